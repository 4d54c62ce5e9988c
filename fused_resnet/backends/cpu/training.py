"""Convolutions in training, and their gradients: csrc/cpu's where they pay, else aten's."""

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.cpu.convolution import geometry, pack
from fused_resnet.backends.cpu.elementwise import add_act, moments, norm_act
from fused_resnet.backends.cpu.extension import ACT_CODES, engine_takes
from fused_resnet.backends.cpu.memory import empty, norm_arguments
from fused_resnet.backends.reference import channels_last


def _engine_pays(size, dtype: torch.dtype, args) -> bool:
    """Whether a training step gains by having csrc/cpu's convolution write a map of this size.

    That is where aten writes to fresh pages: measured at batch 16 on ResNet-50, all maps above 4 MB; smaller ones take
    0.9 to 1.2 of aten's time, and 16 channels, half a panel, 1.2 to 2.
    """
    n, k, p, q = size
    return engine_takes(dtype, args) and k >= 32 and n * k * p * q * dtype.itemsize >= 4 << 20


def _convolve(x, weight, bias, args, residual=None) -> Tensor:
    """A convolution in csrc/cpu whose weight has just changed, so that its packed form is not worth keeping."""
    channels = weight.shape[0]
    shift = torch.zeros(channels) if bias is None else bias.detach().float()
    weights = pack(weight, x.dtype, lasting=False)
    z = empty(args.output_size(x, weight), x.dtype)
    torch.ops.fused_resnet_C.conv_scale_act(
        x, weights, torch.ones(channels), shift, residual, geometry(weight, args), ACT_CODES["none"], z
    )
    return z


def convolution_backward(grad, x, norm, act, weight, args, needs, residual):
    grad = channels_last(grad)
    d_y = _input_gradient(grad, x, weight, args, residual) if needs[0] else None
    d_weight = _weight_gradient(grad, x, norm, act, weight, args) if needs[1] else None
    rest = (needs[0] and d_y is None, needs[1] and d_weight is None, needs[2])
    if not any(rest):
        return d_y, d_weight, None
    y = activation(x, norm, act) if rest[1] else x
    found = reference.convolution_backward(grad, y, None, "none", weight, args, rest, None)
    if rest[0]:
        d_y = found[0] if residual is None else add_act(found[0], residual, "none")
    return d_y, found[1] if rest[1] else d_weight, found[2]


def _wgrad_pays(x: Tensor, weight: Tensor, args) -> bool:
    """Whether csrc/cpu is the faster way to the gradient of this weight; fp32 alone has a kernel.

    Measured beside aten in processor time on AVX-512 (1 and 2 threads, batch 16 unless said), aten's over ours: every
    layer of ResNet-50 1.0 to 1.8, and 1.2 of them all; 3x3 from 32 channels 1.0 to 1.2, with few pixels and many
    weights, or few outputs, 1.4 to 3. Fewer channels are folded with the taps: with a stride 1.1 to 1.5, without one
    0.4 to 1.05. 1x1: 0.8 to 0.95 where a panel of 32 channels has a tail, with less than 784 pixels, or with less than
    1e8 products (64 channels to 64, one image of 56 x 56: 0.86).
    """
    if x.dtype != torch.float32 or not engine_takes(x.dtype, args):
        return False
    n, k, p, q = args.output_size(x, weight)
    c, r, s = weight.shape[1:]
    pixels = n * p * q
    if r * s == 1:
        return c % 32 == 0 and min(c, k) >= 64 and pixels >= 784 and pixels * c * k >= 1e8
    return pixels > 0 and (c >= 32 or (k >= 32 and max(args.stride) > 1))


def _weight_gradient(grad, x, norm, act, weight, args) -> Tensor | None:
    """Of a convolution of act(norm(x)), or of x where norm is None; None: it is left to aten."""
    if not _wgrad_pays(x, weight, args):
        return None
    d_weight = torch.empty_like(weight, dtype=torch.float32)
    torch.ops.fused_resnet_C.conv_wgrad(
        grad, channels_last(x), *norm_arguments(norm), ACT_CODES[act], geometry(weight, args), d_weight
    )
    return d_weight.to(weight.dtype)


def _input_gradient(grad, x, weight, args, residual) -> Tensor | None:
    """Without a stride it is a convolution too, with the weight turned around; None: it is left to aten."""
    strided = args.stride != (1, 1)
    spread = [args.dilation[i] * (weight.shape[i + 2] - 1) for i in range(2)]
    padding = (spread[0] - args.padding[0], spread[1] - args.padding[1])
    if not _engine_pays(x.shape, x.dtype, args) or min(padding) < 0 or (strided and max(spread) > 0):
        return None
    turned = weight.detach().transpose(0, 1)
    if max(spread) > 0:
        turned = turned.flip(2, 3)
    unstrided = args._replace(stride=(1, 1), padding=padding)
    if not strided:
        return _convolve(grad, turned, None, unstrided, residual)
    # Of a 1x1 convolution with a stride: the pixels that it passes over have no gradient of their own.
    whole = empty(x.shape, x.dtype)
    whole.zero_() if residual is None else whole.copy_(residual)
    whole[:, :, :: args.stride[0], :: args.stride[1]] += _convolve(grad, turned, None, unstrided)
    return whole


def activation(x, norm, act) -> Tensor:
    """act(norm(x)), as a convolution reads it; x without a norm."""
    return channels_last(x) if norm is None else norm_act(x, norm, None, None, act)[0]


def convolve(x, norm, act, weight, bias, args) -> Tensor:
    x = activation(x, norm, act)
    if _engine_pays(args.output_size(x, weight), x.dtype, args):
        return _convolve(x, weight, bias, args)
    return channels_last(reference.convolution(x, weight, bias, args))


def conv_moments(x, norm, act, weight, bias, args):
    z = convolve(x, norm, act, weight, bias, args)
    return z, *moments(z)
