"""Tensors as the kernels of a GPU read and write them: dense channels_last, from addresses that are multiples of 16."""

import torch
from torch import Tensor

from fused_resnet.backends.reference import channels_last


def aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def ready(x: Tensor | None) -> Tensor | None:
    """x in that layout; the same tensor where it has it."""
    return None if x is None else aligned(channels_last(x))


def vector(value: Tensor | None) -> Tensor | None:
    """A number a channel, as the kernels read it: dense, in fp32."""
    return None if value is None else aligned(value.detach().float().contiguous())


def empty(size, x: Tensor) -> Tensor:
    """An output beside x."""
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
