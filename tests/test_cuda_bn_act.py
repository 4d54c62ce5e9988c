"""Batch norm, scale_act and add_act by the kernels of csrc/cuda: on a GPU, or thread by thread on the CPU."""

import pytest
import torch
from cuda_kernels import DEVICE, library
from problems import (
    ACTS,
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    compare_with_eager,
    dtypes,
    eager_add_act,
    eager_bn_act,
    eager_scale_act,
    integers,
    on_cpu,
    planes,
    poisoned,
    representable,
    run,
    smooth_gradient,
)
from tolerances import assert_two_times, tolerance, ulp

from fused_resnet.backends.cuda import training
from fused_resnet.backends.norm import Norm

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

ops = torch.ops.fused_resnet_C

# Beside those of every operator: several tiles of rows, several of channels, and batches without a map.
SHAPES = PLANES | {
    "tiles": (3, 40, 31, 29),
    "channel_tiles": (2, 528, 5, 3),
    "odd_channel_tiles": (2, 37, 7, 5),
    "many_images": (1500, 8, 1, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


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


class AddAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, act):
        y = training.add_act(x, residual, act)
        ctx.save_for_backward(y, x, residual)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx, grad):
        d_x = training.add_act_backward(grad, *ctx.saved_tensors, ctx.act)
        return d_x, d_x, None


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
    for slope in slopes_of(act, residual):
        for written in (False, True):
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


@dtypes()
@shapes
def test_cuda_scale_act_exact(shape, dtype):
    c = shape[1]
    tensors = {
        "x": integers(*shape, low=-8, high=8, dtype=dtype).to(DEVICE),
        "scale": (2.0 ** integers(c)).to(DEVICE),
        "shift": integers(c, low=-4, high=4).to(DEVICE),
    }
    for residual in (None, integers(*shape, low=-4, high=4, dtype=dtype).to(DEVICE)):
        for act in EXACT_ACTS:
            truth, _ = run(eager_scale_act, tensors | {"residual": residual}, None, torch.float64, act=act)
            found = training.scale_act(*tensors.values(), residual, act)
            assert torch.equal(found, representable(truth, dtype)), act


@dtypes()
@acts
def test_cuda_scale_act_two_times(act, dtype):
    tensors = problem(PLANES["sixty_four"], dtype)
    named = dict(zip(("x", "scale", "shift", "residual"), tensors.values(), strict=True))
    truth, plain = (run(eager_scale_act, named, None, to, act=act)[0] for to in (torch.float64, None))
    assert_two_times(training.scale_act(*tensors.values(), act), plain, truth)


@dtypes()
@acts
@planes()
def test_cuda_add_act_two_times(shape, act, dtype):
    tensors = {name: (torch.randn(shape) * 3).to(DEVICE, dtype) for name in ("x", "residual")}
    compare_with_eager(lambda x, residual, act: AddAct.apply(x, residual, act), eager_add_act, tensors, act)


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


# --- statistics ---


def normalised(x, act="none"):
    mean, var = training.moments(x)
    return training.norm_act(x, Norm(mean, var, None, None, 1e-5), None, None, act)[0], mean, var


@dtypes()
@shapes
def test_cuda_statistics_two_times(shape, dtype):
    x = (torch.randn(shape) * 3 - 2).to(DEVICE, dtype)
    eager = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, var = training.moments(x)
    assert_two_times(mean, eager[1], truth[1], "mean")
    assert_two_times(var, eager[0], truth[0], "variance")


@pytest.mark.parametrize("rows", [1, 7, 128, 100_000])
@pytest.mark.parametrize("channels", [5, 24])
def test_cuda_statistics_of_any_tiles(channels, rows):
    """As a convolution would leave them: tiles of one row, tiles that do not divide the rows, and one tile."""
    x = training.ready((torch.randn(3, channels, 13, 17) + 5).to(DEVICE))
    count = 3 * 13 * 17
    partials = torch.empty(-(-count // rows), 3, channels, device=DEVICE)
    ops.cuda_bn_stats(x, rows, partials)
    eager = torch.var_mean(x, (0, 2, 3), correction=0)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, var = training.merged_moments(x, partials, rows)
    assert_two_times(mean, eager[1], truth[1], "mean")
    assert_two_times(var, eager[0], truth[0], "variance")


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6], ids="{:.0e}".format)
def test_cuda_bn_cancellation(ratio):
    x = (torch.randn(4, 17, 19, 7) + ratio * torch.linspace(-1, 1, 17).view(-1, 1, 1)).to(DEVICE)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    y, mean, var = normalised(x)
    allowed = tolerance("cancellation") * ulp(torch.float32, ratio)
    assert (mean - truth[1]).abs().max() <= allowed
    assert (var / truth[0] - 1).abs().max() <= allowed
    normal = eager_bn_act(x.double(), act="none")
    assert (y - normal).abs().max() <= allowed * normal.abs().max()


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 1e6, 6e30, 3e38, -3.4e38], ids=str)
@pytest.mark.parametrize("channels", [5, 8])
def test_cuda_bn_constant_channels(channels, constant):
    x = torch.full((3, channels, 7, 3), constant, device=DEVICE)
    y, mean, var = normalised(x)
    assert torch.equal(mean, x[0, :, 0, 0])
    assert not var.any()
    assert not y.any()


# Beyond 1.8e19 squares overflow, beyond 1.7e38 differences do, and far below the sums of many.
@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("scale", [1e17, 1e18, 1e25, 1e37])
def test_cuda_bn_large_values(scale, channels, dtype):
    """The mean and the variance are right wherever fp32 has them, and Inf where the variance has none."""
    x = (torch.randn(8, channels, 17, 31) * 3 - 2) * scale
    _check_large(x.to(DEVICE, dtype))


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("value", [3e19, 2e38, 3.3e38])
def test_cuda_bn_large_values_of_both_signs(value, dtype):
    signs = torch.where(torch.rand(3, 8, 9, 9) < 0.5, -1.0, 1.0)
    signs[..., 1] = 1  # so that no mean is zero but for the signs' luck
    _check_large((signs * value).to(DEVICE, dtype))


def _check_large(x):
    variance, truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    aten = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    y, mean, var = normalised(x)
    assert_two_times(mean, aten[1], truth, "mean")
    assert torch.equal(var.isinf(), variance.float().isinf())
    finite = var.isfinite()
    if finite.any():
        assert_two_times(var[finite], aten[0][finite], variance[finite], "variance")
        few = x[:, finite]
        assert_two_times(y[:, finite], eager_bn_act(few, act="none"), eager_bn_act(few.double(), act="none"))
    representable = (x.float() - mean.view(-1, 1, 1)).isfinite()
    assert not y[~finite.view(-1, 1, 1) & representable].any()


@dtypes()
@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
def test_cuda_bn_not_finite(where, channels, dtype):
    """One channel each: +Inf, -Inf, both, NaN; the others know nothing of it."""
    x = torch.randn(4, channels, 9, 9).to(dtype)
    clean = normalised(x.to(DEVICE), "relu")
    pixels = {"first": [(0, 0, 0)], "last": [(3, 8, 8)], "everywhere": [(0, 0, 0), (1, 3, 5), (3, 8, 8)]}[where]
    inf, nan = float("inf"), float("nan")
    for n, h, w in pixels:
        x[n, :4, h, w] = torch.tensor([inf, -inf, inf, nan]).to(dtype)
    x[2, 2, 2, 2] = -inf
    y, mean, var = normalised(x.to(DEVICE), "relu")
    assert torch.equal(mean[:2], torch.tensor([inf, -inf], device=DEVICE))
    assert mean[2:4].isnan().all()
    assert var[:4].isnan().all()
    assert y[:, :4].isnan().all()
    for found, wanted in zip((y, mean, var), clean, strict=True):
        channel = 1 if found.dim() == 4 else 0
        assert torch.equal(found.narrow(channel, 4, channels - 4), wanted.narrow(channel, 4, channels - 4))


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
    for act in ACTS:
        norm = Norm(*training.moments(x), weight, bias, 1e-5)
        other = Norm(*training.moments(residual), residual_weight, residual_bias, 1e-5)
        found += [*norm[:2], training.scale_act(x, weight, bias, residual, act)]
        for residual_norm in (None, other):
            source = (x, norm, residual, residual_norm, act)
            y, mask = training.norm_act(*source)
            g, *sums = training.norm_act_reduce(grad, *source, None, mask, act == "silu")
            found += [y, mask, g, *sums]
            found += training.norm_act_input_grad(grad, *source, None, mask, *sums, count)
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
