"""conv_bn_act: training and inference against eager, gradients, statistics and layouts."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    BACKEND_NAMES,
    CONV_CASES,
    EXACT_ACTS,
    LAYOUTS,
    ConvCase,
    acts,
    backends,
    cases,
    compare_with_eager,
    dtypes,
    eager_conv_bn_act,
    finish,
    integers,
    layouts,
    poisoned,
    representable,
    require,
    run,
)
from tolerances import assert_two_times

from fused_resnet.backends import backend_report, cpu
from fused_resnet.ops import conv_bn_act

poison = pytest.fixture(autouse=True)(poisoned)

BY_ID = {case.id: case for case in CONV_CASES}
SQUARE = BY_ID["3x3_residual"]
# One value a channel has no variance. One channel has gradients that are single numbers, which eager may hit by luck:
# test_bn_act_exact_gradients has it.
TRAINING_CASES = [case for case in CONV_CASES if case.id not in ("1x1_one_pixel", "3x3_valid", "1x1_to_one_channel")]


def training(
    x, weight, bn_weight=None, bn_bias=None, conv_bias=None, residual=None, *, running=(None, None), **options
):
    return conv_bn_act(
        x, weight, bn_weight, bn_bias, *running, conv_bias=conv_bias, residual=residual, training=True, **options
    )


def problem(case, dtype=torch.float32, conv_bias=False):
    weight = torch.randn(case.weight) / (case.weight[1] * case.kernel[0] * case.kernel[1]) ** 0.5
    k = case.out_channels
    tensors = {
        "x": torch.randn(case.x).to(dtype),
        "weight": weight.to(dtype),
        "bn_weight": torch.rand(k) + 0.5,
        "bn_bias": torch.randn(k),
    }
    if conv_bias:
        tensors["conv_bias"] = torch.randn(k).to(dtype)
    if case.residual:
        shape = F.conv2d(tensors["x"], tensors["weight"], **case.geometry).shape
        tensors["residual"] = torch.randn(shape).to(dtype)
    return tensors


@backends
@dtypes()
@cases(TRAINING_CASES)
def test_conv_bn_act_training_two_times(case, dtype, backend):
    tensors = problem(case, dtype)
    require(backend, "conv_bn_act", tensors["x"], tensors["weight"], **case.geometry)
    compare_with_eager(
        training, eager_conv_bn_act, tensors, case.act, fused_options={"backend": backend}, **case.geometry
    )


@pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason=backend_report()["cpu"] or "available")
@dtypes(torch.float32, torch.bfloat16)
@cases(TRAINING_CASES)
def test_conv_bn_act_training_two_times_in_the_engine(case, dtype, monkeypatch):
    """Training leaves small maps to aten: here they run, forward and input gradient, in csrc/cpu's convolution."""
    monkeypatch.setattr(cpu.training, "_engine_pays", lambda size, dtype, args: cpu.engine_takes(dtype, args))
    tensors = problem(case, dtype)
    require("cpu", "conv_bn_act", tensors["x"], tensors["weight"], **case.geometry)
    compare_with_eager(
        training, eager_conv_bn_act, tensors, case.act, fused_options={"backend": "cpu"}, **case.geometry
    )


@pytest.mark.skipif("cpu" not in BACKEND_NAMES, reason=backend_report()["cpu"] or "available")
def test_conv_bn_act_training_in_the_engine_at_full_size():
    """A map of more than 4 MB, and no patch."""
    tensors = problem(ConvCase("", (3, 32, 120, 120), 32, (3, 3), padding=1, residual=True))
    compare_with_eager(training, eager_conv_bn_act, tensors, "relu", fused_options={"backend": "cpu"}, padding=1)


@backends
@dtypes()
@acts
def test_conv_bn_act_training_two_times_every_act(act, dtype, backend):
    tensors = problem(SQUARE, dtype)
    require(backend, "conv_bn_act", tensors["x"], tensors["weight"], padding=1)
    compare_with_eager(training, eager_conv_bn_act, tensors, act, fused_options={"backend": backend}, padding=1)


@backends
@dtypes(torch.float32, torch.bfloat16)
def test_conv_bn_act_exact(dtype, backend):
    """A 1x1 convolution that permutes the channels of values mean - 1 and mean + 1: variance 1, eps = 3."""
    signs = torch.tensor([-1.0, 1.0]).repeat(64)
    x = torch.stack([signs[torch.randperm(128)] for _ in range(17)]).view(17, 2, 8, 8).transpose(0, 1)
    x = (x + integers(17, low=-4, high=4).view(-1, 1, 1)).to(dtype)
    weight = torch.eye(17)[torch.randperm(17)].view(17, 17, 1, 1).to(dtype)
    require(backend, "conv_bn_act", x, weight)
    tensors = {
        "x": x,
        "weight": weight,
        "bn_weight": 2.0 ** integers(17, low=0, high=2),
        "bn_bias": integers(17, low=-4, high=4),
        "residual": integers(*x.shape, low=-4, high=4, dtype=dtype),
    }
    for act in EXACT_ACTS:
        truth, _ = run(eager_conv_bn_act, tensors, None, torch.float64, act=act, eps=3.0)
        assert torch.equal(training(**tensors, act=act, eps=3.0, backend=backend), representable(truth, dtype)), act


@backends
@layouts
def test_conv_bn_act_strides(layout, backend):
    """reliability.md, strides."""
    tensors = problem(SQUARE)
    require(backend, "conv_bn_act", tensors["x"], tensors["weight"], padding=1)
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "weight", "residual")}
    compare_with_eager(training, eager_conv_bn_act, tensors, "silu", layout, {"backend": backend}, padding=1)


@backends
@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("conv_bias", [False, True], ids=["", "conv_bias"])
def test_conv_bn_act_running_statistics(conv_bias, dtype, backend):
    tensors = problem(SQUARE, dtype, conv_bias)
    require(backend, "conv_bn_act", tensors["x"], tensors["weight"], padding=1)
    truth = torch.zeros(64).double(), torch.ones(64).double()
    found, eager = ((torch.zeros(64), torch.ones(64)) for _ in range(2))
    training(**tensors, running=found, momentum=0.3, padding=1, backend=backend)
    for running in (truth, eager):
        wide = torch.float64 if running is truth else dtype
        z = F.conv2d(*[t.to(wide) for name, t in tensors.items() if name in ("x", "weight")], padding=1)
        z = z + tensors["conv_bias"].to(wide).view(-1, 1, 1) if conv_bias else z
        F.batch_norm(z, *running, None, None, True, 0.3)
    for name, *values in zip(("running_mean", "running_var"), found, eager, truth, strict=True):
        # A sum over every pixel of convolutions that are themselves in the low precision.
        low = [value.to(dtype) if dtype == torch.bfloat16 else value for value in values[:2]]
        assert_two_times(*low, values[2], name, "floor_ulps_moments")


@backends
@dtypes()
@cases()
def test_conv_bn_act_inference_two_times(case, dtype, backend):
    """Folded, against convolution and batch norm one after the other."""
    tensors = problem(case, dtype, conv_bias=True)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], **case.geometry)
    mean, var = torch.randn(case.out_channels), torch.rand(case.out_channels) * 4 + 0.1

    def fused(x, weight, bn_weight, bn_bias, *, conv_bias, residual=None, **options):
        return conv_bn_act(x, weight, bn_weight, bn_bias, mean, var, conv_bias=conv_bias, residual=residual, **options)

    def eager(x, weight, bn_weight, bn_bias, *, conv_bias, residual=None, act, **geometry):
        z = F.conv2d(x, weight, conv_bias, **geometry)
        y = F.batch_norm(z, mean.to(bn_bias.dtype), var.to(bn_bias.dtype), bn_weight, bn_bias)
        return finish(y, residual, act)

    compare_with_eager(fused, eager, tensors, case.act, fused_options={"backend": backend}, **case.geometry)


@backends
@dtypes(torch.float32, torch.bfloat16, torch.float16)
def test_conv_bn_act_folding_in_low_precision(dtype, backend):
    """reliability.md, folding: variances from 1e-8 to 1e8 stay out of the weight's range (p120545)."""
    tensors = problem(SQUARE, dtype)
    require(backend, "conv_scale_act", tensors["x"], tensors["weight"], padding=1)
    var = 10.0 ** torch.linspace(-8, 8, 64)
    tensors["x"] = LAYOUTS["channels_last"](tensors["x"])  # the layout of eager's convolution decides on its precision
    # Each output channel is as large as its statistics say, within what the dtype can hold.
    size = var.sqrt().clamp(2.0**-8, 2.0**8).view(-1, 1, 1, 1)
    tensors["weight"] = (tensors["weight"].float() * size).to(dtype)
    tensors["bn_weight"] = tensors["bn_weight"] * var.sqrt() / size.flatten()

    def folded(x, weight, bn_weight, bn_bias, residual):
        running = torch.zeros_like(bn_weight), var.to(bn_weight.dtype)
        return F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), *running, bn_weight, bn_bias, eps=1e-12) + residual)

    truth = folded(**{name: t.double() for name, t in tensors.items()})
    named = {name: tensors[name] for name in ("x", "weight", "bn_weight", "bn_bias")}
    out = conv_bn_act(
        **named, running_mean=torch.zeros(64), running_var=var, residual=tensors["residual"], padding=1, eps=1e-12,
        backend=backend,
    )  # fmt: skip
    assert_two_times(out, folded(**tensors), truth)


@acts
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
def test_conv_bn_act_gradcheck(inference, act):
    sizes = ((2, 4, 3, 4), (4, 2, 3, 3), (4,), (4,), (4,), (2, 4, 2, 2))
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    running = (torch.randn(4).double(), torch.rand(4).double() + 0.5) if inference else (None, None)

    def call(*args):
        x, weight, bn_weight, bn_bias, conv_bias, residual = args
        return conv_bn_act(
            x, weight, bn_weight, bn_bias, *running, conv_bias=conv_bias, residual=residual, stride=2, padding=1,
            groups=2, act=act, training=not inference,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
