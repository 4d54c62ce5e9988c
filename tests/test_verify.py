"""`verify` passes what is right, in every dtype, and fails what is wrong."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr
from fused_resnet.backends import reference
from fused_resnet.modules import unit
from fused_resnet.modules.blocks import conv1x1
from fused_resnet.parity import Row, VerifyReport, compare
from fused_resnet.verify import NETWORK, STEM, block_names, verify


class Small(unit.FusedModule):
    """A stem, a block of each kind with a projection, and a head."""

    def __init__(self, act="relu", bias=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.basic = fr.BasicBlock(8, 8)
        down = nn.Sequential(conv1x1(8, 16, 2), fr.modules.BatchNorm2d(16))
        self.bottleneck = fr.Bottleneck(8, 4, stride=2, downsample=down)
        self.unit = fr.ConvBNAct2d(16, 8, 3, bias=bias, act=act)
        self.norm = fr.BNAct2d(8, act=act)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = unit.conv_bn_act(self.conv1, self.bn1, x)
        x = self.unit(self.bottleneck(self.basic(x)))
        return self.fc(self.dropout(self.norm(x, residual=x)).mean((2, 3)))


def small(**kwargs) -> nn.Module:
    model = Small(**kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def image():
    return torch.randn(4, 3, 12, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_verify_passes_in_every_dtype(image, dtype):
    report = verify(small(bias=True), image, dtype=dtype)
    assert report, report
    names = [STEM, "basic", "bottleneck", "unit", "norm", NETWORK]
    assert {row.name for row in report.rows} == set(names) == set(block_names(small()))
    assert {row.mode for row in report.rows} == {"eval", "train"}
    quantities = {"output", "input gradient", "parameter gradient", "running statistics"}
    assert {row.quantity for row in report.rows} == quantities


@pytest.mark.parametrize("act", ["none", "relu6", "hardswish", "silu"])
def test_verify_passes_with_every_activation(image, act):
    report = verify(small(act=act), image)
    assert report, report


def test_verify_holds_for_one_backend_by_name(image):
    report = verify(small(), image, backend="reference", train=False)
    assert report
    assert report.about["backend"] == "reference"
    assert {row.mode for row in report.rows} == {"eval"}


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "preact_resnet_cifar"])
def test_plain_twin_uses_no_fused_operator(name):
    class Names(TorchDispatchMode):
        seen: set = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.namespace)
            return func(*args, **(kwargs or {}))

    model = fr.create_model(name, num_classes=3)
    for mode in (True, False):
        with Names() as names, unit.unfused():
            model.train(mode)(torch.randn(2, 3, 32, 32)).sum().backward()
        assert names.seen <= {"aten", "prim", "prims"}


# --- faults are found ---------------------------------------------------------------------------------------------


def _scaled(function, factor):
    def wrong(*args, **kwargs):
        out = function(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return wrong


def _no_residual(function, *positions):
    def wrong(*args, **kwargs):
        return function(*[None if i in positions else a for i, a in enumerate(args)], **kwargs)

    return wrong


FAULTS = {
    "eval factor": ("conv_scale_act", lambda f: _scaled(f, 1.001), "eval", "output"),
    "train factor": ("norm_act", lambda f: _scaled(f, 1.001), "train", "output"),
    "eval residual": ("conv_scale_act", lambda f: _no_residual(f, 4), "eval", "output"),
    "train residual": ("norm_act", lambda f: _no_residual(f, 2, 3), "train", "output"),
    "gradient": ("norm_act_input_grad", lambda f: _scaled(f, 1.001), "train", "input gradient"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_fails_a_wrong_kernel(monkeypatch, image, fault):
    name, change, mode, quantity = FAULTS[fault]
    monkeypatch.setattr(reference, name, change(getattr(reference, name)))
    report = verify(small(), image, backend="reference")
    assert not report.passed
    assert not report
    failed = {(row.mode, row.quantity) for row in report.failures if row.name == "basic"}
    assert (mode, quantity) in failed, report
    assert "FAILED" in str(report)


def test_verify_fails_wrong_running_statistics(monkeypatch, image):
    right = reference.conv_moments

    def biased(*args):
        z, mean, var = right(*args)
        return z, mean, var * 0.99

    monkeypatch.setattr(reference, "conv_moments", biased)
    report = verify(small(), image, backend="reference")
    assert any(row.quantity == "running statistics" and "running_var" in row.tensor for row in report.failures)


def test_verify_fails_nan(monkeypatch, image):
    right = reference.conv_scale_act

    def one_nan(*args):
        y = right(*args)
        y[-1, -1, -1, -1] = math.nan
        return y

    monkeypatch.setattr(reference, "conv_scale_act", one_nan)
    report = verify(small(), image, backend="reference", train=False)
    assert math.isinf(report.worst.ratio)
    assert json.loads(report.to_json())["passed"] is False


# --- what it leaves alone, and what it takes ------------------------------------------------------------------------


def test_verify_changes_neither_model_nor_mode(image):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    verify(model, image)
    assert model.training
    assert model.dropout.p == 0.5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_verify_against_torchvision():
    models = pytest.importorskip("torchvision.models")
    ours = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=5)
    theirs = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    report = verify(ours, torch.randn(4, 3, 64, 64), reference=theirs)
    assert report, report


def test_verify_with_a_lean_network_and_frozen_parameters():
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=5, lean=True)
    fr.freeze_batch_norm(model.layer1)
    report = verify(model, torch.randn(4, 3, 64, 64))
    assert report, report
    assert not any(row.tensor == "layer1.0.bn1.weight" for row in report.rows)


def test_verify_says_what_does_not_fit(image):
    with pytest.raises(ValueError, match=r"dtype must be float32.*got torch.int8"):
        verify(small(), image, dtype=torch.int8)
    with pytest.raises(ValueError, match="does not take the model's state dict"):
        verify(small(), image, reference=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="unknown backend 'fpga'"):
        verify(small(), image, backend="fpga")


# --- the rule -------------------------------------------------------------------------------------------------------

WHERE = ("block", "eval", "output", "output")


def test_rule_is_two_times():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eager, inside, outside = truth + 1e-3, truth - 1.99e-3, truth - 2.01e-3
    assert compare(WHERE, inside, eager, truth, torch.float32).passed
    assert not compare(WHERE, outside, eager, truth, torch.float32).passed


def test_rule_has_a_floor_where_eager_is_exact():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    ulps = 4.0 * torch.finfo(torch.float32).eps
    assert compare(WHERE, truth + 3.9 * ulps, truth, truth, torch.float32).passed
    assert not compare(WHERE, truth + 4.1 * ulps, truth, truth, torch.float32).passed


def test_rule_counts_infinities_that_eager_has_too_as_equal():
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    overflown = torch.tensor([1.0, math.inf])
    assert compare(WHERE, overflown, overflown, truth, torch.float16).passed
    assert not compare(WHERE, overflown, truth, truth, torch.float16).passed
    assert not compare(WHERE, torch.ones(3), truth, truth, torch.float32).passed  # another shape


def test_report_is_a_table_with_aligned_columns_and_json():
    rows = [
        Row("layer1.0", "eval", "output", "output", 1e-7, 1e-7, 1.0, 1e-7),
        Row("x", "train", "output", "o", 1, 0, 1, 0),
    ]
    report = VerifyReport(rows, {"model": "ResNet"})
    lines = str(report).splitlines()
    header, rule, *table = lines[2:6]
    assert all(line.index(word) == header.index("mode") for line, word in zip(table, ("eval", "train"), strict=True))
    assert set(rule) == {"-", " "}
    assert lines[-1].startswith("FAILED: 1 of 2 tensors, worst ratio inf")
    found = json.loads(report.to_json())
    assert found["model"] == "ResNet"
    assert [row["passed"] for row in found["rows"]] == [True, False]
    assert not VerifyReport()
