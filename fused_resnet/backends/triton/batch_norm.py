"""act(norm(x) + residual) with batch statistics, and the two passes of its gradient.

x is [M, C], m over N * H * W, C being units * WIDTH. A norm is five arguments, mean, var, weight, bias and eps; where
its mean is None there is none. The pre-activation is made by `batch_norm` of `load_norm`'s numbers in every kernel, so
that the backward finds the forward's pieces of the activation to the bit.
"""

import triton
import triton.language as tl

from fused_resnet.backends.triton.epilogue import act_gradient, activate, rounded


@triton.jit
def load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C):
    """Mean, 1 / sqrt(var + eps), the same times the weight, and the bias of the channels c: each [1, BLOCK_C]."""
    inside = c < C
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    invstd = tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1.0) + eps)
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, mask=inside, other=0.0)
    shift = tl.zeros_like(mean)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=inside, other=0.0)
    return mean[None, :], invstd[None, :], scale[None, :], shift[None, :]


@triton.jit
def batch_norm(centred, scale, shift):
    """Of x - mean, in fp32; one rounding for product and sum, which no compiler may then choose otherwise."""
    return tl.fma(centred, scale, shift)


@triton.jit
def norm_scale_kernel(var_ptr, weight_ptr, scale_ptr, eps, C, BLOCK_C: tl.constexpr):
    """scale = weight / sqrt(var + eps), as `load_norm` has it, for kernels that read it at every step of a loop."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.rsqrt(tl.load(var_ptr + c, mask=c < C, other=1.0) + eps)
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + c, mask=c < C, other=0.0)
    tl.store(scale_ptr + c, scale, mask=c < C)


# What a convolution is told that reads x as it is, in place of mean, scale, shift and activation.
NO_NORM = (None, None, None, "none")


@triton.jit
def norm_on_load(x, mean_ptr, scale_ptr, shift_ptr, c, C, ACT: tl.constexpr):
    """act(norm(x)) of x [BLOCK_M, BLOCK_K] as it would be in memory, rounded; zeros for channels beyond the last."""
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    y = batch_norm(x.to(tl.float32) - mean[None, :], scale[None, :], shift[None, :])
    return rounded(activate(y, ACT), x.dtype)


@triton.jit(do_not_specialize=["M", "units", "steps"])
def norm_act_fwd_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
    r_mean_ptr, r_var_ptr, r_weight_ptr, r_bias_ptr, r_eps,
    M, units, steps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y = act(norm(x) + residual), or act(norm(x) + r_norm(residual)), in fp32; residual may be None.

    `steps` times [BLOCK_M, BLOCK_C] a program.
    """
    C = units * WIDTH
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // tiles_c).to(tl.int64) * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, _, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C)
    if r_mean_ptr is not None:
        r_mean, _, r_scale, r_shift = load_norm(r_mean_ptr, r_var_ptr, r_weight_ptr, r_bias_ptr, r_eps, c, C)
    for _step in range(0, steps):
        mask = (m < M)[:, None] & (c < C)[None, :]
        offs = m[:, None] * C + c[None, :]
        y = batch_norm(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean, scale, shift)
        residual = load_residual(residual_ptr, offs, mask)
        if r_mean_ptr is not None:
            y += batch_norm(residual - r_mean, r_scale, r_shift)
        elif residual_ptr is not None:
            y += residual
        tl.store(y_ptr + offs, rounded(activate(y, ACT), y_ptr.dtype.element_ty), mask=mask)
        m += BLOCK_M


@triton.jit
def load_residual(residual_ptr, offs, mask):
    """The residual in fp32, or None."""
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return residual


@triton.jit
def gradient_behind(
    grad_ptr, y_ptr, offs, mask, centred, scale, shift, residual, r_centred, r_scale, r_shift, dtype: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """The gradient of the pre-activation, in fp32; the slope is told from y, or where that is None computed again.

    `residual` is None, or what was added to norm(x) where r_centred is None, which is the residual less its mean.
    """
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if ACT != "none":
        if y_ptr is not None:
            at = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        else:
            at = batch_norm(centred, scale, shift)
            if r_centred is not None:
                at += batch_norm(r_centred, r_scale, r_shift)
            elif residual is not None:
                at += residual
            if ACT == "relu" or ACT == "relu6":
                at = rounded(activate(at, ACT), dtype).to(tl.float32)
        g = act_gradient(g, at, ACT)
    return g


@triton.jit(do_not_specialize=["M", "units", "steps"])
def norm_act_reduce_kernel(
    grad_ptr, x_ptr, residual_ptr, y_ptr, g_ptr, partials_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
    r_mean_ptr, r_var_ptr, r_weight_ptr, r_bias_ptr, r_eps,
    M, units, steps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """g = grad * act'(norm(x) + residual), stored where g_ptr is not None; partials[tile] = the tile's sums of g, of
    g * (x - mean) and, where the residual has a norm, of g * (residual - r_mean), in fp32.

    `steps` times [BLOCK_M, BLOCK_C] a program; each place of that tile sums up its own rows.
    """
    C = units * WIDTH
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    tile = (pid // tiles_c).to(tl.int64)
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tile * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, _, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C)
    r_scale, r_shift = None, None
    if r_mean_ptr is not None:
        r_mean, _, r_scale, r_shift = load_norm(r_mean_ptr, r_var_ptr, r_weight_ptr, r_bias_ptr, r_eps, c, C)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    x_sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    r_sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for _step in range(0, steps):
        mask = (m < M)[:, None] & (c < C)[None, :]
        offs = m[:, None] * C + c[None, :]
        centred = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean
        residual = load_residual(residual_ptr, offs, mask)
        r_centred = None
        if r_mean_ptr is not None:
            r_centred = residual - r_mean
        g = gradient_behind(
            grad_ptr, y_ptr, offs, mask, centred, scale, shift, residual, r_centred, r_scale, r_shift,
            x_ptr.dtype.element_ty, ACT,
        )  # fmt: skip
        if g_ptr is not None:
            tl.store(g_ptr + offs, rounded(g, g_ptr.dtype.element_ty), mask=mask)
        sums += g
        x_sums += g * centred
        if r_mean_ptr is not None:
            r_sums += g * r_centred
        m += BLOCK_M
    SUMS: tl.constexpr = 2 if r_mean_ptr is None else 3
    out_ptr = partials_ptr + tile * SUMS * C + c
    tl.store(out_ptr, tl.sum(sums, 0), mask=c < C)
    tl.store(out_ptr + C, tl.sum(x_sums, 0), mask=c < C)
    if r_mean_ptr is not None:
        tl.store(out_ptr + 2 * C, tl.sum(r_sums, 0), mask=c < C)


@triton.jit
def sum_of_tiles(partials_ptr, which, tiles, c, C, SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """partials [tiles, SUMS, C] summed up over the tiles in fp64: one of the sums, [BLOCK_C]."""
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        mask = (first + t < tiles)[:, None] & (c < C)[None, :]
        offs = ((first + t).to(tl.int64) * SUMS + which)[:, None] * C + c[None, :]
        total += tl.load(partials_ptr + offs, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["units", "tiles"])
def norm_act_reduce_merge_kernel(
    partials_ptr, d_weight_ptr, d_bias_ptr, d_r_weight_ptr, var_ptr, eps, r_var_ptr, r_eps, units, tiles,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_bias = sum g, d_weight = sum g * x_hat and the same of the residual, where it has a norm; of the tiles' sums.

    BLOCK_C channels a program, BLOCK_T tiles a step, in fp64.
    """
    C = units * WIDTH
    SUMS: tl.constexpr = 2 if r_var_ptr is None else 3
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_bias = sum_of_tiles(partials_ptr, 0, tiles, c, C, SUMS, BLOCK_T, BLOCK_C)
    d_weight = sum_of_tiles(partials_ptr, 1, tiles, c, C, SUMS, BLOCK_T, BLOCK_C)
    d_weight *= tl.rsqrt(tl.load(var_ptr + c, mask=c < C, other=1.0) + eps).to(tl.float64)
    tl.store(d_bias_ptr + c, d_bias.to(tl.float32), mask=c < C)
    tl.store(d_weight_ptr + c, d_weight.to(tl.float32), mask=c < C)
    if r_var_ptr is not None:
        d_r_weight = sum_of_tiles(partials_ptr, 2, tiles, c, C, SUMS, BLOCK_T, BLOCK_C)
        d_r_weight *= tl.rsqrt(tl.load(r_var_ptr + c, mask=c < C, other=1.0) + r_eps).to(tl.float64)
        tl.store(d_r_weight_ptr + c, d_r_weight.to(tl.float32), mask=c < C)


@triton.jit(do_not_specialize=["M", "units", "steps"])
def norm_act_input_grad_kernel(
    grad_ptr, x_ptr, residual_ptr, y_ptr, d_x_ptr, d_residual_ptr, d_weight_ptr, d_bias_ptr, d_r_weight_ptr, inverse,
    mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, r_mean_ptr, r_var_ptr, r_weight_ptr, r_bias_ptr, r_eps,
    M, units, steps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """d_x = weight / sqrt(var + eps) * (g - d_bias * inverse - x_hat * d_weight * inverse), g as in
    `norm_act_reduce_kernel` and `inverse` 1 / count, in fp32; where the residual has a norm, d_residual by the same.

    `steps` times [BLOCK_M, BLOCK_C] a program.
    """
    C = units * WIDTH
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (pid // tiles_c).to(tl.int64) * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, invstd, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C)
    mean_g = tl.load(d_bias_ptr + c, mask=c < C, other=0.0)[None, :] * inverse
    slope = tl.load(d_weight_ptr + c, mask=c < C, other=0.0)[None, :] * inverse * invstd
    r_scale, r_shift = None, None
    if r_mean_ptr is not None:
        r_mean, r_invstd, r_scale, r_shift = load_norm(r_mean_ptr, r_var_ptr, r_weight_ptr, r_bias_ptr, r_eps, c, C)
        r_slope = tl.load(d_r_weight_ptr + c, mask=c < C, other=0.0)[None, :] * inverse * r_invstd
    for _step in range(0, steps):
        mask = (m < M)[:, None] & (c < C)[None, :]
        offs = m[:, None] * C + c[None, :]
        centred = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean
        residual = load_residual(residual_ptr, offs, mask)
        r_centred = None
        if r_mean_ptr is not None:
            r_centred = residual - r_mean
        g = gradient_behind(
            grad_ptr, y_ptr, offs, mask, centred, scale, shift, residual, r_centred, r_scale, r_shift,
            x_ptr.dtype.element_ty, ACT,
        )  # fmt: skip
        d_x = scale * (g - mean_g - centred * slope)
        tl.store(d_x_ptr + offs, rounded(d_x, d_x_ptr.dtype.element_ty), mask=mask)
        if r_mean_ptr is not None:
            d_residual = r_scale * (g - mean_g - r_centred * r_slope)
            tl.store(d_residual_ptr + offs, rounded(d_residual, d_residual_ptr.dtype.element_ty), mask=mask)
        m += BLOCK_M
