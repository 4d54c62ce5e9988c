"""act(conv(x, weight) * scale + shift + residual): a convolution with a per-channel affine map, for inference.

With `scale = bn_weight / sqrt(running_var + eps)` and `shift = bn_bias - running_mean * scale` it is convolution +
batch norm in eval mode (Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1) + residual + activation.
"""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.ops import checks
from fused_resnet.ops.conv_args import ConvArgs, normalise
from fused_resnet.ops.library import (
    CONV_SCHEMA,
    SMOOTH,
    autocast,
    autograd,
    call,
    define,
    empty_channels_last,
    kept_for_act,
    peel_act,
    second_order,
    select,
    select_pooled,
)


def conv_scale_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    act: str = "relu",
    backend: str | None = None,
) -> Tensor:
    """Return `act(conv2d(x, weight) * scale + shift + residual)`, accumulated in fp32.

    Shapes:
        x: [N, C, H, W], fp32, bf16, fp16 or fp64; channels_last is the native layout, others are converted.
        weight: [K, C / groups, R, S], of x's dtype.
        scale, shift: [K], any floating dtype, used in fp32 (fp64 for fp64 input).
        residual: [N, K, P, Q], of x's dtype, added before the activation.
        returns: [N, K, P, Q] in channels_last.

    Args:
        stride, dilation: int or (height, width).
        padding: int, (height, width), "same" (stride 1 only) or "valid".
        act: "none", "relu", "relu6", "hardswish" or "silu".
        backend: a name of `available_backends()`; by default the selection decides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched.
    """
    x, args = _checked(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    return call("conv_scale_act", x, weight, scale, shift, residual, *args, act, backend or "")


def prepare_conv_scale_act(x, weight, scale, shift, *, residual, stride, padding, dilation, groups, act):
    """Return the kernel that `conv_scale_act` ends at for inputs like these, for callers that see to the rest.

    `run(x, residual, out)` computes the same, written to `out` (which may be the residual) or, for None, to a fresh
    tensor. It checks nothing, records no gradient, and holds what it derived from weight, scale and shift. None: there
    is no such kernel.
    """
    padded, args = _checked(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    if padded is not x or x.numel() == 0:
        return None
    backend = select("conv_scale_act", "", x, weight, args, residual, act)
    return backend.prepare_conv_scale_act(x, weight, scale, shift, residual, args, act)


def prepare_conv_scale_act_max_pool2d(x, weight, scale, shift, *, stride, padding, dilation, groups, act):
    """As `prepare_conv_scale_act`, for the convolution and the 3x3 max-pool of stride 2 and padding 1 behind it."""
    padded, args = _checked(x, weight, scale, shift, None, stride, padding, dilation, groups, act)
    backend = select_pooled(x, weight, args, act) if padded is x and x.numel() else None
    return None if backend is None else backend.prepare_conv_scale_act_max_pool2d(x, weight, scale, shift, args, act)


def _checked(x, weight, scale, shift, residual, stride, padding, dilation, groups, act) -> tuple[Tensor, ConvArgs]:
    op = "conv_scale_act"
    checks.check_input(op, x)
    checks.check_act(op, act)
    checks.check_same_device(op, x, weight=weight, scale=scale, shift=shift, residual=residual)
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, weight=weight, residual=residual)
    x, args = normalise(op, x, weight, stride, padding, dilation, groups)
    checks.check_channels(op, weight.shape[0], scale=scale, shift=shift)
    checks.check_residual(op, residual, args.output_size(x, weight))
    return x, args


def _impl(x, weight, scale, shift, residual, stride, padding, dilation, groups, act, backend):
    args = ConvArgs.of(stride, padding, dilation, groups)
    if x.numel() == 0:
        return _fake(x, weight, scale, shift, residual, *args, act, backend)
    return select("conv_scale_act", backend, x, weight, args, residual, act).conv_scale_act(
        x, weight, scale, shift, residual, args, act
    )


def _fake(x, weight, scale, shift, residual, stride, padding, dilation, groups, act, backend):
    return empty_channels_last(x, ConvArgs.of(stride, padding, dilation, groups).output_size(x, weight))


def _setup_context(ctx, inputs, output):
    x, weight, scale, shift, residual, *args, act, _ = inputs
    ctx.args, ctx.act = ConvArgs.of(*args), act
    ctx.save_for_backward(x, weight, scale, shift, *kept_for_act(act, residual, output))


def _backward(ctx, grad):
    *inputs, y = ctx.saved_tensors
    x, weight, scale, shift, residual = inputs
    need_x, need_weight, need_scale, need_shift, need_residual = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        grad, act = peel_act(grad, y, ctx.act)
        *found, d_residual = second_order(lambda *t: reference.conv_scale_act(*t, ctx.args, act), inputs, grad)
        return *found, grad if residual is None and need_residual else d_residual
    z = None
    if need_scale or ctx.act in SMOOTH:
        z = reference.convolution(x, weight, None, ctx.args)
    pre = reference.affine(z, scale, shift, residual) if ctx.act in SMOOTH else None
    grad = reference.act_backward(grad, y, pre, ctx.act)
    d_scale = reference.channel_sum(grad, z).to(scale.dtype) if need_scale else None
    d_shift = reference.channel_sum(grad).to(shift.dtype) if need_shift else None
    d_x = d_weight = None
    if need_x or need_weight:
        d_z = (grad * scale.to(reference.wide(grad)).view(1, -1, 1, 1)).to(grad.dtype)
        needs = (need_x, need_weight, False)
        d_x, d_weight, _ = reference.convolution_backward(d_z, x, None, "none", weight, ctx.args, needs, None)
    return d_x, d_weight, d_scale, d_shift, grad if need_residual else None


def _cast(dtype, x, weight, scale, shift, residual, *rest):
    # The weight stays as it is: the backend casts it where it packs it, once, not at every call.
    return x.to(dtype), weight, scale, shift, None if residual is None else residual.to(dtype), *rest


define(
    f"conv_scale_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, {CONV_SCHEMA}, str act, "
    "str backend) -> Tensor",
    _impl,
    _fake,
)
autograd("conv_scale_act", _setup_context, _backward)
autocast("conv_scale_act", _cast)
