"""Batch norm and convolutions in training: the functions of a backend, made of this one's launches."""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.layout import aligned, empty, ready, vector
from fused_resnet.backends.problem import Problem
from fused_resnet.backends.triton import batch_norm as kernels
from fused_resnet.backends.triton import capability, run_launches
from fused_resnet.backends.triton.launch import Launch, cdiv, pixels
from fused_resnet.backends.triton.registry import in_training
from fused_resnet.backends.triton.statistics import Partials, cut, merge_launch, merging, moments_launch

# Programs of a pass that leaves nothing behind for each of them: several waves, so that the last one is short.
ELEMENTWISE_PROGRAMS = 132 * 64

SCALE_BLOCK = 256  # channels of a program of `norm_scale_kernel`


def _vectors(count: int, x: Tensor, channels: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(count))


def _norm(norm) -> tuple:
    """The five arguments of a kernel that a norm is; None: there is none."""
    if norm is None:
        return None, None, None, None, 0.0
    return *(vector(t) for t in norm[:4]), float(norm.eps)


# --- batch norm -------------------------------------------------------------------------------------------------------


def moments(x):
    x = ready(x)
    partials, launch = moments_launch(x)
    return _merged(x, partials, launch)


def _merged(x: Tensor, partials: Partials, *before: Launch) -> tuple[Tensor, Tensor]:
    """Mean and variance of x, of which the launches `before` leave the partials."""
    mean, var = _vectors(2, x, x.shape[1])
    run_launches([*before, merge_launch(partials, pixels(x.shape), mean, var)], x.device)
    return mean, var


def norm_act(x, norm, residual, residual_norm, act):
    """No mask: where the slope is not computed again, y tells it."""
    x = ready(x)
    y = empty(x.shape, x)
    run_launches([norm_act_launch(x, norm, residual, residual_norm, act, y)], x.device)
    return y, None


def norm_act_launch(x, norm, residual, residual_norm, act: str, y) -> Launch:
    args = (x, ready(residual), y, *_norm(norm), *_norm(residual_norm))
    return _elementwise(kernels.norm_act_fwd_kernel, args, x, act)


def _elementwise(kernel, args, x: Tensor, act: str) -> Launch:
    _, grid, last, constants = cut(x.shape, ELEMENTWISE_PROGRAMS, 1)
    return Launch(kernel, grid, (*args, *last), constants | {"ACT": act}, 4, 1)


def _slope_from(residual, residual_norm, act: str, y) -> tuple[Tensor | None, Tensor | None]:
    """The residual and y, None where the gradient is told without it."""
    y = ready(y) if act in ("relu", "relu6") else None
    again = act != "none" and y is None
    return ready(residual) if again or residual_norm is not None else None, y


def norm_act_reduce(grad, x, norm, residual, residual_norm, act, y, mask, write):
    x = ready(x)
    g = empty(x.shape, x) if write else None
    sums = _vectors(2 if residual_norm is None else 3, x, x.shape[1])
    launches = norm_act_reduce_launches(ready(grad), x, norm, residual, residual_norm, act, y, g, *sums)
    run_launches(launches, x.device)
    d_weight, d_bias, *d_residual_weight = sums
    return g, d_weight, d_bias, d_residual_weight[0] if d_residual_weight else None


def norm_act_reduce_launches(
    grad, x, norm, residual, residual_norm, act: str, y, g, d_weight, d_bias, d_residual_weight=None
) -> tuple[Launch, Launch]:
    residual, y = _slope_from(residual, residual_norm, act, y)
    tiles, grid, last, constants = cut(x.shape)
    c = x.shape[1]
    partials = torch.empty((tiles, 2 if residual_norm is None else 3, c), dtype=torch.float32, device=x.device)
    own, residuals = _norm(norm), _norm(residual_norm)
    args = (grad, x, residual, y, g, partials, *own, *residuals, *last)
    first = Launch(kernels.norm_act_reduce_kernel, grid, args, constants | {"ACT": act}, 4, 1)
    args = (partials, d_weight, d_bias, d_residual_weight, own[1], own[4], residuals[1], residuals[4])
    return first, merging(kernels.norm_act_reduce_merge_kernel, args, tiles, c)


def norm_act_input_grad(
    grad, x, norm, residual, residual_norm, act, y, mask, d_weight, d_bias, d_residual_weight, count
):
    grad, x = ready(grad), ready(x)
    d_x, d_residual = empty(x.shape, x), None if residual_norm is None else empty(x.shape, x)
    sums = (vector(t) for t in (d_weight, d_bias, d_residual_weight))
    inputs = (grad, x, norm, residual, residual_norm, act, y)
    run_launches([norm_act_input_grad_launch(*inputs, *sums, count, d_x, d_residual)], x.device)
    return d_x, d_residual


def norm_act_input_grad_launch(
    grad, x, norm, residual, residual_norm, act: str, y, d_weight, d_bias, d_residual_weight, count, d_x, d_residual
) -> Launch:
    residual, y = _slope_from(residual, residual_norm, act, y)
    sums = (d_weight, d_bias, d_residual_weight, 1.0 / count)
    args = (grad, x, residual, y, d_x, d_residual, *sums, *_norm(norm), *_norm(residual_norm))
    return _elementwise(kernels.norm_act_input_grad_kernel, args, x, act)


# --- convolutions -----------------------------------------------------------------------------------------------------


def conv_moments(x, norm, act, weight, bias, args):
    z, partials, launches = _convolution(x, norm, act, weight, bias, args)
    if partials is not None:
        return z, *_merged(z, partials, *launches)
    run_launches(launches, z.device)
    return z, *moments(z)


def convolve(x, norm, act, weight, bias, args) -> Tensor:
    """The same launches, so that what is computed again is what it was, to the bit."""
    z, _, launches = _convolution(x, norm, act, weight, bias, args)
    run_launches(launches, z.device)
    return z


def _convolution(x, norm, act, weight, bias, args) -> tuple[Tensor, Partials | None, tuple[Launch, ...]]:
    """The output, the partials of its moments where the kernel leaves them, and the launches."""
    x = ready(x)
    problem = Problem.of("conv_scale_act", x, weight, args, None, "none")
    family, config, on_load = in_training(problem, capability(x.device), norm is not None)
    if norm is not None and not on_load:
        x, norm = norm_act(x, norm, None, None, act)[0], None
    k = weight.shape[0]
    # The weight has just changed, whether its version says so or not: no packed form of it is kept.
    weights = aligned(family.pack(weight.detach(), problem, config))
    scale = torch.ones(k, dtype=torch.float32, device=x.device)
    shift = torch.zeros_like(scale) if bias is None else vector(bias)
    z, tiles = empty(problem.output, x), family.tiles(problem, config)
    partials = Partials.empty(tiles, k, x.device) if tiles else None
    before, on_load = ((), None) if norm is None else _on_load(norm, act)
    also = {"partials": partials} if tiles else {}
    also |= {"on_load": on_load} if on_load else {}
    return z, partials, (*before, *family.launches(problem, config, x, weights, scale, shift, None, z, **also))


def _on_load(norm, act: str) -> tuple[tuple[Launch, ...], tuple]:
    """What a convolution reads that applies act(norm(x)) on load, and the launch that makes it."""
    mean, bias = vector(norm.mean), vector(norm.bias)
    scale = torch.empty_like(mean)
    return (norm_scale_launch(norm, scale),), (mean, scale, torch.zeros_like(mean) if bias is None else bias, act)


def norm_scale_launch(norm, scale: Tensor) -> Launch:
    _, var, weight, _, eps = _norm(norm)
    args = (var, weight, scale, eps, len(scale))
    return Launch(kernels.norm_scale_kernel, cdiv(len(scale), SCALE_BLOCK), args, {"BLOCK_C": SCALE_BLOCK}, 4, 1)


def convolution_backward(grad, x, norm, act, weight, args, needs, residual):
    """aten's products (cuDNN), of act(norm(x)) made again where the weight's gradient reads it."""
    if norm is not None and needs[1]:
        x = norm_act(x, norm, None, None, act)[0]
    return reference.convolution_backward(grad, x, None, act, weight, args, needs, residual)


# --- pooling ----------------------------------------------------------------------------------------------------------


def norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size):
    return reference.norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size)


def norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding):
    return reference.norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding)


def norm_act_max_pool2d_input_grad(grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count):
    return reference.norm_act_max_pool2d_input_grad(
        grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count
    )
