"""The pre-activation ResNet for 32x32 images (He et al. 2016, arXiv:1603.05027), with pooling where sizes halve."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_resnet.models.registry import factory, register
from fused_resnet.models.resnet import initialise
from fused_resnet.modules import unit
from fused_resnet.modules.again import again
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.modules.blocks import conv1x1, conv3x3


class PreActBlock(unit.FusedModule):
    """`conv2(relu(bn2(conv1(relu(bn1(x)))))) + x`: figure 4(e) of the paper.

    With `pool` the size halves: a 2x2 max-pool before the trunk, a strided 1x1 convolution on the shortcut.

    Shapes:
        x: [N, in_planes, H, W]; returns: [N, planes, P, Q], P = ceil(H / 2) with `pool`, else H.

    Raises:
        ValueError: other channels without `pool`.
    """

    lean: bool = False  # in training, keep the block's input alone and compute the block again

    def __init__(
        self, in_planes: int, planes: int, pool: bool = False, norm_layer: Callable[..., nn.Module] = BatchNorm2d
    ):
        super().__init__()
        if in_planes != planes and not pool:
            raise ValueError(f"PreActBlock: {in_planes} channels become {planes} only where pool=True")
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else None  # odd sizes as in the strided convolution
        self.bn1 = norm_layer(in_planes)
        self.conv1 = conv3x3(in_planes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.downsample = conv1x1(in_planes, planes, stride=2) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        return again(self._forward, x, self.lean and self.training, unit.below(self))

    def _forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        y = x if self.pool is None else self.pool(x)
        y = unit.bn_act(self.bn1, y)
        y = unit.conv_bn_act(self.conv1, self.bn2, y)
        return self.conv2(y) + residual


class PreActResNet(unit.FusedModule):
    """A 3x3 stem, stages of `PreActBlock`s, BN-ReLU, dropout, global average pool, a linear layer.

    Shapes:
        x: [N, in_channels, H, W]; returns: [N, num_classes], logits: the softmax belongs to the loss.

    Args:
        layers: blocks in each stage; every stage after the first halves the size.
        widths: channels of each stage.
        dropout: chance that a value before the pooling is dropped in training.
        in_channels, norm_layer: as in `ResNet`.
        lean: keep only the blocks' inputs for the backward pass and compute the blocks again there.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 3, 3, 3),
        widths: Sequence[int] = (32, 64, 128, 256),
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        dropout: float = 0.25,
        norm_layer: Callable[..., nn.Module] | None = None,
        lean: bool = False,
    ):
        super().__init__()
        if len(layers) != len(widths):
            raise ValueError(f"layers and widths must have one value a stage, got {layers} and {widths}")
        norm_layer = norm_layer or BatchNorm2d
        self.lean = lean
        self.conv1 = conv3x3(in_channels, widths[0])
        self.stages = nn.ModuleList()
        planes = widths[0]
        for index, (blocks, width) in enumerate(zip(layers, widths, strict=True)):
            first = PreActBlock(planes, width, pool=index > 0, norm_layer=norm_layer)
            others = (PreActBlock(width, width, norm_layer=norm_layer) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *others))
            for block in self.stages[-1]:
                block.lean = lean
            planes = width
        self.bn = norm_layer(planes)
        self.dropout = nn.Dropout(dropout)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        x = self.dropout(unit.bn_act(self.bn, x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


preact_resnet_cifar = register("preact_resnet_cifar", factory(PreActResNet, num_classes=10))
