"""act(batch_norm(conv(x)) + residual): one unit of a residual network, in training and in inference."""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.ops import checks
from fused_resnet.ops.bn_act import (
    bn_act_backward,
    empty_statistics,
    fold_batch_norm,
    kept_for_bn_act,
    update_running_statistics,
)
from fused_resnet.ops.conv_args import ConvArgs, normalise
from fused_resnet.ops.conv_backward import convolution_backward
from fused_resnet.ops.library import (
    CONV_SCHEMA,
    autocast,
    autograd,
    call,
    chosen,
    define,
    empty_channels_last,
    peel_act,
    second_order,
    select,
)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    act: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Return `act(batch_norm(conv2d(x, weight, conv_bias)) + residual)`.

    In training the batch's statistics normalise, and the running ones are updated in place. In inference batch norm is
    folded into a per-channel scale and shift, and the whole is `conv_scale_act`.

    Shapes:
        x: [N, C, H, W], fp32, bf16, fp16 or fp64; channels_last is the native layout, others are converted.
        weight: [K, C / groups, R, S], of x's dtype; conv_bias: [K] or None.
        bn_weight, bn_bias: [K] or None (1 and 0); running_mean, running_var: [K], may be None in training.
        residual: [N, K, P, Q], of x's dtype, added before the activation.
        returns: [N, K, P, Q] in channels_last.

    Args:
        stride, dilation: int or (height, width); padding: the same, or "same" (stride 1 only) or "valid".
        act: "none", "relu", "relu6", "hardswish" or "silu".
        momentum: weight of the batch in the running statistics; running_var takes the unbiased variance.
        backend: a name of `available_backends()`; by default the selection decides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched; one value a
        channel in training, as `torch.nn.functional.batch_norm`.
    """
    op = "conv_bn_act"
    vectors = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    checks.check_input(op, x)
    checks.check_act(op, act)
    checks.check_same_device(op, x, weight=weight, conv_bias=conv_bias, residual=residual, **vectors)
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, weight=weight, conv_bias=conv_bias, residual=residual)
    checks.check_statistics(op, running_mean, running_var, training=training)
    checks.check_eps(eps, training=training)
    x, args = normalise(op, x, weight, stride, padding, dilation, groups)
    checks.check_channels(op, weight.shape[0], conv_bias=conv_bias, **vectors)
    size = args.output_size(x, weight)
    checks.check_residual(op, residual, size)
    if not training:
        scale, shift = fold_batch_norm(bn_weight, bn_bias, running_mean, running_var, eps)
        if conv_bias is not None:
            shift = shift + conv_bias.to(scale.dtype) * scale
        return call("conv_scale_act", x, weight, scale, shift, residual, *args, act, backend or "")
    if size[0] * size[2] * size[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}")
    problem = (x, weight, conv_bias, bn_weight, bn_bias, residual, *args, eps, act)
    y, _, mean, var = call("conv_bn_act", *problem, backend or "")
    update_running_statistics(running_mean, running_var, mean, var, size[0] * size[2] * size[3], momentum)
    return y


def _impl(x, weight, conv_bias, bn_weight, bn_bias, residual, stride, padding, dilation, groups, eps, act, backend):
    args = ConvArgs.of(stride, padding, dilation, groups)
    if x.numel() == 0:
        y, z, mean, var = _fake(x, weight, conv_bias, bn_weight, bn_bias, residual, *args, eps, act, backend)
        return y, z, mean.zero_(), var.zero_()
    return select("conv_bn_act", backend, x, weight, args).conv_bn_act(
        x, weight, conv_bias, bn_weight, bn_bias, residual, args, eps, act
    )


def _fake(x, weight, conv_bias, bn_weight, bn_bias, residual, stride, padding, dilation, groups, eps, act, backend):
    size = ConvArgs.of(stride, padding, dilation, groups).output_size(x, weight)
    return empty_channels_last(x, size), empty_channels_last(x, size), *empty_statistics(x, size[1])


def _setup_context(ctx, inputs, output):
    x, weight, conv_bias, bn_weight, bn_bias, residual, *args, ctx.eps, ctx.act, backend = inputs
    ctx.backend = chosen(backend)
    y, z, mean, var = output
    ctx.args = ConvArgs.of(*args)
    ctx.mark_non_differentiable(z, mean, var)
    kept = kept_for_bn_act(ctx.act, residual, y)
    ctx.save_for_backward(x, weight, conv_bias, bn_weight, bn_bias, *kept, z, mean, var)


def _backward(ctx, grad, _z, _mean, _var):
    *inputs, y, z, mean, var = ctx.saved_tensors
    x, weight, _, bn_weight, bn_bias, residual = inputs
    if torch.is_grad_enabled():
        grad, act = peel_act(grad, y, ctx.act)
        *found, d_residual = second_order(lambda *t: reference.conv_bn_act(*t, ctx.args, ctx.eps, act)[0], inputs, grad)
        if residual is None and ctx.needs_input_grad[5]:
            d_residual = grad
        return *found, d_residual, *[None] * 7
    need_x, need_weight, need_conv_bias, *need_bn = ctx.needs_input_grad[:6]
    needs = (need_x or need_weight or need_conv_bias, *need_bn)
    d_z, d_bn_weight, d_bn_bias, d_residual = bn_act_backward(
        grad, z, y, bn_weight, bn_bias, residual, mean, var, ctx.eps, ctx.act, needs, ctx.backend
    )
    d_x = d_weight = d_conv_bias = None
    if needs[0]:
        needs = (need_x, need_weight, need_conv_bias)
        d_x, d_weight, d_conv_bias = convolution_backward("conv_bn_act", d_z, x, weight, ctx.args, needs, ctx.backend)
    return d_x, d_weight, d_conv_bias, d_bn_weight, d_bn_bias, d_residual, *[None] * 7


def _cast(dtype, x, weight, conv_bias, bn_weight, bn_bias, residual, *rest):
    residual = None if residual is None else residual.to(dtype)
    return x.to(dtype), weight, conv_bias, bn_weight, bn_bias, residual, *rest


define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, "
    f"{CONV_SCHEMA}, float eps, str act, str backend) -> (Tensor y, Tensor z, Tensor mean, Tensor var)",
    _impl,
    _fake,
)
autograd("conv_bn_act", _setup_context, _backward)
autocast("conv_bn_act", _cast)
