"""moments, norm_act and its gradient, of every backend that has them: called directly, beside eager and the truth."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from problems import (
    BACKEND_NAMES,
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    dtypes,
    finish,
    integers,
    layouts,
    on_cpu,
    planes,
    poisoned,
    representable,
    require,
    run,
    smooth_gradient,
)
from tolerances import assert_two_times, tolerance, ulp

from fused_resnet.backends.norm import Norm
from fused_resnet.backends.selection import BACKENDS

poison = pytest.fixture(autouse=True)(poisoned)
backends = pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if hasattr(BACKENDS[name], "norm_act")])

# What is added to the normalised x: nothing, a tensor, or a tensor with a norm of its own.
SHORTCUTS = ("none", "identity", "projection")
shortcuts = pytest.mark.parametrize("shortcut", SHORTCUTS)

# Whether the first pass stores g: the gradient of a plain tensor that was added is nothing else.
WRITES = {"none": (False, True), "identity": (True,), "projection": (False,)}


def problem(shape, dtype, shortcut, affine=True):
    c = shape[1]
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    if affine:
        tensors |= {"weight": torch.rand(c) + 0.5, "bias": torch.randn(c)}
    if shortcut != "none":
        tensors["residual"] = torch.randn(shape).to(dtype)
    if shortcut == "projection" and affine:
        tensors |= {"residual_weight": torch.rand(c) + 0.5, "residual_bias": torch.randn(c)}
    return tensors


def exact_problem(shape, dtype, shortcut):
    """Half of a channel's values are mean - 1, the others mean + 1: variance 1, and with eps = 3, 1 / sqrt(4)."""
    n, c, h, w = shape

    def plus_or_minus_one():
        signs = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
        x = torch.stack([signs[torch.randperm(len(signs))] for _ in range(c)]).view(c, n, h, w).transpose(0, 1)
        return (x + integers(c, low=-4, high=4).view(-1, 1, 1)).to(dtype)

    tensors = {
        "x": plus_or_minus_one(),
        "weight": 2.0 ** integers(c, low=0, high=2),
        "bias": integers(c, low=-4, high=4),
    }
    if shortcut == "identity":
        tensors["residual"] = integers(*shape, low=-4, high=4, dtype=dtype)
    if shortcut == "projection":
        tensors["residual"] = plus_or_minus_one()
        tensors |= {"residual_weight": 2.0 ** integers(c, low=0, high=2), "residual_bias": integers(c, low=-4, high=4)}
    return tensors


def eager(x, weight=None, bias=None, residual=None, residual_weight=None, residual_bias=None, *, act, shortcut, eps):
    if shortcut == "projection":
        residual = F.batch_norm(residual, None, None, residual_weight, residual_bias, True, 0.0, eps)
    return finish(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), residual, act)


def forward(module, tensors, act, shortcut, eps):
    """y and mask of the module, and the arguments that forward and backward share."""
    x, residual = tensors["x"], tensors.get("residual")
    norm = Norm(*module.moments(x), tensors.get("weight"), tensors.get("bias"), eps)
    residual_norm = None
    if shortcut == "projection":
        affine = tensors.get("residual_weight"), tensors.get("residual_bias")
        residual_norm = Norm(*module.moments(residual), *affine, eps)
    inputs = (x, norm, residual, residual_norm, act)
    return *module.norm_act(*inputs), inputs


def slopes(y, mask, act):
    """What the slope of the activation may be told from: (y, mask) for the backward functions."""
    told = [(y, None)] if act in ("relu", "relu6") else []
    return [(None, None), *told, *([(None, mask)] if mask is not None else [])]


def gradients(module, grad, inputs, told, write):
    """By name, from the two passes; `write`: the second begins with what the first has written."""
    x, norm, _, residual_norm, _ = inputs
    count = float(x.numel() // x.shape[1])
    g, d_weight, d_bias, d_residual_weight = module.norm_act_reduce(grad, *inputs, *told, write)
    assert (g is not None) == write
    assert (d_residual_weight is None) == (residual_norm is None)
    sums = (d_weight, d_bias, d_residual_weight, count)
    if write:
        d_x, nothing = module.norm_act_input_grad(g, x, norm, None, None, "none", None, None, *sums)
        assert nothing is None
        d_residual = g
    else:
        d_x, d_residual = module.norm_act_input_grad(grad, *inputs, *told, *sums)
        assert (d_residual is None) == (residual_norm is None)
    found = {"x": d_x, "weight": d_weight, "bias": d_bias, "residual": d_residual}
    return found | {"residual_weight": d_residual_weight, "residual_bias": d_bias}


def check(backend, tensors, act, shortcut, layout="nchw", eps=1e-5):
    """The two-times rule for y and every gradient, whatever the slope is told from and whether g is written."""
    require(backend, "norm_act", tensors["x"])
    module, options = BACKENDS[backend], {"shortcut": shortcut, "eps": eps}
    grad = smooth_gradient(eager, tensors, act, layout, **options)
    truth, true_grads = run(eager, on_cpu(tensors), grad.cpu(), torch.float64, act=act, **options)
    native = {name: t if t.dim() != 4 else LAYOUTS["channels_last"](t) for name, t in tensors.items()}
    plain, plain_grads = run(eager, native, LAYOUTS["channels_last"](grad), act=act, **options)
    y, mask, inputs = forward(module, tensors, act, shortcut, eps)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_two_times(y, plain, truth)
    for told, write in product(slopes(y, mask, act), WRITES[shortcut]):
        found = gradients(module, grad, inputs, told, write)
        for name in tensors:
            what = f"gradient of {name}"
            assert_two_times(found[name], plain_grads[name], true_grads[name], what, "floor_ulps_gradient")


@backends
@shortcuts
@dtypes()
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 5, 1, 1), (4, 17, 4, 2), (2, 64, 8, 8)], ids=str)
def test_norm_act_exact(shape, dtype, shortcut, backend):
    """As many values a channel as a power of two: sums, means and their quotients are exact."""
    tensors = exact_problem(shape, dtype, shortcut)
    require(backend, "norm_act", tensors["x"])
    options = {"shortcut": shortcut, "eps": 3.0}
    pre, _ = run(eager, tensors, None, torch.float64, act="none", **options)
    grad = integers(*shape, low=-2, high=2) * (pre != 0) * (pre != 6)
    for act in EXACT_ACTS:
        truth, true_grads = run(eager, tensors, grad, torch.float64, act=act, **options)
        y, mask, inputs = forward(BACKENDS[backend], tensors, act, shortcut, 3.0)
        assert torch.equal(y, representable(truth, dtype)), act
        for told, write in product(slopes(y, mask, act), WRITES[shortcut]):
            found = gradients(BACKENDS[backend], grad.to(dtype), inputs, told, write)
            for name in tensors:
                assert torch.equal(found[name], true_grads[name].to(tensors[name].dtype)), (act, name, write)


@backends
@shortcuts
@dtypes()
@pytest.mark.parametrize("plane", ["three_channels", "seventeen", "sixty_four", "wide_row", "one_image"])
def test_norm_act_two_times(plane, dtype, shortcut, backend):
    """Not of one channel, whose gradients are single numbers that eager may hit by luck: test_norm_act_exact."""
    check(backend, problem(PLANES[plane], dtype, shortcut), "relu", shortcut)


@backends
@shortcuts
@dtypes()
@acts
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_norm_act_two_times_every_act(affine, act, dtype, shortcut, backend):
    check(backend, problem(PLANES["seventeen"], dtype, shortcut, affine), act, shortcut)


@backends
@layouts
def test_norm_act_strides(layout, backend):
    tensors = problem(PLANES["seventeen"], torch.float32, "projection")
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual")}
    check(backend, tensors, "silu", "projection", layout)


@backends
@dtypes(torch.float32, torch.bfloat16)
def test_norm_act_two_times_in_many_tiles(dtype, backend):
    """Tiles of rows and of channels, the last of each not full, and outputs that are written past the caches."""
    check(backend, problem((2, 528, 23, 25), dtype, "projection"), "relu", "projection")


@backends
@shortcuts
@dtypes()
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_norm_act_slope_is_the_forward_s_to_the_bit(act, dtype, shortcut, backend):
    """Told from y, from a mask or computed again: g is the same everywhere, with no margin around the kinks."""
    tensors = problem((3, 36, 17, 19), dtype, shortcut)
    require(backend, "norm_act", tensors["x"])
    module = BACKENDS[backend]
    y, mask, inputs = forward(module, tensors, act, shortcut, 1e-5)
    grad = torch.randn(y.shape).to(dtype)
    again, *others = (module.norm_act_reduce(grad, *inputs, *told, True)[0] for told in slopes(y, mask, act))
    passes = (y > 0) & (y < 6) if act == "relu6" else y > 0
    assert torch.equal(again, grad * passes)
    assert others
    for g in others:
        assert torch.equal(g, again)


@backends
@shortcuts
@dtypes(torch.float32, torch.bfloat16)
def test_norm_act_input_gradient_over_processes(dtype, shortcut, backend):
    """SyncBatchNorm hands in sums and a count that are not this tensor's own: the formula, on the truth's pieces."""
    tensors = problem((2, 24, 9, 7), dtype, shortcut)
    require(backend, "norm_act", tensors["x"])
    module = BACKENDS[backend]
    _, _, inputs = forward(module, tensors, "none", shortcut, 1e-5)
    x, norm, residual, residual_norm, _ = inputs
    grad, count = torch.randn(x.shape).to(dtype), 1000.0
    d_weight, d_bias, d_residual_weight = (torch.randn(24) * 100 for _ in range(3))
    sums = (d_weight, d_bias, None if residual_norm is None else d_residual_weight)

    def formula(v, norm, d_weight, wide):
        mean, var, weight, bias_sum, weight_sum = (
            t.to(wide).view(-1, 1, 1) for t in (norm.mean, norm.var, norm.weight, d_bias, d_weight)
        )
        inverse = (var + norm.eps).rsqrt()
        v_hat = (v.to(wide) - mean) * inverse
        return weight * inverse * (grad.to(wide) - bias_sum / count - v_hat * weight_sum / count)

    found = module.norm_act_input_grad(grad, *inputs, None, None, *sums, count)
    for out, v, of, total in zip(
        found, (x, residual), (norm, residual_norm), (d_weight, d_residual_weight), strict=True
    ):
        if of is None:
            assert out is None
            continue
        plain = formula(v, of, total, torch.float32).to(dtype)
        assert_two_times(out, plain, formula(v, of, total, torch.float64), "gradient", "floor_ulps_gradient")


@backends
@dtypes(torch.float32, torch.bfloat16)
def test_norm_act_has_the_same_bits_with_any_number_of_threads(dtype, backend):
    tensors = problem((4, 70, 30, 31), dtype, "projection")
    require(backend, "norm_act", tensors["x"])
    module, threads, found = BACKENDS[backend], torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            y, _, inputs = forward(module, tensors, "relu6", "projection", 1e-5)
            grads = gradients(module, tensors["residual"], inputs, (y, None), False)
        finally:
            torch.set_num_threads(threads)
        found.append([y, *inputs[1][:2], *inputs[3][:2], *grads.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- moments ---


@backends
@dtypes()
@planes()
def test_moments_two_times(shape, dtype, backend):
    x = (torch.randn(shape) * 3 - 2).to(dtype)
    require(backend, "norm_act", x)
    found = BACKENDS[backend].moments(x)
    plain, truth = (torch.var_mean(x.to(wide), (0, 2, 3), correction=0) for wide in (torch.float32, torch.float64))
    for name, *values in zip(("mean", "var"), found, plain[::-1], truth[::-1], strict=True):
        assert_two_times(*values, name)


@backends
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4, 1e5, 1e6], ids="{:.0e}".format)
def test_moments_cancellation(ratio, backend):
    x = torch.randn(4, 17, 9, 7) + ratio * torch.linspace(-1, 1, 17).view(-1, 1, 1)
    require(backend, "norm_act", x)
    mean, var = BACKENDS[backend].moments(x)
    bound = tolerance("cancellation") * ulp(torch.float32, ratio)
    assert (mean - x.double().mean((0, 2, 3))).abs().max() <= bound
    assert (var / x.double().var((0, 2, 3), correction=0) - 1).abs().max() <= bound


@backends
@dtypes(torch.float32, torch.bfloat16)
def test_moments_that_are_not_finite(dtype, backend):
    """As aten's: Inf has the mean Inf, both signs of it or NaN have NaN; huge values of both signs stay finite."""
    x = torch.randn(2, 5, 6, 7)
    x[1, 0, 2, 3] = float("inf")
    x[0, 1, 1, 1], x[1, 1, 5, 6] = float("inf"), float("-inf")
    x[1, 2, 0, 0] = float("nan")
    x[:, 3] = 2.0**127 * (-1.0) ** torch.arange(42).view(6, 7)
    x = x.to(dtype)
    require(backend, "norm_act", x)
    mean, var = BACKENDS[backend].moments(x)
    truth = x.double().mean((0, 2, 3))
    assert torch.equal(mean.isnan(), truth.isnan())
    assert mean[0] == float("inf")
    assert mean[3].abs() <= ulp(torch.float32, 2.0**127)
    assert not var[:4].isfinite().any()
    assert var[4].isfinite()


@backends
@acts
@shortcuts
def test_norm_act_passes_nan_on(shortcut, act, backend):
    tensors = problem((2, 20, 3, 5), torch.float32, shortcut)
    require(backend, "norm_act", tensors["x"])
    module = BACKENDS[backend]
    _, _, inputs = forward(module, tensors, act, shortcut, 1e-5)
    x = inputs[0].clone()
    x[1, 7, 2, 2] = float("nan")
    y, mask = module.norm_act(x, *inputs[1:])
    assert y.isnan().nonzero().tolist() == [[1, 7, 2, 2]]
    grad = torch.ones(x.shape)
    for told in slopes(y, mask, act):
        d_weight = module.norm_act_reduce(grad, x, *inputs[1:], *told, False)[1]
        assert d_weight.isnan().nonzero().tolist() == [[7]], told
