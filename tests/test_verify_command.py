"""`fused-resnet verify` of networks of other libraries and of a user's file."""

import json
import socket
import sys

import pytest
import torch
from torch import nn

from fused_resnet import cli, foreign_models, verify_command
from fused_resnet.backends import reference

NETWORK = """
import torch
from torch import nn
from beside import CHANNELS


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


def make():
    from beside import classes
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, classes()))
    return nn.Sequential(nn.Conv2d(2, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), Block(CHANNELS), head)


def odd():
    return nn.Linear(3, 3)


def raising():
    raise KeyError("a\\nb")


def leaving():
    raise SystemExit(3)


def scripted():
    return torch.jit.script(nn.Conv2d(2, 2, 1))


def text():
    return "a network"


number = 3
"""


@pytest.fixture(autouse=True)
def _without_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(verify_command, "CALLS", 1)


@pytest.fixture
def network(tmp_path):
    (tmp_path / "beside.py").write_text("CHANNELS = 6\n\ndef classes():\n    return 4\n")
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    yield str(path)
    sys.modules.pop("beside", None)


def run(*argv) -> int:
    try:
        return cli.main(["verify", *(str(a) for a in argv)])
    except SystemExit as stop:
        return stop.code


def test_network_of_a_file(network, capsys):
    before = list(sys.path)
    assert run("--model", f"{network}:make", "--size", 12) == 0
    shown = capsys.readouterr()
    fusion, parity, speed = shown.out.split("\n\n")
    assert "conv+bn+add+relu" in fusion
    assert "input 4x2x12x12" in parity
    assert "passed: " in parity.splitlines()[-1]
    assert [line.split()[0] for line in speed.splitlines()[2:]] == ["inference", "training", "median"]
    assert "random" not in shown.err
    assert sys.path == before


def test_json_holds_all_three(network, capsys):
    assert run("--model", f"{network}:make", "--size", 12, "--eval-only", "--dtype", "bf16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"model", "passed", "fusion", "parity", "speed"}
    assert found["passed"] is True
    assert {row["pattern"] for row in found["fusion"]["fused"]} == {"conv+bn", "conv+bn+add+relu"}
    assert {row["mode"] for row in found["parity"]["rows"]} == {"eval"}
    assert {row["name"] for row in found["parity"]["rows"]} == {"2", "(network)"}
    assert set(found["speed"]) == {"unit", "calls", "inference"}
    assert min(found["speed"]["inference"].values()) > 0


def test_wrong_kernel_exits_with_1(network, capsys, monkeypatch):
    right = reference.conv_scale_act
    monkeypatch.setattr(reference, "conv_scale_act", lambda *args: right(*args) * 1.001)
    assert run("--model", f"{network}:make", "--size", 12, "--backend", "reference", "--eval-only", "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_weights_of_a_file(network, tmp_path, capsys):
    model = foreign_models.build_foreign(f"{network}:make")
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    options = ("--size", 12, "--eval-only", "--json", "--weights", tmp_path / "nan.pth")
    assert run("--model", f"{network}:make", *options) == 0
    assert "WARNING" not in capsys.readouterr().err
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    assert run("--model", f"{network}:make", "--weights", tmp_path / "other.pth") == 2
    assert "other.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "resnet18"), ("timm", "resnet18"), ("transformers", "microsoft/resnet-18")],
)
def test_network_of_a_library(library, name, capsys):
    pytest.importorskip(library)
    options = ("--size", 32, "--eval-only", "--num-classes", 7, "--backend", "reference", "--json")
    assert run("--model", f"{library}:{name}", *options) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "weights are random" in shown.err
    assert len(found["fusion"]["fused"]) == 20
    assert found["fusion"]["skipped"] == []
    outputs = [row for row in found["parity"]["rows"] if (row["name"], row["quantity"]) == ("(network)", "output")]
    assert outputs
    assert all(row["scale"] > 0 for row in outputs)


def test_timm_begins_with_weights_that_hide_nothing():
    model = pytest.importorskip("timm").create_model("resnet18")
    assert not model.layer1[0].bn2.weight.any()
    verify_command.wake(model)
    assert all(m.weight.all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


PARAMETERS = {18: 11_689_512, 26: 15_995_176, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize("layers", PARAMETERS)
def test_resnets_of_transformers(layers):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = foreign_models.build_foreign(f"transformers:microsoft/resnet-{layers}")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[layers]


@pytest.mark.parametrize("file", ["", "config.json"])
def test_transformers_reads_a_folder(file, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8).save_pretrained(tmp_path)
    model = foreign_models.build_foreign(f"transformers:{tmp_path / file}", 3)
    assert model.config.hidden_sizes == [8, 16]
    assert model.config.num_labels == 3


def test_torchvision_downloads_no_backbone():
    pytest.importorskip("torchvision")
    assert isinstance(foreign_models.build_foreign("torchvision:fcn_resnet50", 3), nn.Module)


# --- bad usage ------------------------------------------------------------------------------------------------------

BAD = {
    "source": ("torchvison:resnet50", "expected a name of this library, or torchvision:NAME"),
    "torchvision's name": ("torchvision:resnet19", "torchvision has no model 'resnet19'; it has resnet1"),
    "timm's name": ("timm:resnet50x", "timm has no model 'resnet50x'; it has resnet50"),
    "timm's hub": ("timm:hf-hub:timm/resnet50.a1_in1k", "timm has no model 'hf-hub:timm/resnet50.a1_in1k'"),
    "transformers' id": ("transformers:microsoft/resnet-19", "there is no folder or file 'microsoft/resnet-19'"),
    "transformers' folder": ("transformers:TMP", "config.json"),
    "no file": ("TMP/none.py:make", "there is no file"),
    "file with an error": ("TMP/bad.py:make", "bad.py cannot be imported: ZeroDivisionError: division by zero"),
    "file that ends": ("TMP/exit.py:make", "exit.py cannot be imported: SystemExit: 1"),
    "no factory": ("FILE:nothing", "network.py has no function 'nothing'"),
    "factory that is none": ("FILE:number", "network.py has no function 'number'"),
    "empty factory": ("FILE:", "network.py has no function ''"),
    "factory that raises": ("FILE:raising", "raising() of"),
    "factory that leaves": ("FILE:leaving", "leaving() of"),
    "no module": ("FILE:text", "must return an nn.Module, got str"),
    "not for images": ("FILE:odd", "it does not run on images of 4x3x12x12: RuntimeError: mat1 and mat2"),
    "scripted": ("FILE:scripted", "scripted"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_exits_with_2_and_says_why(case, network, tmp_path, capsys):
    name, message = BAD[case]
    if name.partition(":")[0] in ("torchvision", "timm", "transformers"):
        pytest.importorskip(name.partition(":")[0])
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "exit.py").write_text("raise SystemExit(1)\n")
    assert run("--model", name.replace("TMP", str(tmp_path)).replace("FILE", network), "--size", 12) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""


def test_options_that_do_not_fit(network, capsys):
    assert run("--model", f"{network}:make", "--num-classes", 3) == 2
    assert "--num-classes: the classes of" in capsys.readouterr().err
    assert run("--model", f"{network}:make", "--reference", "torchvision") == 2
    assert "--reference is for networks of this library" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers"])
def test_library_that_is_not_there(name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert run("--model", f"{name}:resnet18") == 2
    assert f"{name} is not installed; pip install {name}" in capsys.readouterr().err


def test_library_that_cannot_be_imported(capsys, monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms\\ndoes not exist')\n")
    for module in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    assert run("--model", "timm:resnet18") == 2
    assert "timm cannot be imported: operator torchvision::nms does not exist; install" in capsys.readouterr().err
