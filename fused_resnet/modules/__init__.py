"""Drop-in modules: they own parameters and state, and do no arithmetic themselves."""

from fused_resnet.modules.batch_norm import BatchNorm2d, freeze_batch_norm
from fused_resnet.modules.blocks import BasicBlock, Bottleneck
from fused_resnet.modules.bn_act import BNAct2d
from fused_resnet.modules.conv_bn_act import ConvBNAct2d, DepthwiseSeparableConv2d
from fused_resnet.modules.sync_batch_norm import SyncBNAct2d, convert_sync_batchnorm

__all__ = [
    "BNAct2d",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "ConvBNAct2d",
    "DepthwiseSeparableConv2d",
    "SyncBNAct2d",
    "convert_sync_batchnorm",
    "freeze_batch_norm",
]
