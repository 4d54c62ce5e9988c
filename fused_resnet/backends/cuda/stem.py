"""Convolution of an image with 1 to 4 channels, the first layer of a network, by tensor cores.

The image is read as it lies in memory: a row of the filter is S * C elements in a row there. fp32 is three products of
TF32 parts, or one where torch allows TF32.
"""

import math

import torch
from torch import Tensor

from fused_resnet.backends.config import SHARED_MEMORY, Config
from fused_resnet.backends.cpu.extension import ACT_CODES
from fused_resnet.backends.cuda.family import MULTIPROCESSORS, Family, cdiv, geometry, tf32_allowed

NAME = "stem"
# Output rows of a block, 16 pixels a warp's times, output channels.
BLOCKS = ("ROWS", "TIMES", "CHANNELS")

MOST_TAPS = 7  # in each direction
CELL = 8  # elements of K, as in csrc/cuda/stem.cu
MOST_SHARED = min(SHARED_MEMORY.values())  # that a block has on every device


def unsupported(problem, capability) -> str:
    if problem.groups != 1:
        return "a grouped convolution"
    if problem.x[1] > 4:
        return "more than 4 channels"
    if max(problem.weight[2:]) > MOST_TAPS:
        return f"its window is wider than {MOST_TAPS}"
    if max(problem.stride) > 2 or problem.dilation != (1, 1):
        return "it takes a stride of 1 or 2, and no dilation"
    if max(math.prod(problem.x[1:]), math.prod(problem.output[1:])) >= 1 << 31:
        return "an image of more than 2^31 elements"
    p, q = problem.size
    if problem.x[0] * p * cdiv(q, 16) * cdiv(problem.weight[0], 32) >= 1 << 31:  # blocks, at most
        return "more than 2^31 blocks"
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


class _Cells:
    """How the filter's rows are cut into cells of K; as in csrc/cuda/stem.cu."""

    def __init__(self, problem):
        _, c, r, s = problem.weight
        self.length = s * c
        self.words = 4 // problem.dtype.itemsize  # elements in 4 bytes; cells of a step
        self.skew = problem.padding[1] * c % 2 if self.words == 2 else 0
        self.of_a_row = cdiv(self.length + self.skew, CELL)
        self.steps = cdiv(r * self.of_a_row, self.words)


def _columns(problem, rows: int, channels: int) -> int:
    """Output columns of a block: all, or as many multiples of 16 as leave the tile in shared memory; 0: none."""
    cells = _Cells(problem)
    height = (rows - 1) * problem.stride[0] + problem.weight[2]
    free = MOST_SHARED // problem.dtype.itemsize - cells.steps * channels * CELL * cells.words
    wide = free // height // CELL * CELL - cells.of_a_row * CELL - CELL
    columns = wide // (problem.stride[1] * problem.x[1]) + 1 if wide >= 0 else 0
    return problem.size[1] if columns >= problem.size[1] else columns // 16 * 16


def configs(problem, capability) -> list[Config]:
    """Tall tiles first, of which fewer rows are read twice, as long as there are two blocks for each SM."""
    n, k, p, _ = problem.output
    channels = 32 if k <= 32 else 64
    fit = [rows for rows in (8, 4, 2, 1) if (rows <= p or rows == 1) and _columns(problem, rows, channels)]
    filling = [rows for rows in fit if n * cdiv(p, rows) * cdiv(k, channels) >= 2 * MULTIPROCESSORS] or fit[-1:]
    even = problem.stride[1] * problem.x[1] % 2 == 0
    times = (2, 4) if problem.dtype != torch.float32 and even else (2,)
    return [Config(NAME, (rows, t, channels), 4, 1) for rows in filling[:2] for t in times]


def pack(weight, problem, config) -> Tensor:
    """[chunks of channels, steps of K, 16 channels, lane, 16 bytes]: what a lane multiplies with, one after another.

    A lane gets of the output 16 bytes of neighbouring channels, whichever columns of a tensor core's tile they are.
    """
    k, c, r, s = problem.weight
    channels, cells = config.blocks[2], _Cells(problem)
    rows = weight.new_zeros((cdiv(k, channels) * channels, r, cells.of_a_row * CELL), dtype=problem.dtype)
    taps = weight.detach().permute(0, 2, 3, 1).reshape(k, r, s * c)
    rows[:k, :, cells.skew : cells.skew + cells.length] = taps
    rows = rows.flatten(1)
    rows = torch.nn.functional.pad(rows, (0, cells.steps * CELL * cells.words - rows.shape[1]))
    # Channel ((chunk * groups + group) * 4 + lane % 4) * wide + 2 * tile + e is column 2 * (lane % 4) + e of a tile.
    wide = 16 // problem.dtype.itemsize
    by_tile = rows.view(-1, channels // (4 * wide), 4, wide // 2, 2, rows.shape[1]).permute(0, 1, 3, 2, 4, 5)
    # K of a step is 2 halves of 4 lanes' words; a lane has 8 channels' column lane // 4 and the words lane % 4.
    by_word = by_tile.reshape(-1, channels // 16, 2, 8, cells.steps, 2, 4, cells.words)
    return by_word.permute(0, 4, 1, 3, 6, 2, 5, 7).contiguous()


def run(problem, config, x, weights, scale, shift, residual, out) -> None:
    rows, times, channels = config.blocks
    tile = (rows, _columns(problem, rows, channels), times, channels)
    torch.ops.fused_resnet_C.cuda_stem(
        x, weights, scale, shift, residual, geometry(problem), tile, tf32_allowed(x), ACT_CODES[problem.act], out
    )


def packed_by(config) -> tuple:
    return (config.blocks[2],)


FAMILY = Family(NAME, unsupported, configs, pack, run, packed_by)
