"""Max pooling by the kernels of csrc/cuda, alone and behind batch norm and an activation, forward and backward."""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.cpu.extension import ACT_CODES
from fused_resnet.backends.cuda import training
from fused_resnet.backends.layout import empty, ready, vector

_ops = torch.ops.fused_resnet_C

MOST_TAPS = 25  # of a window, as in csrc/cuda/max_pool.h

# What is pooled in the pass that computes it; others are in memory before.
FUSED_ACTS = ("none", "relu", "relu6")


def _has_kernel(kernel) -> bool:
    return kernel[0] * kernel[1] <= MOST_TAPS


def _pooled(x, size) -> tuple[Tensor, Tensor]:
    """The output of a pooling of x, and the number in its window, r * S + s, of the tap that each was taken from."""
    out = empty((*x.shape[:2], *size), x)
    return out, torch.empty_like(out, dtype=torch.uint8)


def max_pool2d(x, kernel, stride, padding, size):
    if not _has_kernel(kernel):
        return reference.max_pool2d(x, kernel, stride, padding, size)
    x = ready(x)
    out = empty((*x.shape[:2], *size), x)
    _ops.cuda_max_pool(x, (*kernel, *stride, *padding), out, None)
    return out


def max_pool2d_argmax(x, kernel, stride, padding, size):
    """The output and the taps that it was taken from; windows have up to MOST_TAPS."""
    x = ready(x)
    out, argmax = _pooled(x, size)
    _ops.cuda_max_pool(x, (*kernel, *stride, *padding), out, argmax)
    return out, argmax


def max_pool2d_backward(grad, argmax, kernel, stride, padding, size):
    """The gradient of x [N, C, *size]."""
    grad = ready(grad)
    d_x = empty((*grad.shape[:2], *size), grad)
    _ops.cuda_max_pool_bwd(grad, ready(argmax), (*kernel, *stride, *padding), d_x)
    return d_x


def norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size):
    """The output of act is rounded as it would be in memory, which that of FUSED_ACTS never is in."""
    if not _has_kernel(kernel):
        return reference.norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size)
    if act not in FUSED_ACTS:
        return max_pool2d_argmax(training.norm_act(x, norm, None, None, act)[0], kernel, stride, padding, size)
    out, argmax = _pooled(x, size)
    source = (ready(x), *training.norm_arguments(norm), ACT_CODES[act])
    _ops.cuda_bn_max_pool(*source, (*kernel, *stride, *padding), out, argmax)
    return out, argmax


def norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding):
    """The gradient behind act is written only where it was written in front of it, behind the pooling."""
    if not _has_kernel(kernel):
        return reference.norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding)
    if act not in FUSED_ACTS:
        d_y = max_pool2d_backward(grad, argmax, kernel, stride, padding, x.shape[2:])
        return training.norm_act_reduce(d_y, x, norm, None, None, act, None, None, True)[:3]
    x, rows = ready(x), training.tile_rows(x)
    sums = training.partials(x, rows, 2)
    source = (
        ready(grad),
        ready(argmax),
        (*kernel, *stride, *padding),
        x,
        *training.norm_arguments(norm),
        ACT_CODES[act],
    )
    _ops.cuda_bn_max_pool_reduce(*source, rows, sums)
    return None, *training.merged_gradients(x, sums, norm, None)[:2]


def norm_act_max_pool2d_input_grad(grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count):
    if not _has_kernel(kernel):
        return reference.norm_act_max_pool2d_input_grad(
            grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count
        )
    if g is not None:
        return training.norm_act_input_grad(g, x, norm, None, None, "none", None, None, d_weight, d_bias, None, count)[
            0
        ]
    x, d_x = ready(x), empty(x.shape, x)
    source = (
        ready(grad),
        ready(argmax),
        (*kernel, *stride, *padding),
        x,
        *training.norm_arguments(norm),
        ACT_CODES[act],
    )
    _ops.cuda_bn_max_pool_input_grad(*source, vector(d_weight), vector(d_bias), count, d_x)
    return d_x
