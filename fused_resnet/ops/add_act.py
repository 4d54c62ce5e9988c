"""act(x + residual): the end of a residual block (He et al. 2015, arXiv:1512.03385, equation 1)."""

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
    select,
)


def add_act(x: Tensor, residual: Tensor, *, act: str = "relu", backend: str | None = None) -> Tensor:
    """Return `act(x + residual)`.

    Shapes:
        x, residual: [N, C, H, W], the same shape and dtype.
        returns: [N, C, H, W] in channels_last.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched.
    """
    op = "add_act"
    checks.check_input(op, x)
    checks.check_input(op, residual, "residual")
    checks.check_act(op, act)
    checks.check_same_device(op, x, residual=residual)
    checks.check_residual(op, residual, x.shape)
    if not checks.under_autocast(x):
        checks.check_same_dtype(op, x, residual=residual)
    return call("add_act", x, residual, act, backend or "")


def _impl(x, residual, act, backend):
    if x.numel() == 0:
        return _fake(x, residual, act, backend)
    return select("add_act", backend, x, residual=residual, act=act).add_act(x, residual, act)


def _fake(x, residual, act, backend):
    return empty_channels_last(x, x.shape)


def _setup_context(ctx, inputs, output):
    x, residual, ctx.act, backend = inputs
    ctx.backend = chosen(backend)
    smooth = ctx.act in SMOOTH
    ctx.save_for_backward(*((x, residual) if smooth else (None, None)), output)


def _backward(ctx, grad):
    x, residual, y = ctx.saved_tensors
    if torch.is_grad_enabled():
        # Piecewise linear activations: the output tells the pieces apart, and the gradient is linear in `grad`.
        pre = None if x is None else x + residual
        grad = reference.act_backward(grad, y, pre, ctx.act)
    else:
        grad = call("add_act_backward", grad, y, x, residual, ctx.act, ctx.backend)
    return grad if ctx.needs_input_grad[0] else None, grad if ctx.needs_input_grad[1] else None


def _backward_impl(grad, y, x, residual, act, backend):
    if grad.numel() == 0:
        return _backward_fake(grad, y, x, residual, act, backend)
    return select("add_act_backward", backend, y, residual=y, act=act).add_act_backward(grad, y, x, residual, act)


def _backward_fake(grad, y, x, residual, act, backend):
    return empty_channels_last(y, y.shape)


def _cast(dtype, x, residual, *rest):
    # As aten::add under autocast: both in the wider dtype.
    wide = torch.promote_types(x.dtype, residual.dtype)
    return x.to(wide), residual.to(wide), *rest


define("add_act(Tensor x, Tensor residual, str act, str backend) -> Tensor", _impl, _fake)
define(
    "add_act_backward(Tensor grad, Tensor y, Tensor? x, Tensor? residual, str act, str backend) -> Tensor",
    _backward_impl,
    _backward_fake,
)
autograd("add_act", _setup_context, _backward)
autocast("add_act", _cast)
