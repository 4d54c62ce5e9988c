"""The operators, as functions; each but `max_pool2d` is also `torch.ops.fused_resnet.<name>`."""

from fused_resnet.ops.add_act import add_act
from fused_resnet.ops.bn_act import bn_act, scale_act
from fused_resnet.ops.conv_bn_act import conv_bn_act
from fused_resnet.ops.conv_scale_act import conv_scale_act
from fused_resnet.ops.conv_scale_act import prepare_conv_scale_act as prepare_conv_scale_act
from fused_resnet.ops.conv_scale_act import (
    prepare_conv_scale_act_max_pool2d as prepare_conv_scale_act_max_pool2d,
)
from fused_resnet.ops.direct import may_call_directly as may_call_directly
from fused_resnet.ops.max_pool2d import max_pool2d

__all__ = ["add_act", "bn_act", "conv_bn_act", "conv_scale_act", "max_pool2d", "scale_act"]
