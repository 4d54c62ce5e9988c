"""Tiles of an image over batch, rows and columns: their shape, how TMA reads a tap of them, and how one is finished."""

from functools import lru_cache

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.triton.epilogue import activate, rounded
from fused_resnet.backends.triton.launch import cdiv, nhwc
from fused_resnet.backends.triton.statistics import store_tile_moments


@lru_cache(4096)  # asked at every launch
def tile_shape(n: int, p: int, q: int, block_m: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile of `block_m` pixels with the least waste; of equals, the squarest.

    A square reads fewest pixels beyond its edges, and those are in L1 and L2; tiles over several images waste nothing
    on small maps of large batches.
    """

    def cost(shape):
        i, rows, columns = shape
        computed = cdiv(n, i) * i * cdiv(p, rows) * rows * cdiv(q, columns) * columns
        return computed, (rows + 2) * (columns + 2) / (rows * columns)

    powers = [1 << e for e in range(block_m.bit_length())]
    shapes = [(block_m // (r * s), r, s) for r in powers for s in powers if r * s <= block_m]
    return min((s for s in shapes if max(s) <= 256), key=cost)  # TMA takes no more than 256 of a dimension


def image(problem, x, tile, step: int) -> TensorDescriptor:
    """x in tiles of `step` channels. With stride 2 it is [N, H/2, 2, W/2, 2C], of which a tap reads one parity of rows
    and of columns; beyond the last channel of an even column lie those of the odd one.
    """
    if problem.stride == (1, 1):
        return nhwc(x, *tile, step)
    n, c, h, w = problem.x
    strides = [h * w * c, 2 * w * c, w * c, 2 * c, 1]
    return TensorDescriptor(x, [n, h // 2, 2, w // 2, 2 * c], strides, [tile[0], tile[1], 1, tile[2], step])


def window(problem) -> dict[str, int]:
    """The constants of a kernel that say where the taps lie."""
    return {
        "R": problem.weight[2], "S": problem.weight[3], "STRIDE": problem.stride[0],
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
    }  # fmt: skip


def count_tiles(problem, tile) -> tuple[int, int, int]:
    """Tiles over the batch, the rows and the columns of the output."""
    n, (p, q) = problem.x[0], problem.size
    return cdiv(n, tile[0]), cdiv(p, tile[1]), cdiv(q, tile[2])


def moment_tiles(problem, config) -> int:
    """How many tiles leave their moments; the first of the configuration's blocks is a tile's pixels."""
    images, rows, columns = count_tiles(problem, tile_shape(problem.x[0], *problem.size, config.blocks[0]))
    return images * rows * columns


@triton.jit
def place(tile, tiles_p, tiles_q, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The first image, row and column of a tile."""
    i = (tile // (tiles_p * tiles_q)) * BLOCK_I
    p = (tile // tiles_q % tiles_p) * BLOCK_P
    q = (tile % tiles_q) * BLOCK_Q
    return i, p, q


@triton.jit
def load_tap(
    x_desc, i, p, q, first, step, C,
    S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, CHANNEL_STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pixels that a step reads, [BLOCK_M, BLOCK_K], from the channel `first` of the tile on."""
    tap = step // CHANNEL_STEPS
    c = first + (step % CHANNEL_STEPS) * BLOCK_K
    h = (tap // S) * DIL_H - PAD_H
    w = (tap % S) * DIL_W - PAD_W
    if STRIDE == 2:
        x = x_desc.load([i, p + (h >> 1), h & 1, q + (w >> 1), (w & 1) * C + c])
    else:
        x = x_desc.load([i, p + h, q + w, c])
    return x.reshape(BLOCK_M, BLOCK_K)


@triton.jit
def finish(
    acc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, tile, i, p, q, n, K,
    BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Store act(acc * scale + shift + residual) of a tile; acc is [BLOCK_N, BLOCK_I * BLOCK_P * BLOCK_Q].

    Where there are partials, their row `tile` is the moments of what is stored.
    """
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_P * BLOCK_Q
    offs_n = n + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0)
    shift = tl.load(shift_ptr + offs_n, mask=offs_n < K, other=0.0)
    y = acc * scale[:, None] + shift[:, None]
    if HAS_RESIDUAL:
        y += residual_desc.load([i, p, q, n]).reshape(BLOCK_M, BLOCK_N).T.to(tl.float32)
    y = rounded(activate(y, ACT), y_desc.dtype)
    y_desc.store([i, p, q, n], y.T.reshape(BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_N))
    if partials_ptr is not None:
        images = (y_desc.shape[0] - i).to(tl.int32)
        rows = (y_desc.shape[1] - p).to(tl.int32)
        columns = (y_desc.shape[2] - q).to(tl.int32)
        m = tl.arange(0, BLOCK_M)
        inside = (m // (BLOCK_P * BLOCK_Q) < images) & (m // BLOCK_Q % BLOCK_P < rows) & (m % BLOCK_Q < columns)
        count = tl.minimum(images, BLOCK_I) * tl.minimum(rows, BLOCK_P) * tl.minimum(columns, BLOCK_Q)
        store_tile_moments(
            y.to(tl.float32), inside, count.to(tl.float32), partials_ptr, counts_ptr, tile, offs_n, K, offs_n < K, 1
        )  # fmt: skip
