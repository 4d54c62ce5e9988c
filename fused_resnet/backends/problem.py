"""What a backend is asked to compute, as a value: the key of the selection, of plans and of the kernels' choice."""

from typing import NamedTuple

import torch
from torch import Tensor

# A convolution with a 3x3 max-pool of stride 2 and padding 1 behind it: the stem of a ResNet.
POOLED = "conv_scale_act_max_pool2d"


def windows(size, window, stride, padding, dilation=(1, 1)) -> tuple[int, int]:
    """How many positions a window has in an image, down and across; each argument is a pair."""
    p, q = (
        (size[i] + 2 * padding[i] - dilation[i] * (window[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )  # fmt: skip
    return p, q


class ConvArgs(NamedTuple):
    """Arguments of a 2-d convolution, each a pair (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, stride, padding, dilation, groups) -> "ConvArgs":
        """From the lists that the dispatcher hands on."""
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups)

    def output_size(self, x: Tensor, weight: Tensor) -> list[int]:
        return self.output_shape(x.shape, weight)

    def output_shape(self, size, weight: Tensor) -> list[int]:
        """The output's shape for an input of shape `size`."""
        spatial = windows(size[2:], weight.shape[2:], self.stride, self.padding, self.dilation)
        return [size[0], weight.shape[0], *spatial]


class Problem(NamedTuple):
    """One call of an operator, without its tensors.

    `x` is [N, C, H, W]; `weight` is [K, C / groups, R, S], or () for an operator without one.
    """

    op: str
    x: tuple[int, ...]
    dtype: torch.dtype
    weight: tuple[int, ...] = ()
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    act: str = "none"

    @classmethod
    def of(cls, op: str, x: Tensor, weight: Tensor | None, args, residual: Tensor | None, act: str) -> "Problem":
        """The problem of these tensors; `args` are a convolution's (stride, padding, dilation, groups), or None."""
        # Pairs, because the dispatcher hands on lists.
        geometry = () if weight is None else (tuple(weight.shape), *map(tuple, args[:3]), args[3])
        rest = {"residual": residual is not None, "act": act}
        return cls(op, tuple(x.shape), x.dtype, *geometry, **rest)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the convolution's output, P and Q."""
        return windows(self.x[2:], self.weight[2:], self.stride, self.padding, self.dilation)

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The shape of the output, [N, K, P, Q]."""
        if not self.weight:
            return self.x
        p, q = self.size
        pooled = ((p - 1) // 2 + 1, (q - 1) // 2 + 1) if self.op == POOLED else (p, q)
        return self.x[0], self.weight[0], *pooled

    @property
    def args(self) -> ConvArgs:
        return ConvArgs(self.stride, self.padding, self.dilation, self.groups)

    @property
    def depthwise(self) -> bool:
        """One filter a channel."""
        return bool(self.weight) and self.groups == self.x[1] == self.weight[0] and self.groups > 1

    def __str__(self) -> str:
        """Such as "conv_scale_act 1x1 256->64 256x56x56 +residual relu bfloat16"; no two problems have the same."""
        n, c, h, w = self.x
        parts = [self.op]
        if self.weight:
            k, _, r, s = self.weight
            strided = {(1, 1): "", (2, 2): "/2"}.get(self.stride, f"/{self.stride[0]}x{self.stride[1]}")
            parts += [f"{r}x{s}{strided}", f"depthwise {c}" if self.depthwise else f"{c}->{k}"]
            parts += [f"groups {self.groups}"] if self.groups > 1 and not self.depthwise else []
            parts += [f"padding {self.padding[0]}x{self.padding[1]}"] if self.padding != (r // 2, s // 2) else []
            parts += [f"dilation {self.dilation[0]}x{self.dilation[1]}"] if self.dilation != (1, 1) else []
            parts.append(f"{n}x{h}x{w}")
        else:
            parts.append(f"{n}x{c}x{h}x{w}")
        parts += ["+residual"] if self.residual else []
        return " ".join([*parts, self.act, str(self.dtype).removeprefix("torch.")])
