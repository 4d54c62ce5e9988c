"""The operators, as functions. In `torch.ops.fused_resnet` those of training are one, `block`."""

from fused_resnet.ops.add_act import add_act
from fused_resnet.ops.bn_act import bn_act, scale_act
from fused_resnet.ops.conv_bn_act import conv_bn_act
from fused_resnet.ops.conv_scale_act import conv_scale_act
from fused_resnet.ops.conv_scale_act import prepare_conv_scale_act as prepare_conv_scale_act
from fused_resnet.ops.conv_scale_act import (
    prepare_conv_scale_act_max_pool2d as prepare_conv_scale_act_max_pool2d,
)
from fused_resnet.ops.direct import may_call_directly as may_call_directly
from fused_resnet.ops.direct import transformed as transformed
from fused_resnet.ops.max_pool2d import max_pool2d
from fused_resnet.ops.residual_block import Unit, residual_block

__all__ = [
    "Unit", "add_act", "bn_act", "conv_bn_act", "conv_scale_act", "max_pool2d", "residual_block", "scale_act"
]  # fmt: skip
