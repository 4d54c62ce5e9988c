"""Max pooling behind batch norm + activation, and alone with its taps, of every backend that has them."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACTS,
    BACKEND_NAMES,
    EXACT_ACTS,
    KINKS,
    LAYOUTS,
    acts,
    dtypes,
    finish,
    integers,
    layouts,
    poisoned,
    require,
    run,
)
from tolerances import assert_two_times, tolerance

from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import windows
from fused_resnet.backends.selection import BACKENDS

poison = pytest.fixture(autouse=True)(poisoned)

# Kernel, stride and padding, by id.
POOLS = {
    "resnet": ((3, 3), (2, 2), (1, 1)),
    "halves": ((2, 2), (2, 2), (0, 0)),
    "dense": ((3, 3), (1, 1), (1, 1)),
    "lopsided": ((2, 5), (1, 3), (1, 2)),
    "gaps": ((1, 2), (2, 3), (0, 1)),
}
pools = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
SHAPES = [(2, 17, 9, 7), (3, 36, 8, 11), (1, 1, 5, 6), (2, 528, 6, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def backends(function):
    return pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if hasattr(BACKENDS[name], function)])


def forward(module, x, act, pool, eps=1e-5, weight=None, bias=None):
    """y, argmax and the norm."""
    norm = Norm(*module.moments(x), weight, bias, eps)
    return *module.norm_act_max_pool2d(x, norm, act, *pool, windows(x.shape[2:], *pool)), norm


def gradients(module, grad, argmax, x, norm, act, pool):
    count = float(x.numel() // x.shape[1])
    g, d_weight, d_bias = module.norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, *pool)
    d_x = module.norm_act_max_pool2d_input_grad(grad, argmax, x, norm, act, *pool, g, d_weight, d_bias, count)
    return {"x": d_x, "weight": d_weight, "bias": d_bias}


def indices(argmax, pool, width):
    """h * W + w of each tap, as aten's indices are."""
    (_, s), stride, padding = pool
    tap = argmax.long()
    p, q = (torch.arange(n) for n in argmax.shape[2:])
    h = p.view(-1, 1) * stride[0] - padding[0] + tap // s
    return h * width + q * stride[1] - padding[1] + tap % s


def unpooled(grad, taken, shape):
    """The gradient of what was pooled."""
    d = torch.zeros(*shape[:2], shape[2] * shape[3], dtype=grad.dtype)
    return d.scatter_add_(2, taken.flatten(2), grad.flatten(2)).view(shape)


@backends("norm_act_max_pool2d")
@dtypes()
@pools
@shapes
def test_pooled_is_the_activation_s_output_to_the_bit(shape, pool, dtype, backend):
    """Rounded as it would be in memory: the maxima and their taps, NaN's too, are aten's of what norm_act gives."""
    x = torch.randn(shape).to(dtype)
    require(backend, "norm_act", x)
    module = BACKENDS[backend]
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    norm = Norm(*module.moments(x), weight, bias, 1e-5)
    x[0, 0, 2:4, 1:4] = float("nan")
    for act in ACTS:
        y, argmax = module.norm_act_max_pool2d(x, norm, act, *pool, windows(shape[2:], *pool))
        whole, _ = module.norm_act(x, norm, None, None, act)
        expected, taken = F.max_pool2d(whole.contiguous(), *pool, return_indices=True)
        assert y.isnan().any()
        assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)), act
        assert argmax.dtype == torch.uint8
        assert torch.equal(indices(argmax, pool, shape[3]), taken), act


@backends("norm_act_max_pool2d")
@dtypes()
@pools
def test_norm_act_max_pool2d_exact(pool, dtype, backend):
    """Values mean - 1 and mean + 1, so that there are ties everywhere, and sums that nothing is rounded in."""
    n, c, h, w = shape = (2, 20, 8, 4)
    signs = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
    x = torch.stack([signs[torch.randperm(len(signs))] for _ in range(c)]).view(c, n, h, w).transpose(0, 1).to(dtype)
    require(backend, "norm_act", x)
    vectors = {"weight": 2.0 ** integers(c, low=0, high=2), "bias": integers(c, low=-4, high=4) + 0.25}

    def eager(x, weight, bias, *, act):
        return F.max_pool2d(finish(F.batch_norm(x, None, None, weight, bias, True, 0.0, 3.0), None, act), *pool)

    for act in EXACT_ACTS:
        grad = integers(n, c, *windows(shape[2:], *pool), low=-2, high=2, dtype=dtype)
        truth, true_grads = run(eager, {"x": x, **vectors}, grad, torch.float64, act=act)
        y, argmax, norm = forward(BACKENDS[backend], x, act, pool, 3.0, **vectors)
        assert torch.equal(y.double(), truth), act
        found = gradients(BACKENDS[backend], grad, argmax, x, norm, act, pool)
        for name, gradient in found.items():
            assert torch.equal(gradient, true_grads[name].to(gradient.dtype)), (act, name)


def check_gradients(backend, x, act, pool, layout="nchw"):
    """The two-times rule, where the same taps were taken."""
    require(backend, "norm_act", x)
    module, c = BACKENDS[backend], x.shape[1]
    vectors = {"weight": torch.rand(c) + 0.5, "bias": torch.randn(c)}
    x = LAYOUTS[layout](x)
    y, argmax, norm = forward(module, x, act, pool, **vectors)

    def eager(x, weight, bias, *, act):
        return finish(F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5), None, act)

    pre, _ = run(eager, {"x": x, **vectors}, None, torch.float64, act="none")
    taken = indices(argmax, pool, x.shape[3])
    at = pre.flatten(2).gather(2, taken.flatten(2)).view(y.shape)
    margin = tolerance("kink_margin") * max(1.0, pre.abs().max().item())
    keep = torch.ones_like(at)
    for kink in KINKS[act]:
        keep *= (at - kink).abs() > margin
    grad = (torch.randn(y.shape) * keep).to(x.dtype)
    whole = unpooled(grad.double(), taken, x.shape)
    _, truth = run(eager, {"x": x, **vectors}, whole, torch.float64, act=act)
    native = LAYOUTS["channels_last"](x)
    _, plain = run(eager, {"x": native, **vectors}, LAYOUTS["channels_last"](whole.to(x.dtype)), act=act)
    found = gradients(module, LAYOUTS[layout](grad) if layout != "expanded" else grad, argmax, x, norm, act, pool)
    for name, gradient in found.items():
        what = f"gradient of {name}"
        assert_two_times(gradient, plain[name], truth[name], what, "floor_ulps_gradient")


@backends("norm_act_max_pool2d")
@dtypes()
@pools
def test_norm_act_max_pool2d_gradient_two_times(pool, dtype, backend):
    check_gradients(backend, (torch.randn(3, 36, 18, 23) * 2 + 1).to(dtype), "relu", pool)


@backends("norm_act_max_pool2d")
@acts
@layouts
def test_norm_act_max_pool2d_gradient_two_times_every_act(layout, act, backend):
    check_gradients(backend, torch.randn(2, 17, 12, 11) * 2 + 1, act, POOLS["resnet"], layout)


@backends("norm_act_max_pool2d")
@dtypes(torch.float32, torch.bfloat16)
def test_norm_act_max_pool2d_gradient_two_times_in_many_tiles(dtype, backend):
    check_gradients(backend, torch.randn(2, 528, 23, 25).to(dtype), "relu", POOLS["resnet"])


@backends("max_pool2d_backward")
@dtypes()
@pools
@shapes
def test_max_pool2d_with_taps(shape, pool, dtype, backend):
    """Outputs, taps and gradients are aten's, ties and NaN included; integers, so that no sum is rounded."""
    x = integers(*shape, low=-3, high=3, dtype=dtype)
    x[0, 0, 1:3, 2:4] = float("nan")
    require(backend, "max_pool2d", x)
    module = BACKENDS[backend]
    y, argmax = module.max_pool2d_argmax(x, *pool, windows(shape[2:], *pool))
    expected, taken = F.max_pool2d(x, *pool, return_indices=True)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(indices(argmax, pool, shape[3]), taken)
    grad = integers(*y.shape, low=-2, high=2, dtype=dtype)
    d_x = module.max_pool2d_backward(grad, argmax, *pool, shape[2:])
    assert torch.equal(d_x, unpooled(grad, taken, shape))
