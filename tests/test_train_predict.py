"""`fused-resnet predict` with a run: its network, classes and preprocessing, so that it says what `eval` counts."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tolerances import tolerance
from train_calls import call, checkpoint, said_since, tiny
from training_data import CIFAR10_CLASSES, made_cifar10, make_cifar10, make_image_folder

from fused_resnet import cli

pytest.importorskip("torchvision.transforms.v2")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

said = pytest.fixture(said_since)

SMALL = ("--model", "cifar_resnet20", "--batch-size", 10, "--epochs", 1, "--lr", 0.05, "--threads", 1, "--workers", 0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("photographs"), train=20, val=8, size=48)


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    """A run with classes in another order than the folder's, and another margin around the crop than ImageNet's."""
    folder = tmp_path_factory.mktemp("run")
    argv = ("--classes", "flower", "china", "--size", 24, "--val-size", 32, "--val-resize", 40)
    assert call("--data", photographs, "--output", folder, *SMALL, *argv) == 0
    return folder


def printed(capfd, *argv) -> dict:
    """What a command prints as JSON."""
    capfd.readouterr()
    assert cli.main([*map(str, argv), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def mean_loss(found: dict, truth: dict[str, str]) -> float:
    """The cross entropy of what was predicted, from the probability of each file's true class."""
    losses = []
    for prediction in found["predictions"]:
        by_name = {entry["label"]: entry["probability"] for entry in prediction["classes"]}
        losses.append(-math.log(by_name[truth[prediction["path"]]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("views", [(), ("--tencrop",)], ids=["crop", "tencrop"])
@pytest.mark.parametrize("file", ["", "best.pth"], ids=["folder", "file"])
def test_predict_says_what_eval_counts(photographs, run, capfd, views, file):
    found = printed(capfd, "predict", photographs / "val", "--weights", run / file, *views)
    score = printed(capfd, "eval", run, "--workers", 0, *views)
    truth = {str(path): path.parent.name for path in photographs.glob("val/*/*")}
    assert len(found["predictions"]) == score["images"] == len(truth) == 16
    assert mean_loss(found, truth) == pytest.approx(score["loss"], rel=tolerance("model_eval_fp32"))
    hits = [p["classes"][0]["label"] == truth[p["path"]] for p in found["predictions"]]
    assert sum(hits) / len(hits) == score["top1"]
    assert found["model"] == "cifar_resnet20"
    indices = {entry["label"]: entry["index"] for entry in found["predictions"][0]["classes"]}
    assert indices == {"flower": 0, "china": 1}


def test_images_of_cifar10_are_not_cut(tmp_path, capfd):
    from torchvision.datasets import CIFAR10

    data = make_cifar10(tmp_path / "data", images_per_batch=20)
    with made_cifar10(data):
        assert call("--data", data, "--dataset", "cifar10", "--output", tmp_path / "run", *SMALL) == 0
        score = printed(capfd, "eval", tmp_path / "run", "--workers", 0)
        images = list(CIFAR10(data, train=False))
    truth = {}
    for number, (image, label) in enumerate(images):
        path = tmp_path / f"{number:02}.png"
        image.save(path)
        truth[str(path)] = CIFAR10_CLASSES[label]
    about = checkpoint(tmp_path / "run")["about"]
    assert about["val_resize"] == about["val_size"] == 32  # which an exported network tells, too
    found = printed(capfd, "predict", *truth, "--weights", tmp_path / "run", "--topk", 10)
    assert mean_loss(found, truth) == pytest.approx(score["loss"], rel=tolerance("model_eval_fp32"))


def test_other_sizes_and_names_than_those_of_the_run(photographs, run, tmp_path, capfd):
    files = photographs / "val" / "china"
    same = printed(capfd, "predict", files, "--weights", run, "--size", 32)
    assert same == printed(capfd, "predict", files, "--weights", run)
    assert same != printed(capfd, "predict", files, "--weights", run, "--size", 48)
    (tmp_path / "names").write_text("Blume\nChina\n")
    named = printed(capfd, "predict", files, "--weights", run, "--labels", tmp_path / "names")
    assert {entry["label"] for entry in named["predictions"][0]["classes"]} == {"Blume", "China"}


def test_options_that_are_not_those_of_the_run(photographs, run, said):
    files = str(photographs / "val")
    same = ("--model", "cifar_resnet20", "--num-classes", "2")
    assert cli.main(["predict", files, "--weights", str(run), *same]) == 0
    said()
    assert cli.main(["predict", files, "--weights", str(run), "--model", "resnet50"]) == 2
    assert f"--model resnet50: {run} holds a cifar_resnet20" in said()
    assert cli.main(["predict", files, "--weights", str(run), "--num-classes", "1000"]) == 2
    assert f"--num-classes 1000: {run} has 2 classes" in said()


def test_a_network_that_takes_no_photographs(photographs, tmp_path, said):
    assert tiny(tmp_path) == 0
    said()
    assert cli.main(["predict", str(photographs / "val"), "--weights", str(tmp_path)]) == 2
    assert "takes images of 1 channel, not photographs" in said()


def test_a_damaged_run_and_a_folder_of_something_else(photographs, run, tmp_path, said):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    best = copy / "best.pth"
    best.write_bytes(best.read_bytes()[:-1000])
    assert cli.main(["predict", str(photographs / "val"), "--weights", str(copy)]) == 2
    assert "best.pth is not loaded: its SHA-256 is" in said()
    assert cli.main(["predict", str(photographs / "val"), "--weights", str(photographs)]) == 2
    assert "holds no best.pth and no checkpoint that is whole" in said()


def test_plain_weights_of_a_run_are_taken_as_any_others(photographs, run, capfd):
    given = ("--model", "cifar_resnet20", "--num-classes", 2, "--size", 32)
    found = printed(capfd, "predict", photographs / "val", "--weights", run / "model.pth", *given)
    assert {entry["label"] for entry in found["predictions"][0]["classes"]} == {"0", "1"}
