"""Networks that go through PyTorch's own tools, fused: an own one, one of timm's norms, and a ResNet."""

import pytest
import torch
import torch.nn.functional as F
from problems import randomised
from torch import Tensor, nn

import fused_resnet as fr


class Small(nn.Module):
    """A stem with pooling, a convolution with a bias and no norm, a residual block, a sum, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.biased = nn.Conv2d(8, 8, 3, padding="same")
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn(self.stem(x))))
        y = F.relu(self.biased(x))
        y = F.relu(self.block(y) + x)
        return self.fc(y.mean((2, 3)))


def own():
    return Small()


def of_timm():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), layers.BatchNormAct2d(8),
        nn.Conv2d(8, 16, 3, 1, 1, groups=2), layers.BatchNormAct2d(16, act_layer=nn.SiLU),
        nn.Flatten(), nn.Linear(16 * 16 * 16, 5),
    )  # fmt: skip


def resnet18():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.resnet18(num_classes=5)


NETWORKS = {"own": own, "timm": of_timm, "resnet18": resnet18}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def pair(make, training=False):
    """The network, and a fused copy of it."""
    plain = randomised(make()).train(training)
    return plain, fr.fuse(plain)


def images(n=2):
    return torch.randn(n, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def operators(graph) -> list[str]:
    """Names of this package's operators in an fx graph."""
    found = [node.target for node in graph.nodes if node.op == "call_function"]
    return [target._schema.name for target in found if getattr(target, "namespace", None) == "fused_resnet"]
