"""CPU: the compiled kernels of csrc/cpu, and oneDNN for the convolutions that they do not take.

Convolutions in inference run in `fused_resnet_C::conv_scale_act` where the processor has the instructions for it
(fp32: AVX-512; bf16: AMX), and through oneDNN with packed weights elsewhere.
"""

from functools import cache

import torch
from torch import Tensor

from fused_resnet.backends.cpu.convolution import conv_scale_act as conv_scale_act
from fused_resnet.backends.cpu.convolution import prepare_conv_scale_act as prepare_conv_scale_act
from fused_resnet.backends.cpu.elementwise import add_act as add_act
from fused_resnet.backends.cpu.elementwise import add_act_backward as add_act_backward
from fused_resnet.backends.cpu.elementwise import max_pool2d as max_pool2d
from fused_resnet.backends.cpu.elementwise import max_pool2d_argmax as max_pool2d_argmax
from fused_resnet.backends.cpu.elementwise import max_pool2d_backward as max_pool2d_backward
from fused_resnet.backends.cpu.elementwise import moments as moments
from fused_resnet.backends.cpu.elementwise import norm_act as norm_act
from fused_resnet.backends.cpu.elementwise import norm_act_input_grad as norm_act_input_grad
from fused_resnet.backends.cpu.elementwise import norm_act_max_pool2d as norm_act_max_pool2d
from fused_resnet.backends.cpu.elementwise import norm_act_max_pool2d_input_grad as norm_act_max_pool2d_input_grad
from fused_resnet.backends.cpu.elementwise import norm_act_max_pool2d_reduce as norm_act_max_pool2d_reduce
from fused_resnet.backends.cpu.elementwise import norm_act_reduce as norm_act_reduce
from fused_resnet.backends.cpu.elementwise import scale_act as scale_act
from fused_resnet.backends.cpu.extension import engine_takes, extension_missing
from fused_resnet.backends.cpu.memory import empty_cache as empty_cache
from fused_resnet.backends.cpu.training import conv_moments as conv_moments
from fused_resnet.backends.cpu.training import convolution_backward as convolution_backward
from fused_resnet.backends.cpu.training import convolve as convolve
from fused_resnet.backends.problem import POOLED

DTYPES = (torch.float32, torch.bfloat16)


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
