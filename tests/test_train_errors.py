"""What goes wrong in `fused-resnet train` is said, without a traceback; 2: bad usage, 1: a failed run."""

import itertools
import os
import pickle
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from train_calls import call, checkpoint, different, failing_at, network_that, said_since, tiny
from training_data import make_image_folder

from fused_resnet.training import loop
from fused_resnet.training.checkpoint import Checkpoints

pytest.importorskip("torchvision.transforms.v2")
pytest.importorskip("sklearn")

said = pytest.fixture(said_since)

FOLDER = ("--model", "cifar_resnet20", "--size", 16, "--batch-size", 8, "--epochs", 1, "--threads", 1, "--workers", 0)


@pytest.fixture
def photographs(tmp_path):
    return make_image_folder(tmp_path / "photographs", train=8, val=4, size=32)


def of_folder(data, folder, *argv) -> int:
    return call("--data", data, "--output", folder, *FOLDER, *argv)


# --- folders and classes ----------------------------------------------------------------------------------------------


def _without_train(path):
    shutil.rmtree(path / "train")


def _without_val(path):
    shutil.rmtree(path / "val")


def _without_classes(path):
    shutil.rmtree(path / "train")
    (path / "train").mkdir()


def _class_without_images(path):
    (path / "train" / "nothing").mkdir()


def _class_of_train_alone(path):
    shutil.copytree(path / "train" / "china", path / "train" / "pottery")


def _file(path):
    shutil.rmtree(path)
    path.write_text("no folder")


BROKEN = {
    "missing": (shutil.rmtree, "no such folder"),
    "a file": (_file, "no such folder"),
    "no train": (_without_train, "no folder 'train'"),
    "no val": (_without_val, "no folder 'val'"),
    "empty": (_without_classes, "find any class"),
    "class without images": (_class_without_images, "nothing"),
    "classes differ": (_class_of_train_alone, "only in train: pottery; only in val: none"),
}


@pytest.mark.parametrize(("spoil", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_a_folder_that_is_no_data_set(photographs, tmp_path, said, spoil, text):
    spoil(photographs)
    assert of_folder(photographs, tmp_path / "run") == 2
    found = said()
    assert text in found
    assert str(photographs) in found
    assert not (tmp_path / "run").exists()


def test_one_class_alone(photographs, tmp_path, said):
    for part in ("train", "val"):
        shutil.rmtree(photographs / part / "china")
    assert of_folder(photographs, tmp_path / "run") == 2
    assert "one class alone" in said()


def test_a_class_that_is_not_there(photographs, tmp_path, said):
    assert of_folder(photographs, tmp_path / "run", "--classes", "china", "japan") == 2
    assert "has no class japan; it has china, flower" in said()


def test_classes_other_than_those_of_the_checkpoint(photographs, tmp_path, said):
    assert of_folder(photographs, tmp_path / "run") == 0
    for part in ("train", "val"):
        (photographs / part / "china").rename(photographs / part / "japan")
    said()
    assert of_folder(photographs, tmp_path / "run", "--resume", "auto") == 2
    found = said()
    assert "missing china" in found
    assert "new japan" in found


def test_no_cifar10(tmp_path, said):
    assert call("--dataset", "cifar10", "--data", tmp_path, "--output", tmp_path / "run") == 2
    assert "cifar-10-python.tar.gz" in said()


@pytest.mark.parametrize("dataset", ["digits", "imagefolder"])
def test_a_package_that_is_not_installed(photographs, tmp_path, said, monkeypatch, dataset):
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code = tiny(tmp_path / "run") if dataset == "digits" else of_folder(photographs, tmp_path / "run")
    assert code == 2
    assert "pip install 'fused_resnet[train]'" in said()


# --- images that cannot be read ---------------------------------------------------------------------------------------


def test_a_corrupt_image_is_named_and_left_out(photographs, tmp_path, said):
    torn = photographs / "train" / "china" / "0003.jpg"
    torn.write_bytes(torn.read_bytes()[:300])
    assert of_folder(photographs, tmp_path / "run", "--epochs", 2, "--max-unreadable", "0.1") == 0
    found = said()
    assert found.count(str(torn)) == 1  # and not in every epoch
    assert "1 unreadable" in found
    state = checkpoint(tmp_path / "run")
    assert list(state["unreadable"]) == [str(torn)]
    assert [row["unreadable"] for row in state["history"]] == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images(photographs, tmp_path, said, workers):
    for name in ("0001", "0002"):
        (photographs / "train" / "flower" / f"{name}.jpg").write_text("no image")
    assert of_folder(photographs, tmp_path / "run", "--max-unreadable", "0.05", "--workers", workers) == 1
    assert "2 of 24 images cannot be read, more than --max-unreadable 0.05" in said()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_batch_without_an_image(photographs, tmp_path, said, part, workers):
    for path in (photographs / part).glob("*/*.jpg"):
        path.write_text("no image")
    assert of_folder(photographs, tmp_path / "run", "--max-unreadable", 1, "--workers", workers) == 1
    assert "none of the" in said()


# --- runs that fail on their way --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number(tmp_path, said, monkeypatch):
    """The step and the last good checkpoint are named; that one holds finite weights and goes on."""

    def broken(step):
        if step == 8:
            with torch.no_grad():
                next(iter(training[0].module.parameters())).fill_(torch.nan)

    training = []
    run = loop.Training.run

    def noted(self):
        training.append(self)
        run(self)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Training, "run", noted)
        network_that(patched, broken)
        assert tiny(tmp_path / "run", "--epochs", 3) == 1
    found = said()
    good = tmp_path / "run" / "checkpoint-00000006.pth"
    assert "the loss of step 9 is not a number or infinite" in found
    assert f"Last good checkpoint: {good}" in found
    assert Checkpoints(tmp_path / "run").all() == [good]
    assert tiny(tmp_path / "run", "--epochs", 3, "--resume", "auto") == 0
    assert tiny(tmp_path / "whole", "--epochs", 3) == 0
    assert not different(checkpoint(tmp_path / "run")["model"], checkpoint(tmp_path / "whole")["model"])


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_are_not_numbers(tmp_path, said, monkeypatch, epochs):
    """The last step before a checkpoint spoils them, after a loss that was finite: that checkpoint is not written."""
    backward = loop.Training._backward

    def spoiling(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        if self.step == 6 * epochs - 1:
            next(iter(self.module.parameters())).grad.fill_(torch.inf)

    monkeypatch.setattr(loop.Training, "_backward", spoiling)
    assert tiny(tmp_path / "run", "--epochs", 2) == 1
    found = said()
    assert f"step {6 * epochs} left weights that are not finite" in found
    good = [tmp_path / "run" / "checkpoint-00000006.pth"][: epochs - 1]
    assert f"Last good checkpoint: {good[0] if good else 'none was written yet'}" in found
    assert Checkpoints(tmp_path / "run").all() == good


def test_a_learning_rate_that_is_much_too_high(tmp_path, said):
    assert tiny(tmp_path / "run", "--lr", "1e12", "--epochs", 2) == 1
    assert "is not a number or infinite. Last good checkpoint: " in said()


MEMORY = {
    "of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words"),
    "of the machine": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    "of Python": MemoryError(),
}


def test_a_batch_too_small_for_batch_norm(photographs, tmp_path, said):
    """The last of an odd number of images, at one pixel."""
    (photographs / "train" / "china" / "0000.jpg").unlink()
    assert of_folder(photographs, tmp_path / "run", "--model", "resnet18", "--batch-size", 2) == 1
    assert "--batch-size (now 2)" in said()


@pytest.mark.parametrize("place", ["training", "validation"])
@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY.keys())
def test_out_of_memory(tmp_path, said, monkeypatch, error, place):
    """What to do is said, and no checkpoint is written of a step that was not finished."""

    if place == "training":
        network_that(monkeypatch, failing_at(8, error))
    else:  # of the second epoch
        score, epochs = loop.evaluate, itertools.count()
        fails = failing_at(1, error)
        monkeypatch.setattr(loop, "evaluate", lambda *args, **kwargs: fails(next(epochs)) or score(*args, **kwargs))
    assert tiny(tmp_path / "run", "--epochs", 3) == 1
    found = said()
    assert "out of memory" in found
    assert "--batch-size (now 54" in found
    assert "--grad-checkpointing" in found
    good = tmp_path / "run" / "checkpoint-00000006.pth"
    assert str(good) in found
    assert Checkpoints(tmp_path / "run").all() == [good]


def test_a_worker_that_dies(photographs, tmp_path, said, monkeypatch):
    """Killed as the system does where memory is short."""

    def killed(path):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("fused_resnet.training.datasets.read_image", killed)
    assert of_folder(photographs, tmp_path / "run", "--workers", 1) == 1
    found = said()
    assert "DataLoader worker" in found
    assert "--workers 0" in found


# --- where the run is written -----------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(tmp_path, said):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert tiny(folder) == 2
        assert f"--output {folder}" in said()


def test_output_that_holds_a_run(tmp_path, said):
    assert tiny(tmp_path / "run") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    said()
    assert tiny(tmp_path / "run") == 2
    assert "holds a run already (checkpoint-00000006.pth): --resume auto goes on with it" in said()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_a_full_disk(tmp_path, said, monkeypatch):
    """No file may become as large as a checkpoint is; with room again the run goes on to the same bits."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        network_that(patched, failing_at(8, MemoryError()))
        assert tiny(folder, "--epochs", 3) == 1
    said()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert tiny(folder, "--epochs", 3, "--resume", "auto") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = said()
    good = folder / "checkpoint-00000006.pth"
    assert "files may not be so big" in found
    assert str(good) in found
    assert Checkpoints(folder).newest() == (good, [])
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == [good.name, f"{good.name}.sha256"]
    assert tiny(folder, "--epochs", 3, "--resume", "auto") == 0
    assert tiny(tmp_path / "whole", "--epochs", 3) == 0
    assert not different(checkpoint(folder)["model"], checkpoint(tmp_path / "whole")["model"])


def test_a_summary_that_cannot_be_printed(tmp_path, said, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert tiny(tmp_path / "run") == 1
        monkeypatch.undo()
    assert f"No space left on device; the run has ended well, and is in {tmp_path / 'run'}" in said()
    assert (tmp_path / "run" / "model.pth").exists()


# --- checkpoints and configs ------------------------------------------------------------------------------------------


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("option", ["--resume", "--pretrained"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, said, option):
    bad = tmp_path / "checkpoint-00000001.pth"
    torch.save({"format": 1, "model": {}, "about": Code(tmp_path / "ran")}, bad)
    assert tiny(tmp_path / "run", option, bad) == 2
    found = said()
    assert "not loaded" in found
    assert option in found or str(bad) in found
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have


def test_an_unknown_key_in_a_config(tmp_path, said):
    config = tmp_path / "mine.toml"
    config.write_text("learning_rate = 0.1\n")
    assert tiny(tmp_path / "run", "--config", config) == 2
    found = said()
    assert "learning_rate" in found
    assert str(config) in found


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--freeze", "layer9"), "--freeze layer9: the network has no module of that name"),
        (("--model", "resnet19"), "--model resnet19: unknown; did you mean"),
        (("--pretrained", "nowhere.pth"), "--pretrained nowhere.pth: "),
        (("--backend", "none"), "--backend: "),
        (("--resume", "nowhere.pth"), "there is no file nowhere.pth"),
        (("--resume", "."), "--resume .: there is no checkpoint in that folder"),
        (("--lr", "fast"), "argument --lr: "),
        (("--batch-size", "1"), "--batch-size 1 counts the images of all 1 processes: it must be 2 or more"),
        (("--auto-augment", "ra"), "--auto-augment works on photographs"),
        (("--momentum", "0.5", "--opt", "adam"), "--momentum 0.5 does nothing without --opt sgd"),
        (("--amp-dtype", "fp16"), "--amp-dtype fp16 does nothing without --amp"),
        (("--model-ema-decay", "0.9"), "--model-ema-decay 0.9 does nothing without --model-ema"),
        (("--val-resize", "20"), "--val-resize 20 does nothing without --dataset imagefolder"),
    ],
)
def test_bad_options(tmp_path, said, argv, reason):
    assert tiny(tmp_path / "run", *argv) == 2
    found = said()
    assert "fused-resnet train: error: " in found
    assert reason in found


@pytest.mark.parametrize("environment", [{"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_an_environment_that_is_not_torchruns(tmp_path, said, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tiny(tmp_path / "run") == 2
    assert "use torchrun" in said()


def test_images_that_are_too_many_for_memory(tmp_path, said):
    assert tiny(tmp_path / "run", "--size", 20_000) == 1
    assert "out of memory" in said()
