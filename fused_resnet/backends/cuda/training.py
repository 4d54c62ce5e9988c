"""Batch norm, residual and activation in training by the kernels of csrc/cuda, forward and backward.

Statistics and gradient sums have two stages: a tile of rows (pixels) leaves its partial result, and a second kernel
merges the tiles in fp64 and in a fixed order. A convolution that leaves such partials of its output is finished by
`merged_moments`.
"""

import torch
from torch import Tensor

from fused_resnet.backends.cpu.extension import ACT_CODES
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


def partials(x: Tensor, rows: int, sums: int) -> Tensor:
    """Memory for the sums of the tiles of so many rows."""
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


# --- statistics -------------------------------------------------------------------------------------------------------


def moments(x):
    """Mean and biased variance of the channels."""
    x = ready(x)
    return merged_moments(x, *partial_moments(x))


def partial_moments(x: Tensor) -> tuple[Tensor, int]:
    """Of x, which is `ready`: partials [tiles, 3, C], the mean in two parts and the variance; and a tile's rows."""
    rows = tile_rows(x)
    found = partials(x, rows, 3)
    _ops.cuda_bn_stats(x, rows, found)
    return found, rows


def merged_moments(x: Tensor, found: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The moments of x from what tiles of so many rows have left."""
    mean, var = _vectors(2, x)
    _ops.cuda_bn_finalize(found, _rows(x), rows, mean, var)
    return mean, var


# --- batch norm, residual and activation ------------------------------------------------------------------------------

CLAMPS = ("relu", "relu6")


def norm_arguments(norm) -> tuple:
    """What a kernel takes of a norm, or of none."""
    if norm is None:
        return None, None, None, None, 0.0
    return *(vector(t) for t in (norm.mean, norm.var, norm.weight, norm.bias)), norm.eps


def _source(x, norm, residual, residual_norm, act) -> tuple:
    """What all passes read, in the order of their arguments."""
    return ready(x), *norm_arguments(norm), ready(residual), *norm_arguments(residual_norm), ACT_CODES[act]


def _mask(x: Tensor) -> Tensor:
    """Memory for a bit an element, which tells where the gradient passes a clamp: a byte for every access."""
    return torch.empty(x.numel() // _width(x), dtype=torch.uint8, device=x.device)


def norm_act(x, norm, residual, residual_norm, act):
    """act(norm(x) + residual), or of residual_norm(residual); and a mask where the slope would take a residual to tell.

    Without one it is computed again from x, which the backward reads in any case.
    """
    y = empty(x.shape, x)
    mask = _mask(x) if residual is not None and act in CLAMPS else None
    _ops.cuda_bn_apply(*_source(x, norm, residual, residual_norm, act), y, mask)
    return y, mask


def norm_act_reduce(grad, x, norm, residual, residual_norm, act, y, mask, write):
    g = empty(x.shape, x) if write else None
    rows = tile_rows(x)
    sums = partials(x, rows, 2 if residual_norm is None else 3)
    source = _source(x, norm, residual, residual_norm, act)
    _ops.cuda_bn_reduce(ready(grad), *source, ready(y), mask, rows, sums, g)
    return g, *merged_gradients(x, sums, norm, residual_norm)


def merged_gradients(x, sums, norm, residual_norm) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the norm's weight and bias and of the residual's weight, from the sums of the tiles."""
    d_weight, d_bias = _vectors(2, x)
    d_residual_weight = None if residual_norm is None else _vectors(1, x)[0]
    _, var, _, _, eps = norm_arguments(norm)
    _, residual_var, _, _, residual_eps = norm_arguments(residual_norm)
    _ops.cuda_bn_reduce_finalize(sums, var, eps, residual_var, residual_eps, d_weight, d_bias, d_residual_weight)
    return d_weight, d_bias, d_residual_weight


def norm_act_input_grad(
    grad, x, norm, residual, residual_norm, act, y, mask, d_weight, d_bias, d_residual_weight, count
):
    d_x = empty(x.shape, x)
    d_residual = None if residual_norm is None else empty(x.shape, x)
    gradients = (vector(t) for t in (d_weight, d_bias, d_residual_weight))
    _ops.cuda_bn_input_grad(
        ready(grad), *_source(x, norm, residual, residual_norm, act), ready(y), mask, *gradients, count, d_x, d_residual
    )
    return d_x, d_residual
