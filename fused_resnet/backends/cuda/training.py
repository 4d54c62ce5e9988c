"""Batch norm, residual addition and pooling by the kernels of csrc/cuda, forward and backward.

Statistics and gradient sums have two stages: a tile of rows (pixels) leaves its partial result, and a second kernel
merges the tiles in fp64 and in a fixed order. A convolution that leaves such partials of its output is finished by
`finish_bn_act`.
"""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.cpu import ACT_CODES
from fused_resnet.backends.cuda.family import MULTIPROCESSORS
from fused_resnet.backends.layout import empty, ready, vector
from fused_resnet.backends.reference import channels_last

_ops = torch.ops.fused_resnet_C

# Of csrc/cuda/rows.h: threads of a block, rows that one has in flight, and threads side by side in a row, at most.
_THREADS, _AT_ONCE, _MOST_LANES = 256, 4, 32

# Blocks of a pass that leaves partials: whole waves of 2, 3, 4 or 6 blocks a multiprocessor. More would only make
# the second stage longer.
_BLOCKS = MULTIPROCESSORS * 12


def _vectors(count: int, x: Tensor) -> tuple[Tensor, ...]:
    """`count` vectors of a number for each channel of x."""
    return tuple(torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(count))


def _width(x: Tensor) -> int:
    """Elements of an access, as `with_width` of csrc/cuda/launch.h has them."""
    wide = 16 // x.element_size()
    return 1 if x.shape[1] % wide else wide


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def tile_rows(x: Tensor) -> int:
    """The rows of a tile that leaves partials: enough blocks for the GPU, and few partials."""
    accesses = x.shape[1] // _width(x)
    lanes = min(_MOST_LANES, 1 << (accesses - 1).bit_length())
    lines = _THREADS // lanes
    rows = -(-_rows(x) * -(-accesses // lanes) // _BLOCKS)
    return max(_AT_ONCE * lines, -(-rows // lines) * lines)


def _partials(x: Tensor, rows: int, sums: int) -> Tensor:
    return torch.empty(-(-_rows(x) // rows), sums, x.shape[1], dtype=torch.float32, device=x.device)


def add_act(x, residual, act):
    x, residual = ready(x), ready(residual)
    out = empty(x.shape, x)
    _ops.cuda_add_act_fwd(x, residual, ACT_CODES[act], out)
    return out


def add_act_backward(grad, y, x, residual, act):
    if act == "none":
        return channels_last(grad)
    out = empty(y.shape, y)
    _ops.cuda_add_act_bwd(ready(grad), ready(y), ready(x), ready(residual), ACT_CODES[act], out)
    return out


def scale_act(x, scale, shift, residual, act):
    x = ready(x)
    out = empty(x.shape, x)
    _ops.cuda_scale_act(x, vector(scale), vector(shift), ready(residual), ACT_CODES[act], out)
    return out


def moments(x: Tensor) -> tuple[Tensor, int]:
    """Of x, which is `ready`: partials [tiles, 3, C], the mean in two parts and the variance; and a tile's rows."""
    rows = tile_rows(x)
    partials = _partials(x, rows, 3)
    _ops.cuda_bn_stats(x, rows, partials)
    return partials, rows


def merged_statistics(x: Tensor, partials: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the channels of x, from its `moments`."""
    mean, var = _vectors(2, x)
    _ops.cuda_bn_finalize(partials, _rows(x), rows, mean, var)
    return mean, var


def normalise_act(x, mean, var, weight, bias, residual, eps, act, mask=None):
    """act((x - mean) / sqrt(var + eps) * weight + bias + residual); fills `mask` where one is given."""
    y = empty(x.shape, x)
    _ops.cuda_bn_apply(
        x, mean, var, vector(weight), vector(bias), ready(residual), eps, ACT_CODES[act], y, mask
    )  # fmt: skip
    return y


def gradient_mask(x: Tensor) -> Tensor:
    """Memory for a bit an element, which tells where the gradient passes a ReLU: a byte for every access."""
    return torch.empty(x.numel() // _width(x), dtype=torch.uint8, device=x.device)


def bn_act(x, weight, bias, residual, eps, act):
    x = ready(x)
    return finish_bn_act(x, *moments(x), weight, bias, residual, eps, act)


def finish_bn_act(z, partials, rows, weight, bias, residual, eps, act):
    """`bn_act` of z, of which a convolution has left the partials of tiles of so many rows."""
    mean, var = merged_statistics(z, partials, rows)
    return normalise_act(z, mean, var, weight, bias, residual, eps, act), mean, var


def bn_act_backward(grad, x, y, weight, bias, residual, mean, var, eps, act, needs, mask=None):
    grad, x, y, residual = (ready(t) for t in (grad, x, y, residual))
    weight, bias, mean, var = (vector(t) for t in (weight, bias, mean, var))
    nothing = x.new_empty(0)
    d_x, d_residual = (empty(x.shape, x) if needs[i] else None for i in (0, 3))
    rows = tile_rows(x)
    partials = _partials(x, rows, 2)
    source, code = (y, mask, residual, weight, bias, mean, var), ACT_CODES[act]
    _ops.cuda_bn_reduce(grad, x, *source, eps, code, rows, partials, d_residual)
    d_weight, d_bias, mean_g, slope = _merged_gradients(x, partials, var, eps)
    if d_x is not None:
        if d_residual is not None:  # the gradient behind the activation is there
            grad, code = d_residual, ACT_CODES["none"]
            source = (None, None, None, weight, bias, mean, var)
        _ops.cuda_bn_input_grad(grad, x, *source, mean_g, slope, eps, code, d_x)
    return nothing if d_x is None else d_x, d_weight, d_bias, nothing if d_residual is None else d_residual


def _merged_gradients(x, partials, var, eps):
    """Gradients of weight and bias, and the two vectors that the gradient of x needs."""
    vectors = _vectors(4, x)
    _ops.cuda_bn_reduce_finalize(partials, _rows(x), var, eps, *vectors)
    return vectors


# --- pooling ----------------------------------------------------------------------------------------------------------

MOST_TAPS = 25  # of a window, as in csrc/cuda/max_pool.h


def max_pool2d(x, kernel, stride, padding, size):
    if kernel[0] * kernel[1] > MOST_TAPS:
        return reference.max_pool2d(x, kernel, stride, padding, size)
    x = ready(x)
    out = empty((*x.shape[:2], *size), x)
    _ops.cuda_max_pool(x, (*kernel, *stride, *padding), out, None)
    return out


def _pooled(x, size) -> tuple[Tensor, Tensor]:
    """The output of a pooling of x, and the number in its window, r * S + s, of the tap that each was taken from."""
    out = empty((*x.shape[:2], *size), x)
    return out, torch.empty_like(out, dtype=torch.uint8)


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
    _ops.cuda_max_pool_bwd(grad, argmax, (*kernel, *stride, *padding), d_x)
    return d_x


FUSED_POOL_ACTS = ("none", "relu", "relu6")


def bn_act_max_pool2d(x, weight, bias, eps, act, kernel, stride, padding, size):
    """max_pool2d(bn_act(x)) of one of FUSED_POOL_ACTS: the output, the taps, mean and variance.

    The output of bn_act is rounded as it would be in memory, which it never is in.
    """
    x = ready(x)
    return finish_bn_act_max_pool2d(x, *moments(x), weight, bias, eps, act, kernel, stride, padding, size)


def finish_bn_act_max_pool2d(z, partials, rows, weight, bias, eps, act, kernel, stride, padding, size):
    """The same of z, of which a convolution has left the partials of tiles of so many rows."""
    mean, var = merged_statistics(z, partials, rows)
    out, argmax = _pooled(z, size)
    geometry = (*kernel, *stride, *padding)
    weight, bias = vector(weight), vector(bias)
    _ops.cuda_bn_max_pool(z, mean, var, weight, bias, eps, ACT_CODES[act], geometry, out, argmax)
    return out, argmax, mean, var


def bn_act_max_pool2d_backward(
    grad, argmax, x, weight, bias, mean, var, eps, act, kernel, stride, padding, *, needs_x=True
):
    """The gradients of x (None where it is not needed), weight and bias, from that of the pooled output."""
    grad, x = ready(grad), ready(x)
    weight, bias, mean, var = (vector(t) for t in (weight, bias, mean, var))
    pooling, code = (grad, argmax, (*kernel, *stride, *padding)), ACT_CODES[act]
    rows = tile_rows(x)
    partials = _partials(x, rows, 2)
    _ops.cuda_bn_max_pool_reduce(*pooling, x, weight, bias, mean, var, eps, code, rows, partials)
    d_weight, d_bias, mean_g, slope = _merged_gradients(x, partials, var, eps)
    if not needs_x:
        return None, d_weight, d_bias
    d_x = empty(x.shape, x)
    _ops.cuda_bn_max_pool_input_grad(*pooling, x, weight, bias, mean, var, mean_g, slope, eps, code, d_x)
    return d_x, d_weight, d_bias
