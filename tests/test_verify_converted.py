"""`verify` of networks that `fuse` converts."""

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.backends import reference
from fused_resnet.verify import STEM, block_names


def _torchvision():
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def _timm():
    model = pytest.importorskip("timm").create_model("resnet10t", num_classes=5, drop_rate=0.5, drop_path_rate=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the last one of a block is 0 otherwise, and hides it
    return model


def _transformers():
    transformers = pytest.importorskip("transformers")
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape, num_labels=5))


@pytest.mark.parametrize("build", [_torchvision, _timm, _transformers])
def test_converted_networks_pass_and_with_a_wrong_kernel_fail(build, monkeypatch):
    """In both modes: what verify changes in a network leaves its fused forwards in use."""
    plain, image = build(), torch.randn(4, 3, 64, 64)
    fused = fr.fuse(plain)
    report = fr.verify(fused, image, reference=plain, backend="reference")
    assert report, report
    for name in ("conv_scale_act", "norm_act"):
        monkeypatch.setattr(reference, name, _scaled(getattr(reference, name)))
    failed = {(row.name, row.mode) for row in fr.verify(fused, image, backend="reference").failures}
    blocks = {name for name in block_names(fused) if name != STEM}
    assert {name for name, _ in failed} >= blocks
    assert {mode for _, mode in failed} == {"eval", "train"}


def _scaled(function):
    def wrong(*args, **kwargs):
        y = function(*args, **kwargs)
        return (y[0] * 1.001, *y[1:]) if isinstance(y, tuple) else y * 1.001

    return wrong
