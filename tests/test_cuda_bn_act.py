"""Batch norm, residual and activation by the kernels of csrc/cuda: on a GPU, or thread by thread on the CPU."""

import pytest
import torch
from cuda_kernels import DEVICE, SHAPES, library
from problems import (
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    compare_with_eager,
    dtypes,
    eager_bn_act,
    integers,
    on_cpu,
    poisoned,
    representable,
    run,
    smooth_gradient,
)
from tolerances import assert_two_times

from fused_resnet.backends.cuda import training
from fused_resnet.backends.norm import Norm

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

ops = torch.ops.fused_resnet_C

# Where the backward tells a slope from; the others compute the pre-activation again.
SLOPES = ("again", "output", "mask")


class NormAct(torch.autograd.Function):
    """The passes as an operator calls them; with `written` the second one of the backward starts from the first's g."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, residual_weight, residual_bias, act, eps, normed, slope, written):
        norm, residual_norm = Norm(*training.moments(x), weight, bias, eps), None
        if normed:
            residual_norm = Norm(*training.moments(residual), residual_weight, residual_bias, eps)
        y, mask = training.norm_act(x, norm, residual, residual_norm, act)
        assert (mask is None) == (residual is None or act not in training.CLAMPS)
        told = {"again": (None, None), "output": (y, None), "mask": (None, mask)}[slope]
        ctx.source, ctx.written = (x, norm, residual, residual_norm, act, *told), written
        return y

    @staticmethod
    def backward(ctx, grad):
        x, _, residual, residual_norm, *_ = ctx.source
        written = ctx.written or (residual is not None and residual_norm is None)
        g, *sums = training.norm_act_reduce(grad, *ctx.source, written)
        assert (g is None) == (not written)
        count = float(x.numel() // x.shape[1])
        if ctx.written and residual_norm is None:
            source = (g, x, ctx.source[1], None, None, "none", None, None)
        else:
            source = (grad, *ctx.source)
        d_x, d_residual = training.norm_act_input_grad(*source, *sums, count)
        assert (d_residual is None) == (sums[2] is None) == (residual_norm is None)
        found = d_x, *sums[:2], g if residual_norm is None else d_residual, sums[2], sums[1]
        return *(f if n else None for f, n in zip(found, ctx.needs_input_grad[:6], strict=True)), *[None] * 5


def norm_act(
    x,
    weight=None,
    bias=None,
    residual=None,
    residual_weight=None,
    residual_bias=None,
    *,
    act,
    eps=1e-5,
    normed=False,
    slope="again",
    written=True,
):
    return NormAct.apply(
        x, weight, bias, residual, residual_weight, residual_bias, act, eps, normed, slope, written
    )  # fmt: skip


def eager_norm_act(
    x, weight=None, bias=None, residual=None, residual_weight=None, residual_bias=None, *, act, eps=1e-5, normed=False
):
    if normed:
        residual = torch.batch_norm(residual, residual_weight, residual_bias, None, None, True, 0.0, eps, False)
    return eager_bn_act(x, weight, bias, residual, act=act, eps=eps)


def problem(shape, dtype=torch.float32, residual="added"):
    c = shape[1]
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype), "weight": torch.rand(c) + 0.5, "bias": torch.randn(c)}
    if residual != "none":
        tensors |= {
            "residual": (torch.randn(shape) * 3 - 2).to(dtype) if residual == "normed" else torch.randn(shape).to(dtype)
        }
    if residual == "normed":
        tensors |= {"residual_weight": torch.rand(c) + 0.5, "residual_bias": torch.randn(c)}
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def signs(shape, dtype):
    """Half of a channel's values are mean - 1, the others mean + 1: variance 1, and with eps = 3, 1 / sqrt(4)."""
    n, c, h, w = shape
    both = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
    x = torch.stack([both[torch.randperm(len(both))] for _ in range(c)]).view(c, n, h, w).transpose(0, 1)
    return (x + integers(c, low=-4, high=4).view(-1, 1, 1)).to(DEVICE, dtype)


def exact_problem(shape, dtype, residual="added"):
    c = shape[1]
    vectors = [((2.0 ** integers(c, low=0, high=2)).to(DEVICE), integers(c, low=-4, high=4).to(DEVICE)) for _ in "xr"]
    tensors = {"x": signs(shape, dtype), "weight": vectors[0][0], "bias": vectors[0][1]}
    if residual == "added":
        tensors |= {"residual": integers(*shape, low=-4, high=4, dtype=dtype).to(DEVICE)}
    if residual == "normed":
        tensors |= {"residual": signs(shape, dtype), "residual_weight": vectors[1][0], "residual_bias": vectors[1][1]}
    return tensors


exact_shapes = pytest.mark.parametrize(
    "shape", [(2, 1, 4, 4), (2, 5, 1, 1), (4, 17, 4, 2), (2, 64, 8, 8), (8, 20, 16, 8)], ids=str
)
residuals = pytest.mark.parametrize("residual", ["none", "added", "normed"])


def slopes_of(act, residual):
    """Those that an activation can be told from; a mask is written only where there is a residual."""
    if act not in training.CLAMPS:
        return SLOPES[:1]
    return SLOPES[:2] if residual == "none" else SLOPES


@dtypes()
@exact_shapes
@residuals
def test_cuda_norm_act_exact(residual, shape, dtype):
    tensors = exact_problem(shape, dtype, residual)
    for act in EXACT_ACTS:
        options = {"act": act, "eps": 3.0, "normed": residual == "normed"}
        truth, _ = run(eager_norm_act, tensors, None, torch.float64, **options)
        assert torch.equal(norm_act(**tensors, **options), representable(truth, dtype)), act


@exact_shapes
@residuals
@pytest.mark.parametrize("written", [False, True], ids=["", "written"])
def test_cuda_norm_act_exact_gradients(written, residual, shape):
    tensors = exact_problem(shape, torch.float32, residual)
    options = {"eps": 3.0, "normed": residual == "normed"}
    pre, _ = run(eager_norm_act, tensors, None, torch.float64, act="none", **options)
    grad = integers(*shape, low=-2, high=2).to(DEVICE) * (pre != 0) * (pre != 6)
    for act in EXACT_ACTS:
        _, truth = run(eager_norm_act, tensors, grad, torch.float64, act=act, **options)
        for slope in slopes_of(act, residual):
            _, found = run(norm_act, tensors, grad, act=act, slope=slope, written=written, **options)
            for name, gradient in found.items():
                assert torch.equal(gradient, representable(truth[name], tensors[name].dtype)), (act, slope, name)


# Two values a channel leave nothing of batch norm's gradient, and one channel's own sum may cancel to as little.
FEW = {"added": ("two_values",), "normed": ("two_values", "one_channel")}


@dtypes()
@pytest.mark.parametrize(
    ("residual", "shape"), [(kind, name) for kind, few in FEW.items() for name in SHAPES if name not in few]
)
def test_cuda_norm_act_two_times(residual, shape, dtype):
    tensors, normed = problem(SHAPES[shape], dtype, residual), residual == "normed"
    compare_with_eager(norm_act, eager_norm_act, tensors, "relu", normed=normed)


@dtypes()
@acts
@residuals
@pytest.mark.parametrize("channels", [17, 16])
def test_cuda_norm_act_every_act(channels, residual, act, dtype):
    tensors, normed = problem((3, channels, 5, 3), dtype, residual), residual == "normed"
    for slope, written in (("again", True), *((slope, False) for slope in slopes_of(act, residual))):
        fused_options = {"slope": slope, "written": written}
        compare_with_eager(norm_act, eager_norm_act, tensors, act, fused_options=fused_options, normed=normed)
    plain = {name: t if t.dim() == 4 else None for name, t in tensors.items()}
    compare_with_eager(norm_act, eager_norm_act, plain, act, normed=normed)


@dtypes()
@pytest.mark.parametrize("act", training.CLAMPS)
@pytest.mark.parametrize("residual", ["added", "normed"])
@pytest.mark.parametrize("channels", [13, 24])
def test_cuda_norm_act_backward_finds_the_forward_s_pieces(channels, residual, act, dtype):
    """To the bit, wherever the slope is told from: of 16 bits many an output is rounded to 6."""
    x, weight, bias, residual, *rest = problem((4, channels, 31, 17), dtype, residual).values()
    norm = Norm(*training.moments(x), weight * 3, bias + 3, 1e-5)
    residual_norm = Norm(*training.moments(residual), *rest, 1e-5) if rest else None
    source = (x, norm, residual, residual_norm, act)
    y, mask = training.norm_act(*source)
    ones = torch.ones_like(x)
    plain = (y > 0) & (y < 6) if act == "relu6" else y > 0
    assert 0 < plain.sum() < plain.numel()
    for told in ((None, None), (y, None), (None, mask)):
        g, *_ = training.norm_act_reduce(ones, *source, *told, True)
        assert torch.equal(g, plain.to(dtype))


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("residual", ["none", "normed"])
def test_cuda_norm_act_of_a_batch_in_parts(residual, dtype):
    """As with SyncBatchNorm: each part is given the whole batch's moments, sums and count."""
    tensors, normed = problem((6, 24, 7, 5), dtype, residual), residual == "normed"
    grad = smooth_gradient(eager_norm_act, tensors, "silu", normed=normed)
    x, weight, bias, *others = tensors.values()
    images = [x, *others[:1]]
    norms = [Norm(*training.moments(x), weight, bias, 1e-5)]
    norms += [Norm(*training.moments(others[0]), *others[1:], 1e-5)] if normed else []

    def source(part):
        first, *second = (t[part] for t in images)
        return (first, norms[0], *(second or (None,)), *(norms[1:] or (None,)), "silu", None, None)

    parts = [slice(0, 2), slice(2, 6)]
    reduced = [training.norm_act_reduce(grad[part], *source(part), False)[1:] for part in parts]
    sums = [None if a is None else a + b for a, b in zip(*reduced, strict=True)]
    found = [training.norm_act_input_grad(grad[part], *source(part), *sums, 6 * 7 * 5.0) for part in parts]
    _, truth = run(eager_norm_act, on_cpu(tensors), grad.cpu(), torch.float64, act="silu", normed=normed)
    _, eager = run(eager_norm_act, tensors, grad, act="silu", normed=normed)
    for name, of_parts in zip(("x", "residual") if normed else ("x",), zip(*found, strict=True), strict=False):
        whole = torch.cat(of_parts).cpu()
        assert_two_times(whole, eager[name].cpu(), truth[name], f"gradient of {name}", "floor_ulps_gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_norm_act_strides(layout):
    for residual in ("added", "normed"):
        tensors = problem(PLANES["sixty_four"], residual=residual)
        tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual")}
        compare_with_eager(norm_act, eager_norm_act, tensors, "relu", layout, normed=residual == "normed")


def test_cuda_norm_act_of_an_address_that_is_not_aligned():
    x = torch.randn(2 * 8 * 5 * 5 + 1, device=DEVICE)[1:].view(2, 5, 5, 8).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16
    weight = torch.randn(9, device=DEVICE)[1:]
    y = norm_act(x, weight, weight, x, weight, act="relu", normed=True)
    copy, of_weight = x.clone(), weight.clone()
    assert torch.equal(y, norm_act(copy, of_weight, of_weight, copy, of_weight, act="relu", normed=True))


@pytest.mark.parametrize("residual", ["added", "normed"])
@pytest.mark.parametrize("slope", SLOPES)
def test_cuda_norm_act_gradient_passes_nan(slope, residual):
    """And of a residual's channel that is NaN no other channel knows."""
    x = torch.randn(2, 8, 5, 5)
    x[0, 1, 2, 3] = float("nan")
    grad = torch.randn(x.shape).to(DEVICE)
    inputs = {"x": x.to(DEVICE), "residual": torch.randn(x.shape).to(DEVICE)}
    options = {"normed": residual == "normed"}
    if residual == "normed":
        inputs["residual"][1, 3, 0, 0] = float("nan")
    for act in training.CLAMPS:
        _, found = run(norm_act, inputs, grad, act=act, slope=slope, **options)
        _, truth = run(eager_norm_act, inputs, grad, act=act, **options)
        for name in inputs:
            assert torch.equal(found[name].isnan(), truth[name].isnan())
        if residual == "added":
            assert torch.equal(found["residual"][0, 1], grad[0, 1])  # the whole channel is NaN


# --- determinism ---


def everything(x, weight, bias, residual, residual_weight, residual_bias, grad):
    found, count = [], float(x.numel() // x.shape[1])
    norm = Norm(*training.moments(x), weight, bias, 1e-5)
    other = Norm(*training.moments(residual), residual_weight, residual_bias, 1e-5)
    found += [*norm[:2], training.scale_act(x, weight, bias, residual, "silu")]
    for act, residual_norm in (("none", other), ("relu6", None), ("relu", other), ("silu", None), ("silu", other)):
        source = (x, norm, residual, residual_norm, act)
        y, mask = training.norm_act(*source)
        g, *sums = training.norm_act_reduce(grad, *source, None, mask, act == "silu")
        found += [y, mask, g, *sums, *training.norm_act_input_grad(grad, *source, None, mask, *sums, count)]
    return [t for t in found if t is not None]


@pytest.mark.parametrize("shape", ["tiles", "odd_channel_tiles"])
@dtypes(torch.float32, torch.bfloat16)
def test_cuda_norm_act_is_deterministic(shape, dtype, monkeypatch):
    tensors = [*problem(SHAPES[shape], dtype, "normed").values(), torch.randn(SHAPES[shape]).to(DEVICE, dtype)]
    first = everything(*tensors)
    monkeypatch.setenv("FUSED_RESNET_EMULATOR_ORDER", "1")
    for found, again in zip(first, everything(*tensors), strict=True):
        assert torch.equal(found, again)


# --- schemas ---


def test_cuda_norm_act_schemas():
    x, weight, bias, residual = (t.detach() for t in problem((2, 16, 5, 3)).values())
    x, residual = training.ready(x), training.ready(residual)
    rows = training.tile_rows(x)
    y, dx, g = (torch.empty_like(x) for _ in range(3))
    mean, var, other_var, *rest = (torch.empty(16, device=DEVICE) for _ in range(6))
    statistics, sums = (torch.empty(-(-30 // rows), 3, 16, device=DEVICE) for _ in range(2))
    mask = torch.empty(x.numel() // 4, dtype=torch.uint8, device=DEVICE)

    def check(op, *args):
        torch.library.opcheck(op.default, args, test_utils="test_schema")
        op(*args)

    check(ops.cuda_bn_stats, x, rows, statistics)
    check(ops.cuda_bn_finalize, statistics, 30, rows, mean, var)
    check(ops.cuda_bn_finalize, statistics, 30, rows, mean, other_var)
    source = (x, mean, var, weight, bias, 1e-5, residual, mean, other_var, weight, bias, 1e-3, 1)
    check(ops.cuda_bn_apply, *source, y, mask)
    check(ops.cuda_bn_reduce, residual, *source, y, mask, rows, sums, g)
    check(ops.cuda_bn_reduce_finalize, sums, var, 1e-5, other_var, 1e-3, *rest)
    check(ops.cuda_bn_input_grad, residual, *source, y, mask, *rest, 30.0, dx, g)
    check(ops.cuda_scale_act, x, weight, bias, None, 4, y)
    with pytest.raises(RuntimeError, match="mask"):
        ops.cuda_bn_apply(*source[:-1], 4, y, mask)
    with pytest.raises(RuntimeError, match="partials"):
        ops.cuda_bn_stats(x, 1, statistics)
