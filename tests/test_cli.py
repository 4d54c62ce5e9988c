"""The command line: results, exit codes, and the message of every bad input."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image

import fused_resnet as fr
from fused_resnet import cli
from fused_resnet.backends import reference
from fused_resnet.models import registry


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """A network that is quick to build, under a name of its own."""

    def build(weights=None, num_classes=4):
        def network():
            layers = fr.ConvBNAct2d(3, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
            return torch.nn.Sequential(*layers, torch.nn.Linear(6, num_classes))

        return registry.with_weights(network, weights)

    monkeypatch.setitem(registry.MODELS, "tiny", build)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (50, 40), "red").save(path)
    return str(path)


def run(*argv) -> int:
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stop:  # argparse's own errors, and --help
        return stop.code


@pytest.mark.parametrize("command", sorted(cli.EXAMPLES))
def test_help_shows_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"example: fused-resnet {command}" in " ".join(capsys.readouterr().out.split())


def test_examples_parse():
    for example in cli.EXAMPLES.values():
        assert cli.build_parser().parse_args(example.split()[1:]).command in cli.EXAMPLES


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fused_resnet", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fused_resnet {fr.__version__}\n"


def test_starting_imports_nothing_slow_that_it_may_not_need():
    slow = ("torch._dynamo", "torch.distributed.tensor", "torchvision", "sklearn", "matplotlib", "onnx")
    code = f"import sys, fused_resnet.cli; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_info_names_versions_and_backends(capsys):
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"] == "available"
    assert set(found["versions"]) == {"fused_resnet", "python", "torch", "triton", "cuda"}
    assert run("info") == 0
    assert torch.__version__ in capsys.readouterr().out


def test_info_says_how_to_get_a_missing_backend(capsys, monkeypatch):
    monkeypatch.setattr(cli, "backend_report", lambda: {"cpu": "not built; pip install --no-build-isolation ."})
    run("info")
    assert "pip install --no-build-isolation ." in capsys.readouterr().out


def test_verify_passes(capsys):
    assert run("verify", "--model", "tiny", "--size", 16, "--dtype", "bf16") == 0
    shown = capsys.readouterr()
    assert "passed: " in shown.out
    assert "weights are random" in shown.err
    assert run("verify", "--model", "tiny", "--size", 16, "--eval-only", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert {row["mode"] for row in found["rows"]} == {"eval"}


def test_verify_of_a_wrong_kernel_exits_with_1(capsys, monkeypatch):
    right = reference.conv_scale_act
    monkeypatch.setattr(reference, "conv_scale_act", lambda *args: right(*args) * 1.001)
    assert run("verify", "--model", "tiny", "--size", 16, "--backend", "reference", "--eval-only") == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_against_torchvision(capsys):
    pytest.importorskip("torchvision")
    arguments = ("--size", 32, "--num-classes", 5, "--eval-only", "--reference", "torchvision")
    assert run("verify", "--model", "resnet18", *arguments) == 0
    assert run("verify", "--model", "tiny", *arguments) == 2
    assert "torchvision: it has no model 'tiny'" in capsys.readouterr().err


def test_predict_writes_table_csv_and_json(image, capsys, tmp_path):
    options = ("--model", "tiny", "--size", 32, "--topk", 2)
    assert run("predict", image, *options) == 0
    shown = capsys.readouterr()
    assert "WARNING: no --weights: the weights are RANDOM" in shown.err
    assert shown.out.splitlines()[0].split() == ["image", "rank", "index", "label", "probability"]
    assert run("predict", image, *options, "--csv", "--tencrop") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    output = tmp_path / "out.json"
    assert run("predict", image, *options, "--json", "--output", output) == 0
    assert json.loads(output.read_text())["weights"] == "random"
    assert capsys.readouterr().out == ""


def test_predict_loads_weights_and_labels(image, capsys, tmp_path):
    weights, labels = tmp_path / "tiny.pth", tmp_path / "labels.txt"
    model = fr.create_model("tiny")
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    torch.save(model.state_dict(), weights)
    labels.write_text("a\nb\nc\nd\n")
    options = ("--model", "tiny", "--size", 32, "--topk", 1, "--weights", weights, "--labels", labels)
    assert run("predict", image, *options, "--csv") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].split(",")[1:4] == ["1", "1", "b"]
    assert "RANDOM" not in shown.err


def test_predict_goes_on_after_an_unreadable_image(image, capsys, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    options = ("--model", "tiny", "--size", 32)
    assert run("predict", bad, image, *options) == 0
    shown = capsys.readouterr()
    assert f"{bad}: cannot be read" in shown.err
    assert "red.png" in shown.out
    assert run("predict", bad, *options) == 2
    shown = capsys.readouterr()
    assert "no image could be read" in shown.err
    assert shown.out == ""


VERIFY, PREDICT = ["verify", "--model", "tiny"], ["predict", "IMAGE", "--model", "tiny"]
BAD = {
    "no command": ([], "the following arguments are required: command"),
    "unknown command": (["bake"], "invalid choice: 'bake'"),
    "unknown model": (["verify", "--model", "resnet19"], "unknown model 'resnet19', expected one of cifar_resnet110"),
    "unknown backend": ([*VERIFY, "--backend", "fpga"], "unknown backend 'fpga', expected one of 'reference'"),
    "unknown dtype": ([*VERIFY, "--dtype", "int8"], "invalid choice: 'int8'"),
    "size": ([*VERIFY, "--size", "0"], "expected a positive whole number, got '0'"),
    "batch": ([*VERIFY, "--batch", "-3"], "expected a positive whole number, got '-3'"),
    "missing weights": ([*VERIFY, "--weights", "TMP/none.pth"], "none.pth"),
    "damaged weights": ([*VERIFY, "--weights", "TMP/text.pth"], "text.pth is damaged"),
    "damaged safetensors": ([*VERIFY, "--weights", "TMP/text.safetensors"], "--weights"),
    "other network's weights": ([*VERIFY, "--weights", "TMP/other.pth"], "does not fit Sequential"),
    "missing folder": (["predict", "TMP/nowhere", "--model", "tiny"], "nowhere: no such file or folder"),
    "empty folder": (["predict", "TMP/empty", "--model", "tiny"], "the folder holds no image"),
    "missing labels": ([*PREDICT, "--labels", "TMP/none.txt"], "--labels"),
    "too few labels": ([*PREDICT, "--size", "32", "--labels", "TMP/text.pth"], "1 labels for a model of 4 classes"),
    "two formats": ([*PREDICT, "--csv", "--json"], "--csv and --json exclude each other"),
    "output folder": ([*PREDICT, "--size", "32", "--output", "TMP/no/out.csv"], "--output"),
    "demo folder": (["demo", "--out", "TMP/text.pth/out"], "--out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_exits_with_2_and_says_why(case, image, tmp_path, capsys):
    argv, message = BAD[case]
    (tmp_path / "empty").mkdir()
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
    torch.save(torch.nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "other.pth")
    argv = [a.replace("TMP", str(tmp_path)).replace("IMAGE", image) for a in argv]
    assert run(*argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
