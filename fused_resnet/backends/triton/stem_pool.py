"""The stem's convolution by strips of rows, with the 3x3 max-pool behind it (`FAMILY`) or without one (`ROWS`).

A program walks down a strip, a pair of rows of the image at a time. A pair belongs to the windows of four rows of the
output, so there are sums of four rows at work, and each pair is read once where tiles read it 3.5 times: they are bound
by L2. The weights stay in shared memory.

A tile of the accumulator is [BLOCK_N, DEEP, WIDE, 2] columns: in the tensor cores' layout the last two dimensions are
a thread's pair and the four threads of a quad, and DEEP is its registers. Each thread thus has 2 * DEEP neighbouring
columns, and pools them without asking another one.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.triton import stem
from fused_resnet.backends.triton.epilogue import activate, dot, rounded
from fused_resnet.backends.triton.launch import Config, Family, Launch, cdiv, precision, rows
from fused_resnet.backends.triton.stem import OVERLAPPING, PADDING, STEP, WINDOW, WRITTEN_OUT, Columns

NAME, ROWS_NAME = "stem_pool", "stem_rows"
# Rows of a strip (pooled ones, where there is a pool), columns of a tile, output channels; the pitch is the stem's.
BLOCKS = ("ROWS", "COLUMNS", "BLOCK_N", "PITCH")

WIDE = 4  # threads that share a row of the accumulator
BLOCK_N = 64
STRIPS = (28, 14, 7, 3, 1)
COLUMNS_AT_ONCE = 132 * 2 * 64  # by registers: two programs of 64, or four of 32, on each SM of an H200


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def shifted(x):
    """x[:, v + 1, :] at v, and at the last v anything: within a thread, where `tl.gather` would leave it."""
    N: tl.constexpr = x.shape[0]
    DEEP: tl.constexpr = x.shape[1]
    WIDE: tl.constexpr = x.shape[2]
    if DEEP == 1:
        return x
    else:
        even, odd = tl.split(x.reshape(N, DEEP // 2, 2, WIDE).permute(0, 1, 3, 2))
        return tl.join(odd, shifted(even)).permute(0, 1, 3, 2).reshape(N, DEEP, WIDE)


@triton.jit
def stem_rows_fwd_kernel(
    x_desc, w_desc, y_ptr, scale_ptr, shift_ptr, P, Q, P_out, Q_out, rows_padded, strips, tiles,
    K: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, ADVANCE: tl.constexpr,
    STEP: tl.constexpr, PADDING: tl.constexpr, BLOCK_N: tl.constexpr, POOL: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z[i, p, q, k] = act(sum_rsc x[i, 2*p+r-3, 2*q+s-3, c] w[k, r, s, c] * scale[k] + shift[k]), and
    y[i, p, q, k] = max over dp, dq in (-1, 0, 1) of z[i, 2*p+dp, 2*q+dq, k], or y = z without POOL.

    ROWS rows of y by a tile of columns by BLOCK_N channels a program; fp32 accumulation. `x_desc` is the workspace as
    [rows, columns, WIDE, 2, WINDOW], of which a tile advances ADVANCE.
    """
    COLUMNS: tl.constexpr = 2 * DEEP * WIDE  # of z
    OVERLAP: tl.constexpr = 1 if POOL else 0  # a pooled column needs the next one's first
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BLOCK_N
    tile = pid // tiles_n % tiles
    strip = pid // (tiles_n * tiles) % strips
    i = pid // (tiles_n * tiles * strips)
    first = strip * ROWS * 2 - 1 if POOL else strip * ROWS  # row of z
    column = tl.arange(0, COLUMNS)
    u, v = column // 2 % WIDE, column // (2 * WIDE)
    z_column = 2 * ((tile * WIDE + u) * (DEEP - OVERLAP) + v) + column % 2 - OVERLAP
    z_inside = (z_column >= 0) & (z_column < Q)
    if POOL:
        q = tl.arange(0, DEEP * WIDE)
        u, v = q % WIDE, q // WIDE
        q = (tile * WIDE + u) * (DEEP - 1) + v
        y_inside = (q < Q_out) & (v < DEEP - 1)
    else:
        q = z_column
        y_inside = z_inside
    offs_n = n + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + i.to(tl.int64) * P_out * Q_out * K + (q[:, None] * K + offs_n[None, :])
    y_mask = y_inside[:, None] & (offs_n < K)[None, :]
    scale = tl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0)
    shift = tl.load(shift_ptr + offs_n, mask=offs_n < K, other=0.0)
    w0, w1 = w_desc.load([n, 0]), w_desc.load([n, STEP])
    w2, w3 = w_desc.load([n, 2 * STEP]), w_desc.load([n, 3 * STEP])
    w4, w5, w6 = w_desc.load([n, 4 * STEP]), w_desc.load([n, 5 * STEP]), w_desc.load([n, 6 * STEP])
    zero = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    ahead1, ahead2, ahead3 = zero, zero, zero  # sums of the rows of z after the one that is completed
    before2 = tl.zeros((BLOCK_N, DEEP, WIDE), tl.float32)
    before1 = before2
    for step in range(0, (2 * ROWS + 1 if POOL else ROWS) + 3):
        p = first + step - 3  # the row of z completed here, if step >= 3
        h = i * rows_padded + 2 * (p + 1) + PADDING
        even = x_desc.load([h, tile * ADVANCE, 0, 0, 0]).reshape(COLUMNS, STEP).T
        odd = x_desc.load([h + 1, tile * ADVANCE, 0, 0, 0]).reshape(COLUMNS, STEP).T
        z = dot(w5, even, ahead1, PRECISION)
        ahead1 = dot(w3, even, ahead2, PRECISION)
        ahead2 = dot(w1, even, ahead3, PRECISION)
        z = dot(w6, odd, z, PRECISION)
        ahead1 = dot(w4, odd, ahead1, PRECISION)
        ahead2 = dot(w2, odd, ahead2, PRECISION)
        ahead3 = dot(w0, odd, zero, PRECISION)
        y = activate(z * scale[:, None] + shift[:, None], ACT)
        p_out = p
        done = step >= 3
        if POOL:
            y = tl.where((z_inside & (p >= 0) & (p < P))[None, :], y, float("-inf"))
            y1, y2 = tl.split(y.reshape(BLOCK_N, DEEP, WIDE, 2))
            y0 = larger(larger(y1, y2), shifted(y1))
            y = larger(larger(before2, before1), y0).reshape(BLOCK_N, DEEP * WIDE)
            before2, before1 = before1, y0
            p_out = (p - 1) // 2
            done = (step >= 5) & (step % 2 == 1)
        mask = y_mask & done & (p_out < P_out)
        tl.store(y_ptrs + p_out.to(tl.int64) * Q_out * K, rounded(y, y_ptr.dtype.element_ty).T, mask=mask)


def unsupported(problem, capability) -> str:
    return "it takes no residual" if problem.residual else stem.unsupported(problem, capability)


def _output(problem, pool: bool) -> tuple[int, int]:
    p, q = problem.size
    return ((p + 1) // 2, (q + 1) // 2) if pool else (p, q)


def _tiling(problem, config) -> tuple[bool, int, int, int, int]:
    """Whether there is a pool; DEEP; columns of the output a thread; strips and tiles."""
    pool, deep = config.family == NAME, config.blocks[1] // (2 * WIDE)
    p, q = _output(problem, pool)
    step = deep - 1 if pool else deep
    return pool, deep, step, cdiv(p, config.blocks[0]), cdiv(q, (1 if pool else 2) * step * WIDE)


def _cost(problem, config) -> int:
    """Steps of the programs that run one after the other."""
    pool, _, _, strips, tiles = _tiling(problem, config)
    columns = problem.x[0] * strips * tiles * cdiv(problem.weight[0], BLOCK_N) * config.blocks[1]
    steps = config.blocks[0] * (2 if pool else 1) + 3 + pool
    return cdiv(columns, COLUMNS_AT_ONCE) * steps


def _configs(name: str):
    table = [
        Config(name, (strip, columns, BLOCK_N, pitch), 4, 3)
        for pitch in (OVERLAPPING, WRITTEN_OUT)
        for columns in (64, 32)
        for strip in STRIPS
    ]

    def configs(problem, capability) -> list[Config]:
        """Overlapping windows first; strips that fill the GPU with the fewest rows in common."""
        return sorted(table, key=lambda c: (c.blocks[3], _cost(problem, c)))

    return configs


def _view(problem, config, x: Tensor) -> tuple[TensorDescriptor, Launch, int]:
    """The workspace as the kernel reads it, the launch that fills it, and how far a tile advances in it.

    Where windows overlap, the view's strides are not in descending order either: the threads' lies before the columns'.
    """
    pool, deep, step, _, tiles = _tiling(problem, config)
    pitch = config.blocks[3]
    if pitch == WRITTEN_OUT:
        columns = Columns(deep, WIDE, step, int(pool))
        windows, advance = 2 * WIDE * deep * tiles, deep
        strides = [2 * WIDE * pitch, 2 * pitch, pitch, 1]
    else:
        columns = Columns(left=int(pool))
        windows, advance = 2 * WIDE * step * tiles + 2 * (deep - step), WIDE * step
        strides = [2 * pitch, 2 * step * pitch, pitch, 1]
    space, fill = stem.workspace(problem, x, windows, pitch, columns)
    n, height, row_size = space.shape
    shape = [n * height, advance * (tiles - 1) + deep, WIDE, 2, WINDOW]
    return TensorDescriptor(space, shape, [row_size, *strides], [1, deep, WIDE, 2, STEP]), fill, advance


def launches(problem, config, x, weights, scale, shift, residual, out) -> tuple[Launch, ...]:
    """`out` is the pooled output, where there is a pool; there is no residual."""
    pool, deep, _, strips, tiles = _tiling(problem, config)
    x_desc, fill, advance = _view(problem, config, x)
    strip, _, block_n, _ = config.blocks
    n, k, (p, q) = problem.x[0], problem.weight[0], problem.size
    p_out, q_out = _output(problem, pool)
    args = (
        x_desc, rows(weights, block_n, STEP), out, scale, shift, p, q, p_out, q_out, 2 * p + 2 * PADDING,
        strips, tiles,
    )  # fmt: skip
    constants = {
        "K": k, "ROWS": strip, "DEEP": deep, "WIDE": WIDE, "ADVANCE": advance, "STEP": STEP, "PADDING": PADDING,
        "BLOCK_N": block_n, "POOL": pool, "ACT": problem.act, "PRECISION": precision(problem),
    }  # fmt: skip
    grid = n * strips * tiles * cdiv(k, block_n)
    return fill, Launch(stem_rows_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages)


FAMILY = Family(NAME, unsupported, _configs(NAME), stem.pack, launches)
ROWS = Family(ROWS_NAME, unsupported, _configs(ROWS_NAME), stem.pack, launches)
