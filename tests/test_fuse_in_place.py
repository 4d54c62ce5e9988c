"""Forwards that write to memory, fused: what is written, and where else it is read, is as before."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import CHANNELS, Block, assert_near, training_step
from torch import nn

import fused_resnet as fr


def imul(x, y):
    x *= y
    return x


def isub(x, y):
    x -= y
    return x


def iadd(x, y):
    x += y
    return x


def itruediv(x, y):
    x /= 1.0 + y.abs()
    return x


class InPlaceOnInput(nn.Module):
    """An operator writes to the input, which the shortcut reads afterwards."""

    def __init__(self, change):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.change = change

    def forward(self, x):
        y = self.bn(self.conv(x.clone()))
        self.change(x, y.sigmoid())
        return F.relu(self.bn.weight.view(-1, 1, 1) * y + x)


class Sum(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.conv, self.bn, self.add = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), add

    def forward(self, x):
        return F.relu(self.add(self.bn(self.conv(x)), x))


SUMS = {
    "iadd": iadd,
    "iadd_swapped": lambda y, x: iadd(x.mul(2.0), y),
    "add_": lambda y, x: y.add_(x),
    "add": lambda y, x: y + x,
    "broadcast": lambda y, x: iadd(y, x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("change", [iadd, isub, imul, itruediv], ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fuse_operators_that_write(change, training):
    """`x += y` is not `x = x + y`: others see it."""
    model = InPlaceOnInput(change).double().train(training)
    fused = fr.fuse(model)
    with torch.no_grad():
        x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.double)
        mine, eager = x.clone(), x.clone()
        assert_near([fused(mine), mine], [model(eager), eager])
    assert not torch.equal(mine, x)


@pytest.mark.parametrize("add", SUMS.values(), ids=SUMS.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fuse_sums_under_autocast(add, training):
    """A sum in place has the dtype of what it is written over; the input is fp32, the convolution's result bf16."""
    model = Sum(add).train(training)
    fused = fr.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, CHANNELS, 6, 5)
        assert fused(x).dtype == model(x).dtype
    x = x.double()
    assert_near([fused.double()(x)], [model.double()(x)])


def test_fuse_broadcasting_sum():
    """Of which the norm runs by itself."""
    model = Sum(lambda y, x: y + x.mean((2, 3), keepdim=True)).double()
    fused, x = fr.fuse(model), torch.randn(2, CHANNELS, 6, 5, dtype=torch.double)
    assert_near(training_step(nn.Sequential(fused, Mean()), x), training_step(nn.Sequential(model, Mean()), x))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class WrittenAfterReLU6(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU6()

    def forward(self, x):
        return self.act(self.bn(self.conv(x))).mul_(2.0).mean((2, 3))


def test_fuse_result_of_relu6_is_written():
    """PyTorch's own ReLU6 takes the slope from its input, so that its result may be written to."""
    model = WrittenAfterReLU6().double()
    fused, x = fr.fuse(model), torch.randn(2, CHANNELS, 6, 5, dtype=torch.double)
    for training in (True, False):
        assert_near(training_step(fused.train(training), x), training_step(model.train(training), x))


class WrittenAfterSum(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(CHANNELS, CHANNELS, 1), act

    def forward(self, x):
        y = self.conv(x)
        return self.act(0.5 * y + 0.5 * y.detach()).add_(y).mean((2, 3))


@pytest.mark.parametrize("act", [F.silu, F.hardswish, F.relu6], ids=lambda act: act.__name__)
def test_fuse_result_of_a_sum_is_written(act):
    model = WrittenAfterSum(act).double()
    fused, x = fr.fuse(model), torch.randn(2, CHANNELS, 6, 5, dtype=torch.double)
    assert_near(training_step(fused, x), training_step(model, x))


@torch.no_grad()
def test_blocks_of_a_stage_write_over_each_other_unseen():
    """In inference a block may overwrite what the one before it made: never the stage's input, nor what a hook saw."""
    torch.manual_seed(0)
    stage = nn.Sequential(*(Block() for _ in range(4))).eval()
    x = torch.randn(2, CHANNELS, 9, 9).contiguous(memory_format=torch.channels_last)
    given, expected = x.clone(), stage(x)
    fused = fr.fuse(nn.Sequential(stage))
    assert vars(fused[0])["_fused_resnet"].programs[False].source.count("in_turn") == 1
    torch.testing.assert_close(fused(x), expected)
    assert torch.equal(x, given)
    seen = []
    fused[0][1].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    torch.testing.assert_close(fused(x), expected)
    (before, after), *_ = seen
    torch.testing.assert_close(before, stage[0](x))
    torch.testing.assert_close(after, stage[1](stage[0](x)))
