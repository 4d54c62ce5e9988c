"""The residual blocks of ResNet (He et al. 2015, arXiv:1512.03385), run as two or three fused operators.

Names of parameters and arguments are torchvision's. Hooks on the block itself work as always; a hook on a child makes
that child run by itself, unfused.
"""

import contextvars
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.modules.chain import chain

# The map that the running block may overwrite.
_given: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("fused_resnet_given", default=None)


def is_given(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and _given.get() is x


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class PadShortcut(nn.Module):
    """Shortcut "A": every stride-th pixel, new channels filled with zeros, no parameters (section 3.3, option A).

    Shapes:
        x: [N, in_planes, H, W]; returns: [N, out_planes, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_planes: int, out_planes: int, stride: int = 1):
        super().__init__()
        if out_planes < in_planes:
            raise ValueError(f"PadShortcut: cannot pad {in_planes} channels to {out_planes}")
        self.in_planes, self.out_planes, self.stride = in_planes, out_planes, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.out_planes - self.in_planes))

    def extra_repr(self) -> str:
        return f"{self.in_planes}, {self.out_planes}, stride={self.stride}"


class _ResidualBlock(unit.FusedModule):
    """What both blocks share: the layers in a row, and the branch that is added, or none in a plain network."""

    expansion: int = 1
    residual: bool = True
    lean: bool = False  # in training, compute the last convolution and the projection again instead of keeping them
    downsample: nn.Module | None

    def _layers(self) -> list[unit.Layer]:
        """The convolutions in a row."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        projection, branch = self._projection(), self.downsample if self.residual else None
        return chain(
            self._layers(),
            x,
            residual=branch(x) if branch is not None and projection is None else None,
            projection=projection,
            add_input=self.residual and branch is None,
            lean=self.lean and self.training,
            given=is_given(x),
        )

    def _projection(self) -> unit.Layer | None:
        """The shortcut, where it is a convolution with batch norm that nobody looks into."""
        branch = self.downsample
        if self.residual and type(branch) is nn.Sequential and len(branch) == 2 and not unit.hooked(branch):
            conv, bn = branch
            return unit.Layer(conv, bn, "none") if isinstance(conv, nn.Conv2d) else None
        return None


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    Shapes:
        x: [N, inplanes, H, W]; returns: [N, planes, P, Q] in channels_last, P = ceil(H / stride).

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as in torchvision.
        residual: False leaves the shortcut out (the plain networks of the degradation experiment, section 4.1).

    Raises:
        ValueError: groups, base_width or dilation that this block does not have.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        residual: bool = True,
    ):
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock: only groups=1 and base_width=64, got {groups} and {base_width}")
        if dilation > 1:
            raise ValueError(f"BasicBlock: only dilation=1, got {dilation}")
        norm_layer = norm_layer or BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose weight the zero-init option sets to 0."""
        return self.bn2

    def _layers(self) -> list[unit.Layer]:
        return [unit.Layer(self.conv1, self.bn1), unit.Layer(self.conv2, self.bn2)]


class Bottleneck(_ResidualBlock):
    """1x1, 3x3, 1x1 convolutions, four times as wide at the end, with the shortcut added before the last ReLU.

    Shapes:
        x: [N, inplanes, H, W]; returns: [N, 4 * planes, P, Q] in channels_last, P = ceil(H / stride).

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as in torchvision.
        residual: False leaves the shortcut out.
        stride_on: "3x3" (torchvision's form, "v1.5") or "1x1" (the original paper's).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        residual: bool = True,
        stride_on: str = "3x3",
    ):
        super().__init__()
        if stride_on not in ("3x3", "1x1"):
            raise ValueError(f"Bottleneck: stride_on must be '3x3' or '1x1', got {stride_on!r}")
        norm_layer = norm_layer or BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (1, stride) if stride_on == "3x3" else (stride, 1)
        self.conv1 = conv1x1(inplanes, width, first)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose weight the zero-init option sets to 0."""
        return self.bn3

    def _layers(self) -> list[unit.Layer]:
        convs = (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)
        return [unit.Layer(conv, bn) for conv, bn in convs]


def _ours_alone(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The block, where it keeps nothing of its input and its output."""
    return block if type(block) in (BasicBlock, Bottleneck) and "forward" not in vars(block) else None


def run_in_turn(stage: nn.Sequential, x: Tensor) -> Tensor:
    """Return `stage(x)`; in inference each block may overwrite what the one before it has returned.

    That saves writing a stage's widest map to fresh memory for every block. A map is given away only where both blocks
    are known to keep nothing of it and no hook could have taken it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(stage) is not nn.Sequential:
        return stage(x)
    if unit.hooked(stage) or unit.hooked_everywhere():
        return stage(x)
    return in_turn(stage, x, _ours_alone)


def in_turn(
    blocks: Iterable[nn.Module], x: Tensor, alone: Callable[[nn.Module], Callable[[Tensor], Tensor] | None]
) -> Tensor:
    """Run the blocks one after the other, those that are `alone` over the output of the one before, if it was too.

    `alone` returns what is called for a block that keeps nothing of its input and its output, and None for others.
    """
    before = False
    for block in blocks:
        run = None if unit.hooked(block) else alone(block)
        token = _given.set(x if before and run is not None else None)
        try:
            x = (block if run is None else run)(x)
        finally:
            _given.reset(token)
        before = run is not None
    return x
