"""Runs that go on: in the same folder or another, with the best network, and with nothing else than they had."""

import pytest
import torch
from train_calls import checkpoint, different, failing_at, network_that, said_since, tiny

from fused_resnet.training import snapshot
from fused_resnet.training.checkpoint import Checkpoints

pytest.importorskip("sklearn")

said = pytest.fixture(said_since)


def test_killed_between_the_best_network_and_its_checkpoint(tmp_path, monkeypatch):
    """Whichever of both was written, the best network is there at the end and is the one that is named."""

    def killed(*args):
        raise KeyboardInterrupt

    for number, (owner, name) in enumerate([(snapshot.state_file, "write"), (Checkpoints, "save")]):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, killed)
            assert tiny(folder, "--epochs", 2) == 130
        assert tiny(folder, "--epochs", 2, "--resume", "auto") == 0
        state, best = checkpoint(folder), checkpoint(folder, "best.pth")
        assert {name: best[name] for name in state["best"]} == state["best"]
        assert not different(checkpoint(folder, "model.pth"), best["model"])


def test_an_ended_run_in_another_folder(tmp_path, said):
    assert tiny(tmp_path / "a") == 0
    said()
    assert tiny(tmp_path / "b", "--resume", next((tmp_path / "a").glob("checkpoint-*.pth"))) == 0
    assert "this run has ended already, after 1 epochs" in said()
    assert not different(checkpoint(tmp_path / "b", "model.pth"), checkpoint(tmp_path / "a", "model.pth"))


@pytest.mark.parametrize("best", [True, False], ids=["with its best network", "without"])
def test_going_on_in_another_folder(tmp_path, monkeypatch, best):
    """Without its best network, the best of what follows is the best: an earlier one could not be given."""
    with monkeypatch.context() as patched:
        network_that(patched, failing_at(8, MemoryError()))
        assert tiny(tmp_path / "a", "--epochs", 3) == 1
    path = tmp_path / "a" / "checkpoint-00000006.pth"
    state = torch.load(path, weights_only=True)
    state["best"] = {"top1": 1.1, "epoch": 1}  # none that follows is better
    file = tmp_path / "a" / "best.pth"
    for changed, at in ((state, path), (torch.load(file, weights_only=True) | state["best"], file)):
        torch.save(changed, at)
        at.with_name(f"{at.name}.sha256").unlink()
    if not best:
        file.unlink()
    assert tiny(tmp_path / "b", "--epochs", 3, "--resume", path) == 0
    weights, first = checkpoint(tmp_path / "b", "model.pth"), state["model"]
    assert bool(different(weights, first)) != best
    assert (checkpoint(tmp_path / "b")["best"]["epoch"] == 1) == best


def test_an_ended_run_without_its_best_network(tmp_path, said):
    """The checkpoint's is the best that is left."""
    assert tiny(tmp_path / "run") == 0
    for name in ("best.pth", "model.pth"):
        (tmp_path / "run" / name).unlink()
    assert tiny(tmp_path / "run", "--resume", "auto") == 0
    assert not different(checkpoint(tmp_path / "run", "model.pth"), checkpoint(tmp_path / "run")["model"])


def test_the_best_of_a_later_epoch_is_not_brought(tmp_path, said):
    assert tiny(tmp_path / "a", "--epochs", 2) == 0
    first = tmp_path / "a" / "checkpoint-00000006.pth"
    state = torch.load(first, weights_only=True)
    best = checkpoint(tmp_path / "a", "best.pth")
    said()
    assert tiny(tmp_path / "b", "--epochs", 2, "--resume", first) == 0
    later = best["epoch"] != state["best"]["epoch"]
    assert ("is not beside" in said()) is later
    assert checkpoint(tmp_path / "b", "best.pth")["epoch"] == best["epoch"]


def test_a_folder_of_another_run_is_left_alone(tmp_path, said):
    assert tiny(tmp_path / "a") == 0
    assert tiny(tmp_path / "b", "--seed", 1) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "b").glob("*.pth")}
    said()
    assert tiny(tmp_path / "b", "--resume", tmp_path / "a") == 2
    assert "holds another run already" in said()
    assert {path: path.read_bytes() for path in (tmp_path / "b").glob("*.pth")} == before


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--lr", "0.02"), "--lr was 0.05 and is 0.02"),
        (("--sync-bn",), "--sync-bn was False and is True"),
        (("--epochs", 2), "--epochs was 1 and is 2"),
    ],
)
def test_an_option_that_has_changed(tmp_path, said, argv, text):
    assert tiny(tmp_path / "run") == 0
    said()
    assert tiny(tmp_path / "run", "--resume", "auto", *argv) == 2
    assert text in said()


def test_images_that_have_changed(tmp_path, said, monkeypatch):
    """More of them would be another schedule, and another order."""
    from fused_resnet.training import datasets

    assert tiny(tmp_path / "run") == 0
    said()
    split = datasets.split_digits
    monkeypatch.setattr(datasets, "split_digits", lambda size: [(x[:200], y[:200]) for x, y in split(size)])
    assert tiny(tmp_path / "run", "--resume", "auto") == 2
    assert "a run goes on with its images" in said()


def test_the_same_command_again_and_again(tmp_path):
    """What a cluster does that starts a job anew: weights to begin with are read at the beginning alone."""
    assert tiny(tmp_path / "base") == 0
    command = ("--pretrained", tmp_path / "base" / "model.pth", "--resume", "auto")
    assert [tiny(tmp_path / "run", *command) for _ in range(3)] == [0, 0, 0]
    expected = tmp_path / "other"
    assert tiny(expected, *command[:2]) == 0
    assert not different(checkpoint(tmp_path / "run")["model"], checkpoint(expected)["model"])


def test_home_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny("~/run") == 0
    assert tiny("~/run", "--resume", "auto") == 0
    assert Checkpoints(tmp_path / "run").newest()[0] is not None
