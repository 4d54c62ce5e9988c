"""act(batch_norm(x) + residual), with batch statistics (training) or running ones (inference).

Batch norm: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2. Variances are merged by Chan's formula (Chan,
Golub & LeVeque 1983), never taken as E[x^2] - E[x]^2.
"""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.ops import checks
from fused_resnet.ops.library import (
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
)
from fused_resnet.ops.residual_block import Unit, train


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    act: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Return `act(batch_norm(x) + residual)`; in training the running statistics are updated in place.

    Shapes:
        x: [N, C, H, W], fp32, bf16, fp16 or fp64; channels_last is the native layout, others are converted.
        weight, bias: [C] or None (1 and 0).
        running_mean, running_var: [C]; may be None in training.
        residual: [N, C, H, W], of x's dtype, added before the activation.
        returns: [N, C, H, W] in channels_last.

    Args:
        act: "none", "relu", "relu6", "hardswish" or "silu".
        training: normalise with the batch's own mean and biased variance; running_var takes the unbiased one.
        momentum: weight of the batch in the running statistics.
        backend: a name of `available_backends()`; by default the selection decides.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched; one value a
        channel in training, as `torch.nn.functional.batch_norm`.
    """
    op = "bn_act"
    checks.check_input(op, x)
    checks.check_act(op, act)
    checks.check_same_device(
        op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, residual=residual
    )
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, residual=residual)
    checks.check_channels(op, x.shape[1], weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    checks.check_statistics(op, running_mean, running_var, training=training)
    checks.check_eps(eps, training=training)
    checks.check_residual(op, residual, x.shape)
    if not training:
        scale, shift = fold_batch_norm(weight, bias, running_mean, running_var, eps)
        return scale_act(x, scale, shift, residual=residual, act=act, backend=backend)
    checks.check_more_than_one_value(x.shape)
    unit = Unit(None, weight, bias, running_mean, running_var, momentum=momentum, eps=eps, act=act)
    return train(x, [unit], [], residual, backend=backend)


def scale_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "relu",
    backend: str | None = None,
) -> Tensor:
    """Return `act(x * scale + shift + residual)`: batch norm in eval mode with its parameters folded.

    Shapes:
        x: [N, C, H, W]; scale, shift: [C], used in fp32; residual: [N, C, H, W] or None.
        returns: [N, C, H, W] in channels_last.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched.
    """
    op = "scale_act"
    checks.check_input(op, x)
    checks.check_act(op, act)
    checks.check_same_device(op, x, scale=scale, shift=shift, residual=residual)
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, residual=residual)
    checks.check_channels(op, x.shape[1], scale=scale, shift=shift)
    checks.check_residual(op, residual, x.shape)
    return call("scale_act", x, scale, shift, residual, act, backend or "")


def fold_batch_norm(weight, bias, running_mean, running_var, eps: float) -> tuple[Tensor, Tensor]:
    """Return fp32 (fp64 from fp64) `scale`, `shift` with `batch_norm(x) == x * scale + shift`."""
    wide = torch.promote_types(running_var.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(wide) + eps)
    if weight is not None:
        scale = scale * weight.to(wide)
    shift = -running_mean.to(wide) * scale
    return scale, shift if bias is None else shift + bias.to(wide)


# --- inference: fused_resnet::scale_act -------------------------------------------------------------------------------


def _scale_impl(x, scale, shift, residual, act, backend):
    if x.numel() == 0:
        return _scale_fake(x, scale, shift, residual, act, backend)
    return select("scale_act", backend, x, residual=residual, act=act).scale_act(x, scale, shift, residual, act)


def _scale_fake(x, scale, shift, residual, act, backend):
    return empty_channels_last(x, x.shape)


def _scale_setup_context(ctx, inputs, output):
    x, scale, shift, residual, ctx.act, _ = inputs
    ctx.save_for_backward(x, scale, shift, *kept_for_act(ctx.act, residual, output))


def _scale_backward(ctx, grad):
    x, scale, shift, residual, y = ctx.saved_tensors
    need_x, need_scale, need_shift, need_residual = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        grad, act = peel_act(grad, y, ctx.act)
        *found, d_residual = second_order(lambda *t: reference.scale_act(*t, act), [x, scale, shift, residual], grad)
        return *found, grad if residual is None and need_residual else d_residual
    pre = reference.affine(x, scale, shift, residual) if ctx.act in SMOOTH else None
    grad = reference.act_backward(grad, y, pre, ctx.act)
    d_x = (grad * scale.to(reference.wide(grad)).view(1, -1, 1, 1)).to(x.dtype) if need_x else None
    d_scale = reference.channel_sum(grad, x).to(scale.dtype) if need_scale else None
    d_shift = reference.channel_sum(grad).to(shift.dtype) if need_shift else None
    return d_x, d_scale, d_shift, grad if need_residual else None


def _scale_cast(dtype, x, scale, shift, residual, *rest):
    return x, scale, shift, None if residual is None else residual.to(x.dtype), *rest


define(
    "scale_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act, str backend) -> Tensor",
    _scale_impl,
    _scale_fake,
)
autograd("scale_act", _scale_setup_context, _scale_backward)
autocast("scale_act", _scale_cast)
