"""Max pooling by the kernels of csrc/cuda, alone and behind batch norm: on a GPU, or thread by thread on the CPU."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from cuda_kernels import DEVICE, library
from problems import ACTS, LAYOUTS, acts, compare_with_eager, dtypes, eager_bn_act, image, integers, poisoned, run
from tolerances import assert_two_times

from fused_resnet.backends import reference
from fused_resnet.backends.cuda import pooling, training
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import windows

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

ops = torch.ops.fused_resnet_C

# Kernel, stride and padding.
POOLS = {
    "3x3_stride2": ((3, 3), (2, 2), (1, 1)),
    "3x3_stride1": ((3, 3), (1, 1), (1, 1)),
    "3x3_stride4": ((3, 3), (4, 4), (0, 0)),
    "2x2": ((2, 2), (2, 2), (0, 0)),
    "2x2_padded": ((2, 2), (2, 2), (1, 1)),
    "3x5": ((3, 5), (2, 1), (1, 2)),
    "5x5": ((5, 5), (3, 2), (2, 2)),
    "1x1": ((1, 1), (1, 1), (0, 0)),
}
pools = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
SHAPES = [(2, 64, 9, 8), (1, 3, 5, 7), (3, 33, 6, 6), (2, 20, 5, 5), (1, 17, 5, 11), (70, 1, 5, 5), (2, 264, 5, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def sized(x, pool):
    return (*pool, windows(x.shape[2:], *pool))


class MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pool):
        out, argmax = pooling.max_pool2d_argmax(x, *sized(x, pool))
        ctx.save_for_backward(argmax)
        ctx.pool, ctx.size = pool, x.shape[2:]
        return out

    @staticmethod
    def backward(ctx, grad):
        return pooling.max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.pool, ctx.size), None


class NormActMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, act, eps, pool):
        norm = Norm(*training.moments(x), weight, bias, eps)
        out, argmax = pooling.norm_act_max_pool2d(x, norm, act, *sized(x, pool))
        ctx.source = argmax, x, norm, act, *pool
        return out

    @staticmethod
    def backward(ctx, grad):
        d_x, *sums = gradients(grad, *ctx.source)
        return (
            *(f if n else None for f, n in zip((d_x, *sums), ctx.needs_input_grad[:3], strict=True)),
            None,
            None,
            None,
        )


def gradients(grad, argmax, x, norm, act, *pool):
    """Of x, weight and bias, through both passes."""
    source = (grad, argmax, x, norm, act, *pool)
    g, *sums = pooling.norm_act_max_pool2d_reduce(*source)
    assert (g is None) == (act in pooling.FUSED_ACTS)
    return pooling.norm_act_max_pool2d_input_grad(*source, g, *sums, float(x.numel() // x.shape[1])), *sums


def norm_act_max_pool(x, weight, bias, *, act, pool, eps=1e-5):
    return NormActMaxPool.apply(x, weight, bias, act, eps, pool)


def eager_norm_act_max_pool(x, weight, bias, *, act, pool, eps=1e-5):
    return F.max_pool2d(eager_bn_act(x, weight, bias, act=act, eps=eps), *pool)


def assert_same(found, wanted):
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(7, 8, 9), wanted.nan_to_num(7, 8, 9))


@dtypes()
@pools
@shapes
def test_cuda_max_pool_is_aten_s(shape, pool, dtype):
    """Values, and the gradients, which tell which tap was taken: ties, NaN and infinities among them."""
    x = integers(*shape, low=-2, high=2, dtype=dtype)
    nan, inf = float("nan"), float("inf")
    x[0, 0, 1, 1:3], x[-1, -1, :3, :2], x[0, -1, 4, 4] = nan, -inf, inf
    x[-1, 0, 2, :] = nan
    x = LAYOUTS["channels_last"](x).to(DEVICE)
    truth = F.max_pool2d(x, *pool)
    grad = integers(*truth.shape, low=-3, high=3, dtype=dtype).to(DEVICE)
    assert_same(pooling.max_pool2d(x, *sized(x, pool)), truth)
    _, true_grads = run(lambda x: F.max_pool2d(x, *pool), {"x": x}, grad)
    out, grads = run(lambda x: MaxPool.apply(x, pool), {"x": x}, grad)
    assert_same(out, truth)
    assert_same(grads["x"], true_grads["x"])


def test_cuda_max_pool_of_minus_infinity_takes_the_first_tap():
    x = torch.full((1, 8, 4, 4), -float("inf"), device=DEVICE)
    pool = POOLS["3x3_stride2"]
    out, argmax = pooling.max_pool2d_argmax(x, *sized(x, pool))
    assert torch.equal(out, F.max_pool2d(x, *pool))
    assert torch.equal(argmax[0, 0].cpu(), torch.tensor([[4, 3], [1, 0]], dtype=torch.uint8))


def test_cuda_max_pool_large_windows_are_the_reference_s():
    x = image(1, 8, 9, 9).to(DEVICE)
    pool = ((6, 5), (1, 1), (0, 0))
    assert torch.equal(pooling.max_pool2d(x, *sized(x, pool)), F.max_pool2d(x, *pool))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_max_pool_strides(layout):
    x, pool = LAYOUTS[layout](torch.randn(2, 16, 9, 8)).to(DEVICE), POOLS["3x3_stride2"]
    out, grads = run(lambda x: MaxPool.apply(x, pool), {"x": x}, torch.ones(2, 16, 5, 4, device=DEVICE))
    truth, true_grads = run(lambda x: F.max_pool2d(x, *pool), {"x": x}, torch.ones(2, 16, 5, 4, device=DEVICE))
    assert torch.equal(out, truth)
    assert torch.equal(grads["x"], true_grads["x"])


# --- behind batch norm ---


def problem(shape, dtype=torch.float32):
    tensors = {"x": torch.randn(shape).to(dtype), "weight": torch.rand(shape[1]) + 0.5, "bias": torch.randn(shape[1])}
    return {name: t.to(DEVICE) for name, t in tensors.items()}


@dtypes()
@pools
@pytest.mark.parametrize(
    ("act", "shape"), [("none", SHAPES[1]), ("relu", SHAPES[0]), ("relu6", SHAPES[2]), ("silu", SHAPES[2])]
)
def test_cuda_norm_act_max_pool_is_both_after_each_other(act, shape, pool, dtype):
    """To the bit, and so are the taps: what is compared is rounded as it would be in memory."""
    x, weight, bias = problem(shape, dtype).values()
    norm, size = Norm(*training.moments(x), weight, bias, 1e-5), sized(x, pool)
    wanted = pooling.max_pool2d_argmax(training.norm_act(x, norm, None, None, act)[0], *size)
    for found, truth in zip(pooling.norm_act_max_pool2d(x, norm, act, *size), wanted, strict=True):
        assert torch.equal(found, truth)


@dtypes()
@acts
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_cuda_norm_act_max_pool_gradients(shape, act, dtype):
    """As good as those of the two kernels after each other; the gradient between them is one that memory keeps."""
    x, weight, bias = problem(shape, dtype).values()
    norm, count = Norm(*training.moments(x), weight, bias, 1e-5), float(x.numel() // x.shape[1])
    for pool in (POOLS["3x3_stride2"], POOLS["3x5"]):
        out, argmax = pooling.norm_act_max_pool2d(x, norm, act, *sized(x, pool))
        grad = integers(*out.shape, low=-2, high=2, dtype=dtype).to(DEVICE)  # whose sums are exact in every dtype
        found = gradients(grad, argmax, x, norm, act, *pool)
        source = (pooling.max_pool2d_backward(grad, argmax, *pool, x.shape[2:]), x, norm, None, None, act, None, None)
        _, *sums = training.norm_act_reduce(*source, False)
        plain = (training.norm_act_input_grad(*source, *sums, count)[0], *sums)
        tensors = {"x": x, "weight": weight, "bias": bias}
        _, truth = run(eager_bn_act, tensors, source[0], torch.float64, act=act, eps=1e-5)
        for name, one, other in zip(tensors, found, plain[:3], strict=True):
            assert_two_times(one, other, truth[name], f"{name}, {act}", "floor_ulps_gradient")


@pytest.mark.parametrize("pool", ["3x3_stride2", "2x2", "5x5"])
@pytest.mark.parametrize("shape", [(2, 16, 9, 8), (3, 17, 6, 7)], ids=str)
def test_cuda_norm_act_max_pool_two_times(shape, pool):
    for act in ACTS:
        compare_with_eager(norm_act_max_pool, eager_norm_act_max_pool, problem(shape), act, pool=POOLS[pool])


@pytest.mark.parametrize("name", ["", "_reduce", "_input_grad"])
def test_cuda_norm_act_max_pool_large_windows_are_the_reference_s(name, monkeypatch):
    """All three: they have the meaning of argmax and g among themselves."""
    name, given = f"norm_act_max_pool2d{name}", []
    monkeypatch.setattr(reference, name, lambda *args: given.append(args) or "the reference's", raising=False)
    function = getattr(pooling, name)
    names = inspect.signature(function).parameters
    args = [(6, 5) if name == "kernel" else object() for name in names]
    assert function(*args) == "the reference's"
    assert given == [tuple(args)]


# --- determinism and schemas ---


def everything(x, weight, bias, pool):
    found = []
    for act in ("relu", "silu"):
        norm = Norm(*training.moments(x), weight, bias, 1e-5)
        out, argmax = pooling.norm_act_max_pool2d(x, norm, act, *sized(x, pool))
        found += [out, argmax, *pooling.max_pool2d_argmax(x, *sized(x, pool))]
        found += gradients(out, argmax, x, norm, act, *pool)
        found += [pooling.max_pool2d_backward(out, argmax, *pool, x.shape[2:])]
    return found


@pytest.mark.parametrize("shape", [(3, 64, 17, 19), (2, 37, 9, 9)], ids=str)
@dtypes(torch.float32, torch.bfloat16)
def test_cuda_max_pool_is_deterministic(shape, dtype, monkeypatch):
    tensors = (*problem(shape, dtype).values(), POOLS["3x3_stride2"])
    first = everything(*tensors)
    monkeypatch.setenv("FUSED_RESNET_EMULATOR_ORDER", "1")
    for found, again in zip(first, everything(*tensors), strict=True):
        assert torch.equal(found, again)


def test_cuda_max_pool_schemas():
    x, weight, bias = problem((2, 16, 6, 6)).values()
    x, geometry = training.ready(x), (3, 3, 2, 2, 1, 1)
    out, dx = training.empty((2, 16, 3, 3), x), torch.empty_like(x)
    argmax = torch.empty_like(out, dtype=torch.uint8)
    mean, var = training.moments(x)
    rows = training.tile_rows(x)
    partials = torch.empty(-(-72 // rows), 2, 16, device=DEVICE)
    norm = (x, mean, var, weight, bias, 1e-5, 1)

    def check(op, *args):
        torch.library.opcheck(op.default, args, test_utils="test_schema")
        op(*args)

    check(ops.cuda_max_pool, x, geometry, out, argmax)
    check(ops.cuda_max_pool_bwd, out, argmax, geometry, dx)
    check(ops.cuda_bn_max_pool, *norm, geometry, out, argmax)
    check(ops.cuda_bn_max_pool_reduce, out, argmax, geometry, *norm, rows, partials)
    check(ops.cuda_bn_max_pool_input_grad, out, argmax, geometry, *norm, mean, var, 72.0, dx)
    with pytest.raises(RuntimeError, match="number of windows is 6; expected 1 to 4"):
        ops.cuda_max_pool(x, (3, 3, 1, 1, 0, 0), training.empty((2, 16, 6, 6), x), None)
    with pytest.raises(RuntimeError, match="act is 4; expected 0 to 2"):
        ops.cuda_bn_max_pool(x, mean, var, None, None, 1e-5, 4, geometry, out, None)
