"""1x1 convolution with stride 1: a matrix product over pixels, by TMA."""

import torch
import triton
import triton.language as tl

from fused_resnet.backends.triton.batch_norm import NO_NORM, norm_on_load
from fused_resnet.backends.triton.epilogue import activate, dot, rounded
from fused_resnet.backends.triton.launch import Config, Family, Launch, cdiv, no_tma, pixels, precision, rows
from fused_resnet.backends.triton.statistics import NO_PARTIALS, store_tile_moments

NAME = "conv1x1"
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")

# BLOCK_K in elements of 16 bits: 64 of them, or 32 of fp32, are the 128 bytes of a swizzled row.
CONFIGS = (
    Config(NAME, (128, 128, 64), 8, 3),
    Config(NAME, (128, 128, 64), 8, 4),
    Config(NAME, (128, 64, 64), 4, 4),
    Config(NAME, (64, 128, 64), 4, 4),
    Config(NAME, (64, 64, 64), 4, 4),
    Config(NAME, (128, 32, 64), 4, 4),
    Config(NAME, (128, 16, 64), 4, 4),
)


@triton.jit(do_not_specialize=["M"])
def conv1x1_fwd_kernel(
    x_desc, w_desc, y_desc, residual_ptr, scale_ptr, shift_ptr, partials_ptr, counts_ptr,
    x_mean_ptr, x_scale_ptr, x_shift_ptr, M,
    C: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, X_ACT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, k] = act(sum_c x[m, c] w[k, c] * scale[k] + shift[k] + residual[m, k]); m runs over N * H * W.

    One [BLOCK_M, BLOCK_N] tile a program, neighbours share x; fp32 accumulation. The residual is asked for before the
    loop, so that it comes while the products are made. In training x may be normalised on load, and the tile's moments
    go to the partials.
    """
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    m = (pid // tiles_n) * BLOCK_M
    n = (pid % tiles_n) * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    if HAS_RESIDUAL:
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & (offs_n < K)[None, :]
        residual = tl.load(residual_ptr + offs_m.to(tl.int64)[:, None] * K + offs_n[None, :], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, C, BLOCK_K):
        x = x_desc.load([m, c])  # [BLOCK_M, BLOCK_K]
        if x_mean_ptr is not None:
            x = norm_on_load(x, x_mean_ptr, x_scale_ptr, x_shift_ptr, c + tl.arange(0, BLOCK_K), C, X_ACT)
        w = w_desc.load([n, c])  # [BLOCK_N, BLOCK_K]
        acc = dot(x, w.T, acc, PRECISION)
    scale = tl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0)
    shift = tl.load(shift_ptr + offs_n, mask=offs_n < K, other=0.0)
    y = acc * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        y += residual.to(tl.float32)
    y = rounded(activate(y, ACT), y_desc.dtype)
    y_desc.store([m, n], y)
    if partials_ptr is not None:
        inside = m + tl.arange(0, BLOCK_M) < M
        count = tl.minimum(M - m, BLOCK_M).to(tl.float32)
        store_tile_moments(
            y.to(tl.float32), inside, count, partials_ptr, counts_ptr, pid // tiles_n, offs_n, K, offs_n < K, 0
        )  # fmt: skip


def unsupported(problem, capability) -> str:
    if problem.weight[2:] != (1, 1) or problem.stride != (1, 1) or problem.padding != (0, 0) or problem.groups != 1:
        return "not a 1x1 convolution with stride 1"
    return no_tma(problem, capability)


def configs(problem, capability) -> list[Config]:
    """By the width of the output: no tile with less than half its columns in use."""
    k, m = problem.weight[0], pixels(problem.x)
    fit = [c for c in CONFIGS if c.blocks[1] < 2 * k or c.blocks[1] == 16]
    # A few waves of large tiles, else more of smaller ones: 132 SMs on an H200.
    few = cdiv(m, 128) * cdiv(k, 128) < 2 * 132
    wanted = 64 if few or k <= 64 else 128
    return sorted(fit, key=lambda c: (abs(c.blocks[1] - min(wanted, k)), few and c.blocks[0] > 64))


def pack(weight, problem, config) -> torch.Tensor:
    return weight.detach().to(problem.dtype).reshape(problem.weight[0], problem.weight[1]).contiguous()


def launches(
    problem, config, x, weights, scale, shift, residual, out, partials=NO_PARTIALS, on_load=NO_NORM
) -> tuple[Launch, ...]:
    block_m, block_n, block_k = config.blocks
    block_k = block_k * 2 // problem.dtype.itemsize
    m, k = pixels(problem.x), problem.weight[0]
    args = (
        rows(x, block_m, block_k), rows(weights, block_n, block_k), rows(out, block_m, block_n),
        out if residual is None else residual, scale, shift, *partials, *on_load[:3], m,
    )  # fmt: skip
    constants = {
        "C": problem.x[1], "K": k, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "HAS_RESIDUAL": residual is not None, "X_ACT": on_load[3], "ACT": problem.act, "PRECISION": precision(problem),
    }  # fmt: skip
    grid = cdiv(m, block_m) * cdiv(k, block_n)
    return (Launch(conv1x1_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages),)


def tiles(problem, config) -> int:
    return cdiv(pixels(problem.x), config.blocks[0])


FAMILY = Family(NAME, unsupported, configs, pack, launches, tiles=tiles, normalises=lambda problem: True)
