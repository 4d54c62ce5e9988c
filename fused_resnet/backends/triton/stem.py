"""7x7 convolution with stride 2 on an image of 1 to 4 channels, the first layer of a ResNet, by TMA.

A first kernel writes the image into a workspace that TMA can read: four channels a pixel, zeros for the padding and for
missing channels. There the seven pixels of a filter's row are 28 elements in a row, and the window of the next column
starts two pixels, 16 or 32 bytes, further: so one load a row of the filter, from a view whose windows overlap. The
view ends after the 28th element and TMA fills the tile up to 32 with zeros: no pixel outside of the filter is
multiplied, even by zero, which would spread its NaN.

A driver may refuse a view that overlaps: with PITCH 32 every window is written out, at four times the memory.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.triton.epilogue import dot
from fused_resnet.backends.triton.launch import (
    Config,
    Family,
    Launch,
    aligned,
    cdiv,
    is_wide,
    nhwc,
    pixels,
    precision,
    rows,
    takes_large_tiles,
    tensor_cores,
)
from fused_resnet.backends.triton.statistics import NO_PARTIALS
from fused_resnet.backends.triton.tiles import count_tiles, finish, moment_tiles, place, tile_shape

NAME = "stem"
# Pixels and output channels of a tile; elements from one window of the workspace to the next.
BLOCKS = ("BLOCK_M", "BLOCK_N", "PITCH")
OVERLAPPING, WRITTEN_OUT = 8, 32

R = 7
PADDING = 3
WINDOW = 28  # seven pixels of four channels
STEP = 32  # the window in a tile
PACK_BLOCK = 1024

CONFIGS = tuple(
    Config(NAME, (block_m, block_n, pitch), warps, stages)
    for pitch in (OVERLAPPING, WRITTEN_OUT)
    for block_m, block_n, warps, stages in ((128, 64, 4, 4), (256, 64, 8, 4), (64, 64, 4, 4), (128, 128, 8, 4))
)


class Columns(NamedTuple):
    """Which column of the output the windows of a workspace's row belong to.

    Window ((tile * deep + v) * wide + u) * 2 + b is of column 2 * ((tile * wide + u) * step + v) + b - left.
    """

    deep: int = 1
    wide: int = 1
    step: int = 1
    left: int = 0


@triton.jit
def stem_pack_kernel(
    x_ptr, workspace_ptr, H, W, C, rows_padded, row_size,
    PITCH: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, LEFT: tl.constexpr,
    PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """workspace[i, h, window, 4 * s + c] = x[i, h - PADDING, 2 * column(window) - PADDING + s, c], else zero.

    BLOCK elements of a row of the workspace a program.
    """
    chunks = tl.cdiv(row_size, BLOCK)
    pid = tl.program_id(0)
    row = pid // chunks
    h = row % rows_padded - PADDING
    offs = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    window = offs // PITCH
    u = window // 2 % WIDE
    v = window // (2 * WIDE) % DEEP
    tile = window // (2 * WIDE * DEEP)
    column = 2 * ((tile * WIDE + u) * STEP + v) + window % 2 - LEFT
    w = 2 * column - PADDING + offs % PITCH // 4
    c = offs % 4
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (c < C)
    x_row = ((row // rows_padded).to(tl.int64) * H + h) * W * C
    x = tl.load(x_ptr + x_row + w * C + c, mask=inside, other=0.0)
    tl.store(workspace_ptr + row.to(tl.int64) * row_size + offs, x, mask=offs < row_size)


@triton.jit
def stem_fwd_kernel(
    x_desc, w_desc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, K, tiles_p, tiles_q,
    R: tl.constexpr, STEP: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[i, p, q, k] = act(sum_rsc x[i, 2*p+r-3, 2*q+s-3, c] w[k, r, s, c] * scale[k] + shift[k]
    + residual[i, p, q, k]).

    One tile of BLOCK_I images, BLOCK_P rows and BLOCK_Q columns by BLOCK_N channels a program, one row of the filter a
    step; fp32 accumulation. `x_desc` is [N, P + 3, 2, Q, WINDOW]: pairs of rows of the workspace.
    """
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_P * BLOCK_Q
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BLOCK_N
    tile = pid // tiles_n
    i, p, q = place(tile, tiles_p, tiles_q, BLOCK_I, BLOCK_P, BLOCK_Q)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in range(0, R):
        x = x_desc.load([i, p + r // 2, r % 2, q, 0]).reshape(BLOCK_M, STEP)
        acc = dot(w_desc.load([n, r * STEP]), x.T, acc, PRECISION)
    finish(
        acc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, tile, i, p, q, n, K,
        BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_N, HAS_RESIDUAL, ACT,
    )  # fmt: skip


def unsupported(problem, capability) -> str:
    window = problem.weight[2:], problem.stride, problem.padding, problem.dilation
    if window != ((R, R), (2, 2), (PADDING, PADDING), (1, 1)) or problem.groups != 1:
        return "not a 7x7 convolution with stride 2 and padding 3"
    if problem.x[1] > 4:
        return "more than 4 channels"
    if not aligned(problem, problem.weight[0]):
        return "its channels are not multiples of 16 bytes"
    if not tensor_cores(problem):
        return "fp32 without TF32 has no tensor cores"
    p, q = problem.size
    if is_wide(problem.x[0] * (2 * p + 2 * PADDING) * (cdiv(q, 16) + 1)):  # programs of the first kernel, at most
        return "more than 2^31 programs"
    return "" if capability >= (9, 0) else "it needs TMA, of compute capability 9.0"


def configs(problem, capability) -> list[Config]:
    """Overlapping windows first; tiles of 128 pixels, or 64 where those do not fill the GPU."""
    k, m = problem.weight[0], pixels(problem.output)
    wanted = 64 if cdiv(m, 128) * cdiv(k, 64) < 132 else 128  # SMs of an H200
    fit = [c for c in CONFIGS if c.blocks[1] == 64 or k > 64]
    fit = [c for c in fit if max(c.blocks[:2]) == 64 or takes_large_tiles(capability)]
    return sorted(fit, key=lambda c: (c.blocks[2], abs(c.blocks[0] - wanted), c.blocks[1]))


def pack(weight, problem, config) -> Tensor:
    """[K, R * STEP]: the rows of the filter, each filled up with zeros."""
    k, c, r, s = problem.weight
    packed = weight.new_zeros((k, r, STEP // 4, 4), dtype=problem.dtype)
    packed[:, :, :s, :c] = weight.detach().permute(0, 2, 3, 1)
    return packed.reshape(k, -1)


def workspace(problem, x: Tensor, windows: int, pitch: int, columns: Columns) -> tuple[Tensor, Launch]:
    """[N, 2P + 6, windows a row * pitch], and the launch that fills it."""
    n, c, h, w = problem.x
    # At a pitch below a window's length the last window goes on into others, which belong to no column.
    row_size = cdiv(windows * pitch + STEP - pitch, 16) * 16  # aligned, so that stores are wide
    space = x.new_empty((n, 2 * problem.size[0] + 2 * PADDING, row_size))
    args = (x, space, h, w, c, space.shape[1], row_size)
    constants = {
        "PITCH": pitch, "DEEP": columns.deep, "WIDE": columns.wide, "STEP": columns.step, "LEFT": columns.left,
        "PADDING": PADDING, "BLOCK": PACK_BLOCK,
    }  # fmt: skip
    grid = n * space.shape[1] * cdiv(row_size, PACK_BLOCK)
    return space, Launch(stem_pack_kernel, grid, args, constants, num_warps=4, num_stages=1)


def launches(problem, config, x, weights, scale, shift, residual, out, partials=NO_PARTIALS) -> tuple[Launch, ...]:
    block_m, block_n, pitch = config.blocks
    n, k, (p, q) = problem.x[0], problem.weight[0], problem.size
    tile = tile_shape(n, p, q, block_m)
    space, fill = workspace(problem, x, q, pitch, Columns())
    _, height, row_size = space.shape
    strides = [height * row_size, 2 * row_size, row_size, pitch, 1]
    x_desc = TensorDescriptor(space, [n, height // 2, 2, q, WINDOW], strides, [tile[0], tile[1], 1, tile[2], STEP])
    y_desc = nhwc(out, *tile, block_n)
    residual_desc = y_desc if residual is None else nhwc(residual, *tile, block_n)
    tiles = count_tiles(problem, tile)
    args = (x_desc, rows(weights, block_n, STEP), residual_desc, y_desc, scale, shift, *partials, k, tiles[1], tiles[2])
    constants = {
        "R": R, "STEP": STEP, "BLOCK_I": tile[0], "BLOCK_P": tile[1], "BLOCK_Q": tile[2], "BLOCK_N": block_n,
        "HAS_RESIDUAL": residual is not None, "ACT": problem.act, "PRECISION": precision(problem),
    }  # fmt: skip
    grid = tiles[0] * tiles[1] * tiles[2] * cdiv(k, block_n)
    return fill, Launch(stem_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages)


FAMILY = Family(NAME, unsupported, configs, pack, launches, tiles=moment_tiles)
