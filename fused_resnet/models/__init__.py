"""Networks."""

from fused_resnet.models.cifar import (
    CIFARResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
)
from fused_resnet.models.features import ResNetFeatures
from fused_resnet.models.mobilenet import MobileNetV1, MobileNetV2, mobilenet_v1, mobilenet_v2
from fused_resnet.models.multi_head import MultiHead, resnet34_multi_head
from fused_resnet.models.preact import PreActBlock, PreActResNet, preact_resnet_cifar
from fused_resnet.models.registry import create_model, list_models
from fused_resnet.models.resnet import (
    ResNet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fused_resnet.models.weights import load_weights

__all__ = [
    "CIFARResNet",
    "MobileNetV1",
    "MobileNetV2",
    "MultiHead",
    "PreActBlock",
    "PreActResNet",
    "ResNet",
    "ResNetFeatures",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
    "create_model",
    "list_models",
    "load_weights",
    "mobilenet_v1",
    "mobilenet_v2",
    "plain18",
    "plain34",
    "preact_resnet_cifar",
    "resnet18",
    "resnet34",
    "resnet34_multi_head",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
