"""Convolutions in training by the CUDA backend: with the moments of their output, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from cuda_kernels import DEVICE, library
from problems import ACT_FUNCTIONS, LAYOUTS, dtypes, integers, poisoned, representable
from tolerances import assert_two_times

from fused_resnet.backends import cuda
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import ConvArgs, Problem

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

# x, weight and geometry of a problem of each family.
CASES = {
    "implicit_gemm": ((2, 16, 7, 5), (24, 16, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
    "depthwise": ((2, 24, 7, 5), (24, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 24)),
    "stem": ((2, 3, 15, 12), (16, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
}
cases = pytest.mark.parametrize("name", CASES)
norms = pytest.mark.parametrize("act", [None, "none", "relu", "silu"], ids=["plain", "norm", "norm_relu", "norm_silu"])


def problem(name, dtype, act):
    """x, its norm, weight and args; act None: there is no norm."""
    x, weight, args = CASES[name]
    c = x[1]
    norm = Norm(torch.randn(c), torch.rand(c) + 0.5, torch.rand(c) + 0.5, torch.randn(c), 1e-3) if act else None
    norm = norm and Norm(*(t.to(DEVICE) for t in norm[:4]), norm.eps)
    x, weight, args = LAYOUTS["channels_last"](torch.randn(x).to(DEVICE, dtype)), torch.randn(weight), ConvArgs(*args)
    weight = (weight / weight[0].numel() ** 0.5).to(DEVICE)
    found = cuda.candidates(Problem.of("conv_scale_act", x, weight, args, None, "none"), DEVICE)[0]
    assert found.family.name == name
    return x, norm, weight, args


def activated(x, norm, act, dtype):
    """act(norm(x)) in fp32 or fp64, then in the dtype that it has in memory."""
    if norm is None:
        return x
    mean, var, weight, bias = (t.to(x.dtype) if x.dtype == torch.float64 else t.float() for t in norm[:4])
    y = F.batch_norm(x.to(mean.dtype), mean, var, weight, bias, False, 0.0, norm.eps)
    return ACT_FUNCTIONS[act](y).to(dtype)


@dtypes()
@cases
@norms
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_cuda_conv_moments_two_times(biased, act, name, dtype):
    x, norm, weight, args = problem(name, dtype, act)
    bias = torch.randn(weight.shape[0], device=DEVICE) if biased else None
    z, mean, var = cuda.conv_moments(x, norm, act or "none", weight, bias, args)
    y = activated(x, norm, act, dtype)
    eager = F.conv2d(y, weight.to(dtype), None if bias is None else bias.to(dtype), *args)
    of_the_same, wide = weight.to(dtype).double(), None if bias is None else bias.double()
    truth = F.conv2d(activated(x.double(), norm, act, torch.float64), of_the_same, wide, *args)
    assert_two_times(z, eager, truth)
    assert z.is_contiguous(memory_format=torch.channels_last)
    plain, moments = (torch.var_mean(t, (0, 2, 3), correction=0) for t in (z.float(), z.double()))
    assert_two_times(mean, plain[1], moments[1], "mean")
    assert_two_times(var, plain[0], moments[0], "variance")


@cases
@pytest.mark.parametrize(("dtype", "less"), [(torch.bfloat16, 1 / 32), (torch.float16, 1 / 256)], ids=str)
def test_cuda_conv_moments_rounds_what_it_multiplies(dtype, less, name):
    """To the bit: act(norm(x)) counts as it would be in memory, where 16 and less than half of its last place is 16."""
    x, norm, weight, args = problem(name, dtype, "none")
    zeros, ones = torch.zeros_like(norm.mean), torch.ones_like(norm.var)
    x = LAYOUTS["channels_last"]((integers(*x.shape, low=0) * 32 - 16).to(DEVICE, dtype))
    weight = torch.ones_like(weight)
    z, *_ = cuda.conv_moments(x, Norm(zeros, ones, None, zeros + less, 0.0), "none", weight, None, args)
    assert torch.equal(z, representable(F.conv2d(x.double(), weight.double(), None, *args), dtype))


@dtypes()
@cases
@norms
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_cuda_convolution_backward_two_times(added, act, name, dtype):
    x, norm, weight, args = problem(name, dtype, act)
    grad = torch.randn(Problem.of("conv_scale_act", x, weight, args, None, "none").output).to(DEVICE, dtype)
    residual = LAYOUTS["channels_last"](torch.randn(x.shape).to(DEVICE, dtype)) if added else None
    found = cuda.convolution_backward(
        LAYOUTS["channels_last"](grad), x, norm, act or "none", weight, args, (True, True, True), residual
    )
    assert found[1].dtype == weight.dtype
    assert found[1].shape == weight.shape

    def plain(to):
        y = activated(x.to(to), norm, act, to).requires_grad_()
        leaves = [y, weight.to(dtype).to(to).requires_grad_(), torch.zeros(len(weight), device=DEVICE).to(to)]
        leaves[2].requires_grad_()
        d_y, d_weight, d_bias = torch.autograd.grad(F.conv2d(*leaves, *args), leaves, grad.to(to))
        return d_y if residual is None else d_y + residual.to(to), d_weight, d_bias

    for what, one, eager, truth in zip(("x", "weight", "bias"), found, plain(dtype), plain(torch.float64), strict=True):
        assert_two_times(one.to(dtype), eager, truth, f"gradient of {what}", "floor_ulps_gradient")


@cases
def test_cuda_convolution_backward_gives_what_is_needed(name):
    x, norm, weight, args = problem(name, torch.float32, "relu")
    grad = torch.randn(Problem.of("conv_scale_act", x, weight, args, None, "none").output).to(DEVICE)
    grad = LAYOUTS["channels_last"](grad)
    whole = cuda.convolution_backward(grad, x, norm, "relu", weight, args, (True, True, True), x)
    for one in range(3):
        needs = tuple(i == one for i in range(3))
        found = cuda.convolution_backward(grad, x, norm, "relu", weight, args, needs, x)
        assert [t is not None for t in found] == list(needs)
        assert torch.equal(found[one], whole[one])
