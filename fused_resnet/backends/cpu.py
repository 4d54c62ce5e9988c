"""CPU: the compiled kernels of csrc/cpu, and oneDNN for the convolutions that they do not take.

Convolutions in inference run in `fused_resnet_C::conv_scale_act` where the processor has the instructions for it
(fp32: AVX-512; bf16: AMX), and through oneDNN with packed weights elsewhere. oneDNN's fused ReLU turns NaN into 0, so
that only bias and sum are fused there and the activation, which keeps NaN, runs in place behind it.
"""

import importlib
from functools import cache

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.packing import packed
from fused_resnet.backends.problem import POOLED
from fused_resnet.backends.reference import channels_last

ACT_CODES = {"none": 0, "relu": 1, "relu6": 2, "hardswish": 3, "silu": 4}
DTYPES = (torch.float32, torch.bfloat16)

# Of the compiled extension; as in csrc/ops.cpp.
INTERFACE = 6


@cache
def extension_missing() -> str:
    """Why the compiled extension does not load; empty: it does."""
    try:
        importlib.import_module("fused_resnet._C")
    except ImportError as error:
        return f"the compiled extension is not installed ({error})"
    number = getattr(torch.ops.fused_resnet_C, "interface_number", lambda: 0)()
    if number != INTERFACE:
        return f"the compiled extension was built from other sources (interface {number}, not {INTERFACE})"
    return ""


@cache
def onednn_convolution() -> bool:
    """Whether this torch offers the oneDNN convolution with a packed weight."""
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def unavailable() -> str:
    if extension_missing() and not onednn_convolution():
        return (
            f"{extension_missing()}, and this torch has no oneDNN; install with a C++ compiler: "
            "pip install --no-build-isolation ."
        )
    return ""


def unsupported(op: str, x: Tensor, weight: Tensor | None = None, args=None) -> str:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"{x.dtype} input; it takes float32 and bfloat16"
    if op == POOLED:
        return "it has no kernel for that"
    if op != "conv_scale_act":
        missing = extension_missing()
        return f"{missing}; install with a C++ compiler: pip install --no-build-isolation ." if missing else ""
    if engine_takes(x.dtype, args):
        return ""
    if not onednn_convolution() or not torch.backends.mkldnn.enabled:
        return "no fast convolution for it here, and oneDNN is missing or switched off"
    return "" if onednn_has(x.dtype) else f"oneDNN has no {x.dtype} on this processor"


def trusted(problem, device: torch.device) -> bool | None:
    return True


def explain(problem, device: torch.device) -> str:
    if problem.op != "conv_scale_act":
        return ""
    return "csrc/cpu" if engine_takes(problem.dtype, problem) else "oneDNN"


@cache
def _engine_has(dtype: torch.dtype) -> bool:
    return not extension_missing() and torch.ops.fused_resnet_C.conv_supported(dtype.itemsize * 8)


def engine_takes(dtype: torch.dtype, args) -> bool:
    """Whether csrc/cpu has a convolution for this problem on this processor."""
    return args.groups == 1 and _engine_has(dtype)


def conv_scale_act(x, weight, scale, shift, residual, args, act):
    x = channels_last(x)
    return prepare_conv_scale_act(x, weight, scale, shift, residual, args, act)(x, _optional(residual), None)


def prepare_conv_scale_act(x, weight, scale, shift, residual, args, act):
    """Return `run(x, residual, out)` for channels_last inputs like x; `out` is the residual or None."""
    prepare = _prepare_engine if engine_takes(x.dtype, args) else _prepare_onednn
    return prepare(x, weight, scale, shift, args, act)


def _pack(weight: Tensor, dtype: torch.dtype, *, lasting: bool) -> Tensor:
    return torch.ops.fused_resnet_C.conv_pack(weight.detach().to(dtype), lasting)


def _geometry(weight: Tensor, args) -> tuple[int, ...]:
    return *weight.shape[2:], *args.stride, *args.padding, *args.dilation


def _prepare_engine(x, weight, scale, shift, args, act):
    weights = packed(weight, ("engine", x.dtype), lambda: _pack(weight, x.dtype, lasting=True))
    scale, shift = scale.detach().float(), shift.detach().float()
    size, dtype, code = args.output_size(x, weight), x.dtype, ACT_CODES[act]
    geometry = _geometry(weight, args)
    kernel = torch.ops.fused_resnet_C.conv_scale_act.default

    def run(x, residual, out):
        if out is None:
            out = _empty(size, dtype)
        kernel(x, weights, scale, shift, residual, geometry, code, out)
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


def _empty(size, dtype: torch.dtype) -> Tensor:
    """An output: channels_last, in memory that is kept from call to call."""
    out = torch.ops.fused_resnet_C.empty_channels_last.default(size, dtype)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        out.fill_(float("nan"))  # as torch.empty
    return out


def max_pool2d(x, kernel, stride, padding, size):
    out = _empty((*x.shape[:2], *size), x.dtype)
    torch.ops.fused_resnet_C.max_pool(x, (*kernel, *stride, *padding), out, None)
    return out


def max_pool2d_argmax(x, kernel, stride, padding, size):
    """The output, and of each window the number r * S + s of the tap that it was taken from."""
    x, (out, argmax) = channels_last(x), _pooled(x, size)
    torch.ops.fused_resnet_C.max_pool(x, (*kernel, *stride, *padding), out, argmax)
    return out, argmax


def max_pool2d_backward(grad, argmax, kernel, stride, padding, size):
    """The gradient of x [N, C, *size]."""
    grad, d_x = channels_last(grad), _empty((*grad.shape[:2], *size), grad.dtype)
    torch.ops.fused_resnet_C.max_pool_bwd(grad, channels_last(argmax), (*kernel, *stride, *padding), d_x)
    return d_x


def _pooled(x: Tensor, size) -> tuple[Tensor, Tensor]:
    out = _empty((*x.shape[:2], *size), x.dtype)
    return out, torch.empty_like(out, dtype=torch.uint8)


def empty_cache() -> int:
    """Give the memory that is kept for coming outputs back to the system; return its bytes.

    Outputs of 1 MB and more on the CPU live in memory that is kept when they die, because the system zeroes fresh pages
    and takes them back at a cost above that of many a layer. With what is in use, it is never more than was in use at
    once since the last call of this function.
    """
    return 0 if extension_missing() else torch.ops.fused_resnet_C.empty_cache()


def scale_act(x, scale, shift, residual, act):
    x = channels_last(x)
    residual = _optional(residual)
    out = _empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.scale_act(x, scale.float(), shift.float(), residual, ACT_CODES[act], out)
    return out


def add_act(x, residual, act):
    x, out = channels_last(x), _empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.add_act_fwd(x, channels_last(residual), ACT_CODES[act], out)
    return out


def add_act_backward(grad, y, x, residual, act):
    if act == "none":
        return channels_last(grad)
    out = _empty(y.shape, y.dtype)
    torch.ops.fused_resnet_C.add_act_bwd(channels_last(grad), y, _optional(x), _optional(residual), ACT_CODES[act], out)
    return out


def _optional(value: Tensor | None) -> Tensor | None:
    return None if value is None else channels_last(value)


def _vector(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().contiguous()


def _norm(norm: Norm | None) -> tuple:
    """A norm as the operators take it."""
    return (None, None, None, None, 0.0) if norm is None else (*map(_vector, norm[:4]), norm.eps)


def _vectors(x: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(x.shape[1]) for _ in range(count)]


def moments(x):
    x, (mean, var) = channels_last(x), _vectors(x, 2)
    torch.ops.fused_resnet_C.bn_moments(x, mean, var)
    return mean, var


def norm_act(x, norm, residual, residual_norm, act):
    x, y = channels_last(x), _empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.norm_act(x, *_norm(norm), _optional(residual), *_norm(residual_norm), ACT_CODES[act], y)
    return y, None  # a bit an element gains nothing here


def norm_act_reduce(grad, x, norm, residual, residual_norm, act, y, mask, write):
    x, (d_weight, d_bias) = channels_last(x), _vectors(x, 2)
    g = _empty(x.shape, x.dtype) if write else None
    d_residual_weight = None if residual_norm is None else torch.empty_like(d_weight)
    torch.ops.fused_resnet_C.norm_act_reduce(
        channels_last(grad), x, *_norm(norm), _optional(residual), *_norm(residual_norm),
        _optional(y), ACT_CODES[act], g, d_weight, d_bias, d_residual_weight,
    )  # fmt: skip
    return g, d_weight, d_bias, d_residual_weight


def norm_act_input_grad(
    grad, x, norm, residual, residual_norm, act, y, mask, d_weight, d_bias, d_residual_weight, count
):
    x, d_x = channels_last(x), _empty(x.shape, x.dtype)
    d_residual = None if residual_norm is None else _empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.norm_act_input_grad(
        channels_last(grad), x, *_norm(norm), _optional(residual), *_norm(residual_norm),
        _optional(y), ACT_CODES[act], d_weight, d_bias, d_residual_weight, count, d_x, d_residual,
    )  # fmt: skip
    return d_x, d_residual


def norm_act_max_pool2d(x, norm, act, kernel, stride, padding, size):
    x, (y, argmax) = channels_last(x), _pooled(x, size)
    geometry = (*kernel, *stride, *padding)
    torch.ops.fused_resnet_C.norm_act_max_pool(x, *_norm(norm), ACT_CODES[act], geometry, y, argmax)
    return y, argmax


def norm_act_max_pool2d_reduce(grad, argmax, x, norm, act, kernel, stride, padding):
    x, (d_weight, d_bias) = channels_last(x), _vectors(x, 2)
    torch.ops.fused_resnet_C.norm_act_max_pool_reduce(
        channels_last(grad), channels_last(argmax), x, *_norm(norm), ACT_CODES[act], (*kernel, *stride, *padding),
        d_weight, d_bias,
    )  # fmt: skip
    return None, d_weight, d_bias  # the next pass makes g again: it has four times the elements of grad


def norm_act_max_pool2d_input_grad(grad, argmax, x, norm, act, kernel, stride, padding, g, d_weight, d_bias, count):
    x, d_x = channels_last(x), _empty(x.shape, x.dtype)
    torch.ops.fused_resnet_C.norm_act_max_pool_input_grad(
        channels_last(grad), channels_last(argmax), x, *_norm(norm), ACT_CODES[act], (*kernel, *stride, *padding),
        d_weight, d_bias, count, d_x,
    )  # fmt: skip
    return d_x


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
    weights = _pack(weight, x.dtype, lasting=False)
    z = _empty(args.output_size(x, weight), x.dtype)
    torch.ops.fused_resnet_C.conv_scale_act(
        x, weights, torch.ones(channels), shift, residual, _geometry(weight, args), ACT_CODES["none"], z
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
    vectors, eps = (None, None, None, None), 0.0
    if norm is not None:
        vectors, eps = (norm.mean, norm.var, _vector(norm.weight), _vector(norm.bias)), norm.eps
    d_weight = torch.empty_like(weight, dtype=torch.float32)
    torch.ops.fused_resnet_C.conv_wgrad(
        grad, channels_last(x), *vectors, eps, ACT_CODES[act], _geometry(weight, args), d_weight
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
    whole = _empty(x.shape, x.dtype)
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
