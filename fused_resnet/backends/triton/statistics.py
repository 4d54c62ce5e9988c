"""Mean and variance of the channels: of tiles of rows (pixels) first, which a second kernel merges in a fixed order.

A tile's mean is the sum of two floats, high and low: with a mean a million deviations away from zero, the differences
of two tiles' means are still exact to the bits that count. Deviations are taken from the tile's first row, then from
its mean, and never as E[x^2] - E[x]^2 (Chan, Golub & LeVeque 1983).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends.triton.launch import Launch, cdiv, pixels, power_of_two

# Everything up to the merging is scaled by this, so that the square of a deviation, and a tile's sum of them, overflow
# only where the variance does. What it takes from the other end are deviations of 1e-14, of which no eps can tell.
SHRINK = tl.constexpr(2.0**-16)
GROW = tl.constexpr(2.0**16)

# Programs of a pass that leaves partials: enough for the 132 SMs of an H200, and few partials to merge.
PROGRAMS = 132 * 16
LEAST_STEPS = 4

MERGED_CHANNELS = 8  # of a program of the second stage: 32 bytes of a row of partials


class Partials(NamedTuple):
    """What the first stage leaves: `values` [tiles, 3, C], high, low and variance; `counts` [tiles], rows of a tile."""

    values: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, tiles: int, channels: int, device: torch.device) -> "Partials":
        values = torch.empty((tiles, 3, channels), dtype=torch.float32, device=device)
        return cls(values, torch.empty(tiles, dtype=torch.float32, device=device))


NO_PARTIALS = (None, None)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def store_partials(partials_ptr, counts_ptr, tile, count, c, C, inside, centre, mean, var):
    """Of x - centre, a tile has this mean and this variance; the mean of x is Inf or NaN where eager's is."""
    high = centre + mean
    moved = high - centre
    low = (centre - (high - moved)) + (mean - moved)  # what the sum has rounded off
    low = tl.where(low == low, low, 0.0)
    out_ptr = partials_ptr + tile.to(tl.int64) * 3 * C + c
    tl.store(out_ptr, high, mask=inside)
    tl.store(out_ptr + C, low, mask=inside)
    tl.store(out_ptr + 2 * C, var, mask=inside)
    tl.store(counts_ptr + tile, count)


@triton.jit
def store_tile_moments(z, rows, count, partials_ptr, counts_ptr, tile, c, C, inside, AXIS: tl.constexpr):
    """The partial of a tile of z, in fp32 as it was rounded; its pixels lie along AXIS, and `rows` says which count.

    The first of them is one.
    """
    if AXIS == 0:
        rows = rows[:, None]
        first = (tl.arange(0, z.shape[0]) == 0)[:, None]
    else:
        rows = rows[None, :]
        first = (tl.arange(0, z.shape[1]) == 0)[None, :]
    z = z * SHRINK
    centre = finite_or_zero(tl.sum(tl.where(first, z, 0.0), AXIS))
    d = tl.where(rows, z - tl.expand_dims(centre, AXIS), 0.0)
    mean = tl.sum(d, AXIS) / count
    d = tl.where(rows, d - tl.expand_dims(mean, AXIS), 0.0)
    var = tl.sum(d * d, AXIS) / count
    store_partials(partials_ptr, counts_ptr, tile, count, c, C, inside, centre, mean, var)


@triton.jit(do_not_specialize=["M", "units", "steps"])
def moments_kernel(
    x_ptr, partials_ptr, counts_ptr, M, units, steps,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials[tile] = the moments of the tile's rows of x [M, C], C being units * WIDTH, in fp32.

    `steps` times [BLOCK_M, BLOCK_C] a program. Each place of that tile has the sum and the squared deviations of its
    own rows, which are merged at the end.
    """
    C = units * WIDTH
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    tile = pid // tiles_c
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    line = tl.arange(0, BLOCK_M)
    row = tile.to(tl.int64) * steps * BLOCK_M
    rows = tl.minimum(M - row, steps * BLOCK_M).to(tl.int32)
    x_ptr += row * C
    centre = finite_or_zero(tl.load(x_ptr + c, mask=inside, other=0.0).to(tl.float32) * SHRINK)
    offs = line[:, None] * C + c[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(0, steps):
        mask = (step * BLOCK_M + line < rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x * SHRINK - centre[None, :], 0.0)
        delta = tl.where(mask, d - sums * (1.0 / tl.maximum(step, 1)), 0.0)
        sums += d
        squares += delta * (delta * (step / (step + 1.0)))  # 0 in the first step, also where the square overflows
        x_ptr += BLOCK_M * C
    own = ((rows - line + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]  # rows of each line
    count = rows.to(tl.float32)
    mean = tl.sum(sums, 0) / count
    d = tl.where(own > 0.0, sums / tl.maximum(own, 1.0) - mean[None, :], 0.0)
    var = tl.sum(squares + own * d * d, 0) / count
    store_partials(partials_ptr, counts_ptr, tile, count, c, C, inside, centre, mean, var)


@triton.jit
def load_partials(partials_ptr, counts_ptr, t, tiles, c, C):
    """Of the tiles t and the channels c, in fp64: mean, variance and rows, none beyond the last tile."""
    mask = (t < tiles)[:, None] & (c < C)[None, :]
    here = partials_ptr + t.to(tl.int64)[:, None] * 3 * C + c[None, :]
    high = tl.load(here, mask=mask, other=0.0).to(tl.float64)
    low = tl.load(here + C, mask=mask, other=0.0).to(tl.float64)
    var = tl.load(here + 2 * C, mask=mask, other=0.0).to(tl.float64)
    count = tl.load(counts_ptr + t, mask=t < tiles, other=0.0).to(tl.float64)
    return high + low, var, count[:, None]


@triton.jit(do_not_specialize=["M", "units", "tiles"])
def moments_merge_kernel(
    partials_ptr, counts_ptr, mean_ptr, var_ptr, M, units, tiles,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and var of M rows, of the tiles' partials: first the mean, then the deviations from it, in fp64.

    BLOCK_C channels a program, BLOCK_T tiles a step.
    """
    C = units * WIDTH
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        mean, var, count = load_partials(partials_ptr, counts_ptr, first + t, tiles, c, C)
        total += mean * count
    centre = tl.sum(total, 0) / M
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        mean, var, count = load_partials(partials_ptr, counts_ptr, first + t, tiles, c, C)
        d = mean - centre[None, :]
        total += (var + d * d) * count
    tl.store(mean_ptr + c, (centre * GROW).to(tl.float32), mask=c < C)
    tl.store(var_ptr + c, (tl.sum(total, 0) / M * GROW * GROW).to(tl.float32), mask=c < C)


def block(channels: int) -> tuple[int, int]:
    """Rows and channels of a program's tile, 16 elements to each of 128 threads; as few columns too many as can be."""
    if channels < 64:
        columns = power_of_two(channels, 1, 64)
        return 2048 // columns, columns
    columns = min((64, 128, 256), key=lambda columns: (channels % columns != 0, columns))
    return 2048 // columns, columns


def divisor(channels: int) -> int:
    """WIDTH, which the channels are a multiple of: all that a kernel is compiled for, so that it serves many layers."""
    return math.gcd(channels, 16)


def cut(shape, programs: int = PROGRAMS, least: int = LEAST_STEPS) -> tuple[int, int, tuple, dict[str, int]]:
    """How [N, C, H, W] is cut into tiles of rows: tiles, programs, and the last arguments and constants of a kernel."""
    m, c = pixels(shape), shape[1]
    block_m, block_c = block(c)
    tiles_c, width = cdiv(c, block_c), divisor(c)
    steps = max(least, cdiv(m * tiles_c, programs * block_m))
    tiles = cdiv(m, steps * block_m)
    return tiles, tiles * tiles_c, (m, c // width, steps), {"WIDTH": width, "BLOCK_M": block_m, "BLOCK_C": block_c}


def merging(kernel, args: tuple, tiles: int, channels: int) -> Launch:
    """The launch of a second stage, whose last two arguments are the units of channels and the tiles."""
    width, block_t = divisor(channels), 64 if tiles <= 256 else 512
    constants = {"WIDTH": width, "BLOCK_T": block_t, "BLOCK_C": MERGED_CHANNELS}
    grid = cdiv(channels, MERGED_CHANNELS)
    return Launch(kernel, grid, (*args, channels // width, tiles), constants, 4 if block_t == 64 else 8, 1)


def moments_launch(x: Tensor) -> tuple[Partials, Launch]:
    """The first stage, of a tensor that is `ready`."""
    tiles, grid, last, constants = cut(x.shape)
    partials = Partials.empty(tiles, x.shape[1], x.device)
    return partials, Launch(moments_kernel, grid, (x, *partials, *last), constants, 4, 1)


def merge_launch(partials: Partials, rows: int, mean: Tensor, var: Tensor) -> Launch:
    """The second stage, of partials of so many rows."""
    tiles, _, c = partials.values.shape
    return merging(moments_merge_kernel, (*partials, mean, var, rows), tiles, c)
