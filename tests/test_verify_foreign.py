"""`verify` of networks whose plain forward is not ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.fusion import FusedForward
from fused_resnet.modes import FusedPieces, Pieces, in_order_of
from fused_resnet.modules import unit
from fused_resnet.twins import map_tensors, tensors
from fused_resnet.verify import NETWORK, STEM, block_names


class HandMade(FusedForward):
    """A fused forward that no trace has written; it is copied as any module is."""

    __reduce_ex__ = object.__reduce_ex__


# --- networks of others ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A bottleneck with a projection, and with every spelling of an activation."""

    def __init__(self, width=8, features=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, features, 1, bias=False), nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv3, self.bn3 = nn.Conv2d(features, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.downsample = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride=2, bias=False), nn.BatchNorm2d(2 * width))
        self.act = nn.ReLU6()

    def forward(self, x):
        identity = x
        out = self.bn1(self.conv1(x)).relu_()
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(identity)
        return F.relu(out, inplace=True)


class DropPath(nn.Module):
    """A branch that is left out at random."""

    def forward(self, x):
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.75) / 0.75 if self.training else x


class Net(nn.Module):
    """A stem behind a scaling, a block that is checkpointed, and parts left out at random; the result is a dict."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block = Block()
        self.drop_path, self.drop_rate = DropPath(), 0.5
        self.grad_checkpointing = True
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(2 * x)))
        x = checkpoint(self.block, x, use_reentrant=False) if self.grad_checkpointing else self.block(x)
        x = self.drop_path(x).mean((2, 3))
        return {"logits": self.head(F.dropout(x, self.drop_rate, self.training))}


def one_by_one(self, x, inner="relu6", last="relu", shortcut=True):
    residual = unit.conv_bn_act(*self.downsample, x, act="none") if shortcut else None
    out = unit.conv_bn_act(self.conv1, self.bn1, x)
    out = unit.conv_bn_act(self.conv2, self.bn2, out, act=inner)
    return unit.conv_bn_act(self.conv3, self.bn3, out, residual, last)


def right(self, x):
    convs = (self.conv1, self.bn1), (self.conv2, self.bn2, "relu6"), (self.conv3, self.bn3)
    layers, projection = [unit.Layer(*conv) for conv in convs], unit.Layer(*self.downsample, "none")
    if unit.trainable([*layers, projection]):
        return unit.train(layers, x, projection=projection)
    return one_by_one(self, x)


def no_act(self, x):
    return one_by_one(self, x, last="none")


def other_act(self, x):
    return one_by_one(self, x, inner="relu")


def no_shortcut(self, x):
    return one_by_one(self, x, shortcut=False)


def norm_left_out(self, x):
    out = F.relu(self.conv1(x))
    out = unit.conv_bn_act(self.conv2, self.bn2, out, act="relu6")
    return unit.conv_bn_act(self.conv3, self.bn3, out, self.downsample(x))


def detached(self, x):
    return one_by_one(self, x.detach())


def twice(self, x):
    if self.training:
        self.bn1(self.conv1(x))
    return right(self, x)


def frozen_in_training(self, x):
    with torch.no_grad():
        self.bn1.running_mean.add_(0.01 if self.training else 0)
    return right(self, x)


WRONG = [no_act, other_act, no_shortcut, norm_left_out, detached, twice, frozen_in_training]


def converted(forward) -> nn.Module:
    """A `Net` whose block runs `forward`, but its own one where the network is to be plain."""

    class FusedBlock(HandMade, Block):
        def forward(self, x):
            return Block.forward(self, x) if unit.is_unfused() else forward(self, x)

    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, mean=1.0)  # ReLU6 reaches its 6
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    model.block.__class__ = FusedBlock
    return model


@pytest.fixture
def image():
    return torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_verify_passes_a_right_forward(image, dtype):
    model = converted(right)
    assert block_names(model) == [STEM, "block", NETWORK]
    state = copy.deepcopy(model.state_dict())
    report = fr.verify(model, image, dtype=dtype)
    assert report, report
    assert {row.name for row in report.rows} == {STEM, "block", NETWORK}
    assert model.grad_checkpointing
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("forward", WRONG, ids=lambda forward: forward.__name__)
def test_verify_fails_a_wrong_forward(image, forward):
    report = fr.verify(converted(forward), image)
    assert any(row.name == "block" for row in report.failures), report


def test_fused_training_takes_pieces_in_the_order_of_the_plain_forward(image):
    model = converted(right).train()
    x = torch.randn(4, 8, 16, 16)
    with FusedPieces() as fused:
        model.block(x)
    with unit.unfused(), Pieces() as plain:
        model.block(x)
    assert [p.shape for p in fused.taken] == [p.shape for p in plain.taken]
    assert [p.max() for p in plain.taken] == [1, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(fused.taken, plain.taken, strict=True))


class Activated(nn.Sequential):
    def forward(self, x):
        return F.relu(self[0](x))


class AnotherSign(HandMade, Activated):
    """Rounds a 0 to the other side of the kink, which changes whole gradients."""

    def forward(self, x):
        return Activated.forward(self, x) if unit.is_unfused() else F.relu(self[0](x) + 1e-9)


def test_a_sign_that_rounding_decides_is_no_fault():
    model = nn.Sequential(AnotherSign(nn.Conv2d(4, 8, 1, bias=False)))
    x = torch.randn(2, 4, 6, 6)
    x[:, :, 2:4] = 0
    report = fr.verify(model, x)
    assert report, report
    with FusedPieces() as fused:
        model(x)
    with Pieces() as plain, unit.unfused():
        model(x)
    assert int((plain.taken[0] != fused.taken[0]).sum()) == 2 * 8 * 2 * 6


class Branches(nn.Module):
    """Two branches with activations of the same shape, whose sum is activated."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        deep = F.relu(self.norms[0](self.convs[0](x)))
        deep = self.norms[1](self.convs[1](deep))
        wide = F.relu(self.norms[2](self.convs[2](x)))
        return F.relu(deep + wide)


class FusedBranches(HandMade, Branches):
    def forward(self, x):
        if unit.is_unfused():
            return Branches.forward(self, x)
        layers = [unit.Layer(conv, bn) for conv, bn in zip(self.convs[:2], self.norms[:2], strict=True)]
        wide = unit.conv_bn_act(self.convs[2], self.norms[2], x)
        if self.training:
            return unit.train(layers, x, residual=wide)
        deep = unit.conv_bn_act(self.convs[0], self.norms[0], x)
        return unit.conv_bn_act(self.convs[1], self.norms[1], deep, wide)


@pytest.mark.parametrize("seed", range(3))
def test_branches_may_be_computed_in_another_order(seed):
    torch.manual_seed(seed)
    model = FusedBranches()
    x = torch.randn(4, 4, 16, 16)
    with Pieces() as plain, unit.unfused():
        model(x)
    with FusedPieces() as fused:
        model(x)
    assert not torch.equal(plain.taken[0], fused.taken[0])
    assert all(map(torch.equal, in_order_of(plain.taken, fused.taken), plain.taken))
    for dtype in (torch.float32, torch.bfloat16):  # in which some signs are rounding's
        report = fr.verify(nn.Sequential(model), x, dtype=dtype)
        assert report, report


def test_map_tensors_keeps_the_class_of_a_dict():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1),))
    changed = map_tensors(value, torch.neg)
    assert changed.last_hidden_state.tolist() == [-1.0, -1.0]
    assert [t.tolist() for t in tensors(changed)] == [[-1.0, -1.0], [-1.0]]
    assert value.last_hidden_state.tolist() == [1.0, 1.0]
