"""act(x * scale + shift + residual), act(x + residual) and its gradient, max pooling: one pass over memory each."""

import triton
import triton.language as tl

from fused_resnet.backends.triton.epilogue import act_gradient, activate, pixel_numbers, rounded
from fused_resnet.backends.triton.launch import Config, Family, Launch, cdiv, is_wide, pixels, power_of_two

# Elements a program of the flat kernels takes: 8 to each of 128 threads, twice.
FLAT_BLOCK = 2048


@triton.jit(do_not_specialize=["M"])
def scale_act_fwd_kernel(
    x_ptr, residual_ptr, y_ptr, scale_ptr, shift_ptr, M,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y[m, c] = act(x[m, c] * scale[c] + shift[c] + residual[m, c]), m over N * H * W; in fp32.

    One [BLOCK_M, BLOCK_C] tile a program.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    m = (pid // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    offs = m[:, None] * C + c[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, rounded(activate(y, ACT), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_act_fwd_kernel(x_ptr, residual_ptr, y_ptr, COUNT, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """y = act(x + residual), element by element, in fp32; BLOCK of them a program."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < COUNT, other=0.0).to(tl.float32)
    y = x + tl.load(residual_ptr + offs, mask=offs < COUNT, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, rounded(activate(y, ACT), y_ptr.dtype.element_ty), mask=offs < COUNT)


@triton.jit
def add_act_bwd_kernel(grad_ptr, y_ptr, x_ptr, residual_ptr, d_ptr, COUNT, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """d = grad * act'(x + residual), in fp32; of piecewise linear activations by y = act(x + residual)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < COUNT
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if ACT == "relu" or ACT == "relu6":
        at = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        at = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        at += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_ptr + offs, rounded(act_gradient(grad, at, ACT), d_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def max_pool2d_fwd_kernel(
    x_ptr, y_ptr, M, H, W, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, c] = max over the window of x, m = (i, p, q); NaN where there is one; padding counts as -inf."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    m = pixel_numbers(pid // tiles_c, WIDE, BLOCK_M)
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = m // (P * Q)
    h0 = m // Q % P * STRIDE_H - PAD_H
    w0 = m % Q * STRIDE_W - PAD_W
    mask = (m < M)[:, None] & (c < C)[None, :]
    base = ((i.to(tl.int64) * H + h0) * W + w0) * C
    y = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    for tap in tl.static_range(R * S):
        h = h0 + tap // S
        w = w0 + tap % S
        inside = mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        offs = (base + (tap // S * W + tap % S) * C)[:, None] + c[None, :]
        x = tl.load(x_ptr + offs, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.maximum(y, x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


SCALE_BLOCKS = ("BLOCK_M", "BLOCK_C")
SCALE_CONFIGS = tuple(Config("scale_act", blocks, 4, 3) for blocks in ((32, 64), (16, 128), (8, 256)))


def _always(problem, capability) -> str:
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


def scale_configs(problem, capability) -> list[Config]:
    """Rows as wide as the channels; of few channels, fewer columns and more rows of the same tile."""
    c = problem.x[1]
    if c < 64:
        columns = power_of_two(c, 1, 64)
        return [Config("scale_act", (2048 // columns, columns), 4, 3)]
    return sorted(SCALE_CONFIGS, key=lambda config: (c % config.blocks[1] != 0, config.blocks[1]))


def scale_launches(problem, config, x, weights, scale, shift, residual, out) -> tuple[Launch, ...]:
    m, c = pixels(problem.x), problem.x[1]
    block_m, block_c = config.blocks
    args = (x, x if residual is None else residual, out, scale, shift, m)
    constants = {
        "C": c,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "HAS_RESIDUAL": residual is not None,
        "ACT": problem.act,
    }
    grid = cdiv(m, block_m) * cdiv(c, block_c)
    return (Launch(scale_act_fwd_kernel, grid, args, constants, config.num_warps, config.num_stages),)


def add_configs(problem, capability) -> list[Config]:
    return [Config("add_act", (block,), 4, 3) for block in (FLAT_BLOCK, 2 * FLAT_BLOCK, FLAT_BLOCK // 2)]


def add_launches(problem, config, x, weights, scale, shift, residual, out) -> tuple[Launch, ...]:
    return (_flat_launch(add_act_fwd_kernel, (x, residual, out), problem.act, config),)


def _flat_launch(kernel, tensors, act: str, config: Config) -> Launch:
    count, block = tensors[-1].numel(), config.blocks[0]
    constants = {"BLOCK": block, "ACT": act}
    return Launch(kernel, cdiv(count, block), (*tensors, count), constants, config.num_warps, config.num_stages)


def add_backward_launch(grad, y, x, residual, act: str, out) -> Launch:
    """The gradient of `x + residual` before the activation; `x` and `residual` are None where y will do."""
    tensors = (grad, y, y if x is None else x, y if residual is None else residual, out)
    return _flat_launch(add_act_bwd_kernel, tensors, act, Config("add_act", (FLAT_BLOCK // 2,), 4, 3))


def max_pool2d_launch(x, kernel, stride, padding, out) -> Launch:
    """torch.nn.functional.max_pool2d of channels_last tensors, without its indices."""
    (_, c, h, w), (n, _, p, q) = x.shape, out.shape
    block_c = power_of_two(c, 1, 64)
    block_m = 1024 // block_c
    m = n * p * q
    args = (x, out, m, h, w, p, q)
    constants = {
        "C": c, "R": kernel[0], "S": kernel[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PAD_H": padding[0], "PAD_W": padding[1], "WIDE": is_wide(max(pixels(x.shape), m)),
        "BLOCK_M": block_m, "BLOCK_C": block_c,
    }  # fmt: skip
    return Launch(max_pool2d_fwd_kernel, cdiv(m, block_m) * cdiv(c, block_c), args, constants, 4, 3)


SCALE_ACT = Family("scale_act", _always, scale_configs, lambda *_: None, scale_launches)
ADD_ACT = Family("add_act", _always, add_configs, lambda *_: None, add_launches)
