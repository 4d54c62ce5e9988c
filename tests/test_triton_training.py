"""The Triton backend in training: moments, batch norm with residual and activation, and their gradient."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACT_FUNCTIONS,
    BACKEND_NAMES,
    EXACT_ACTS,
    LAYOUTS,
    PLANES,
    acts,
    compare_with_eager,
    dtypes,
    integers,
    planes,
    poisoned,
    representable,
)
from tolerances import assert_moments, tolerance, ulp

from fused_resnet.backends import backend_report, triton
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import ConvArgs

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.triton import statistics, training

poison = pytest.fixture(autouse=True)(poisoned)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
ADDED = ("nothing", "residual", "residual_norm")
INF, NAN = float("inf"), float("nan")

added = pytest.mark.parametrize("added", ADDED)


# --- batch norm, residual, activation ---


class NormAct(torch.autograd.Function):
    """Forward and backward, as a block of a network calls the functions; `keeps` y, or computes the slope again."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, residual_weight, residual_bias, act, keeps):
        norm, residual_norm = Norm(*triton.moments(x), weight, bias, EPS), None
        if residual_weight is not None:
            residual_norm = Norm(*triton.moments(residual), residual_weight, residual_bias, EPS)
        ctx.problem = x, norm, residual, residual_norm, act
        y, mask = triton.norm_act(*ctx.problem)
        ctx.y = y if keeps and act in ("relu", "relu6") else None
        assert mask is None
        return y

    @staticmethod
    def backward(ctx, grad):
        x, norm, residual, residual_norm, _ = ctx.problem
        writes = residual is not None and residual_norm is None
        g, *sums = triton.norm_act_reduce(grad, *ctx.problem, ctx.y, None, writes)
        rest = (x, norm, None, None, "none", None) if writes else (*ctx.problem, ctx.y)
        count = x.numel() / x.shape[1]
        d_x, d_residual = triton.norm_act_input_grad(g if writes else grad, *rest, None, *sums, count)
        assert (g is None) != writes
        d_residual_bias = None if residual_norm is None else sums[1]
        return d_x, sums[0], sums[1], g if writes else d_residual, sums[2], d_residual_bias, None, None


def fused_norm_act(x, weight, bias, residual=None, residual_weight=None, residual_bias=None, *, act, keeps=False):
    return NormAct.apply(x, weight, bias, residual, residual_weight, residual_bias, act, keeps)


def eager_norm_act(x, weight, bias, residual=None, residual_weight=None, residual_bias=None, *, act):
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    if residual_weight is not None:
        residual = F.batch_norm(residual, None, None, residual_weight, residual_bias, True, 0.0, EPS)
    return ACT_FUNCTIONS[act](y if residual is None else y + residual)


def problem(shape, dtype, added):
    def norm():
        return torch.rand(shape[1]) + 0.5, torch.randn(shape[1])

    tensors = [(torch.randn(shape) * 2 + 1).to(dtype), *norm()]
    if added != "nothing":
        tensors += [(torch.randn(shape) - 1).to(dtype)]
    if added == "residual_norm":
        tensors += norm()
    names = ("x", "weight", "bias", "residual", "residual_weight", "residual_bias")
    return {name: t.to(DEVICE) for name, t in zip(names, tensors, strict=False)}


@dtypes()
@acts
@added
def test_norm_act_two_times_every_act(added, act, dtype):
    tensors = problem((3, 17, 5, 3), dtype, added)
    for keeps in (False, True) if act in ("relu", "relu6") else (False,):
        compare_with_eager(fused_norm_act, eager_norm_act, tensors, act, fused_options={"keeps": keeps})


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shape", ["three_channels", "sixty_four", "wide_row", "one_image"])
def test_norm_act_two_times(shape, dtype):
    compare_with_eager(fused_norm_act, eager_norm_act, problem(PLANES[shape], dtype, "residual_norm"), "relu")


def test_norm_act_of_several_tiles(monkeypatch):
    """Of rows and of channels, with steps that the rows do not fill."""
    monkeypatch.setattr(statistics, "PROGRAMS", 4)
    monkeypatch.setattr(training, "ELEMENTWISE_PROGRAMS", 3)
    compare_with_eager(
        fused_norm_act, eager_norm_act, problem((5, 136, 11, 9), torch.float32, "residual_norm"), "relu6"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_act_strides(layout):
    tensors = problem(PLANES["sixty_four"], torch.float32, "residual_norm")
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("x", "residual")}
    compare_with_eager(fused_norm_act, eager_norm_act, tensors, "relu", layout)


def per_channel(t):
    return t.double().view(-1, 1, 1)


def exact_norm(channels):
    """Of variance 3 and eps 1, so that 1 / sqrt(var + eps) is a half."""
    weight, bias = 2.0 ** integers(channels, low=0, high=2), integers(channels, low=-4, high=4)
    mean = integers(channels, low=-4, high=4)
    return Norm(*(t.to(DEVICE) for t in (mean, torch.full((channels,), 3.0), weight, bias)), 1.0)


def exact_hat(x, norm):
    return (x.double() - per_channel(norm.mean)) * 0.5


def exact_pre(x, norm):
    return exact_hat(x, norm) * per_channel(norm.weight) + per_channel(norm.bias)


EXACT = {
    "one_channel": ((2, 1, 7, 5), torch.float32),
    "three_channels": ((2, 3, 7, 5), torch.bfloat16),
    "seventeen": ((3, 17, 3, 3), torch.float16),
    "sixty_four": ((1, 64, 4, 5), torch.float32),
}


@added
@pytest.mark.parametrize(("shape", "dtype"), EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("act", EXACT_ACTS)
def test_norm_act_exact(act, shape, added, dtype):
    """Each function by itself, the slope from the output and computed again; no gradient where there is a kink."""
    images = (integers(*shape, low=-3, high=3, dtype=dtype) for _ in range(3))
    x, residual, grad = (LAYOUTS["channels_last"](t).to(DEVICE) for t in images)
    vectors = [integers(shape[1], low=-8, high=8).to(DEVICE) for _ in range(3)]
    norm, residual_norm, pre = exact_norm(shape[1]), None, 0.0
    if added == "residual":
        pre = residual.double()
    elif added == "residual_norm":
        residual_norm = exact_norm(shape[1])
        pre = exact_pre(residual, residual_norm)
    pre = pre + exact_pre(x, norm)
    inputs = (x, norm, None if added == "nothing" else residual, residual_norm, act)
    y, _ = triton.norm_act(*inputs)
    assert torch.equal(y, representable(ACT_FUNCTIONS[act](pre), dtype))

    grad = grad * ((pre != 0) & (pre != 6))
    closed = {"none": pre != pre, "relu": pre < 0, "relu6": (pre < 0) | (pre > 6)}[act]
    g = torch.where(closed, 0.0, grad.double())
    normed = [(x, norm)] if residual_norm is None else [(x, norm), (residual, residual_norm)]
    for kept in (None, y):
        written, d_weight, d_bias, d_residual_weight = triton.norm_act_reduce(grad, *inputs, kept, None, True)
        assert torch.equal(written, g.to(dtype))
        assert torch.equal(d_bias.double(), g.sum((0, 2, 3)))
        for found, its in zip((d_weight, d_residual_weight), normed, strict=False):
            assert torch.equal(found.double(), (g * exact_hat(*its)).sum((0, 2, 3)))
        vectors[2] = None if residual_norm is None else vectors[2]
        gradients = triton.norm_act_input_grad(grad, *inputs, kept, None, *vectors, 64.0)
        assert (d_residual_weight is None) == (gradients[1] is None) == (residual_norm is None)
        for found, its, d_its_weight in zip(gradients, normed, vectors[::2], strict=False):
            inner = g - per_channel(vectors[1]) / 64 - exact_hat(*its) * per_channel(d_its_weight) / 64
            assert torch.equal(found, (inner * per_channel(its[1].weight) * 0.5).to(dtype))


def test_norm_without_weight_and_bias():
    x = problem((2, 17, 5, 3), torch.float32, "nothing")["x"]
    plain = Norm(*triton.moments(x), None, None, EPS)
    whole = plain._replace(weight=torch.ones(17, device=DEVICE), bias=torch.zeros(17, device=DEVICE))
    for found, wanted in zip(*(forward_and_sums(x, norm) for norm in (plain, whole)), strict=True):
        assert torch.equal(found, wanted)


def forward_and_sums(x, norm):
    inputs = (x, norm, x, norm, "silu")
    _, *sums = triton.norm_act_reduce(x, *inputs, None, None, False)
    return triton.norm_act(*inputs)[0], *sums, *triton.norm_act_input_grad(x, *inputs, None, None, *sums, 30.0)


@added
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_norm_act_spoils_no_other_channel(act, added):
    """NaN and infinities in x, the residual and the gradient."""
    tensors, grad = problem((2, 17, 5, 3), torch.float32, added), torch.randn(2, 17, 5, 3).to(DEVICE)

    def everything():
        """The output and the gradients, of x first."""
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        y = fused_norm_act(*leaves, act=act)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    clean = everything()
    tensors["x"][0, :3, 1, 2] = torch.tensor([NAN, INF, -INF])
    if added != "nothing":
        tensors["residual"][1, 3, 4, 0] = NAN
    grad[0, 4, 2, 2] = INF
    found = everything()
    for spoilt in found[:2]:
        assert not spoilt[:, :3].isfinite().any()
    for one, other in zip(found, clean, strict=True):
        channel = 1 if one.dim() == 4 else 0
        assert torch.equal(one.narrow(channel, 5, 12), other.narrow(channel, 5, 12))


# --- moments ---


@dtypes()
@planes()
def test_moments_are_those_of_fp64(shape, dtype):
    x = (torch.randn(shape) * 3 - 2).to(DEVICE, dtype)
    assert_moments(x, *triton.moments(x))


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("shape", [(3, 17, 13, 17), (5, 264, 11, 7)], ids=str)
def test_moments_of_any_tiles(shape, programs, monkeypatch):
    monkeypatch.setattr(statistics, "PROGRAMS", programs)
    x = (torch.randn(shape) + 5).to(DEVICE)
    assert_moments(x, *triton.moments(x))


@pytest.mark.parametrize("ratio", [1.0, 1e4, 1e6], ids="{:.0e}".format)
def test_moments_cancellation(ratio):
    x = (torch.randn(4, 17, 19, 7) + ratio * torch.linspace(-1, 1, 17).view(-1, 1, 1)).to(DEVICE)
    mean, var = triton.moments(x)
    assert_moments(x, mean, var)
    normal, _ = triton.norm_act(x, Norm(mean, var, None, None, EPS), None, None, "none")
    truth = F.batch_norm(x.double(), None, None, None, None, True, 0.0, EPS)
    allowed = tolerance("cancellation") * ulp(torch.float32, ratio) * truth.abs().max()
    assert (normal - truth).abs().max() <= allowed


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 6e30, -3.4e38], ids=str)
def test_moments_of_constant_channels(constant):
    x = torch.full((3, 5, 7, 3), constant, device=DEVICE)
    mean, var = triton.moments(x)
    assert torch.equal(mean, x[0, :, 0, 0])
    assert not var.any()


@pytest.mark.parametrize("scale", [1e-12, 1e17, 5e18, 1e25, 1e38])
def test_moments_of_large_and_small_values(scale):
    """The mean and the variance are right wherever fp32 has them, and the variance is Inf where it has none."""
    x = (torch.rand(8, 5, 17, 13) * 3 * scale).to(DEVICE)
    x[:, 3] *= -1
    assert_moments(x, *triton.moments(x))


@dtypes()
@pytest.mark.parametrize("where", [(0, 0, 0), (3, 8, 8)], ids=["first", "last"])
def test_moments_not_finite(where, dtype):
    """One channel each: Inf, -Inf, both, NaN; the others know nothing of it."""
    x = torch.randn(4, 17, 9, 9).to(dtype)
    clean = triton.moments(x.to(DEVICE))
    x[where[0], :4, where[1], where[2]] = torch.tensor([INF, -INF, INF, NAN]).to(dtype)
    x[2, 2, 2, 2] = -INF
    mean, var = triton.moments(x.to(DEVICE))
    assert mean[:2].tolist() == [INF, -INF]
    assert mean[2:4].isnan().all()
    assert var[:4].isnan().all()
    assert torch.equal(mean[4:], clean[0][4:])
    assert torch.equal(var[4:], clean[1][4:])


@pytest.mark.parametrize("programs", [statistics.PROGRAMS, training.ELEMENTWISE_PROGRAMS])
def test_tiles_cover_large_images(programs):
    for shape in ((4096, 64, 112, 112), (256, 2048, 7, 7), (1, 3, 1, 1), (1 << 16, 1, 256, 256)):
        tiles, grid, (rows, units, steps), constants = statistics.cut(shape, programs, 1)
        columns = grid // tiles * constants["BLOCK_C"]
        assert units * constants["WIDTH"] == shape[1] <= columns
        assert tiles * steps * constants["BLOCK_M"] >= rows > (tiles - 1) * steps * constants["BLOCK_M"]
        assert rows * shape[1] == torch.Size(shape).numel()
        assert grid < programs + 2 * columns // constants["BLOCK_C"] + 1


def test_every_function_of_training_is_there():
    for name in triton.TRAINING:
        assert callable(getattr(triton, name))
    with pytest.raises(AttributeError, match="has no attribute 'moment'"):
        triton.moment  # noqa: B018
    x = torch.empty(2, 17, 5, 3, device=DEVICE)
    assert not triton.unsupported("bn_act", x)
    assert not triton.unsupported("conv_bn_act", x, torch.empty(4, 17, 3, 3), ConvArgs((1, 1), (1, 1), (1, 1), 1))
    assert "float64" in triton.unsupported("bn_act", x.double())
