"""Drop-in convolution + batch norm (+ residual) + activation."""

from torch import Tensor, nn

from fused_resnet.modules import unit
from fused_resnet.modules.again import again
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.ops.checks import check_act


class ConvBNAct2d(unit.FusedModule):
    """`act(bn(conv(x)) + residual)` in one operator, with children `.conv` and `.bn`.

    Shapes:
        x: [N, in_channels, H, W]; residual: like the output, or None.
        returns: [N, out_channels, P, Q] in channels_last.

    Args:
        padding: as `torch.nn.Conv2d`; None: `dilation * (kernel_size - 1) // 2`, which keeps the size at stride 1.
        act: "none", "relu", "relu6", "hardswish" or "silu".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=None,
        dilation=1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: str = "relu",
    ):
        super().__init__()
        check_act(type(self).__name__, act)
        if padding is None:
            kernel, spread = _pair(kernel_size), _pair(dilation)
            padding = tuple(d * (k - 1) // 2 for d, k in zip(spread, kernel, strict=True))
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=bias
        )
        self.bn = BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act = act

    def _layer(self) -> unit.Layer:
        """Its children as one layer."""
        return unit.Layer(self.conv, self.bn, self.act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return unit.conv_bn_act(self.conv, self.bn, x, residual, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class DepthwiseSeparableConv2d(unit.FusedModule, nn.Sequential):
    """3x3 depthwise, then 1x1, each with batch norm and activation (MobileNet, arXiv:1704.04861, section 3.1).

    Shapes:
        x: [N, in_channels, H, W]; returns: [N, out_channels, P, Q] in channels_last.

    It costs 1 / out_channels + 1 / kernel_size^2 of a full convolution's multiplications.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size=3, stride=1, act: str = "relu"):
        super().__init__(
            ConvBNAct2d(in_channels, in_channels, kernel_size, stride, groups=in_channels, act=act),
            ConvBNAct2d(in_channels, out_channels, 1, act=act),
        )

    lean: bool = False  # in training, compute the 1x1 convolution again instead of keeping it

    def forward(self, x: Tensor) -> Tensor:
        layers = [unit.sole_layer(module) for module in self]
        if unit.trainable(layers):
            return unit.train(layers, x, lean=self.lean)
        return again(super().forward, x, self.lean and self.training, unit.below(self))


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
