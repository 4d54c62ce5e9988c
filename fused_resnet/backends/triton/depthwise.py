"""Depthwise convolution by sliding rows: a program walks down its columns, and reads each row of the image once.

A thread holds a few channels of COLUMNS neighbouring outputs, so that one load and one conversion of an input serve
all of the outputs that it reaches; the filter stays in registers. Every input row is added to the output rows below
which it lies, of which (R - 1) / STRIDE are unfinished at a time. The next row is asked for while one is multiplied.
No tensor cores and no TMA: any capability, any number of channels, and fp32 is fp32.
"""

import torch
import triton
import triton.language as tl

from fused_resnet.backends.triton.epilogue import activate, rounded
from fused_resnet.backends.triton.launch import Config, Family, Launch, cdiv, is_wide

NAME = "depthwise"
# Output rows, columns and channels of a program, neighbouring columns of a thread.
BLOCKS = ("BLOCK_P", "BLOCK_Q", "BLOCK_C", "COLUMNS")

TILES = ((16, 64), (8, 64), (8, 128), (16, 32), (32, 32), (64, 16))  # BLOCK_Q, BLOCK_C
# Columns and channels of a thread, the fewest instructions an output first. 4 channels of 16 bits are loads of 8 bytes,
# of which more are in flight: 8 channels take so many registers that half as many threads fit.
THREADS = ((4, 4), (4, 2), (2, 8), (2, 4), (2, 2), (4, 1))
ROWS = (56, 28, 14, 7, 4, 2)
REGISTERS = 208  # of 255: an estimate may be a fifth too low
MOST_TAPS = 7  # in each direction

WARPS = 132 * 16  # that run at once: of the SMs of an H200, each with 512 threads of 128 registers


@triton.jit
def load_rows(
    row_ptr, h, first, last, row_size, x_offs, w, W, channels,
    C: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """COUNT input rows from h on: of each, the WIDTH columns that a thread needs; zeros outside of the image."""
    tiles = ()
    for t in tl.static_range(COUNT):
        inside = (h + t >= first) & (h + t < last)
        for j in tl.static_range(WIDTH):
            mask = ((w + j >= 0) & (w + j < W) & inside)[:, None] & channels
            tiles = tiles + (tl.load(row_ptr + t * row_size + x_offs + j * C, mask=mask, other=0.0),)
    return tiles


@triton.jit
def push(
    sums, rows, weights, COUNT: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the last COUNT input rows of the first of the output rows in `sums`, [row, column], to all of them."""
    for t in tl.static_range(COUNT):
        for j in tl.static_range(WIDTH):
            x = rows[t * WIDTH + j].to(tl.float32)
            added = ()
            for d in tl.static_range(len(sums) // COLUMNS):
                for u in tl.static_range(COLUMNS):
                    total = sums[d * COLUMNS + u]
                    if d * STRIDE <= R - COUNT + t and (u * STRIDE <= j and j < u * STRIDE + S):
                        total += x * weights[(R - COUNT + t - d * STRIDE) * S + j - u * STRIDE]
                    added = added + (total,)
            sums = added
    return sums


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "tiles_p", "tiles_q"])
def depthwise_fwd_kernel(
    x_ptr, w_ptr, residual_ptr, y_ptr, scale_ptr, shift_ptr, H, W, P, Q, tiles_p, tiles_q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y[i, p, q, c] = act(sum_rs x[i, p*STRIDE+r-PAD_H, q*STRIDE+s-PAD_W, c] w[r, s, c] * scale[c] + shift[c]
    + residual[i, p, q, c]).

    BLOCK_P rows of BLOCK_Q columns by BLOCK_C channels of one image a program; tiles are [BLOCK_Q / COLUMNS, BLOCK_C],
    fp32 accumulation. Steps before the first fill the sums of the rows that are unfinished at any time.
    """
    COUNT: tl.constexpr = min(R, STRIDE)  # input rows of a step
    OPEN: tl.constexpr = (R - 1) // STRIDE  # output rows that are unfinished between two steps
    WIDTH: tl.constexpr = (COLUMNS - 1) * STRIDE + S
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // tiles_c
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    q = (tile % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q // COLUMNS) * COLUMNS
    p = (tile // tiles_q % tiles_p) * BLOCK_P
    i = (tile // (tiles_q * tiles_p)).to(tl.int64)
    w = q * STRIDE - PAD_W
    h = p * STRIDE - PAD_H
    first = tl.maximum(h, 0)
    last = tl.minimum(h + (BLOCK_P - 1) * STRIDE + R, H)
    h += R - COUNT - OPEN * STRIDE
    channels = (c < C)[None, :]
    x_row = tl.cast(W, tl.int64) * C
    y_row = tl.cast(Q, tl.int64) * C
    x_offs = w[:, None] * C + c[None, :]
    y_offs = q[:, None] * C + c[None, :]
    row_ptr = x_ptr + (i * H + h) * x_row
    y_base = (i * P + p - OPEN) * y_row
    rows = load_rows(row_ptr, h, first, last, x_row, x_offs, w, W, channels, C, COUNT, WIDTH)
    # As wide as the tiles, so that they lie in registers as those do.
    c_wide = c[None, :] + tl.zeros((BLOCK_Q // COLUMNS, 1), tl.int32)
    weights = ()
    for tap in tl.static_range(R * S):
        weights = weights + (tl.load(w_ptr + tap * C + c_wide, mask=c_wide < C, other=0.0),)
    scale = tl.load(scale_ptr + c_wide, mask=c_wide < C, other=0.0)
    shift = tl.load(shift_ptr + c_wide, mask=c_wide < C, other=0.0)
    sums = ()
    for _ in tl.static_range(OPEN * COLUMNS):
        sums = sums + (tl.zeros((BLOCK_Q // COLUMNS, BLOCK_C), tl.float32),)
    for step in range(-OPEN, BLOCK_P):
        h += STRIDE
        row_ptr += STRIDE * x_row
        ahead = load_rows(row_ptr, h, first, last, x_row, x_offs, w, W, channels, C, COUNT, WIDTH)
        masks, residuals = (), ()
        for u in tl.static_range(COLUMNS):
            masks = masks + (((q + u < Q) & (step >= 0) & (p + step < P))[:, None] & channels,)
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + y_base + y_offs + u * C, mask=masks[u], other=0.0)
                residuals = residuals + (residual,)
            sums = sums + (tl.zeros((BLOCK_Q // COLUMNS, BLOCK_C), tl.float32),)
        sums = push(sums, rows, weights, COUNT, R, S, STRIDE, COLUMNS, WIDTH)
        for u in tl.static_range(COLUMNS):
            y = sums[u] * scale + shift
            if HAS_RESIDUAL:
                y += residuals[u].to(tl.float32)
            tl.store(y_ptr + y_base + y_offs + u * C, rounded(activate(y, ACT), y_ptr.dtype.element_ty), mask=masks[u])
        sums = sums[COLUMNS:]
        rows = ahead
        y_base += y_row


def unsupported(problem, capability) -> str:
    if not problem.depthwise:
        return "not a depthwise convolution"
    if problem.stride not in ((1, 1), (2, 2)) or problem.dilation != (1, 1):
        return "it takes a stride of 1 or 2, and no dilation"
    if max(problem.weight[2:]) > MOST_TAPS:
        return f"its window is wider than {MOST_TAPS}"
    if is_wide(problem.x[1] * (max(problem.x[3], problem.size[1]) + 2 * problem.padding[1])):
        return "a row of more than 2^31 elements"
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


def registers(problem, columns: int, channels: int) -> int:
    """Of a thread: the filter, scale and shift, the sums, the rows read and the rows asked for, addresses."""
    _, _, r, s = problem.weight
    stride = problem.stride[0]
    sums = ((r - 1) // stride + 1) * columns
    inputs = 2 * min(r, stride) * ((columns - 1) * stride + s) * problem.dtype.itemsize // 4
    estimate = channels * (r * s + 2 + sums + inputs) + 30
    return estimate * 4 // 3 if problem.x[1] % channels else estimate  # no wide loads: every element has an address


def configs(problem, capability) -> list[Config]:
    """For each way to lay out a thread the two tiles with the least waste, and as many rows as are done soonest."""
    n, k, _, q = problem.output
    stride, s = problem.stride[1], problem.weight[3]

    def waste(tile):
        """Lanes computed for each that is needed; columns read twice cost half, as they come from L2."""
        block_q, block_c = tile
        lanes = cdiv(q, block_q) * block_q * cdiv(k, block_c) * block_c / (q * k)
        return lanes * (1 + max(s - stride, 0) / (2 * stride * block_q))

    found = []
    fit = [t for t in THREADS if registers(problem, *t) <= REGISTERS]
    if stride == 2 and len(fit) > 1:
        fit = [t for t in fit if t != (4, 1)]  # which spills
    for columns, channels in fit[:4]:
        for block_q, block_c in sorted(TILES, key=waste)[:2]:
            warps = block_q * block_c // (32 * columns * channels)
            tiles = n * cdiv(q, block_q) * cdiv(k, block_c)
            rows = min(ROWS, key=lambda rows, warps=tiles * warps: _steps_in_a_row(problem, rows, warps))
            found.append(Config(NAME, (rows, block_q, block_c, columns), warps, 1))
    return found


def _steps_in_a_row(problem, rows: int, warps: int) -> float:
    """Of the GPU, where `warps` have a whole column to go: the last wave is half empty, and each has steps to begin."""
    p, parts = problem.size[0], cdiv(problem.size[0], rows)
    begin = (problem.weight[2] - 1) // problem.stride[0] + 1
    return (max(warps * parts / WARPS, 1) + 1) * (cdiv(p, parts) + begin)


def pack(weight, problem, config) -> torch.Tensor:
    """[R * S, C] in fp32."""
    return weight.detach().flatten(1).t().float().contiguous()


def launches(problem, config, x, weights, scale, shift, residual, out) -> tuple[Launch, ...]:
    block_p, block_q, block_c, columns = config.blocks
    (n, c, h, w), (p, q) = problem.x, problem.size
    block_p = cdiv(p, cdiv(p, block_p))  # the rows in equal parts
    tiles_p, tiles_q = cdiv(p, block_p), cdiv(q, block_q)
    args = (x, weights, out if residual is None else residual, out, scale, shift, h, w, p, q, tiles_p, tiles_q)
    constants = {
        "C": c, "R": problem.weight[2], "S": problem.weight[3], "STRIDE": problem.stride[0],
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1],
        "BLOCK_P": block_p, "BLOCK_Q": block_q, "BLOCK_C": block_c, "COLUMNS": columns,
        "HAS_RESIDUAL": residual is not None, "ACT": problem.act,
    }  # fmt: skip
    grid = n * tiles_p * tiles_q * cdiv(c, block_c)
    return (Launch(depthwise_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages),)


FAMILY = Family(NAME, unsupported, configs, pack, launches)
