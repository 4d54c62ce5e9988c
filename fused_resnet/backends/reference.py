"""The truth: every operator as plain aten, on every device and for every dtype.

These are the formulas that all other backends are compared with, and the ones that are differentiated when a second
derivative is asked for. On a GPU aten is cuDNN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.problem import POOLED


def unavailable() -> str:
    """The reason why this backend cannot be used; empty: it can."""
    return ""


def unsupported(op: str, x: Tensor, weight: Tensor | None = None, args=None) -> str:
    """The reason why this backend cannot run the problem; empty: it can."""
    return ""


def trusted(problem, device: torch.device) -> bool | None:
    """Whether the backend may be chosen without being asked for; None: that cannot be found out now."""
    return True


def explain(problem, device: torch.device) -> str:
    """Which kernel runs the problem, for the log; empty: there is but one."""
    return ""


def wide(x: Tensor) -> torch.dtype:
    """The dtype of BN arithmetic: fp32, fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def channels_last(x: Tensor) -> Tensor:
    """x with exactly the strides of an NHWC tensor; the same tensor where it has them."""
    _, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def act_forward(x: Tensor, act: str) -> Tensor:
    if act == "none":
        return x
    return {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}[act](x)


def act_backward(grad: Tensor, y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """The gradient of the pre-activation, from the output y (none, relu, relu6) or the pre-activation itself.

    NaN lets the gradient pass, as in aten.
    """
    if act == "none":
        return grad
    if act == "relu":
        return torch.where(y <= 0, 0, grad)
    if act == "relu6":
        return torch.where((y <= 0) | (y >= 6), 0, grad)
    if act == "silu":
        sigmoid = torch.sigmoid(pre)
        return (grad * sigmoid * (1 + pre * (1 - sigmoid))).to(grad.dtype)
    slope = torch.where(pre <= -3, 0, torch.where(pre >= 3, 1, pre / 3 + 0.5))
    return (grad * slope).to(grad.dtype)


def channel_sum(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Sum of x, or of x * factor, over N, H and W, in fp32 (fp64 for fp64)."""
    x = x.to(wide(x))
    return (x if factor is None else x * factor.to(x.dtype)).sum((0, 2, 3))


def affine(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """x * scale + shift + residual in fp32 (fp64 for fp64)."""
    dtype = wide(x)
    y = x.to(dtype) * scale.to(dtype).view(1, -1, 1, 1) + shift.to(dtype).view(1, -1, 1, 1)
    return y if residual is None else y + residual.to(dtype)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, args) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, args.stride, args.padding, args.dilation, args.groups)


def convolution_backward(grad, x, weight, args, needs):
    """Gradients of x, weight and bias of a convolution, each None where not needed, through aten."""
    grads = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight.to(x.dtype),
        [weight.shape[0]] if needs[2] else None,
        args.stride,
        args.padding,
        args.dilation,
        False,
        (0, 0),
        args.groups,
        list(needs),
    )
    d_x, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return d_x, None if d_weight is None else d_weight.to(weight.dtype), d_bias


def conv_scale_act(x, weight, scale, shift, residual, args, act):
    z = convolution(x, weight, None, args)
    return channels_last(act_forward(affine(z, scale, shift, residual), act).to(x.dtype))


def prepare_conv_scale_act(x, weight, scale, shift, residual, args, act):
    """None: what is slow here is aten, not the way to it."""


def prepare_conv_scale_act_max_pool2d(x, weight, scale, shift, args, act):
    """None: aten has no such kernel."""


def max_pool2d(x, kernel, stride, padding, size):
    return F.max_pool2d(x, kernel, stride, padding)


def scale_act(x, scale, shift, residual, act):
    return channels_last(act_forward(affine(x, scale, shift, residual), act).to(x.dtype))


def add_act(x, residual, act):
    return channels_last(act_forward(x + residual, act))


def add_act_backward(grad, y, x, residual, act):
    return channels_last(act_backward(grad, y, None if x is None else x + residual, act))


def compute(problem, x, weight, scale, shift, residual) -> Tensor:
    """The result of a `Problem` of inference; what its operator does not have is None."""
    if problem.op == "add_act":
        return add_act(x, residual, problem.act)
    if problem.op == "scale_act":
        return scale_act(x, scale, shift, residual, problem.act)
    y = conv_scale_act(x, weight, scale, shift, residual, problem, problem.act)
    return max_pool2d(y, 3, 2, 1, None) if problem.op == POOLED else y


def normalise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) in fp32 (fp64 for fp64): centred before it is scaled, so that nothing cancels."""
    dtype = wide(x)
    invstd = torch.rsqrt(var + eps).view(1, -1, 1, 1)
    return (x.to(dtype) - mean.view(1, -1, 1, 1)) * invstd


def bn_act(x, weight, bias, residual, eps, act):
    var, mean = torch.var_mean(x.to(wide(x)), dim=(0, 2, 3), correction=0)
    ones = torch.ones_like(mean) if weight is None else weight
    zeros = torch.zeros_like(mean) if bias is None else bias
    y = act_forward(affine(normalise(x, mean, var, eps), ones, zeros, residual), act)
    return channels_last(y.to(x.dtype)), mean, var


def bn_act_backward(grad, x, y, weight, bias, residual, mean, var, eps, act, needs):
    x_hat = normalise(x, mean, var, eps)
    pre = None
    if y is None and act != "none":
        ones = torch.ones_like(mean) if weight is None else weight
        zeros = torch.zeros_like(mean) if bias is None else bias
        pre = affine(x_hat, ones, zeros, residual)
        if act in ("relu", "relu6"):
            y = act_forward(pre, act).to(x.dtype)  # rounded as the forward's, for the same pieces
    grad = act_backward(grad.to(wide(x)), y, pre, act)
    d_bias, d_weight = channel_sum(grad), channel_sum(grad, x_hat)
    nothing = x.new_empty(0)
    d_x = nothing
    if needs[0]:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        slope = torch.rsqrt(var + eps) * (1 if weight is None else weight)
        inner = grad - (d_bias / count).view(1, -1, 1, 1) - x_hat * (d_weight / count).view(1, -1, 1, 1)
        d_x = channels_last((inner * slope.view(1, -1, 1, 1)).to(x.dtype))
    return d_x, d_weight, d_bias, channels_last(grad.to(x.dtype)) if needs[3] else nothing


def conv_bn_act(x, weight, conv_bias, bn_weight, bn_bias, residual, args, eps, act):
    z = channels_last(convolution(x, weight, conv_bias, args))
    y, mean, var = bn_act(z, bn_weight, bn_bias, residual, eps, act)
    return y, z, mean, var
