"""Forwards that a trace could misread: each fused network does what it does without `fuse`."""

import copy
import dataclasses
import enum
import types

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn

import fused_resnet as fr

C = 4


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Flattening(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x):
        x = self.features(x)
        return x.view(x.size(0), -1)


class Branching(nn.Module):
    """Its forward cannot be traced, and asks for a view."""

    def forward(self, x):
        return x.view(x.size(0), -1) if x.sum() < 1e9 else x


class FlatteningUntraced(Flattening):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


class Masked(Cell):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x):
        y = super().forward(x)
        return y if self.mask is None else y * self.mask


class FreezesItself(Cell):
    def forward(self, x):
        self.bn.eval()
        y = super().forward(x)
        self.bn.train()
        return y


class AsksItsNorm(Cell):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if self.bn.training else y


class Catches(Cell):
    def forward(self, x):
        try:
            return super().forward(x) * int(x.shape[0])
        except Exception:
            return super().forward(x) * 100


class Merge(nn.Module):
    def forward(self, a, b):
        return F.relu(a + 2 * b)


class MergesTwice(Cell):
    def __init__(self):
        super().__init__()
        self.merge = Merge()

    def forward(self, x):
        return self.merge(x, x) + self.merge(x, super().forward(x))


class CallsOtherwise(Cell):
    def __call__(self, x):
        return super().__call__(2 * x) + 1


class OwnCall(Cell):
    def __init__(self):
        super().__init__()
        self.inner = CallsOtherwise()

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.inner(x))))


class OtherWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Cell()
        self.other = {name: 2 * value.detach().double() for name, value in self.net.named_parameters()}

    def forward(self, x):
        return F.relu(torch.func.functional_call(self.net, self.other, (x,)))


@dataclasses.dataclass
class Doubled:
    y: torch.Tensor

    def __post_init__(self):
        self.y = 2 * self.y


class ReturnsDataclass(Cell):
    def forward(self, x):
        return Doubled(super().forward(x))


class ReadsDataclass(Cell):
    def __init__(self):
        super().__init__()
        self.inner = ReturnsDataclass()

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.inner(x).y)))


class Key(enum.Enum):
    A = 1


class ReturnsDict(Cell):
    def forward(self, x):
        return {Key.A: super().forward(x)}


class ReadsDict(ReadsDataclass):
    def __init__(self):
        super().__init__()
        self.inner = ReturnsDict()

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.inner(x)[Key.A])))


class AddsANumber(Cell):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x.shape[0])


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(2) for m in (nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())))

    def forward(self, x):
        return self.layers[3:](self.layers[:3](x))


class Configured(Cell):
    def __init__(self):
        super().__init__()
        self.config, self.names = types.SimpleNamespace(factor=1.0), {"a"}

    def forward(self, x):
        return super().forward(x) * self.config.factor * len(self.names)


class TwoNames(Cell):
    def __init__(self):
        super().__init__()
        self.again = self.bn

    def forward(self, x):
        return F.relu(self.again(self.conv(x)))


class WritesItsInput(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.mul_(2))


class Written(Cell):
    def __init__(self):
        super().__init__()
        self.other = WritesItsInput(C, C, 1)

    def forward(self, x):
        y = self.conv(x)
        z = self.other(x)
        return F.relu(self.bn(y) + z)


def nothing(model):
    pass


CASES = {
    "view": (Flattening, nothing),
    "view_untraced": (FlatteningUntraced, nothing),
    "view_in_a_row": (lambda: nn.Sequential(Cell(), Branching()), nothing),
    "mask_comes": (Masked, lambda m: setattr(m, "mask", torch.zeros(1))),
    "norm_frozen_within": (FreezesItself, nothing),
    "mode_of_a_child": (AsksItsNorm, lambda m: m.bn.eval()),
    "error_caught": (Catches, nothing),
    "one_tensor_twice": (MergesTwice, nothing),
    "own_call": (OwnCall, nothing),
    "functional_call": (OtherWeights, nothing),
    "dataclass": (ReadsDataclass, nothing),
    "dict_of_enum": (ReadsDict, nothing),
    "number_added": (AddsANumber, nothing),
    "slices": (Sliced, nothing),
    "object_changes": (Configured, lambda m: setattr(m.config, "factor", 2.0)),
    "set_grows": (Configured, lambda m: m.names.add("b")),
    "several_names": (TwoNames, lambda m: setattr(m, "again", nn.Identity())),
    "input_written": (Written, nothing),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_fuse_hazard(case, training):
    build, change = CASES[case]
    torch.manual_seed(0)
    model = build().double().train(training)
    fused, model = fr.fuse(model), copy.deepcopy(model)
    x = torch.randn(2, C, 6, 6, dtype=torch.double)
    for network in (model, fused):
        change(network)
    torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=0, atol=tolerance("model_fp64"))
    for value, expected in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance("model_fp64"))


class Collects(Cell):
    def __init__(self):
        super().__init__()
        self.seen = {"maps": []}

    def forward(self, x):
        y = super().forward(x)
        self.seen["maps"].append(y)
        return y


def test_fuse_leaves_nothing_behind():
    model = fr.fuse(Collects().eval())
    assert model.seen == {"maps": []}
    y = model(torch.randn(1, C, 4, 4))
    assert model.seen["maps"] == [y]


def test_fused_class_makes_plain_modules():
    fused = fr.fuse(Cell().eval())
    assert type(fused)()(torch.randn(1, C, 4, 4)).shape == (1, C, 4, 4)


def test_fuse_keeps_the_signature_of_train():
    class Own(Cell):
        def train(self, mode=True, extra=False):
            self.extra = extra
            return super().train(mode)

    fused = fr.fuse(Own())
    fused.train(True, extra=True)
    assert fused.extra
