"""The report of `fuse`: what was left alone and why, the counts, and the bytes saved; and that refusals are right."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import CHANNELS, Net, assert_near, net
from torch import nn
from torch.ao.nn import qat

import fused_resnet as fr


def conv(*args, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, *args, **kwargs)


def bn(**kwargs) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(CHANNELS, **kwargs)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return 2.0 * super().forward(x)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.abs(), bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1.0


class ConvTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = conv(1), bn(), bn()

    def forward(self, x):
        return F.relu(self.second(self.conv(F.relu(self.first(self.conv(x))))))


class NormTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.bn = conv(1), conv(1), bn()

    def forward(self, x):
        return F.relu(self.bn(self.second(F.relu(self.bn(self.first(x))))))


class ReadBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(3, padding=1), bn()

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y.sigmoid()


ROW = (2, CHANNELS, 7, 6)
REFUSED = {  # module, its input's shape, and of the path's module the reason
    "conv_twice": (ConvTwice, ROW, "conv", "used twice"),
    "norm_twice": (NormTwice, ROW, "bn", "used twice"),
    "no_statistics": (lambda: nn.Sequential(conv(1), bn(track_running_stats=False)), ROW, "1", "no running statistics"),
    "read_between": (ReadBetween, ROW, "conv", "read elsewhere"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU()), (2, 8, 9), "0", "Conv1d is"),
    "norm1d": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)), (2, 8, 9), "1", "BatchNorm1d is not 2-d"),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8)), (2, 8, 3, 3, 3), "0", "Conv3d is not 2-d"),
    "norm3d": (lambda: nn.Sequential(nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8)), (2, 8, 3, 3, 3), "1", "not 2-d"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), bn()), ROW, "0", "transposed convolution"),
    "own_conv": (
        lambda: nn.Sequential(OwnConv(8, 8, 1), bn(), nn.ReLU()),
        ROW,
        "0",
        "OwnConv has a forward",
    ),
    "own_conv_forward": (lambda: nn.Sequential(OwnConvForward(8, 8, 1), bn()), ROW, "0", "a forward of its own"),
    "own_norm": (lambda: nn.Sequential(conv(1), OwnNorm(8), nn.ReLU()), ROW, "1", "OwnNorm has a forward of its own"),
    "reflect": (lambda: nn.Sequential(conv(3, padding=1, padding_mode="reflect"), bn()), ROW, "0", "'reflect'"),
    "circular": (lambda: nn.Sequential(conv(3, padding=1, padding_mode="circular"), bn()), ROW, "0", "'circular'"),
    "alone": (lambda: nn.Sequential(conv(1), nn.GELU()), ROW, "0", "nothing to fuse it with"),
}


@pytest.mark.parametrize(("make", "shape", "path", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_fuse_refusals(make, shape, path, reason):
    """Left alone, with the reason, and computed as before."""
    model = make().double()
    fused = fr.fuse(model)
    rows = {row.path: row for row in fr.fusion_report(fused).skipped}
    assert reason in rows[path].reason
    assert rows[path].pattern == ("bn" if "Norm" in type(model.get_submodule(path)).__name__ else "conv")
    assert all(path not in row.modules for row in fr.fusion_report(fused).fused)
    x = torch.randn(shape, dtype=torch.double)
    for training in (True, False, True):
        assert_near([fused.train(training)(x)], [model.train(training)(x)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuse_quantised():
    config = torch.ao.quantization.get_default_qat_qconfig("x86")
    model = nn.Sequential(qat.Conv2d(CHANNELS, CHANNELS, 1, qconfig=config), nn.Tanh()).eval()
    fused, x = fr.fuse(model), torch.randn(ROW)
    assert [(row.path, row.reason) for row in fr.fusion_report(fused).skipped] == [("0", "quantised")]
    assert torch.equal(fused(x), model(x))


def test_fuse_complex_weights():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=torch.cfloat), nn.Identity())
    fused, x = fr.fuse(model), torch.randn(2, 4, 5, 5, dtype=torch.cfloat)
    assert [(row.path, row.reason) for row in fr.fusion_report(fused).skipped] == [("0", "complex")]
    assert torch.equal(fused(x), model(x))


def test_fuse_a_hook_is_a_reason():
    model = net()
    model.conv.register_forward_hook(lambda *args: None)
    assert {row.path: row.reason for row in fr.fusion_report(model).skipped} == {"conv": "a hook on it"}


# --- counts, bytes, text ----------------------------------------------------------------------------------------------


def test_report_of_a_network():
    """What it would do before, and what it did after, are the same."""
    report = fr.fusion_report(net())
    assert report.counts() == {"conv+bn+relu": 3, "conv+bn+add+relu": 2, "conv+bn": 1}
    assert [row.path for row in report.fused if row.by == "blocks.1"] == [
        f"blocks.1.{name}" for name in ("conv1", "conv2", "downsample.0")
    ]
    assert report.skipped == []
    assert str(fr.fusion_report(fr.fuse(net()))) == str(report)


def test_report_bytes_by_hand():
    """Each convolution's and norm's result, and each sum, is written once and read once less, in fp32 of one image."""
    model = net().float()
    report = fr.fusion_report(model, torch.empty(2, 3, 12, 10))
    assert report.size == (3, 12, 10)
    full, half = 12 * 10 * CHANNELS * 4, 6 * 5 * 2 * CHANNELS * 4
    passes = {full: 2 + 2 + 3, half: 2 + 3 + 1}  # results that are no longer made: stem, block, block; and projection
    assert report.saved == sum(2 * size * count for size, count in passes.items())
    twice = fr.fusion_report(model.double(), torch.empty(2, 3, 12, 10, dtype=torch.double))
    assert twice.saved == 2 * report.saved


def test_report_without_an_estimate():
    class TwoInputs(Net):
        def forward(self, x, y):
            return super().forward(x) + super().forward(y)

    report = fr.fusion_report(TwoInputs())
    assert report.saved is None
    assert "memory traffic" not in str(report)
    x = torch.empty(1, 3, 8, 8)
    assert fr.fusion_report(TwoInputs(), (x, x)).size == (3, 8, 8)


def test_report_prints():
    model = net().float()
    model.conv.padding_mode = "reflect"
    lines = str(fr.fusion_report(model, torch.empty(1, 3, 12, 10))).splitlines()
    assert lines[0].split() == ["fused", "places"]
    assert {tuple(line.split()) for line in lines if line.startswith("conv+")} == {
        ("conv+bn+relu", "2"),
        ("conv+bn+add+relu", "2"),
        ("conv+bn", "1"),
    }
    assert any(line.split() == ["conv", "1", "conv", "padding_mode='reflect'"] for line in lines)
    assert lines[-1].startswith("6 places fused, 1 modules left alone; about 0.")
    assert lines[-1].endswith("MB less memory traffic an image of 3x12x10")
    assert max(map(len, lines)) < 120


def test_report_leaves_the_model_alone():
    model = net()
    model.blocks.eval()
    before = [(type(m), dict(vars(m)), m.training) for m in model.modules()]
    fr.fusion_report(model)
    assert all((type(m), vars(m), m.training) == state for m, state in zip(model.modules(), before, strict=True))
