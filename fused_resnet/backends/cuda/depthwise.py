"""Depthwise convolution and its gradients: a thread slides down a strip of rows, and reads each row of the image once.

Windows of 3x3 and 5x5 with a stride of 1 or 2 have kernels of their own; any other up to 7x7 is computed pixel by
pixel. No tensor cores: any number of channels, and fp32 is fp32.
"""

import math

import torch
from torch import Tensor

from fused_resnet.backends.config import Config
from fused_resnet.backends.cpu.extension import ACT_CODES
from fused_resnet.backends.cuda.family import MULTIPROCESSORS, WARPS, Family, cdiv, geometry
from fused_resnet.backends.layout import aligned

NAME = "depthwise"
# Rows and channels of a thread.
BLOCKS = ("ROWS", "CHANNELS")

MOST_TAPS = 7  # in each direction
ROWS = (56, 28, 14, 7, 4, 2, 1)
WARP = 32

# Of the weight gradient: partial sums for each channel, and the pixels that one is worth.
MOST_PARTIALS = 1056
PIXELS_OF_A_PARTIAL = 512


def _own_kernel(window, stride, dilation) -> bool:
    """Whether it slides, as csrc/cuda/depthwise.cu says."""
    square = window[0] == window[1] and window[0] in (3, 5)
    return square and stride[0] == stride[1] and stride[0] in (1, 2) and tuple(dilation) == (1, 1)


def _widths(problem, slides: bool) -> list[int]:
    """Channels of a thread that the kernels offer: 16 bytes, half of that, one; as many as divide the channels."""
    wide = 16 // problem.dtype.itemsize
    found = (wide, 1) if not slides else (wide, wide // 2, 1) if problem.weight[2] == 3 else (wide // 2, wide // 4, 1)
    return [width for width in dict.fromkeys(found) if problem.x[1] % width == 0]


def unsupported(problem, capability) -> str:
    if not problem.depthwise:
        return "not a depthwise convolution"
    if max(problem.weight[2:]) > MOST_TAPS:
        return f"its window is wider than {MOST_TAPS}"
    sizes = (*problem.x[2:], *problem.size)
    if max(math.prod(problem.x[1:]), math.prod(problem.output[1:]), max(sizes) + 2 * max(problem.padding)) >= 1 << 31:
        return "an image of more than 2^31 elements"
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


def configs(problem, capability) -> list[Config]:
    """For each width of an access the rows that fill the GPU; half of 16 bytes first, which leaves registers for more
    threads, and for 5x5 two channels, which leave some for four columns."""
    if not _own_kernel(problem.weight[2:], problem.stride, problem.dilation):
        return [Config(NAME, (1, _widths(problem, False)[0]), 4, 1)]
    n, k, p, q = problem.output
    found = []
    for width in _widths(problem, True)[:2]:
        warps = n * cdiv(q, 2) * (k // width) / WARP  # where every thread has a whole column
        rows = min(ROWS, key=lambda rows, warps=warps: _steps_in_a_row(problem, rows, warps))
        blocks = (4,) if warps * cdiv(p, rows) >= WARPS else (1, 4)
        found += [Config(NAME, (rows, width), warps_of_a_block, 1) for warps_of_a_block in blocks]
    likeliest = 8 // problem.dtype.itemsize if problem.weight[2] == 3 else 2
    return sorted(found, key=lambda config: config.blocks[1] != likeliest)


def _steps_in_a_row(problem, rows: int, warps: float) -> float:
    """Of the GPU, where `warps` have a whole column to go: the last wave is half empty, and each has steps to begin."""
    p, parts = problem.size[0], cdiv(problem.size[0], rows)
    begin = (problem.weight[2] - 1) // problem.stride[0] + 1
    return (max(warps * parts / WARPS, 1) + 1) * (cdiv(p, parts) + begin)


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return aligned(weight.detach().flatten(1).t().to(dtype).contiguous())


def pack(weight, problem, config) -> Tensor:
    """[R * S, C] in x's dtype."""
    return _packed(weight, problem.dtype)


def run(problem, config, x, weights, scale, shift, residual, out) -> None:
    p = problem.size[0]
    rows, channels = config.blocks
    tile = (cdiv(p, cdiv(p, rows)), channels, config.num_warps)  # the rows in equal parts
    torch.ops.fused_resnet_C.cuda_depthwise_fwd(
        x, weights, scale, shift, residual, geometry(problem), tile, ACT_CODES[problem.act], out
    )


def _geometry(window, args) -> tuple[int, ...]:
    return *window, *args.stride, *args.padding, *args.dilation


def input_gradient(grad: Tensor, x_shape, weight: Tensor, args) -> Tensor:
    """The gradient of x, from that of the output; both are channels_last. `args` as of a convolution."""
    dx = torch.empty(x_shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    wide = 16 // grad.dtype.itemsize
    threads = x_shape[0] * x_shape[1] * x_shape[3] // wide
    rows = 14 if threads * cdiv(x_shape[2], 14) >= WARPS * WARP else 4
    torch.ops.fused_resnet_C.cuda_depthwise_dgrad(
        grad, _packed(weight, grad.dtype), _geometry(weight.shape[2:], args), (rows, wide, 4), dx
    )
    return dx


def weight_gradient(grad: Tensor, x: Tensor, weight_shape, args) -> Tensor:
    """The gradient of the weight in fp32, from that of the output; `grad` and `x` are channels_last.

    The number of partial sums depends on the problem alone, so that the result is the same on every GPU.
    """
    channels, _, *window = weight_shape
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    most = max(cdiv(MOST_PARTIALS, cdiv(channels, 128)), MULTIPROCESSORS)
    tiles = min(max(cdiv(pixels, PIXELS_OF_A_PARTIAL), 1), most)
    workspace = torch.empty((tiles, math.prod(window), channels), dtype=torch.float32, device=grad.device)
    dweight = torch.empty(tuple(weight_shape), dtype=torch.float32, device=grad.device)
    torch.ops.fused_resnet_C.cuda_depthwise_wgrad(grad, x, _geometry(window, args), workspace, dweight)
    return dweight


FAMILY = Family(NAME, unsupported, configs, pack, run)
