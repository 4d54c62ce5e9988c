"""MobileNet v1 (Howard et al. 2017, arXiv:1704.04861) and v2 (Sandler et al. 2018, arXiv:1801.04381).

v2 has torchvision's arguments, child names, state dict and initialisation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_resnet.models.registry import factory, register
from fused_resnet.models.resnet import initialise
from fused_resnet.modules import unit
from fused_resnet.modules.again import again
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.modules.conv_bn_act import ConvBNAct2d, DepthwiseSeparableConv2d

# Table 1 of the v1 paper: output channels and stride of each depthwise separable convolution.
V1_LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# Table 2 of the v2 paper: expansion, channels, blocks, stride of the first block.
V2_LAYERS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor` and not more than a tenth below `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class _MobileNet(unit.FusedModule):
    """What both share: features, global average pool, classifier."""

    features: nn.Sequential
    classifier: nn.Sequential
    lean: bool

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class MobileNetV1(_MobileNet):
    """A strided 3x3 convolution, 13 depthwise separable ones, global average pool, a linear layer.

    Shapes:
        x: [N, in_channels, H, W]; returns: [N, num_classes].

    Args:
        width_mult: factor on every layer's channels, which are rounded to a multiple of 8.
        dropout: chance that a pooled feature is dropped in training.
        in_channels, lean: as in `ResNet`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.001,
        *,
        in_channels: int = 3,
        lean: bool = False,
    ):
        super().__init__()
        self.lean = lean
        channels = make_divisible(32 * width_mult)
        features: list[nn.Module] = [ConvBNAct2d(in_channels, channels, 3, stride=2)]
        for planes, stride in V1_LAYERS:
            out_channels = make_divisible(planes * width_mult)
            features.append(DepthwiseSeparableConv2d(channels, out_channels, stride=stride))
            features[-1].lean = lean
            channels = out_channels
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self)


class ConvBNReLU6(unit.FusedModule, nn.Sequential):
    """Convolution, batch norm, ReLU6 as children 0, 1, 2 (torchvision's `Conv2dNormActivation`), run as one operator.

    Shapes:
        x: [N, in_channels, H, W]; returns: [N, out_channels, P, Q] in channels_last, P = ceil(H / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] = BatchNorm2d,
    ):
        padding = (kernel_size - 1) // 2
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        super().__init__(conv, norm_layer(out_channels), nn.ReLU6(inplace=True))
        self.out_channels = out_channels

    def _layer(self) -> unit.Layer | None:
        """Its children as one layer; None where they are others, or hooked."""
        if len(self) != 3 or type(self[2]) is not nn.ReLU6 or unit.hooked(self[2]):
            return None
        return unit.Layer(self[0], self[1], "relu6")

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer()
        if layer is None:
            return nn.Sequential.forward(self, x)
        return unit.conv_bn_act(layer.conv, layer.bn, x, act=layer.act)


class InvertedResidual(unit.FusedModule):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; the input added where the shape is kept.

    Shapes:
        x: [N, inp, H, W]; returns: [N, oup, P, Q] in channels_last, P = ceil(H / stride).

    Raises:
        ValueError: a stride other than 1 or 2.
    """

    lean: bool = False  # in training, compute the last convolution again instead of keeping it

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: int,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        norm_layer = norm_layer or BatchNorm2d
        hidden = round(inp * expand_ratio)
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU6(inp, hidden, 1, norm_layer=norm_layer))
        layers.append(ConvBNReLU6(hidden, hidden, stride=stride, groups=hidden, norm_layer=norm_layer))
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, oup, 1, bias=False), norm_layer(oup))
        self.stride, self.out_channels = stride, oup
        self.use_res_connect = stride == 1 and inp == oup

    def forward(self, x: Tensor) -> Tensor:
        if unit.hooked(self.conv):
            return x + self.conv(x) if self.use_res_connect else self.conv(x)
        *first, conv, bn = self.conv
        layers = [*(unit.sole_layer(module) for module in first), unit.Layer(conv, bn, "none")]
        if unit.trainable(layers):
            return unit.train(layers, x, add_input=self.use_res_connect, lean=self.lean)
        return again(self._one_by_one, x, self.lean and self.training, unit.below(self))

    def _one_by_one(self, x: Tensor) -> Tensor:
        *first, conv, bn = self.conv
        y = x
        for module in first:
            y = module(y)
        return unit.conv_bn_act(conv, bn, y, x if self.use_res_connect else None, act="none")


class MobileNetV2(_MobileNet):
    """A strided 3x3 convolution, 17 inverted residuals, a 1x1 convolution, global average pool, a linear layer.

    Shapes:
        x: [N, in_channels, H, W]; returns: [N, num_classes].

    Args:
        num_classes, width_mult, inverted_residual_setting, round_nearest, block, norm_layer, dropout: as in
            torchvision.
        in_channels, lean: as in `ResNet`.

    Raises:
        ValueError: an `inverted_residual_setting` that is empty or has no 4 values a row.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        block: Callable[..., nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        dropout: float = 0.2,
        *,
        in_channels: int = 3,
        lean: bool = False,
    ):
        super().__init__()
        setting = V2_LAYERS if inverted_residual_setting is None else inverted_residual_setting
        if not setting or any(len(row) != 4 for row in setting):
            raise ValueError(f"inverted_residual_setting must have rows of 4 values, got {setting}")
        block, norm_layer = block or InvertedResidual, norm_layer or BatchNorm2d
        self.lean = lean
        channels = make_divisible(32 * width_mult, round_nearest)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        features: list[nn.Module] = [ConvBNReLU6(in_channels, channels, stride=2, norm_layer=norm_layer)]
        for expansion, planes, blocks, stride in setting:
            out_channels = make_divisible(planes * width_mult, round_nearest)
            for index in range(blocks):
                step = stride if index == 0 else 1
                features.append(block(channels, out_channels, step, expand_ratio=expansion, norm_layer=norm_layer))
                features[-1].lean = lean
                channels = out_channels
        features.append(ConvBNReLU6(channels, self.last_channel, 1, norm_layer=norm_layer))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes))
        initialise(self)
        nn.init.normal_(self.classifier[1].weight, 0, 0.01)
        nn.init.zeros_(self.classifier[1].bias)


mobilenet_v1 = register("mobilenet_v1", factory(MobileNetV1))
mobilenet_v2 = register("mobilenet_v2", factory(MobileNetV2))
