"""The second half of a convolution whose sum was split among programs: the parts added up, in a fixed order."""

import triton
import triton.language as tl

from fused_resnet.backends.triton.epilogue import activate, rounded
from fused_resnet.backends.triton.launch import Launch, cdiv, power_of_two


@triton.jit(do_not_specialize=["M"])
def split_k_reduce_kernel(
    parts_ptr, residual_ptr, y_ptr, scale_ptr, shift_ptr, M, K,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """y[m, k] = act(sum_s parts[s, m, k] * scale[k] + shift[k] + residual[m, k]), in fp32, m over N * P * Q.

    One [BLOCK_M, BLOCK_N] tile a program; the parts are read one after the other, so that the sum has one order.
    """
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    m = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (k < K)[None, :]
    offs = m[:, None] * K + k[None, :]
    stride = tl.cast(M, tl.int64) * K
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + split * stride + offs, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + k, mask=k < K, other=0.0)
    shift = tl.load(shift_ptr + k, mask=k < K, other=0.0)
    y = y * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, rounded(activate(y, ACT), y_ptr.dtype.element_ty), mask=mask)


def reduce_launch(parts, problem, scale, shift, residual, out) -> Launch:
    """`parts` is [SPLITS, N, P, Q, K], dense, in fp32."""
    splits, k = parts.shape[0], problem.output[1]
    m = parts[0].numel() // k
    block_n = power_of_two(k, 16, 64)
    block_m = 512 // block_n  # small, since a problem that is split is
    args = (parts, out if residual is None else residual, out, scale, shift, m, k)
    constants = {
        "SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_RESIDUAL": residual is not None,
        "ACT": problem.act,
    }  # fmt: skip
    return Launch(split_k_reduce_kernel, cdiv(m, block_m) * cdiv(k, block_n), args, constants, 4, 3)
