"""What the kernels share: products, activations, rounding, and the numbers of pixels."""

import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter multiplies the bit patterns of bf16 (3.6 and 3.7): there operands are widened first, which
# changes no product.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc, in fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """y, in fp32, as `dtype`, rounded to the nearest: for bf16 the interpreter (3.6 and 3.7) only cuts bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        y = tl.where(y == y, bits.to(tl.float32, bitcast=True), y)
    return y.to(dtype)


@triton.jit
def activate(y, ACT: tl.constexpr):
    """The activation, in fp32; NaN stays NaN."""
    if ACT == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hardswish":
        gate = tl.maximum(y + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        gate = tl.minimum(gate, 6.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * gate / 6.0
    elif ACT == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def act_gradient(grad, at, ACT: tl.constexpr):
    """grad * act'(pre-activation), in fp32; NaN lets the gradient pass, as in aten.

    `at` is the output of ReLU and ReLU6, which are told from it, and the pre-activation of the others.
    """
    if ACT == "relu" or ACT == "relu6":
        closed = at <= 0.0
        if ACT == "relu6":
            closed = closed | (at >= 6.0)
        grad = tl.where(closed, 0.0, grad)
    elif ACT == "hardswish":
        grad = grad * tl.where(at <= -3.0, 0.0, tl.where(at >= 3.0, 1.0, at / 3.0 + 0.5))
    elif ACT == "silu":
        gate = 1.0 / (1.0 + tl.exp(-at))
        grad = grad * gate * (1.0 + at * (1.0 - gate))
    return grad


@triton.jit
def pixel_numbers(tile, WIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The numbers of a tile's pixels, [BLOCK_M]: in 64 bits, which divide slowly, only where they leave 32."""
    if WIDE:
        tile = tile.to(tl.int64)
    return tile * BLOCK_M + tl.arange(0, BLOCK_M)
