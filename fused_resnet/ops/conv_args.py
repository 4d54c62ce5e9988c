"""The normal form of a convolution's arguments, and its output size."""

import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.problem import ConvArgs as ConvArgs


def pair(op: str, name: str, value, least: int) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) == 1:
        values = values * 2
    if len(values) != 2 or any(isinstance(v, bool) or not hasattr(v, "__index__") or v < least for v in values):
        raise ValueError(f"{op}: {name} must be an int or a pair of ints of at least {least}, got {value!r}")
    return values


def normalise(op: str, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> tuple[Tensor, ConvArgs]:
    """Check a convolution's arguments; return x (padded where "same" is lopsided) and their normal form."""
    args, more = geometry(op, x.shape, weight, stride, padding, dilation, groups)
    return F.pad(x, (0, more[1], 0, more[0])) if any(more) else x, args


def geometry(op: str, size, weight: Tensor, stride, padding, dilation, groups: int) -> tuple[ConvArgs, tuple[int, int]]:
    """Check a convolution's arguments for an input of shape `size`; return their normal form, and the rows and columns
    to be added at the end of the input where "same" is lopsided.
    """
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must be 4-d [K, C / groups, R, S], got {weight.dim()}-d {tuple(weight.shape)}")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {weight.shape[0]} output channels, got {groups!r}")
    if size[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{op}: x has {size[1]} channels, but weight {tuple(weight.shape)} with groups={groups} "
            f"expects {weight.shape[1] * groups}"
        )
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    padding, more = _resolve_padding(op, weight, stride, padding, dilation)
    args = ConvArgs(stride, padding, dilation, groups)
    padded = (*size[:2], size[2] + more[0], size[3] + more[1])
    if min(args.output_shape(padded, weight)[2:]) < 1:
        raise ValueError(
            f"{op}: an image of {padded[2:]} is too small for a kernel of {tuple(weight.shape[2:])} with "
            f"padding {padding} and dilation {dilation}"
        )
    return args, more


def _resolve_padding(op, weight, stride, padding, dilation) -> tuple[tuple[int, int], tuple[int, int]]:
    if not isinstance(padding, str):
        return pair(op, "padding", padding, 0), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ValueError(f"{op}: padding must be an int, a pair, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"{op}: padding='same' needs stride 1, got stride {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    # As torch.nn.functional.conv2d: the odd row or column goes to the end.
    return (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
