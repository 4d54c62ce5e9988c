"""What the compiled kernels take, and their outputs, in memory that is kept from call to call."""

import torch
from torch import Tensor

from fused_resnet.backends.cpu.extension import extension_missing
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.reference import channels_last


def empty(size, dtype: torch.dtype) -> Tensor:
    """An output: channels_last, in memory that is kept from call to call."""
    out = torch.ops.fused_resnet_C.empty_channels_last.default(size, dtype)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        out.fill_(float("nan"))  # as torch.empty
    return out


def empty_cache() -> int:
    """Give the memory that is kept for coming outputs back to the system; return its bytes.

    Outputs of 1 MB and more on the CPU live in memory that is kept when they die, because the system zeroes fresh pages
    and takes them back at a cost above that of many a layer. With what is in use, it is never more than was in use at
    once since the last call of this function.
    """
    return 0 if extension_missing() else torch.ops.fused_resnet_C.empty_cache()


def optional(value: Tensor | None) -> Tensor | None:
    return None if value is None else channels_last(value)


def vector(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().contiguous()


def norm_arguments(norm: Norm | None) -> tuple:
    """A norm as the compiled operators take it."""
    return (None, None, None, None, 0.0) if norm is None else (*map(vector, norm[:4]), norm.eps)
