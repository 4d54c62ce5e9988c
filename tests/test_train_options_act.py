"""Options of `fused-resnet train` do what they say, and what a run writes agrees with what it prints."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import nn
from train_arguments import arguments
from train_calls import TINY, call, checkpoint, different, settings_kept, summary, tiny
from training_data import made_cifar10, make_cifar10, make_image_folder

from fused_resnet.backends.selection import context_backend
from fused_resnet.training import loop, network
from fused_resnet.training.data import make_data
from fused_resnet.training.trained import load_trained

pytest.importorskip("sklearn")

EVERY_STEP = ("--save-steps", 1, "--keep", 99)
PLAIN_SGD = ("--momentum", 0, "--weight-decay", 0, "--scheduler", "constant")


class Linear(nn.Module):
    """One layer, without batch norm; `seen` are the types of its results."""

    def __init__(self, classes: int):
        super().__init__()
        self.fc = nn.Linear(64, classes)
        self.seen: list = []

    def forward(self, x):
        y = self.fc(x.flatten(1))
        self.seen.append(y.dtype)
        return y


@pytest.fixture
def linear(monkeypatch) -> Linear:
    model = Linear(2)
    monkeypatch.setattr(network, "make_network", lambda args, data, **_: (model, []))
    return model


@pytest.fixture
def noted(monkeypatch):
    """What `look(training)` gives at the beginning of a run."""
    found, run = [], loop.Training.run

    def install(look):
        def looked(self):
            found.append(look(self))
            run(self)

        monkeypatch.setattr(loop.Training, "run", looked)
        return found

    return install


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run without any option."""
    folder = tmp_path_factory.mktemp("plain")
    assert tiny(folder, *EVERY_STEP) == 0
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("photographs"), train=8, val=4, size=48)


def of_photographs(data, folder, *argv) -> int:
    small = ("--size", 32, "--batch-size", 8, "--workers", 0, "--epochs", 1, "--threads", 1)
    return call("--data", data, "--output", folder, *small, *argv)


def at(folder, step: int) -> dict:
    return torch.load(folder / f"checkpoint-{step:08d}.pth", weights_only=True)


def norm(tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_step(tmp_path, linear, monkeypatch):
    first = {name: value.clone() for name, value in linear.state_dict().items()}
    assert tiny(tmp_path / "joined", *EVERY_STEP) == 0
    linear.load_state_dict(first)
    assert tiny(tmp_path / "parts", *EVERY_STEP, "--batch-size", 27, "--grad-accum", 2) == 0
    for step in range(1, 5):  # what is left of the epoch is divided in another way
        a, b = at(tmp_path / "parts", step), at(tmp_path / "joined", step)
        assert a["seen"] == b["seen"] == 54 * step
        error = norm(a["model"][name] - b["model"][name] for name in first)
        moved = norm(b["model"][name] - first[name] for name in first)
        assert error <= TOLERANCES["accumulated_step"].value * moved
    assert checkpoint(tmp_path / "parts")["step"] == checkpoint(tmp_path / "joined")["step"] == 6


def test_clip_grad_bounds_a_step(tmp_path):
    steps = {}
    for bound in ("0.01", "none"):
        assert tiny(tmp_path / bound, *EVERY_STEP, *PLAIN_SGD, "--clip-grad", bound) == 0
        a, b = (at(tmp_path / bound, step)["model"] for step in (1, 2))
        steps[bound] = norm(b[name] - a[name] for name in a if "running" not in name and "num_" not in name)
    assert steps["0.01"] == pytest.approx(0.05 * 0.01, rel=TOLERANCES["clipped_step"].value)
    assert steps["none"] > 2 * steps["0.01"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_changes_the_loss(tmp_path, linear, smoothing):
    assert tiny(tmp_path, "--lr", 0, "--weight-decay", 0, "--label-smoothing", smoothing) == 0
    train = make_data(arguments(*TINY[: TINY.index("--batch-size")])).train
    batch = train.__getitems__([(0, index) for index in range(len(train))])
    logs = F.linear(batch.images.flatten(1).double(), linear.fc.weight.double(), linear.fc.bias.double()).log_softmax(1)
    wanted = -(1 - smoothing) * logs.gather(1, batch.labels[:, None]).mean() - smoothing * logs.mean()
    assert summary(tmp_path)["train_loss"] == pytest.approx(wanted.item(), rel=TOLERANCES["summed_loss"].value)


def test_average_of_the_weights(tmp_path):
    """Made by hand from the weights of each step; validated beside them, and what model.pth holds."""
    assert tiny(tmp_path, *EVERY_STEP, "--epochs", 2, "--model-ema", "--model-ema-decay", "0.5") == 0
    steps = [at(tmp_path, step) for step in range(1, 13)]
    average = {name: value.double() for name, value in steps[0]["model"].items()}
    for number, state in enumerate(steps[1:], 1):
        decay = min(0.5, (1 + number) / (10 + number))
        for name, value in state["model"].items():
            average[name] = value if "num_" in name else average[name].lerp(value.double(), 1 - decay)
    last = steps[-1]
    for name, value in last["ema"].items():
        torch.testing.assert_close(value.double(), average[name].double(), rtol=0, atol=_rounding(average[name]))
    assert different(last["ema"], last["model"])
    rows = last["history"]
    assert all(row["ema_top1"] is not None for row in rows)
    best = max(row["ema_top1"] for row in rows)
    assert last["best"]["top1"] == summary(tmp_path)["best_top1"] == best
    assert not different(checkpoint(tmp_path, "model.pth"), at(tmp_path, 6 * last["best"]["epoch"])["ema"])


def _rounding(value) -> float:
    return TOLERANCES["averaged_weights"].value * float(value.double().abs().max())


# --- precision and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)])
def test_amp_computes_in_its_type(tmp_path, linear, name, dtype):
    assert tiny(tmp_path, *(("--amp", "--amp-dtype", name) if name else ())) == 0
    assert set(linear.seen) == {dtype}
    assert linear.fc.weight.dtype == torch.float32
    assert (checkpoint(tmp_path)["scaler"] is not None) == (name == "fp16")


@pytest.mark.parametrize("name", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_amp_of_a_network(tmp_path, plain, name):
    assert tiny(tmp_path, "--amp", "--amp-dtype", name) == 0
    found, wanted = checkpoint(tmp_path)["history"][0], checkpoint(plain)["history"][0]
    assert found["train_loss"] != wanted["train_loss"]
    assert found["train_top1"] > 0.7


@pytest.mark.parametrize("option", ["--grad-checkpointing", "--lean"])
@pytest.mark.parametrize("model", ["cifar_resnet20", "mobilenet_v2", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_what_saves_memory_changes_no_bit(photographs, tmp_path, option, model):
    """Running statistics are of each batch once, though it is computed twice."""
    assert of_photographs(photographs, tmp_path / "plain", "--model", model) == 0
    assert of_photographs(photographs, tmp_path / "saving", "--model", model, option) == 0
    found, wanted = checkpoint(tmp_path / "saving"), checkpoint(tmp_path / "plain")
    assert not different(found["model"], wanted["model"])
    counts = {int(value) for name, value in found["model"].items() if name.endswith("num_batches_tracked")}
    assert counts == {found["step"]}


def test_lean_reaches_the_network(tmp_path, noted):
    found = noted(lambda training: training.module.lean)
    assert [tiny(tmp_path / option, f"--{option}") for option in ("lean", "no-lean")] == [0, 0]
    assert found == [True, False]


def test_channels_last_is_an_option(tmp_path, noted):
    def look(training):
        weight = training.module.layer1[0].conv1.weight
        return training.memory_format, weight.is_contiguous(memory_format=torch.channels_last)

    found = noted(look)
    assert [tiny(tmp_path / "a"), tiny(tmp_path / "b", "--no-channels-last")] == [0, 0]
    assert found == [(torch.channels_last, True), (torch.contiguous_format, False)]


def test_deterministic_settings(tmp_path, noted):
    found = noted(lambda _: torch.are_deterministic_algorithms_enabled())
    with settings_kept():
        assert [tiny(tmp_path / "a", "--deterministic"), tiny(tmp_path / "b")] == [0, 0]
    assert found == [True, False]


def test_threads_and_backend(tmp_path, noted):
    found = noted(lambda _: (torch.get_num_threads(), context_backend()))
    assert tiny(tmp_path / "a", "--threads", 2, "--backend", "reference") == 0
    assert found == [(2, "reference")]


def test_seed_decides_every_bit(tmp_path, plain):
    for name, seed in (("same", 0), ("other", 1)):
        assert tiny(tmp_path / name, "--seed", seed) == 0
    found = {name: checkpoint(tmp_path / name)["model"] for name in ("same", "other")}
    assert not different(found["same"], checkpoint(plain)["model"])
    assert different(found["other"], found["same"])


@pytest.mark.slow
def test_compiled_run(tmp_path, plain):
    assert tiny(tmp_path, "--compile") == 0
    found, wanted = checkpoint(tmp_path), checkpoint(plain)
    assert found["model"].keys() == wanted["model"].keys()
    assert found["history"][0]["train_top1"] > 0.7
    torch.compiler.reset()


# --- weights to begin with --------------------------------------------------------------------------------------------


def test_frozen_trunk_stays_as_it_is(tmp_path):
    """Parameters and running statistics, with projections in it; the head learns."""
    argv = ("--model", "resnet18", "--size", 16, "--batch-size", 100, "--freeze", "trunk")
    assert tiny(tmp_path, *argv, *EVERY_STEP) == 0
    first, last = at(tmp_path, 1)["model"], checkpoint(tmp_path)["model"]
    assert checkpoint(tmp_path)["step"] == 3
    assert different(last, first) == ["fc.weight", "fc.bias"]
    assert all(not value.any() for name, value in last.items() if name.endswith("running_mean"))


def test_frozen_modules_by_name(tmp_path, capsys):
    assert tiny(tmp_path, *EVERY_STEP, "--freeze", "conv1", "layer1") == 0
    assert "frozen: conv1 layer1; " in capsys.readouterr().err
    changed = different(checkpoint(tmp_path)["model"], at(tmp_path, 1)["model"])
    assert changed
    assert not [name for name in changed if name.startswith(("conv1.", "layer1."))]
    assert any(name.startswith("layer2.") for name in changed)


def test_pretrained_with_other_classes(tmp_path, plain, capsys):
    argv = ("--pretrained", plain / "model.pth", "--lr", 0)
    assert tiny(tmp_path / "same", *argv) == 0
    assert "is new" not in capsys.readouterr().err
    assert tiny(tmp_path / "other", *argv, "--classes", 0, 1, 2) == 0
    assert "its layer fc is new, for 3 classes" in capsys.readouterr().err
    weights = checkpoint(plain, "model.pth")
    for name in ("same", "other"):
        found = checkpoint(tmp_path / name, "model.pth")
        parameters = [key for key in weights if "running" not in key and "num_" not in key]
        changed = [key for key in parameters if not torch.equal(found[key], weights[key])]
        assert changed == ([] if name == "same" else ["fc.weight", "fc.bias"])
    assert found["fc.weight"].shape[0] == 3


def test_pretrained_takes_a_checkpoint(tmp_path, plain):
    """What an error tells users to do where an option has to change."""
    path = sorted(plain.glob("checkpoint-*.pth"))[-1]
    assert tiny(tmp_path, "--pretrained", path, "--lr", "0") == 0
    assert torch.equal(checkpoint(tmp_path)["model"]["conv1.weight"], checkpoint(plain)["model"]["conv1.weight"])


# --- what is written --------------------------------------------------------------------------------------------------


def test_log_and_summary_agree_with_what_is_printed(tmp_path, capsys):
    assert tiny(tmp_path, "--epochs", 3) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    history = summary(tmp_path)["history"]
    assert history == checkpoint(tmp_path)["history"]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    lines = [line for line in printed.err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    for row, found, line in zip(rows, history, lines, strict=True):
        for name, value in found.items():
            assert row[name] == ("" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value))
        assert f"train: loss {found['train_loss']:.4f}, top-1 {100 * found['train_top1']:.2f} %" in line
        assert f"val: loss {found['val_loss']:.4f}, top-1 {100 * found['val_top1']:.2f} %" in line
    best = max(row["val_top1"] for row in history)
    assert f"{100 * best:.2f} % (epoch {summary(tmp_path)['best_epoch']})" in printed.out
    for name in ("best.pth", "model.pth", "log.csv", "summary.json", "curves.png"):
        assert name in printed.out
        assert (tmp_path / name).exists()


def test_json_is_all_that_stands_on_stdout(tmp_path, capsys):
    assert tiny(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary(tmp_path)


def test_an_ended_run_that_goes_on_ends(tmp_path, capsys):
    assert tiny(tmp_path) == 0
    before, table = checkpoint(tmp_path), capsys.readouterr().out
    assert tiny(tmp_path, "--resume", "auto") == 0
    said = capsys.readouterr()
    assert "this run has ended already, after 1 epochs" in said.err
    assert said.out == table
    assert not different(checkpoint(tmp_path)["model"], before["model"])


def test_recipe_with_options_over_it(tmp_path):
    path = make_cifar10(tmp_path / "cifar10", images_per_batch=20)
    over = ("--model", "cifar_resnet20", "--epochs", 1, "--batch-size", 10, "--workers", 0, "--threads", 1)
    with made_cifar10(path):
        assert call("--config", "two_class_resnet34", "--data", path, *over, "--output", tmp_path / "run") == 0
    about = checkpoint(tmp_path / "run")["about"]
    args = about["args"]
    assert about["classes"] == ["airplane", "bird"]
    assert (args["opt"], args["lr"], args["weight_decay"], args["scheduler"]) == ("adam", 1e-3, 0.0, "constant")
    assert (args["model"], args["epochs"], args["batch_size"]) == ("cifar_resnet20", 1, 10)


def test_torchvision_takes_the_weights(photographs, tmp_path):
    """And finds with them what was written of the best epoch."""
    models = pytest.importorskip("torchvision.models")
    assert of_photographs(photographs, tmp_path / "run", "--model", "resnet18") == 0
    images = torch.randn(2, 3, 32, 32)
    wanted = load_trained(tmp_path / "run")[0](images)
    for weights in (checkpoint(tmp_path / "run", "model.pth"), checkpoint(tmp_path / "run", "best.pth")["model"]):
        theirs = models.resnet18(num_classes=2).eval()
        theirs.load_state_dict(weights, strict=True)
        error = (theirs(images) - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCES["model_eval_fp32"].value
    val = make_data(arguments("--data", photographs, "--size", 32)).val
    batch = val.__getitems__([(0, index) for index in range(len(val))])
    with torch.no_grad():
        found = theirs(batch.images)
    (row,) = summary(tmp_path / "run")["history"]
    assert row["val_top1"] == (found.argmax(1) == batch.labels).float().mean().item()
    loss = F.cross_entropy(found, batch.labels).item()
    assert row["val_loss"] == pytest.approx(loss, rel=TOLERANCES["model_eval_fp32"].value)
