"""The ResNets for 32x32 images: 6n + 2 layers, three stages (He et al. 2015, arXiv:1512.03385, section 4.2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_resnet.models.registry import factory, register
from fused_resnet.models.resnet import check_shortcut, initialise, make_stage
from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.modules.blocks import BasicBlock, conv3x3, run_in_turn


class CIFARResNet(unit.FusedModule):
    """A 3x3 stem, 2n layers each at 16, 32 and 64 channels, global average pool, a linear layer.

    Shapes:
        x: [N, in_channels, H, W], 32x32 in the paper; returns: [N, num_classes].

    Args:
        depth: 6n + 2 layers.
        in_channels: channels of the image.
        shortcut: "A" (no parameters, the paper's), "B", "C" or "none" (a plain network), as in `ResNet`.
        zero_init_residual, norm_layer, lean: as in `ResNet`.

    Raises:
        ValueError: a depth that is not 6n + 2, or an unknown shortcut.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        shortcut: str = "A",
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        lean: bool = False,
    ):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, at least 8, got {depth}")
        check_shortcut(shortcut)
        norm_layer = norm_layer or BatchNorm2d
        common = {"shortcut": shortcut, "norm_layer": norm_layer, "lean": lean}
        blocks = (depth - 2) // 6
        self.lean, self.shortcut = lean, shortcut
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = norm_layer(16)
        self.layer1 = make_stage(BasicBlock, 16, 16, blocks, **common)
        self.layer2 = make_stage(BasicBlock, 16, 32, blocks, stride=2, **common)
        self.layer3 = make_stage(BasicBlock, 32, 64, blocks, stride=2, **common)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = unit.conv_bn_act(self.conv1, self.bn1, x)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = run_in_turn(stage, x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


cifar_resnet20 = register("cifar_resnet20", factory(CIFARResNet, 20, num_classes=10))
cifar_resnet32 = register("cifar_resnet32", factory(CIFARResNet, 32, num_classes=10))
cifar_resnet44 = register("cifar_resnet44", factory(CIFARResNet, 44, num_classes=10))
cifar_resnet56 = register("cifar_resnet56", factory(CIFARResNet, 56, num_classes=10))
cifar_resnet110 = register("cifar_resnet110", factory(CIFARResNet, 110, num_classes=10))
cifar_resnet1202 = register("cifar_resnet1202", factory(CIFARResNet, 1202, num_classes=10))
