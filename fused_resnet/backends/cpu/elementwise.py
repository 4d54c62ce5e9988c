"""The operators around the convolutions: batch norm, residual addition, pooling."""

import torch
from torch import Tensor

from fused_resnet.backends.cpu.extension import ACT_CODES
from fused_resnet.backends.cpu.memory import empty, norm_arguments, optional
from fused_resnet.backends.reference import channels_last


def max_pool2d(x, kernel, stride, padding, size):
    out = empty((*x.shape[:2], *size), x.dtype)
    torch.ops.fused_resnet_C.max_pool(x, (*kernel, *stride, *padding), out, None)
    return out


def max_pool2d_argmax(x, kernel, stride, padding, size):
    """The output, and of each window the number r * S + s of the tap that it was taken from."""
    x, (out, argmax) = channels_last(x), _pooled(x, size)
    torch.ops.fused_resnet_C.max_pool(x, (*kernel, *stride, *padding), out, argmax)
    return out, argmax


def max_pool2d_backward(grad, argmax, kernel, stride, padding, size):
    """The gradient of x [N, C, *size]."""
    grad, d_x = channels_last(grad), empty((*grad.shape[:2], *size), grad.dtype)
    torch.ops.fused_resnet_C.max_pool_bwd(grad, channels_last(argmax), (*kernel, *stride, *padding), d_x)
    return d_x


def _pooled(x: Tensor, size) -> tuple[Tensor, Tensor]:
    out = empty((*x.shape[:2], *size), x.dtype)
    return out, torch.empty_like(out, dtype=torch.uint8)


def scale_act(x, scale, shift, residual, act):
    x = channels_last(x)
    residual = optional(residual)
    out = empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.scale_act(x, scale.float(), shift.float(), residual, ACT_CODES[act], out)
    return out


def add_act(x, residual, act):
    x, out = channels_last(x), empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.add_act_fwd(x, channels_last(residual), ACT_CODES[act], out)
    return out


def add_act_backward(grad, y, x, residual, act):
    if act == "none":
        return channels_last(grad)
    out = empty(y.shape, y.dtype)
    torch.ops.fused_resnet_C.add_act_bwd(channels_last(grad), y, optional(x), optional(residual), ACT_CODES[act], out)
    return out


def _vectors(x: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(x.shape[1]) for _ in range(count)]


def moments(x):
    x, (mean, var) = channels_last(x), _vectors(x, 2)
    torch.ops.fused_resnet_C.bn_moments(x, mean, var)
    return mean, var


def norm_act(x, norm, residual, residual_norm, act):
    x, y = channels_last(x), empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.norm_act(
        x, *norm_arguments(norm), optional(residual), *norm_arguments(residual_norm), ACT_CODES[act], y
    )
    return y, None  # a bit an element gains nothing here


def norm_act_reduce(grad, x, norm, residual, residual_norm, act, y, mask, write):
    x, (d_weight, d_bias) = channels_last(x), _vectors(x, 2)
    g = empty(x.shape, x.dtype) if write else None
    d_residual_weight = None if residual_norm is None else torch.empty_like(d_weight)
    torch.ops.fused_resnet_C.norm_act_reduce(
        channels_last(grad), x, *norm_arguments(norm), optional(residual), *norm_arguments(residual_norm),
        optional(y), ACT_CODES[act], g, d_weight, d_bias, d_residual_weight,
    )  # fmt: skip
    return g, d_weight, d_bias, d_residual_weight


def norm_act_input_grad(
    grad, x, norm, residual, residual_norm, act, y, mask, d_weight, d_bias, d_residual_weight, count
):
    x, d_x = channels_last(x), empty(x.shape, x.dtype)
    d_residual = None if residual_norm is None else empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.norm_act_input_grad(
        channels_last(grad), x, *norm_arguments(norm), optional(residual), *norm_arguments(residual_norm),
        optional(y), ACT_CODES[act], d_weight, d_bias, d_residual_weight, count, d_x, d_residual,
    )  # fmt: skip
    return d_x, d_residual


def norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size):
    x, (y, argmax) = channels_last(x), _pooled(x, size)
    geometry = (*kernel, *stride, *padding)
    torch.ops.fused_resnet_C.norm_act_max_pool(x, *norm_arguments(norm), ACT_CODES[act], geometry, y, argmax)
    return y, argmax


def norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding):
    x, (d_weight, d_bias) = channels_last(x), _vectors(x, 2)
    torch.ops.fused_resnet_C.norm_act_max_pool_reduce(
        channels_last(grad), channels_last(argmax), x, *norm_arguments(norm), ACT_CODES[act],
        (*kernel, *stride, *padding), d_weight, d_bias,
    )  # fmt: skip
    return None, d_weight, d_bias  # the next pass makes g again: it has four times the elements of grad


def norm_act_max_pool2d_input_grad(grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count):
    x, d_x = channels_last(x), empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.norm_act_max_pool_input_grad(
        channels_last(grad), channels_last(argmax), x, *norm_arguments(norm), ACT_CODES[act],
        (*kernel, *stride, *padding), d_weight, d_bias, count, d_x,
    )  # fmt: skip
    return d_x
