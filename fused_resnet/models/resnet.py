"""ResNet-18/34/50/101/152, ResNeXt and wide ResNet, assembled from fused blocks under torchvision's names.

He et al. 2015, arXiv:1512.03385 (table 1); Xie et al. 2016, arXiv:1611.05431; Zagoruyko & Komodakis 2016,
arXiv:1605.07146.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_resnet.models.registry import factory, register
from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.modules.blocks import BasicBlock, Bottleneck, PadShortcut, conv1x1, run_in_turn
from fused_resnet.modules.chain import chain
from fused_resnet.modules.max_pool import MaxPool2d

SHORTCUTS = ("A", "B", "C", "none")


class ResNet(unit.FusedModule):
    """A residual network; torchvision's `ResNet` in arguments, child names and state dict.

    Shapes:
        x: [N, in_channels, H, W], any H and W of 1 or more that leave a pixel; returns: [N, num_classes].

    Args:
        block: `BasicBlock` or `Bottleneck` (or a subclass).
        layers: blocks in each of the four stages.
        num_classes, zero_init_residual, groups, width_per_group, replace_stride_with_dilation, norm_layer: as in
            torchvision.
        in_channels: channels of the image, 1 for greyscale.
        lean: keep less for the backward pass: each block's last convolution, and its projection, are computed again;
            a block that does not run as one operator (another norm, a hook inside) is computed again as a whole.
        shortcut: "A" (no parameters), "B" (1x1 projection where shapes change), "C" (projection everywhere) or "none"
            (a plain network).
        stride_on: "3x3" or "1x1", which convolution of a bottleneck has the stride.

    Raises:
        ValueError: an unknown option, or one that the block does not have.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        in_channels: int = 3,
        lean: bool = False,
        shortcut: str = "B",
        stride_on: str = "3x3",
    ):
        super().__init__()
        dilate = (False,) * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must be None or have 3 elements, got {dilate}")
        check_shortcut(shortcut)
        if stride_on != "3x3" and not issubclass(block, Bottleneck):
            raise ValueError(f"stride_on={stride_on!r} is an option of bottleneck blocks, got {block.__name__}")
        self._norm_layer = norm_layer or BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.lean, self.shortcut, self.stride_on = lean, shortcut, stride_on
        self.conv1 = nn.Conv2d(in_channels, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self, zero_init_residual)

    def _make_layer(self, block, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        first = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        stage = make_stage(
            block,
            self.inplanes,
            planes,
            blocks,
            stride,
            shortcut=self.shortcut,
            norm_layer=self._norm_layer,
            dilations=(first, self.dilation),
            groups=self.groups,
            base_width=self.base_width,
            lean=self.lean,
            **({} if self.stride_on == "3x3" else {"stride_on": self.stride_on}),
        )
        self.inplanes = planes * block.expansion
        return stage

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution with its norm and activation, before pooling."""
        return unit.conv_bn_act(self.conv1, self.bn1, x)

    def stages(self) -> list[nn.Sequential]:
        """The stages, finest first; without those that a feature extractor left out."""
        return [stage for stage in (self.layer1, self.layer2, self.layer3, self.layer4) if stage is not None]

    def forward(self, x: Tensor) -> Tensor:
        if type(self).stem is ResNet.stem:
            x = chain([unit.Layer(self.conv1, self.bn1)], x, pool=self.maxpool)
        else:
            x = self.maxpool(self.stem(x))
        for stage in self.stages():  # no map is held for longer than its reader needs it
            x = run_in_turn(stage, x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def make_stage(
    block: type[BasicBlock | Bottleneck],
    in_planes: int,
    planes: int,
    blocks: int,
    stride: int = 1,
    *,
    shortcut: str = "B",
    norm_layer: Callable[..., nn.Module] = BatchNorm2d,
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
    base_width: int = 64,
    lean: bool = False,
    **options,
) -> nn.Sequential:
    """`blocks` blocks, of which the first has the stride; `dilations`: the first block's and the others'."""
    out_planes = planes * block.expansion
    layers = []
    for index in range(blocks):
        step, dilation = (stride, dilations[0]) if index == 0 else (1, dilations[1])
        branch = make_shortcut(shortcut, in_planes, out_planes, step, norm_layer)
        arguments = (in_planes, planes, step, branch, groups, base_width, dilation, norm_layer)
        layers.append(block(*arguments, residual=shortcut != "none", **options))
        layers[-1].lean = lean
        in_planes = out_planes
    return nn.Sequential(*layers)


def check_shortcut(kind: str) -> None:
    if kind not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {SHORTCUTS}, got {kind!r}")


def make_shortcut(kind: str, in_planes: int, out_planes: int, stride: int, norm_layer) -> nn.Module | None:
    """The shortcut branch of a block; None: identity, or none at all."""
    changes = stride != 1 or in_planes != out_planes
    if kind == "none" or (kind != "C" and not changes):
        return None
    if kind == "A":
        return PadShortcut(in_planes, out_planes, stride)
    return nn.Sequential(conv1x1(in_planes, out_planes, stride), norm_layer(out_planes))


def initialise(model: nn.Module, zero_init_residual: bool = False) -> None:
    """torchvision's initialisation: Kaiming normal, fan out (He et al. 2015, arXiv:1502.01852); BN at 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)
    if zero_init_residual:  # every block starts as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1)
        for module in model.modules():
            if isinstance(module, (BasicBlock, Bottleneck)) and module.last_norm.weight is not None:
                nn.init.constant_(module.last_norm.weight, 0)


def _resnet(
    block, layers, *, features_only: bool = False, out_indices: Sequence[int] | None = None, **kwargs
) -> ResNet:
    """A `ResNet`, or with `features_only` a `ResNetFeatures` for the maps `out_indices` (all five by default)."""
    if not features_only:
        if out_indices is not None:
            raise ValueError(f"out_indices={out_indices} needs features_only=True")
        return ResNet(block, layers, **kwargs)
    from fused_resnet.models.features import ResNetFeatures  # which is a ResNet, and so cannot be imported above

    return ResNetFeatures(block, layers, **({} if out_indices is None else {"out_indices": out_indices}), **kwargs)


resnet18 = register("resnet18", factory(_resnet, BasicBlock, (2, 2, 2, 2)))
resnet34 = register("resnet34", factory(_resnet, BasicBlock, (3, 4, 6, 3)))
resnet50 = register("resnet50", factory(_resnet, Bottleneck, (3, 4, 6, 3)))
resnet101 = register("resnet101", factory(_resnet, Bottleneck, (3, 4, 23, 3)))
resnet152 = register("resnet152", factory(_resnet, Bottleneck, (3, 8, 36, 3)))
resnext50_32x4d = register("resnext50_32x4d", factory(_resnet, Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4))
resnext101_32x8d = register(
    "resnext101_32x8d", factory(_resnet, Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8)
)
wide_resnet50_2 = register("wide_resnet50_2", factory(_resnet, Bottleneck, (3, 4, 6, 3), width_per_group=128))
wide_resnet101_2 = register("wide_resnet101_2", factory(_resnet, Bottleneck, (3, 4, 23, 3), width_per_group=128))
plain18 = register("plain18", factory(_resnet, BasicBlock, (2, 2, 2, 2), shortcut="none"))
plain34 = register("plain34", factory(_resnet, BasicBlock, (3, 4, 6, 3), shortcut="none"))
