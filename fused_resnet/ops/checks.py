"""Errors that come before any launch: which argument, what it was, what was expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.backends import ACTIVATIONS


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of `tensor`: mixed dtypes are then cast, not refused."""
    return tensor.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tensor.device.type)


FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_input(op: str, x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be 4-d [N, C, H, W], got {x.dim()}-d {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_act(op: str, act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown act {act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")


def check_same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{op}: {name} is on {value.device}, but x is on {x.device}; move one of them")


def check_same_dtype(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{op}: {name} is {value.dtype}, but x is {x.dtype}; cast one of them, or use autocast")


def check_channels(op: str, channels: int, **vectors: Tensor | None) -> None:
    """Per-channel vectors have one value a channel: a shorter one would be read past its end."""
    for name, value in vectors.items():
        if value is None:
            continue
        if not value.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
        if value.dim() != 1 or value.shape[0] != channels:
            raise ValueError(
                f"{op}: {name} must have shape ({channels},), one value a channel, got {tuple(value.shape)}"
            )


def check_residual(op: str, residual: Tensor | None, shape: Sequence[int]) -> None:
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ValueError(f"{op}: residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")


def check_more_than_one_value(size: Sequence[int]) -> None:
    """The variance of one value is not defined: the error, and its text, are torch.nn.functional.batch_norm's."""
    if size[0] * size[2] * size[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}")


def check_eps(eps: float, *, training: bool) -> None:
    """The errors, and their texts, are torch.nn.functional.batch_norm's."""
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_statistics(op: str, running_mean: Tensor | None, running_var: Tensor | None, *, training: bool) -> None:
    if (running_mean is None) != (running_var is None):
        given = "running_mean" if running_var is None else "running_var"
        raise ValueError(f"{op}: give running_mean and running_var together, got only {given}")
    if not training and running_mean is None:
        raise ValueError(f"{op}: running_mean and running_var are needed when training=False")
