"""Grouped convolution, of ResNeXt: an implicit matrix product whose weight is block-diagonal within a tile.

A tile of 64 output channels reads only the input channels of its own groups; the weight has zeros where an input
channel is of another group than the output channel. Narrow groups waste products so, but not bytes: the image is read
as by a convolution of one group per tile.

A zero weight times another group's NaN or infinity is NaN. So a tile that has any NaN, which is rare, is computed again
group by group, with zeros for the channels of the others.
"""

import torch
import triton
import triton.language as tl

from fused_resnet.backends.triton.epilogue import dot
from fused_resnet.backends.triton.launch import Config, Family, Launch, cdiv, nhwc, no_tma, pixels, precision, rows
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

NAME = "grouped"
# Pixels and output channels of a tile, the most input channels of a step.
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
BLOCK_N = 64

CONFIGS = (
    Config(NAME, (128, BLOCK_N, 64), 4, 3),
    Config(NAME, (128, BLOCK_N, 64), 4, 4),
    Config(NAME, (256, BLOCK_N, 64), 8, 3),
    Config(NAME, (64, BLOCK_N, 64), 4, 4),
)


@triton.jit(do_not_specialize=["tiles_p", "tiles_q"])
def grouped_fwd_kernel(
    x_desc, w_desc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, K, tiles_p, tiles_q,
    C: tl.constexpr, GROUP_C: tl.constexpr, GROUP_K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[i, p, q, k] = act(sum_rsc x[i, p*STRIDE+r*DIL_H-PAD_H, q*STRIDE+s*DIL_W-PAD_W, c] w[k, r, s, c] * scale[k]
    + shift[k] + residual[i, p, q, k]), c over the channels of k's group.

    One tile of BLOCK_I images, BLOCK_P rows and BLOCK_Q columns by BLOCK_N channels a program; fp32 accumulation.
    """
    BLOCK_M: tl.constexpr = BLOCK_I * BLOCK_P * BLOCK_Q
    GROUPS: tl.constexpr = max(BLOCK_N // GROUP_K, 1)  # of a tile
    CHANNEL_STEPS: tl.constexpr = GROUPS * GROUP_C // BLOCK_K
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BLOCK_N
    tile = pid // tiles_n
    i, p, q = place(tile, tiles_p, tiles_q, BLOCK_I, BLOCK_P, BLOCK_Q)
    first = n // GROUP_K * GROUP_C
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, R * S * CHANNEL_STEPS):
        x = load_tap(
            x_desc, i, p, q, first, step, C,
            S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, CHANNEL_STEPS, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        acc = dot(w_desc.load([n, step * BLOCK_K]), x.T, acc, PRECISION)
    if GROUPS > 1:  # noqa: SIM102 (decided by the compiler, the other one by the GPU)
        if tl.max((acc != acc).to(tl.int32)) > 0:
            group_n = tl.arange(0, BLOCK_N) // GROUP_K
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for group in range(0, GROUPS):
                own = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for step in tl.range(0, R * S * CHANNEL_STEPS, num_stages=1):
                    x = load_tap(
                        x_desc, i, p, q, first, step, C,
                        S, STRIDE, PAD_H, PAD_W, DIL_H, DIL_W, CHANNEL_STEPS, BLOCK_M, BLOCK_K,
                    )  # fmt: skip
                    channel = (step % CHANNEL_STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
                    x = tl.where((channel // GROUP_C == group)[None, :], x, 0.0)
                    own = dot(w_desc.load([n, step * BLOCK_K]), x.T, own, PRECISION)
                acc = tl.where((group_n == group)[:, None], own, acc)
    finish(
        acc, residual_desc, y_desc, scale_ptr, shift_ptr, partials_ptr, counts_ptr, tile, i, p, q, n, K,
        BLOCK_I, BLOCK_P, BLOCK_Q, BLOCK_N, HAS_RESIDUAL, ACT,
    )  # fmt: skip


def tile_channels(problem) -> int:
    """Input channels that a tile of output channels reads: of all its groups, or of the one that it is a part of."""
    k, c = problem.weight[0] // problem.groups, problem.weight[1]
    return max(BLOCK_N // k, 1) * c


def unsupported(problem, capability) -> str:
    h, w = problem.x[2:]
    if problem.groups == 1 or problem.stride not in ((1, 1), (2, 2)):
        return "it takes several groups and a stride of 1 or 2"
    group_k, width = problem.weight[0] // problem.groups, tile_channels(problem)
    if BLOCK_N % group_k and group_k % BLOCK_N:
        return f"groups of {group_k} output channels do not fill tiles of {BLOCK_N}"
    if width % BLOCK_N and width not in (16, 32):
        return f"its tiles read {width} channels, which are no whole steps"
    if problem.stride == (2, 2) and (h % 2 or w % 2):
        return "stride 2 needs an even height and width"
    return no_tma(problem, capability)


def block_k(problem, config) -> int:
    return min(config.blocks[2] * 2 // problem.dtype.itemsize, tile_channels(problem))


def configs(problem, capability) -> list[Config]:
    """The largest tiles of which there are enough for the SMs of an H200, two a SM."""
    m, tiles_n = pixels(problem.output), cdiv(problem.weight[0], BLOCK_N)
    wanted = 128 if cdiv(m, 128) * tiles_n >= 2 * 132 else 64
    return sorted(CONFIGS, key=lambda c: abs(c.blocks[0] - wanted))


def pack(weight, problem, config) -> torch.Tensor:
    """[K, R * S * tile_channels], each output channel's filter at the place of its group in the tile."""
    k, c, r, s = problem.weight
    width = tile_channels(problem)
    packed = weight.new_zeros((k, r, s, width // c, c), dtype=problem.dtype)
    index = torch.arange(k, device=weight.device)
    place = index // (k // problem.groups) % (width // c)
    packed[index, :, :, place] = weight.detach().permute(0, 2, 3, 1).to(problem.dtype)
    return packed.reshape(k, -1)


def launches(problem, config, x, weights, scale, shift, residual, out, partials=NO_PARTIALS) -> tuple[Launch, ...]:
    block_m = config.blocks[0]
    step, (n, c), k, (p, q) = block_k(problem, config), problem.x[:2], problem.weight[0], problem.size
    tile = tile_shape(n, p, q, block_m)
    tiles = count_tiles(problem, tile)
    y_desc = nhwc(out, *tile, BLOCK_N)
    residual_desc = y_desc if residual is None else nhwc(residual, *tile, BLOCK_N)
    args = (
        image(problem, x, tile, step), rows(weights, BLOCK_N, step), residual_desc, y_desc, scale, shift, *partials, k,
        tiles[1], tiles[2],
    )  # fmt: skip
    constants = {
        "C": c, "GROUP_C": problem.weight[1], "GROUP_K": k // problem.groups, **window(problem),
        "BLOCK_I": tile[0], "BLOCK_P": tile[1], "BLOCK_Q": tile[2], "BLOCK_N": BLOCK_N, "BLOCK_K": step,
        "HAS_RESIDUAL": residual is not None, "ACT": problem.act, "PRECISION": precision(problem),
    }  # fmt: skip
    grid = tiles[0] * tiles[1] * tiles[2] * cdiv(k, BLOCK_N)
    return (Launch(grouped_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages),)


FAMILY = Family(NAME, unsupported, configs, pack, launches, lambda config: config.blocks[2], moment_tiles)
