"""Any convolution, by pointers: every window, stride, dilation, padding, group and number of channels, from sm_80 on.

Where the other families cannot, or not yet, it is this one: its loads are masked, and go through cp.async.
"""

import torch
import triton
import triton.language as tl

from fused_resnet.backends.triton.batch_norm import NO_NORM, norm_on_load
from fused_resnet.backends.triton.epilogue import activate, dot, pixel_numbers, rounded
from fused_resnet.backends.triton.launch import (
    Config,
    Family,
    Launch,
    cdiv,
    is_wide,
    pixels,
    precision,
    tensor_cores,
)
from fused_resnet.backends.triton.statistics import NO_PARTIALS, store_tile_moments

NAME = "general"
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")

CONFIGS = (
    Config(NAME, (128, 128, 64), 8, 3),
    Config(NAME, (128, 128, 32), 8, 4),
    Config(NAME, (128, 64, 64), 4, 3),
    Config(NAME, (128, 64, 32), 4, 4),
    Config(NAME, (64, 64, 32), 4, 4),
    Config(NAME, (64, 32, 32), 4, 4),
    Config(NAME, (64, 16, 32), 4, 4),
    Config(NAME, (64, 16, 16), 4, 4),
)

# fp32 without TF32 has no tensor cores: each thread holds what it multiplies, so that tiles are small.
PLAIN_CONFIGS = (
    Config(NAME, (128, 64, 16), 8, 3),
    Config(NAME, (64, 64, 16), 4, 3),
    Config(NAME, (64, 32, 16), 4, 3),
    Config(NAME, (32, 16, 16), 4, 3),
)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def general_fwd_kernel(
    x_ptr, w_ptr, residual_ptr, y_ptr, scale_ptr, shift_ptr, partials_ptr, counts_ptr,
    x_mean_ptr, x_scale_ptr, x_shift_ptr, M, H, W, P, Q, C, K, tiles_n,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_C: tl.constexpr, GROUP_K: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, X_ACT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, k] = act(sum_rsc x[i, p*STRIDE_H+r*DIL_H-PAD_H, q*STRIDE_W+s*DIL_W-PAD_W, c] w[k, r, s, c] * scale[k]
    + shift[k] + residual[m, k]), m = (i, p, q), c over the channels of k's group.

    One [BLOCK_M, BLOCK_N] tile of one group a program; fp32 accumulation. A step is BLOCK_K channels of one tap, or
    with FLAT, for few channels, BLOCK_K of all taps' channels. In training x may be normalised on load, of one tap
    without padding, and the tile's moments go to the partials.
    """
    CHANNEL_STEPS: tl.constexpr = (GROUP_C + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (R * S * GROUP_C + BLOCK_K - 1) // BLOCK_K if FLAT else R * S * CHANNEL_STEPS
    pid = tl.program_id(0)
    n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # within the group
    group = pid // tiles_n % GROUPS
    m = pixel_numbers(pid // (tiles_n * GROUPS), WIDE, BLOCK_M)
    i = m // (P * Q)
    h0 = m // Q % P * STRIDE_H - PAD_H
    w0 = m % Q * STRIDE_W - PAD_W
    x_base = ((i.to(tl.int64) * H + h0) * W + w0) * C + group * GROUP_C  # [BLOCK_M]
    k = group * GROUP_K + n  # [BLOCK_N]
    w_base = k.to(tl.int64) * (R * S * GROUP_C)
    offs = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, STEPS):
        if FLAT:
            flat = step * BLOCK_K + offs  # [BLOCK_K], of (r, s, c)
            c = flat % GROUP_C
            tap = flat // GROUP_C
            h = h0[:, None] + (tap // S * DIL_H)[None, :]
            w = w0[:, None] + (tap % S * DIL_W)[None, :]
            inside = (flat < R * S * GROUP_C)[None, :]
            x_offs = (tap // S * DIL_H * W + tap % S * DIL_W).to(tl.int64) * C + c
            w_mask = (flat < R * S * GROUP_C)[None, :]
            w_offs = flat
        else:
            tap = step // CHANNEL_STEPS
            c = step % CHANNEL_STEPS * BLOCK_K + offs
            h = (h0 + tap // S * DIL_H)[:, None]
            w = (w0 + tap % S * DIL_W)[:, None]
            inside = (c < GROUP_C)[None, :]
            x_offs = (tap // S * DIL_H * W + tap % S * DIL_W).to(tl.int64) * C + c
            w_mask = (c < GROUP_C)[None, :]
            w_offs = tap * GROUP_C + c
        x_mask = (m < M)[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W) & inside
        x = tl.load(x_ptr + x_base[:, None] + x_offs[None, :], mask=x_mask, other=0.0)
        if x_mean_ptr is not None:
            x = norm_on_load(x, x_mean_ptr, x_scale_ptr, x_shift_ptr, step * BLOCK_K + offs, C, X_ACT)
        weight = tl.load(w_ptr + w_base[:, None] + w_offs[None, :], mask=(n < GROUP_K)[:, None] & w_mask, other=0.0)
        acc = dot(x, weight.T, acc, PRECISION)
    scale = tl.load(scale_ptr + k, mask=n < GROUP_K, other=0.0)
    shift = tl.load(shift_ptr + k, mask=n < GROUP_K, other=0.0)
    y = acc * scale[None, :] + shift[None, :]
    y_offs = m.to(tl.int64)[:, None] * K + k[None, :]
    y_mask = (m < M)[:, None] & (n < GROUP_K)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + y_offs, mask=y_mask, other=0.0).to(tl.float32)
    y = rounded(activate(y, ACT), y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_offs, y, mask=y_mask)
    if partials_ptr is not None:
        tile = pid // (tiles_n * GROUPS)
        count = tl.minimum(M - tile.to(tl.int64) * BLOCK_M, BLOCK_M).to(tl.float32)
        store_tile_moments(y.to(tl.float32), m < M, count, partials_ptr, counts_ptr, tile, k, K, n < GROUP_K, 0)


def unsupported(problem, capability) -> str:
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


def configs(problem, capability) -> list[Config]:
    """By the group's width, in and out: no tile with less than half in use."""
    k, c = problem.weight[0] // problem.groups, _steps_over(problem)
    few = cdiv(pixels(problem.output), 128) * cdiv(k, 128) * problem.groups < 108  # SMs of an A100
    fit = [
        config
        for config in (CONFIGS if tensor_cores(problem) else PLAIN_CONFIGS)
        if (config.blocks[1] < 2 * k or config.blocks[1] == 16)
        and (config.blocks[2] < 2 * c or config.blocks[2] <= 32)
        and _in_registers(problem, config)
        and (config != CONFIGS[2] or capability >= (9, 0))  # which spills without wgmma
    ]
    wanted = 64 if few else 128
    return sorted(fit, key=lambda c: (abs(c.blocks[1] - min(k, wanted)), few and c.blocks[0] > 64, -c.blocks[2]))


def _in_registers(problem, config) -> bool:
    """Addresses and masks of single elements, and two steps of fp32 in flight, spill in the larger tiles."""
    block_m, _, block_k = config.blocks
    if _flat(problem) or problem.weight[1] * problem.dtype.itemsize % 16:
        return block_m <= 64 and block_k <= 32
    return problem.dtype != torch.float32 or block_k <= 32


def _flat(problem) -> bool:
    """Fewer channels than a step has would leave it empty for the most part."""
    return problem.weight[1] < 16


def _steps_over(problem) -> int:
    _, c, r, s = problem.weight
    return c * r * s if _flat(problem) else c


def pack(weight, problem, config) -> torch.Tensor:
    """[K, R, S, C / groups]."""
    return weight.detach().to(problem.dtype).permute(0, 2, 3, 1).contiguous()


def launches(
    problem, config, x, weights, scale, shift, residual, out, partials=NO_PARTIALS, on_load=NO_NORM
) -> tuple[Launch, ...]:
    block_m, block_n, block_k = config.blocks
    (_, c, h, w), (k, group_c, r, s), (p, q) = problem.x, problem.weight, problem.size
    m, group_k = pixels(problem.output), k // problem.groups
    tiles_n = cdiv(group_k, block_n)
    args = (
        x, weights, out if residual is None else residual, out, scale, shift, *partials, *on_load[:3],
        m, h, w, p, q, c, k, tiles_n,
    )  # fmt: skip
    constants = {
        "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0], "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1], "R": r, "S": s,
        "GROUPS": problem.groups, "GROUP_C": group_c, "GROUP_K": group_k, "FLAT": _flat(problem),
        "WIDE": is_wide(max(m, pixels(problem.x))), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "HAS_RESIDUAL": residual is not None, "X_ACT": on_load[3], "ACT": problem.act, "PRECISION": precision(problem),
    }  # fmt: skip
    grid = cdiv(m, block_m) * problem.groups * tiles_n
    return (Launch(general_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages),)


def tiles(problem, config) -> int:
    return cdiv(pixels(problem.output), config.blocks[0])


def normalises(problem) -> bool:
    """Each pixel is read once, and none of the padding, which is zero behind the activation."""
    plain = problem.stride == (1, 1) and problem.padding == (0, 0) and problem.groups == 1
    return plain and problem.weight[2:] == (1, 1)


FAMILY = Family(NAME, unsupported, configs, pack, launches, tiles=tiles, normalises=normalises)
