"""The compiled extension, and which convolutions its kernels take on this processor."""

import importlib
from functools import cache

import torch

ACT_CODES = {"none": 0, "relu": 1, "relu6": 2, "hardswish": 3, "silu": 4}

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
def _engine_has(dtype: torch.dtype) -> bool:
    return not extension_missing() and torch.ops.fused_resnet_C.conv_supported(dtype.itemsize * 8)


def engine_takes(dtype: torch.dtype, args) -> bool:
    """Whether csrc/cpu has a convolution for this problem on this processor."""
    return args.groups == 1 and _engine_has(dtype)
