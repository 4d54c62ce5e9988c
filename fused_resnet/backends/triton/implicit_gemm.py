"""Convolution with any window as an implicit matrix product over TMA tiles: 3x3, 1x1 with stride 2, dilated ones.

The weight is the first operand and the image the second one: so a rank-4 or rank-5 tile of the image goes from shared
memory straight into the tensor cores. Coordinates outside of the image read zeros, which is the padding. A stride of 2
is a view [N, H/2, 2, W/2, 2C] of the image, of which a tap reads one parity of rows and of columns.

Where the output has too few tiles for the GPU, as at batch 1, the sum over taps and channels is split among several
programs, and a second launch adds their parts up.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.triton.epilogue import dot
from fused_resnet.backends.triton.launch import (
    Config,
    Family,
    Launch,
    cdiv,
    nhwc,
    no_tma,
    pixels,
    precision,
    rows,
    takes_large_tiles,
)
from fused_resnet.backends.triton.split_k import reduce_launch
from fused_resnet.backends.triton.statistics import NO_PARTIALS
from fused_resnet.backends.triton.tiles import (
    count_tiles,
    finish,
    image,
    load_tap,
    moment_tiles,
    place,
    tile_shape,
    window,
)

NAME = "implicit_gemm"
# Pixels and output channels of a tile, input channels of a step, parts of the sum. How the pixels lie is
# `tile_shape`'s.
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS")

CONFIGS = (
    Config(NAME, (128, 128, 64, 1), 8, 3),
    Config(NAME, (256, 128, 64, 1), 8, 3),
    Config(NAME, (128, 64, 64, 1), 4, 3),
    Config(NAME, (128, 64, 64, 1), 4, 4),
    Config(NAME, (256, 64, 64, 1), 8, 3),
    Config(NAME, (64, 128, 64, 1), 4, 4),
    Config(NAME, (64, 64, 64, 1), 4, 4),
    Config(NAME, (128, 64, 32, 1), 4, 4),
    Config(NAME, (128, 64, 16, 1), 4, 4),
)
# Of these a split sum is tried too, in so many parts as leave each of them steps enough to fill the pipeline.
SPLIT_TILES = ((64, 64, 64), (64, 128, 64), (128, 64, 64))
SPLITS = (2, 3, 4, 6, 8, 9, 12, 16)
LEAST_STEPS = 3

PROGRAMS = 132  # that run at once: the SMs of an H200


@triton.jit(do_not_specialize=["tiles_p", "tiles_q"])
def implicit_gemm_fwd_kernel(
    x_desc, w_desc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, K, tiles_p, tiles_q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[i, p, q, k] = act(sum_rsc x[i, p*STRIDE+r*DIL_H-PAD_H, q*STRIDE+s*DIL_W-PAD_W, c] w[k, r, s, c] * scale[k]
    + shift[k] + residual[i, p, q, k]).

    One tile of BLOCK_I images, BLOCK_P rows and BLOCK_Q columns by BLOCK_N channels a program; fp32 accumulation.
    With SPLITS > 1 a program takes one part of the sum, and y is [SPLITS, N, P, Q, K] of bare parts in fp32, which have
    no moments.
    """
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_P * BLOCK_Q
    CHANNEL_STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    PART: tl.constexpr = R * S * CHANNEL_STEPS // SPLITS
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BLOCK_N
    split = pid // tiles_n % SPLITS
    tile = pid // (tiles_n * SPLITS)
    i, p, q = place(tile, tiles_p, tiles_q, BLOCK_I, BLOCK_P, BLOCK_Q)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for index in range(0, PART):
        step = split * PART + index
        x = load_tap(
            x_desc, i, p, q, 0, step, C,
            S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, CHANNEL_STEPS, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        acc = dot(w_desc.load([n, step * BLOCK_K]), x.T, acc, PRECISION)
    if SPLITS > 1:
        parts = acc.T.reshape(1, BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_N)
        y_desc.store([split, i, p, q, n], parts)
    else:
        finish(
            acc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, tile, i, p, q, n, K,
            BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_N, HAS_RESIDUAL, ACT,
        )  # fmt: skip


def unsupported(problem, capability) -> str:
    _, c, h, w = problem.x
    if problem.groups != 1 or problem.stride not in ((1, 1), (2, 2)):
        return "it takes one group and a stride of 1 or 2"
    if problem.stride == (2, 2) and (h % 2 or w % 2):
        return "stride 2 needs an even height and width"
    if problem.stride == (2, 2) and c % 16:
        return "stride 2 needs channels in multiples of 16"
    return no_tma(problem, capability)


def block_k(problem, config) -> int:
    return config.blocks[2] * 2 // problem.dtype.itemsize


def _fits(problem, config) -> bool:
    """With stride 2 the channels of both parities of a row lie side by side, so that no step may reach over."""
    step, c = block_k(problem, config), problem.x[1]
    if problem.stride == (2, 2) and c % step:
        return False
    return step == 16 or (step > 16 and step < 2 * c)  # tl.dot takes no fewer than 16


def _steps(problem, config) -> int:
    return problem.weight[2] * problem.weight[3] * cdiv(problem.x[1], block_k(problem, config))


def _split(problem, config) -> list[Config]:
    """The configuration with its sum split: in equal parts, which a loop without an end that differs can take."""
    if config.blocks[:3] not in SPLIT_TILES:
        return []
    steps = _steps(problem, config)
    fit = [splits for splits in SPLITS if steps % splits == 0 and steps // splits >= LEAST_STEPS]
    return [config._replace(blocks=(*config.blocks[:3], splits)) for splits in fit]


def configs(problem, capability) -> list[Config]:
    """Those that fill the GPU go before those that do not, larger tiles before smaller ones, whole sums before split.

    A program that has an SM for itself takes as long as its part of the sum: where no tile is small enough to fill the
    GPU, it is split.
    """
    k, m = problem.weight[0], pixels(problem.output)
    whole = [c for c in CONFIGS if _fits(problem, c) and c.blocks[1] < 2 * max(k, 64)]
    whole = [c for c in whole if c.blocks[0] < 256 or takes_large_tiles(capability)]
    few = cdiv(m, 64) * cdiv(k, 64) < PROGRAMS
    split = [part for config in whole for part in _split(problem, config)] if few else []

    def cost(config):
        block_m, block_n, _, splits = config.blocks
        programs = cdiv(m, block_m) * cdiv(k, block_n) * splits
        # Steps in a row of the busiest SM, a larger tile's taking longer, and what a second launch costs in steps.
        row = cdiv(programs, PROGRAMS) * _steps(problem, config) // splits * (1 + block_m * block_n / 8192)
        return (config.blocks[2] != whole[0].blocks[2], row + (8 if splits > 1 else 0), -block_m, config.num_stages)

    return sorted([*whole, *split], key=cost)


def pack(weight, problem, config) -> torch.Tensor:
    """[K, R * S * C] with the channels of each tap filled up with zeros to whole steps."""
    k, c, r, s = problem.weight
    step = block_k(problem, config)
    packed = weight.new_zeros((k, r, s, cdiv(c, step) * step), dtype=problem.dtype)
    packed[..., :c] = weight.detach().permute(0, 2, 3, 1)
    return packed.reshape(k, -1)


def launches(problem, config, x, weights, scale, shift, residual, out, partials=NO_PARTIALS) -> tuple[Launch, ...]:
    block_m, block_n, _, splits = config.blocks
    step, (n, c), k, (p, q) = block_k(problem, config), problem.x[:2], problem.weight[0], problem.size
    tile = tile_shape(n, p, q, block_m)
    tiles = count_tiles(problem, tile)
    if _steps(problem, config) % splits:
        raise ValueError(f"{config}: its sum has {_steps(problem, config)} steps, which are not {splits} equal parts")
    if splits > 1:
        parts = torch.empty((splits, n, p, q, k), dtype=torch.float32, device=x.device)
        y_desc = TensorDescriptor.from_tensor(parts, [1, *tile, block_n])
    else:
        y_desc = nhwc(out, *tile, block_n)
    residual_desc = y_desc if residual is None or splits > 1 else nhwc(residual, *tile, block_n)
    x_desc = image(problem, x, tile, step)
    args = (x_desc, rows(weights, block_n, step), residual_desc, y_desc, scale, shift, *partials, k, tiles[1], tiles[2])
    constants = {
        "C": c, **window(problem),
        "BLOCK_I": tile[0], "BLOCK_P": tile[1], "BLOCK_Q": tile[2], "BLOCK_N": block_n, "BLOCK_K": step,
        "SPLITS": splits, "HAS_RESIDUAL": residual is not None, "ACT": problem.act, "PRECISION": precision(problem),
    }  # fmt: skip
    grid = tiles[0] * tiles[1] * tiles[2] * cdiv(k, block_n) * splits
    first = Launch(implicit_gemm_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages)
    return (first, reduce_launch(parts, problem, scale, shift, residual, out)) if splits > 1 else (first,)


def _tiles(problem, config) -> int:
    return 0 if config.blocks[3] > 1 else moment_tiles(problem, config)


FAMILY = Family(NAME, unsupported, configs, pack, launches, lambda config: config.blocks[2], _tiles)
