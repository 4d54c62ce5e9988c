"""conv_scale_act: exactness, the two-times rule, gradients, layouts, and errors."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACTS,
    CONV_CASES,
    EXACT_ACTS,
    LAYOUTS,
    acts,
    backends,
    cases,
    compare_with_eager,
    dtypes,
    eager_conv_scale_act,
    integers,
    layouts,
    poisoned,
    representable,
    require,
    run,
)
from tolerances import assert_two_times

from fused_resnet.ops import conv_scale_act
from fused_resnet.ops.conv_args import normalise

poison = pytest.fixture(autouse=True)(poisoned)

BY_ID = {case.id: case for case in CONV_CASES}
SQUARE, CHANNELS_17, GROUPED = BY_ID["3x3_residual"], BY_ID["3x3_stride2_odd"], BY_ID["3x3_grouped"]


def problem(case, dtype=torch.float32):
    weight = torch.randn(case.weight) / (case.weight[1] * case.kernel[0] * case.kernel[1]) ** 0.5
    k = case.out_channels
    tensors = {
        "x": torch.randn(case.x).to(dtype),
        "weight": weight.to(dtype),
        "scale": torch.rand(k) * 2 + 0.5,
        "shift": torch.randn(k),
    }
    if case.residual:
        shape = F.conv2d(tensors["x"], tensors["weight"], **case.geometry).shape
        tensors["residual"] = torch.randn(shape).to(dtype)
    return tensors


def integer_problem(case, dtype):
    k = case.out_channels
    tensors = {
        "x": integers(*case.x, dtype=dtype),
        "weight": integers(*case.weight, dtype=dtype),
        "scale": 2.0 ** integers(k),
        "shift": integers(k, low=-4, high=4),
    }
    if case.residual:
        shape = F.conv2d(tensors["x"].double(), tensors["weight"].double(), **case.geometry).shape
        tensors["residual"] = integers(*shape, low=-4, high=4, dtype=dtype)
    return tensors


@backends
@dtypes(torch.float32, torch.bfloat16, torch.float16, torch.float64)
@cases()
def test_conv_scale_act_exact(case, dtype, backend):
    tensors = integer_problem(case, dtype)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    for act in EXACT_ACTS:
        truth, _ = run(eager_conv_scale_act, tensors, None, torch.float64, act=act, **case.geometry)
        out = conv_scale_act(**tensors, **case.geometry, act=act, backend=backend)
        assert torch.equal(out, representable(truth, dtype)), act


@backends
@dtypes(torch.float32, torch.bfloat16)
@cases()
def test_conv_scale_act_exact_gradients(case, dtype, backend):
    tensors = integer_problem(case, dtype)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    act = case.act if case.act in EXACT_ACTS else "relu"
    y, _ = run(eager_conv_scale_act, tensors, None, torch.float64, act="none", **case.geometry)
    grad = integers(*y.shape, dtype=dtype) * (y != 0) * (y != 6)
    # Weight gradients sum over every pixel: keep few enough of them for bf16's 8 bits.
    grad = grad * (torch.rand(y.shape) < 32 / y.numel())
    _, truth = run(eager_conv_scale_act, tensors, grad, torch.float64, act=act, **case.geometry)
    _, found = run(conv_scale_act, tensors, grad, act=act, backend=backend, **case.geometry)
    for name, value in found.items():
        assert torch.equal(value, representable(truth[name], tensors[name].dtype)), name


@backends
@dtypes()
@cases()
def test_conv_scale_act_two_times(case, dtype, backend):
    tensors = problem(case, dtype)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    compare_with_eager(
        conv_scale_act, eager_conv_scale_act, tensors, case.act, fused_options={"backend": backend}, **case.geometry
    )


@backends
@dtypes()
@acts
def test_conv_scale_act_two_times_every_act(act, dtype, backend):
    tensors = problem(SQUARE, dtype)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], padding=1)
    compare_with_eager(
        conv_scale_act, eager_conv_scale_act, tensors, act, fused_options={"backend": backend}, padding=1
    )


@backends
@layouts
@pytest.mark.parametrize("case", [SQUARE, CHANNELS_17], ids=lambda case: case.id)
def test_conv_scale_act_strides(case, layout, backend):
    """reliability.md, strides: inputs, residual, weight and grad_output in every layout."""
    tensors = problem(case)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual", "weight") if name in tensors}
    compare_with_eager(
        conv_scale_act, eager_conv_scale_act, tensors, case.act, layout, {"backend": backend}, **case.geometry
    )


@backends
@layouts
def test_conv_scale_act_returns_channels_last(layout, backend):
    tensors = problem(SQUARE)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], padding=1)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    out = conv_scale_act(**tensors, padding=1, backend=backend)
    _, k, p, q = out.shape
    assert out.stride() == (p * q * k, 1, q * k, k)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_conv_scale_act_gradcheck(act, residual):
    tensors = {
        "x": torch.randn(2, 4, 3, 4),
        "weight": torch.randn(4, 2, 3, 3),
        "scale": torch.rand(4) + 0.5,
        "shift": torch.randn(4),
    }
    if residual:
        tensors["residual"] = torch.randn(2, 4, 2, 2)
    leaves = [t.double().requires_grad_() for t in tensors.values()]

    def function(*args):
        return conv_scale_act(**dict(zip(tensors, args, strict=True)), stride=2, padding=1, groups=2, act=act)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@backends
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(GROUPED, torch.float32), (CHANNELS_17, torch.bfloat16)],
    ids=["grouped_residual", "channels_17_bf16"],
)
def test_conv_scale_act_opcheck(case, dtype, backend):
    tensors = {name: t.requires_grad_() for name, t in problem(case, dtype).items()}
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    _, args = normalise("opcheck", tensors["x"], tensors["weight"], **case.geometry)
    inputs = [tensors.get(name) for name in ("x", "weight", "scale", "shift", "residual")]
    torch.library.opcheck(torch.ops.fused_resnet.conv_scale_act.default, (*inputs, *args, case.act, backend))


@pytest.mark.parametrize("wanted", ["x", "weight", "scale", "shift", "residual"])
@acts
def test_conv_scale_act_one_gradient_at_a_time(wanted, act):
    """A gradient that nobody asked for must not be needed for one that was."""
    tensors = problem(SQUARE)
    y, everything = run(conv_scale_act, tensors, grad := torch.randn(SQUARE.x), padding=1, act=act)
    leaf = tensors[wanted].detach().requires_grad_()
    out = conv_scale_act(**tensors | {wanted: leaf}, padding=1, act=act)
    assert torch.equal(out, y)
    assert torch.equal(torch.autograd.grad(out, leaf, grad)[0], everything[wanted])


@backends
@dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**-17], ids=["10_bits", "17_bits"])
def test_conv_scale_act_folding_in_low_precision(factor, dtype, backend):
    """reliability.md, folding in low precision: neither overflow nor a lost weight (p120545).

    The image is so dark that the scale, which brings it back to size 1, has no fp16: scale and product are fp32.
    """
    tensors = problem(SQUARE, dtype)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], padding=1)
    tensors["x"] = (tensors["x"].float() * factor).to(dtype)
    tensors["scale"] = tensors["scale"] / factor
    truth, _ = run(eager_conv_scale_act, tensors, None, torch.float64, act="relu", padding=1)
    eager, _ = run(eager_conv_scale_act, tensors, None, act="relu", padding=1)
    out = conv_scale_act(**tensors, padding=1, backend=backend)
    assert_two_times(out, eager, truth)


@pytest.mark.parametrize("stride", [1, 2, (2, 1)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "valid"], ids=str)
@pytest.mark.parametrize("dilation", [1, (1, 2)], ids=str)
def test_conv_scale_act_geometry_is_conv2d(stride, padding, dilation):
    x, weight = integers(2, 4, 9, 8), integers(6, 2, 3, 2)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 2}
    for backend in (None, "reference"):
        out = conv_scale_act(x, weight, torch.ones(6), torch.zeros(6), act="none", backend=backend, **geometry)
        assert torch.equal(out, F.conv2d(x, weight, **geometry))
