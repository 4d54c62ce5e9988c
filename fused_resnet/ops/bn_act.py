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
    chosen,
    define,
    empty_channels_last,
    kept_for_act,
    peel_act,
    second_order,
    select,
)


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
    checks.check_more_than_one_value(x)
    y, mean, var = call("bn_act", x, weight, bias, residual, eps, act, backend or "")
    update_running_statistics(running_mean, running_var, mean, var, x.shape[0] * x.shape[2] * x.shape[3], momentum)
    return y


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


def update_running_statistics(running_mean, running_var, mean, var, count: int, momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the variance unbiased; nothing for an empty batch.

    Nothing either while a checkpointed block is computed again inside a backward pass: it was counted in its forward.
    """
    if running_mean is None or count == 0 or recomputing():
        return
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def recomputing() -> bool:
    """Whether this forward is a checkpointed block's second one, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# --- training: fused_resnet::bn_act and its backward ------------------------------------------------------------------


def _impl(x, weight, bias, residual, eps, act, backend):
    if x.numel() == 0:
        y, mean, var = _fake(x, weight, bias, residual, eps, act, backend)
        return y, mean.zero_(), var.zero_()
    return select("bn_act", backend, x).bn_act(x, weight, bias, residual, eps, act)


def _fake(x, weight, bias, residual, eps, act, backend):
    return empty_channels_last(x, x.shape), *empty_statistics(x, x.shape[1])


def empty_statistics(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Uninitialised mean and variance, [channels], in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, ctx.eps, ctx.act, backend = inputs
    ctx.backend = chosen(backend)
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, *kept_for_bn_act(ctx.act, residual, y), mean, var)


def kept_for_bn_act(act: str, residual: Tensor | None, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """As `kept_for_act`; without a residual the output is computed again from x, which is read in any case."""
    return (None, None) if residual is None else kept_for_act(act, residual, y)


def _backward(ctx, grad, _mean, _var):
    x, weight, bias, residual, y, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():
        grad, act = peel_act(grad, y, ctx.act)
        *found, d_residual = second_order(
            lambda *t: reference.bn_act(*t, ctx.eps, act)[0], [x, weight, bias, residual], grad
        )
        return *found, grad if residual is None and ctx.needs_input_grad[3] else d_residual, None, None, None
    needs = ctx.needs_input_grad[:4]
    grads = bn_act_backward(grad, x, y, weight, bias, residual, mean, var, ctx.eps, ctx.act, needs, ctx.backend)
    return *grads, None, None, None


def bn_act_backward(grad, x, y, weight, bias, residual, mean, var, eps, act, needs, backend):
    """Gradients of x, weight, bias and residual; None where `needs` says that nobody wants one."""
    passed_on = act == "none" and needs[3]  # the residual's gradient is the output's
    wanted = [*needs[:3], needs[3] and not passed_on]
    d_x, d_weight, d_bias, d_residual = call(
        "bn_act_backward", grad, x, y, weight, bias, residual, mean, var, eps, act, wanted, backend
    )
    if weight is not None:
        d_weight = d_weight.to(weight.dtype)
    if bias is not None:
        d_bias = d_bias.to(bias.dtype)
    grads = (d_x, d_weight, d_bias, grad if passed_on else d_residual)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def _backward_impl(grad, x, y, weight, bias, residual, mean, var, eps, act, needs, backend):
    if grad.numel() == 0:
        grads = _backward_fake(grad, x, y, weight, bias, residual, mean, var, eps, act, needs, backend)
        return grads[0], grads[1].zero_(), grads[2].zero_(), grads[3]
    return select("bn_act", backend, x).bn_act_backward(
        grad, x, y, weight, bias, residual, mean, var, eps, act, tuple(needs)
    )


def _backward_fake(grad, x, y, weight, bias, residual, mean, var, eps, act, needs, backend):
    def like_x(need):
        return empty_channels_last(x, x.shape) if need else x.new_empty(0)

    return like_x(needs[0]), torch.empty_like(mean), torch.empty_like(mean), like_x(needs[3])


def _cast(dtype, x, weight, bias, residual, *rest):
    # As aten::batch_norm under autocast: x decides; the parameters stay in fp32.
    return x, weight, bias, None if residual is None else residual.to(x.dtype), *rest


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
        return *found, grad if residual is None and need_residual else d_residual, None, None
    pre = reference.affine(x, scale, shift, residual) if ctx.act in SMOOTH else None
    grad = reference.act_backward(grad, y, pre, ctx.act)
    d_x = (grad * scale.to(reference.wide(grad)).view(1, -1, 1, 1)).to(x.dtype) if need_x else None
    d_scale = reference.channel_sum(grad, x).to(scale.dtype) if need_scale else None
    d_shift = reference.channel_sum(grad).to(shift.dtype) if need_shift else None
    return d_x, d_scale, d_shift, grad if need_residual else None, None, None


def _scale_cast(dtype, x, scale, shift, residual, *rest):
    return x, scale, shift, None if residual is None else residual.to(x.dtype), *rest


define(
    "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str act, str backend) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    _impl,
    _fake,
)
define(
    "bn_act_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
    "Tensor var, float eps, str act, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
define(
    "scale_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act, str backend) -> Tensor",
    _scale_impl,
    _scale_fake,
)
autograd("bn_act", _setup_context, _backward)
autograd("scale_act", _scale_setup_context, _scale_backward)
autocast("bn_act", _cast)
autocast("scale_act", _scale_cast)
