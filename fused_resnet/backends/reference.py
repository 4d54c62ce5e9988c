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


def convolution_backward(grad, x, norm, act, weight, args, needs, residual):
    """Gradients of what a convolution reads, act(norm(x)), of its weight and of its bias, through aten.

    Each is None where not needed. `residual` is a gradient that the first one gets beside its own, or None.
    """
    grads = torch.ops.aten.convolution_backward(
        grad,
        activation(x, norm, act) if needs[1] else x,
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
    d_y, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    if d_y is not None and residual is not None:
        d_y = d_y + residual
    return d_y, None if d_weight is None else d_weight.to(weight.dtype), d_bias


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


# --- training ---------------------------------------------------------------------------------------------------------


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over N, H and W, in fp32 (fp64 for fp64)."""
    x = x.to(wide(x))
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    # Of a channel with an infinity var_mean has the mean NaN, and eager the infinity.
    return torch.where(mean.isfinite(), mean, x.mean((0, 2, 3))), var


def normalise(x: Tensor, norm) -> Tensor:
    """(x - mean) / sqrt(var + eps) in fp32 (fp64 for fp64): centred before it is scaled, so that nothing cancels."""
    invstd = torch.rsqrt(norm.var + norm.eps).view(1, -1, 1, 1)
    return (x.to(wide(x)) - norm.mean.view(1, -1, 1, 1)) * invstd


def pre_activation(x: Tensor, norm, residual: Tensor | None, residual_norm) -> Tensor:
    """norm(x) + residual, or norm(x) + residual_norm(residual), in fp32 (fp64 for fp64)."""
    ones, zeros = torch.ones_like(norm.mean), torch.zeros_like(norm.mean)
    weight, bias = (ones if norm.weight is None else norm.weight), (zeros if norm.bias is None else norm.bias)
    if residual_norm is not None:
        residual = pre_activation(residual, residual_norm, None, None)
    return affine(normalise(x, norm), weight, bias, residual)


def norm_act(x, norm, residual, residual_norm, act):
    """act(norm(x) + residual), and None: its output tells the slope of the activation."""
    return channels_last(act_forward(pre_activation(x, norm, residual, residual_norm), act).to(x.dtype)), None


def activation(x: Tensor, norm, act: str) -> Tensor:
    """act(norm(x)), as the convolution behind it reads it; x without a norm."""
    return x if norm is None else norm_act(x, norm, None, None, act)[0]


def convolve(x, norm, act, weight, bias, args) -> Tensor:
    """conv2d(act(norm(x)), weight, bias); of x itself where norm is None."""
    return channels_last(convolution(activation(x, norm, act), weight, bias, args))


def conv_moments(x, norm, act, weight, bias, args):
    """`convolve`, and the moments of its output."""
    z = convolve(x, norm, act, weight, bias, args)
    return z, *moments(z)


def _gradient_behind(grad, x, norm, residual, residual_norm, act, y) -> Tensor:
    """The gradient of the pre-activation, in fp32 (fp64 for fp64)."""
    pre = None
    if y is None and act != "none":
        pre = pre_activation(x, norm, residual, residual_norm)
        if act in ("relu", "relu6"):
            y = act_forward(pre, act).to(x.dtype)  # rounded as the forward's, for the same pieces
    return act_backward(grad.to(wide(x)), y, pre, act)


def norm_act_reduce(grad, x, norm, residual, residual_norm, act, y, mask, write):
    """The gradient of the pre-activation, in x's dtype, where `write` asks for it; and its sums.

    Returns:
        g, or None; d_weight, the sum of g * x_hat; d_bias, the sum of g; d_residual_weight, or None.
    """
    g = _gradient_behind(grad, x, norm, residual, residual_norm, act, y)
    d_residual_weight = None if residual_norm is None else channel_sum(g, normalise(residual, residual_norm))
    written = channels_last(g.to(x.dtype)) if write else None
    return written, channel_sum(g, normalise(x, norm)), channel_sum(g), d_residual_weight


def norm_act_input_grad(
    grad, x, norm, residual, residual_norm, act, y, mask, d_weight, d_bias, d_residual_weight, count
):
    """The gradient of x and, where it has a norm of its own, of the residual; `count`: values a channel."""
    g = _gradient_behind(grad, x, norm, residual, residual_norm, act, y)

    def behind(x, norm, d_weight):
        slope = torch.rsqrt(norm.var + norm.eps) * (1 if norm.weight is None else norm.weight)
        inner = g - (d_bias / count).view(1, -1, 1, 1) - normalise(x, norm) * (d_weight / count).view(1, -1, 1, 1)
        return channels_last((inner * slope.view(1, -1, 1, 1)).to(x.dtype))

    d_residual = None if residual_norm is None else behind(residual, residual_norm, d_residual_weight)
    return behind(x, norm, d_weight), d_residual


def _window_starts(y: Tensor, stride, padding) -> tuple[Tensor, Tensor]:
    """The first row [P, 1] and the first column [1, Q] of the windows of a pooling's output [N, C, P, Q]."""
    rows, columns = (torch.arange(y.shape[i + 2], device=y.device) * stride[i] - padding[i] for i in range(2))
    return rows.view(-1, 1), columns


def norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size):
    """max_pool2d(act(norm(x))), and the number in its window, r * S + s, of the tap that each output is."""
    y, index = F.max_pool2d(activation(x, norm, act), kernel, stride, padding, return_indices=True)
    row, column = _window_starts(y, stride, padding)
    tap = (index // x.shape[3] - row) * kernel[1] + index % x.shape[3] - column
    return channels_last(y), channels_last(tap.to(torch.uint8))


def index_of_taps(tap, width, kernel, stride, padding):
    """What `norm_act_max_pool2d` tells of each output, as the index in its map, whose rows are so wide."""
    row, column = _window_starts(tap, stride, padding)
    tap = tap.long()
    return (tap // kernel[1] + row) * width + tap % kernel[1] + column


def norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding):
    """The gradient of the pre-activation, for the next step, and its sums d_weight and d_bias."""
    index = index_of_taps(argmax, x.shape[3], kernel, stride, padding)
    d_y = torch.ops.aten.max_pool2d_with_indices_backward(
        channels_last(grad).to(wide(x)), x.to(wide(x)), kernel, stride, padding, (1, 1), False, channels_last(index)
    )
    g = _gradient_behind(d_y, x, norm, None, None, act, None)
    return g, channel_sum(g, normalise(x, norm)), channel_sum(g)


def norm_act_max_pool2d_input_grad(grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count):
    return norm_act_input_grad(g, x, norm, None, None, "none", None, None, d_weight, d_bias, None, count)[0]
