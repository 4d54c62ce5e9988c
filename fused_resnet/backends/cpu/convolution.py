"""Convolutions in inference: csrc/cpu's, and oneDNN's for those that it does not take.

oneDNN's fused ReLU turns NaN into 0, so that only bias and sum are fused there and the activation, which keeps NaN,
runs in place behind it.
"""

import torch
from torch import Tensor

from fused_resnet.backends.cpu.extension import ACT_CODES, engine_takes
from fused_resnet.backends.cpu.memory import empty, optional
from fused_resnet.backends.packing import packed
from fused_resnet.backends.reference import channels_last


def conv_scale_act(x, weight, scale, shift, residual, args, act):
    x = channels_last(x)
    return prepare_conv_scale_act(x, weight, scale, shift, residual, args, act)(x, optional(residual), None)


def prepare_conv_scale_act(x, weight, scale, shift, residual, args, act):
    """Return `run(x, residual, out)` for channels_last inputs like x; `out` is the residual or None."""
    prepare = _prepare_engine if engine_takes(x.dtype, args) else _prepare_onednn
    return prepare(x, weight, scale, shift, args, act)


def pack(weight: Tensor, dtype: torch.dtype, *, lasting: bool) -> Tensor:
    return torch.ops.fused_resnet_C.conv_pack(weight.detach().to(dtype), lasting)


def geometry(weight: Tensor, args) -> tuple[int, ...]:
    return *weight.shape[2:], *args.stride, *args.padding, *args.dilation


def _prepare_engine(x, weight, scale, shift, args, act):
    weights = packed(weight, ("engine", x.dtype), lambda: pack(weight, x.dtype, lasting=True))
    scale, shift = scale.detach().float(), shift.detach().float()
    size, dtype, code = args.output_size(x, weight), x.dtype, ACT_CODES[act]
    window = geometry(weight, args)
    kernel = torch.ops.fused_resnet_C.conv_scale_act.default

    def run(x, residual, out):
        if out is None:
            out = empty(size, dtype)
        kernel(x, weights, scale, shift, residual, window, code, out)
        return out

    return run


def _prepare_onednn(x, weight, scale, shift, args, act):
    conv_args = (list(args.padding), list(args.stride), list(args.dilation), args.groups)

    def fold():  # scale goes into the weight, in fp32, rounded once
        folded = (weight.detach().float() * scale.float().view(-1, 1, 1, 1)).to(x.dtype)
        folded = folded.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._reorder_convolution_weight(folded, *conv_args, list(x.shape))

    form = ("oneDNN", x.dtype, tuple(x.shape), args)
    weights = packed(weight, form, fold, scale)
    bias = packed(shift, ("bias", x.dtype), lambda: shift.detach().to(x.dtype, copy=True))
    tail = ("add", 1.0, None, [], None)

    def run(x, residual, out):
        if residual is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, weights, bias, *conv_args, "none", [], "")
        elif out is None:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, weights, bias, *conv_args, *tail)
        else:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, weights, bias, *conv_args, *tail)
        return channels_last(_act_in_place(y, act))

    return run


def _act_in_place(y: Tensor, act: str) -> Tensor:
    if act == "none":
        return y
    if act == "relu6":
        return torch.nn.functional.hardtanh_(y, 0.0, 6.0)
    return {"relu": torch.relu_, "hardswish": torch.ops.aten.hardswish_, "silu": torch.ops.aten.silu_}[act](y)
