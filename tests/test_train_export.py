"""A trained network goes out as a program, an ONNX model and as weights, and gives the same logits there."""

import argparse
import hashlib
import json
import subprocess
import sys

import pytest
import torch
from networks import largest, seeded
from tolerances import tolerance

import fused_resnet as fr
from fused_resnet.options import UsageError, calibrate
from fused_resnet.training import export_command
from fused_resnet.training.checkpoint import Checkpoints, write
from fused_resnet.training.trained import load_trained

SIZE = 16
CLASSES = ["ant", "bee", "cat"]


def network(seed: int, name: str = "cifar_resnet20"):
    model = seeded(fr.create_model, seed, name=name, num_classes=len(CLASSES))
    calibrate(model, torch.randn(8, 3, SIZE, SIZE))
    return model


def state(model, step: int, *, ema=None, name: str = "cifar_resnet20", **more) -> dict:
    about = {
        "model": name,
        "model_options": {"num_classes": len(CLASSES), "in_channels": 3},
        "dataset": "imagefolder",
        "classes": CLASSES,
        "size": SIZE,
        "val_size": SIZE,
        "val_resize": 18,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "args": {"model_ema": ema is not None},
    }
    kept = {"model": model.state_dict(), "ema": None if ema is None else ema.state_dict(), "optimizer": {}}
    return {"format": 1, "fused_resnet": fr.__version__, "epoch": 0, "step": step, "about": about, **kept, **more}


def best(checkpoint: dict) -> dict:
    return {key: checkpoint[key] for key in ("format", "model", "about", "epoch", "step")}


@pytest.fixture
def run(tmp_path):
    """A run's folder, and its best network."""
    model = network(0)
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / "best.pth", best(state(model, 5)))
    return folder, model


def exported(capsys, *arguments) -> str:
    parser = argparse.ArgumentParser(description="")
    export_command.add_arguments(parser)
    assert export_command.run(parser.parse_args([str(argument) for argument in arguments])) == 0
    return capsys.readouterr().out


def assert_same_logits(run, model) -> None:
    with torch.no_grad():
        for n in (1, 5):
            x = torch.randn(n, 3, SIZE, SIZE)
            found = run(x)
            assert found.shape == (n, len(CLASSES))
            assert largest(found, model(x)) < tolerance("model_eval_fp32")


# --- each format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decompose", [False, True])
def test_a_program(run, tmp_path, capsys, decompose):
    folder, model = run
    output = tmp_path / "net.pt2"
    said = exported(capsys, folder, "--output", output, *(["--decompose"] if decompose else []))
    extra = {"about.json": ""}
    program = torch.export.load(output, extra_files=extra)
    assert_same_logits(program.module(), model)
    ours = [node for node in program.graph.nodes if "fused_resnet" in str(node.target)]
    assert bool(ours) is not decompose
    assert ("import fused_resnet" in said) is not decompose
    assert json.loads(extra["about.json"])["classes"] == CLASSES


def test_a_decomposed_program_needs_nothing_but_torch(run, tmp_path, capsys):
    folder, model = run
    output = tmp_path / "net.pt2"
    exported(capsys, folder, "--output", output, "--decompose")
    x = torch.randn(3, 3, SIZE, SIZE)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; found = torch.export.load('net.pt2').module()(torch.load('x.pt')); "
        "assert 'fused_resnet' not in sys.modules; torch.save(found.detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert largest(torch.load(tmp_path / "logits.pt"), model(x)) < tolerance("model_eval_fp32")


@pytest.mark.parametrize("opset", [None, 20])
def test_an_onnx_model(run, tmp_path, capsys, opset):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder, model = run
    output = tmp_path / "net.onnx"
    exported(capsys, folder, "--output", output, *([] if opset is None else ["--opset", opset]))
    found = onnx.load(output)
    assert {node.domain for node in found.graph.node} == {""}
    assert opset in (None, found.opset_import[0].version)
    assert {entry.key: json.loads(entry.value) for entry in found.metadata_props}["mean"] == [0.5, 0.4, 0.3]
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(output, providers=["CPUExecutionProvider"])
    assert_same_logits(lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights(run, tmp_path, capsys, suffix):
    folder, model = run
    output = tmp_path / f"net{suffix}"
    said = exported(capsys, folder, "--output", output)
    line = next(line for line in said.splitlines() if line.startswith("load it with"))
    again = eval(line.removeprefix("load it with").strip(), {"fused_resnet": fr}).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_metadata_of_safetensors(run, tmp_path, capsys):
    from safetensors import safe_open

    exported(capsys, run[0], "--output", tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        found = {key: json.loads(value) for key, value in file.metadata().items()}
    assert found["model"] == "cifar_resnet20"
    assert found["classes"] == CLASSES
    assert found["std"] == [0.2, 0.2, 0.2]


def test_torchvision_loads_the_weights(tmp_path, capsys):
    models = pytest.importorskip("torchvision.models")
    model = network(0, "resnet18")
    write(tmp_path / "best.pth", best(state(model, 5, name="resnet18")))
    exported(capsys, tmp_path, "--output", tmp_path / "model.pth")
    theirs = models.resnet18(num_classes=len(CLASSES))
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert_same_logits(theirs.eval(), model)


def test_what_is_said_is_so(run, tmp_path, capsys):
    output = tmp_path / "net.pth"
    found = json.loads(exported(capsys, run[0], "--output", output, "--json"))
    content = output.read_bytes()
    assert found["bytes"] == len(content)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["source"] == {"path": f"{run[0]}/best.pth", "step": 5, "epoch": 0, "ema": False}
    assert found["sha256"] in exported(capsys, run[0], "--output", output)


# --- which network ----------------------------------------------------------------------------------------------------


def weight(model):
    return model.conv1.weight


def test_a_folder_stands_for_its_best_network_or_its_newest(tmp_path):
    old, new, average = network(1), network(2), network(3)
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(state(old, 1))
    checkpoints.save(state(new, 2, ema=average))
    assert torch.equal(weight(load_trained(tmp_path)[0]), weight(average))
    assert torch.equal(weight(load_trained(tmp_path, ema=False)[0]), weight(new))
    assert torch.equal(weight(load_trained(tmp_path / "checkpoint-00000001.pth")[0]), weight(old))
    write(tmp_path / "best.pth", best(state(old, 1)))
    model, about = load_trained(tmp_path)
    assert torch.equal(weight(model), weight(old))
    assert not model.training
    assert about["source"]["step"] == 1


def test_averages_alone(tmp_path):
    model, average = network(1), network(2)
    kept = best({**state(model, 4, ema=average), "model": average.state_dict()})
    write(tmp_path / "best.pth", kept)
    found, about = load_trained(tmp_path / "best.pth")
    assert torch.equal(weight(found), weight(average))
    assert about["source"]["ema"]
    with pytest.raises(UsageError, match=r"best.pth holds the averaged weights alone"):
        load_trained(tmp_path / "best.pth", ema=False)
    with pytest.raises(UsageError, match=r"holds no best.pth and no checkpoint"):
        load_trained(tmp_path, ema=False)
    Checkpoints(tmp_path, 3).save(state(model, 6, ema=average))
    assert torch.equal(weight(load_trained(tmp_path, ema=False)[0]), weight(model))


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "net.tflite"], r"suffix must say what to write: \.pt2 .*\.onnx .*\.pth .*\.safetensors"),
        (["--output", "nowhere/net.pth"], "there is no folder nowhere"),
        (["--output", "net.pth", "--decompose"], r"--decompose is for \.pt2"),
        (["--output", "net.pt2", "--opset", "20"], r"--opset is for \.onnx"),
    ],
)
def test_bad_options(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        exported(capsys, run[0], *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("opset", [1, 999])
def test_an_opset_that_is_not_to_be_had(run, tmp_path, capsys, opset):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with pytest.raises(UsageError, match=f"--opset {opset}: the network cannot be written for it"):
        exported(capsys, run[0], "--output", tmp_path / "net.onnx", "--opset", opset)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_not_installed(run, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match="pip install onnx onnxscript"):
        exported(capsys, run[0], "--output", tmp_path / "net.onnx")


def test_an_output_that_cannot_be_written_leaves_what_was_there(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "net.pth"
    output.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        exported(capsys, run[0], "--output", output)
    assert output.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "run"]


def test_what_is_no_checkpoint(tmp_path):
    torch.save(network(0).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UsageError, match=r"plain.pth is no checkpoint of fused-resnet train; .*predict --weights"):
        load_trained(tmp_path / "plain.pth")
    with pytest.raises(UsageError, match="there is no file"):
        load_trained(tmp_path / "none.pth")


@pytest.mark.parametrize("about", [{"model": "resnet0"}, {"model_options": {"size": 3}}, {"model": "resnet18"}])
def test_a_network_that_cannot_be_built(tmp_path, about):
    made = best(state(network(0), 1))
    made["about"] = {**made["about"], **about}
    write(tmp_path / "best.pth", made)
    with pytest.raises(UsageError, match=r"the network of .*best.pth cannot be built"):
        load_trained(tmp_path)
