"""ResNets in PyTorch with fused convolution + batch norm + residual + activation kernels."""

from fused_resnet import ops
from fused_resnet._version import __version__
from fused_resnet.backends import available_backends, use_backend
from fused_resnet.models import (
    ResNet,
    create_model,
    list_models,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)
from fused_resnet.modules import (
    BasicBlock,
    BNAct2d,
    Bottleneck,
    ConvBNAct2d,
    DepthwiseSeparableConv2d,
    freeze_batch_norm,
)

__all__ = [
    "BNAct2d",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct2d",
    "DepthwiseSeparableConv2d",
    "ResNet",
    "__version__",
    "available_backends",
    "create_model",
    "freeze_batch_norm",
    "list_models",
    "ops",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "use_backend",
    "wide_resnet50_2",
]
