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
    planes,
    poisoned,
    representable,
    run,
)
from tolerances import assert_two_times, tolerance, ulp

from fused_resnet.backends.cuda import training
from fused_resnet.ops.bn_act import kept_for_bn_act

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


class BnAct(torch.autograd.Function):
    """The forward and the backward as the operators of ops/bn_act.py call them."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, act, eps, with_mask):
        mask = None
        if with_mask:
            x, mask = training.ready(x), training.gradient_mask(training.ready(x)).fill_(255)
            mean, var = training.merged_statistics(x, *training.moments(x))
            y = training.normalise_act(x, mean, var, weight, bias, residual, eps, act, mask)
        else:
            y, mean, var = training.bn_act(x, weight, bias, residual, eps, act)
        kept_residual, kept = (None, None) if with_mask else kept_for_bn_act(act, residual, y)
        ctx.save_for_backward(x, kept, weight, bias, kept_residual, mean, var, mask)
        ctx.act, ctx.eps, ctx.residual = act, eps, residual is not None
        return y

    @staticmethod
    def backward(ctx, grad):
        *saved, mask = ctx.saved_tensors
        needs = (True, True, True, ctx.residual)
        found = training.bn_act_backward(grad, *saved, ctx.eps, ctx.act, needs, mask)
        return *(f if n else None for f, n in zip(found, ctx.needs_input_grad[:4], strict=True)), None, None, None


def bn_act(x, weight=None, bias=None, residual=None, *, act, eps=1e-5, with_mask=False):
    return BnAct.apply(x, weight, bias, residual, act, eps, with_mask)


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


def problem(shape, dtype=torch.float32, residual=True):
    c = shape[1]
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype), "weight": torch.rand(c) + 0.5, "bias": torch.randn(c)}
    tensors |= {"residual": torch.randn(shape).to(dtype)} if residual else {}
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def exact_problem(shape, dtype):
    """Half of a channel's values are mean - 1, the others mean + 1: variance 1, and with eps = 3, 1 / sqrt(4)."""
    n, c, h, w = shape
    signs = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
    x = torch.stack([signs[torch.randperm(len(signs))] for _ in range(c)]).view(c, n, h, w).transpose(0, 1)
    return {
        "x": (x + integers(c, low=-4, high=4).view(-1, 1, 1)).to(DEVICE, dtype),
        "weight": (2.0 ** integers(c, low=0, high=2)).to(DEVICE),
        "bias": integers(c, low=-4, high=4).to(DEVICE),
        "residual": integers(*shape, low=-4, high=4, dtype=dtype).to(DEVICE),
    }


exact_shapes = pytest.mark.parametrize(
    "shape", [(2, 1, 4, 4), (2, 5, 1, 1), (4, 17, 4, 2), (2, 64, 8, 8), (8, 20, 16, 8)], ids=str
)


@dtypes()
@exact_shapes
def test_cuda_bn_act_exact(shape, dtype):
    tensors = exact_problem(shape, dtype)
    for act in EXACT_ACTS:
        truth, _ = run(eager_bn_act, tensors, None, torch.float64, act=act, eps=3.0)
        for with_mask in (False, True):
            y = bn_act(**tensors, act=act, eps=3.0, with_mask=with_mask)
            assert torch.equal(y, representable(truth, dtype)), act


@exact_shapes
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_cuda_bn_act_exact_gradients(residual, with_mask, shape):
    tensors = exact_problem(shape, torch.float32)
    if not residual:
        del tensors["residual"]
    pre, _ = run(eager_bn_act, tensors, None, torch.float64, act="none", eps=3.0)
    grad = integers(*shape, low=-2, high=2).to(DEVICE) * (pre != 0) * (pre != 6)
    for act in EXACT_ACTS:
        _, truth = run(eager_bn_act, tensors, grad, torch.float64, act=act, eps=3.0)
        _, found = run(bn_act, tensors, grad, act=act, eps=3.0, with_mask=with_mask)
        for name, gradient in found.items():
            assert torch.equal(gradient, representable(truth[name], tensors[name].dtype)), (act, name)


@dtypes()
@pytest.mark.parametrize(
    "shape", [s for n, s in SHAPES.items() if n != "two_values"], ids=[n for n in SHAPES if n != "two_values"]
)
def test_cuda_bn_act_two_times(shape, dtype):
    compare_with_eager(bn_act, eager_bn_act, problem(shape, dtype), "relu")


@dtypes()
@acts
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("channels", [17, 16])
def test_cuda_bn_act_every_act(channels, residual, act, dtype):
    tensors = problem((3, channels, 5, 3), dtype, residual)
    compare_with_eager(bn_act, eager_bn_act, tensors, act)
    plain = tensors | {"weight": None, "bias": None}
    compare_with_eager(bn_act, eager_bn_act, plain, act)
    if act in EXACT_ACTS:
        compare_with_eager(bn_act, eager_bn_act, tensors, act, fused_options={"with_mask": True})


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
def test_cuda_bn_act_strides(layout):
    tensors = problem(PLANES["sixty_four"])
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual")}
    compare_with_eager(bn_act, eager_bn_act, tensors, "relu", layout)


def test_cuda_bn_act_of_an_address_that_is_not_aligned():
    x = torch.randn(2 * 8 * 5 * 5 + 1, device=DEVICE)[1:].view(2, 5, 5, 8).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16
    weight = torch.randn(9, device=DEVICE)[1:]
    y, _, _ = training.bn_act(x, weight, None, None, 1e-5, "relu")
    assert torch.equal(y, training.bn_act(x.clone(), weight.clone(), None, None, 1e-5, "relu")[0])


# --- statistics ---


@dtypes()
@shapes
def test_cuda_statistics_two_times(shape, dtype):
    x = (torch.randn(shape) * 3 - 2).to(DEVICE, dtype)
    eager = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    x = training.ready(x)
    mean, var = training.merged_statistics(x, *training.moments(x))
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
    y, mean, var = training.finish_bn_act(x, partials, rows, None, None, None, 1e-5, "relu")
    assert_two_times(mean, eager[1], truth[1], "mean")
    assert_two_times(var, eager[0], truth[0], "variance")
    assert_two_times(y, eager_bn_act(x, act="relu"), eager_bn_act(x.double(), act="relu"))


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6], ids="{:.0e}".format)
def test_cuda_bn_cancellation(ratio):
    x = (torch.randn(4, 17, 19, 7) + ratio * torch.linspace(-1, 1, 17).view(-1, 1, 1)).to(DEVICE)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    y, mean, var = training.bn_act(x, None, None, None, 1e-5, "none")
    allowed = tolerance("cancellation") * ulp(torch.float32, ratio)
    assert (mean - truth[1]).abs().max() <= allowed
    assert (var / truth[0] - 1).abs().max() <= allowed
    normal = eager_bn_act(x.double(), act="none")
    assert (y - normal).abs().max() <= allowed * normal.abs().max()


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 1e6, 6e30, 3e38, -3.4e38], ids=str)
@pytest.mark.parametrize("channels", [5, 8])
def test_cuda_bn_constant_channels(channels, constant):
    x = torch.full((3, channels, 7, 3), constant, device=DEVICE)
    y, mean, var = training.bn_act(x, None, None, None, 1e-5, "none")
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
    y, mean, var = training.bn_act(x, None, None, None, 1e-5, "none")
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
    clean = training.bn_act(x.to(DEVICE), None, None, None, 1e-5, "relu")
    pixels = {"first": [(0, 0, 0)], "last": [(3, 8, 8)], "everywhere": [(0, 0, 0), (1, 3, 5), (3, 8, 8)]}[where]
    inf, nan = float("inf"), float("nan")
    for n, h, w in pixels:
        x[n, :4, h, w] = torch.tensor([inf, -inf, inf, nan]).to(dtype)
    x[2, 2, 2, 2] = -inf
    y, mean, var = training.bn_act(x.to(DEVICE), None, None, None, 1e-5, "relu")
    assert torch.equal(mean[:2], torch.tensor([inf, -inf], device=DEVICE))
    assert mean[2:4].isnan().all()
    assert var[:4].isnan().all()
    assert y[:, :4].isnan().all()
    for found, wanted in zip((y, mean, var), clean, strict=True):
        channel = 1 if found.dim() == 4 else 0
        assert torch.equal(found.narrow(channel, 4, channels - 4), wanted.narrow(channel, 4, channels - 4))


def test_cuda_bn_gradient_passes_nan():
    x = torch.randn(2, 8, 5, 5)
    x[0, 1, 2, 3] = float("nan")
    grad = torch.randn(x.shape)
    for act in ("relu", "relu6"):
        for with_mask in (False, True):
            inputs = {"x": x.to(DEVICE), "residual": torch.randn(x.shape).to(DEVICE)}
            _, found = run(bn_act, inputs, grad.to(DEVICE), act=act, with_mask=with_mask)
            _, truth = run(eager_bn_act, inputs, grad.to(DEVICE), act=act)
            for name in inputs:
                assert torch.equal(found[name].isnan(), truth[name].isnan())
            assert torch.equal(found["residual"][0, 1], grad.to(DEVICE)[0, 1])  # the whole channel is NaN


# --- determinism ---


def everything(x, weight, bias, residual, grad):
    found = []
    for act in ACTS:
        y, mean, var = training.bn_act(x, weight, bias, residual, 1e-5, act)
        found += [y, mean, var]
        found += training.bn_act_backward(
            grad, x, y, weight, bias, residual, mean, var, 1e-5, act, (True, True, True, act == "silu")
        )
        found += [training.scale_act(x, weight, bias, residual, act)]
    return found


@pytest.mark.parametrize("shape", ["tiles", "odd_channel_tiles"])
@dtypes(torch.float32, torch.bfloat16)
def test_cuda_bn_act_is_deterministic(shape, dtype, monkeypatch):
    tensors = [*problem(SHAPES[shape], dtype).values(), torch.randn(SHAPES[shape]).to(DEVICE, dtype)]
    first = everything(*tensors)
    monkeypatch.setenv("FUSED_RESNET_EMULATOR_ORDER", "1")
    for found, again in zip(first, everything(*tensors), strict=True):
        assert torch.equal(found, again)


# --- schemas ---


def test_cuda_bn_act_schemas():
    x, weight, bias, residual = (t.detach() for t in problem((2, 16, 5, 3)).values())
    x, residual = training.ready(x), training.ready(residual)
    rows = training.tile_rows(x)
    y, dresidual = torch.empty_like(x), torch.empty_like(x)
    vectors = [torch.empty(16, device=DEVICE) for _ in range(6)]
    mean, var, *rest = vectors
    three, two = (torch.empty(-(-30 // rows), n, 16, device=DEVICE) for n in (3, 2))
    mask = training.gradient_mask(x)

    def check(op, *args):
        torch.library.opcheck(op.default, args, test_utils="test_schema")
        op(*args)

    check(ops.cuda_bn_stats, x, rows, three)
    check(ops.cuda_bn_finalize, three, 30, rows, mean, var)
    check(ops.cuda_bn_apply, x, mean, var, weight, bias, residual, 1e-5, 1, y, mask)
    source = (y, mask, residual, weight, bias, mean, var)
    check(ops.cuda_bn_reduce, residual, x, *source, 1e-5, 1, rows, two, dresidual)
    check(ops.cuda_bn_reduce_finalize, two, 30, var, 1e-5, *rest)
    check(ops.cuda_bn_input_grad, residual, x, *source, *rest[2:], 1e-5, 1, y)
    check(ops.cuda_scale_act, x, weight, bias, None, 4, y)
    with pytest.raises(RuntimeError, match="mask"):
        ops.cuda_bn_apply(x, mean, var, None, None, None, 1e-5, 4, y, mask)
    with pytest.raises(RuntimeError, match="partials"):
        ops.cuda_bn_stats(x, 1, three)
