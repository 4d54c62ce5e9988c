"""The checkpoints of a run: nothing is lost to a kill or a torn file, and nothing that is read can run code."""

import fcntl
import os
import pickle
import signal
import time

import pytest
import torch
from run_checkpoints import FORK, names, saved, state

from fused_resnet.options import UsageError
from fused_resnet.training import state_file
from fused_resnet.training.checkpoint import Checkpoints, find, read, write

pytestmark = pytest.mark.usefixtures("one_thread")  # forked children have none of their parent's

# --- killed -----------------------------------------------------------------------------------------------------------


def _save_for_ever(folder, step, tell):
    checkpoints = Checkpoints(folder, 2)
    while True:
        step += 1
        checkpoints.save(state(step, 50_000))
        write(folder / "best.pth", state(step, 50_000))
        tell.value = step


def test_a_kill_while_saving_loses_no_more_than_one_save(tmp_path):
    generator = torch.Generator().manual_seed(0)
    reached, killed_while_writing = 0, 0
    for _ in range(25):
        told = FORK.Value("q", reached, lock=False)
        child = FORK.Process(target=_save_for_ever, args=(tmp_path, reached, told))
        child.start()
        patience = time.monotonic() + 60
        while told.value == reached and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(0.03 * torch.rand((), generator=generator).item())
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed_while_writing += any(name.startswith(".") for name in names(tmp_path))
        path, _ = Checkpoints(tmp_path, 2).newest()
        found = read(path)["step"] if path else 0
        assert told.value + 1 >= found >= told.value >= reached
        best = tmp_path / "best.pth"
        assert not best.exists() or (state_file.damage(best) == "" and read(best)["step"] >= told.value)
        reached = found
    assert reached >= 25
    assert killed_while_writing
    saved(tmp_path, reached + 1, keep=1)
    last = f"checkpoint-{reached + 1:08d}.pth"
    assert names(tmp_path) == ["best.pth", "best.pth.sha256", last, f"{last}.sha256"]


# --- torn -------------------------------------------------------------------------------------------------------------


def _cut(share):
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _digest(path):
    return path.with_name(f"{path.name}.sha256")


TORN = {
    "cut by one byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "it is cut off or damaged"),
    "cut in half": (_cut(0.5), "it is cut off or damaged"),
    "cut to a tenth": (_cut(0.1), "it is cut off or damaged"),
    "flipped": (_flip, "it is cut off or damaged"),
    "empty": (_cut(0), "it is empty"),
    "no digest": (lambda path: _digest(path).unlink(), "there is no checkpoint-00000020.pth.sha256"),
    "empty digest": (lambda path: _digest(path).write_text(""), "sha256 holds no SHA-256"),
    "half a digest": (lambda path: os.truncate(_digest(path), 40), "sha256 holds no SHA-256"),
    "binary digest": (lambda path: _digest(path).write_bytes(b"\xff\0" * 40), "sha256 holds no SHA-256"),
}


@pytest.mark.parametrize(("tear", "reason"), TORN.values(), ids=TORN.keys())
def test_a_torn_one_is_passed_over_and_then_removed(tmp_path, tear, reason):
    saved(tmp_path, 10, 20)
    tear(tmp_path / "checkpoint-00000020.pth")
    found, messages = find("auto", tmp_path)
    assert found["step"] == 10
    assert len(messages) == 1
    assert messages[0].startswith(f"passed over {tmp_path}/checkpoint-00000020.pth: ")
    assert reason in messages[0]
    copied = not _digest(tmp_path / "checkpoint-00000020.pth").exists()  # which no crash leaves: it may be whole
    saved(tmp_path, 15)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint-00000010.pth",
        "checkpoint-00000015.pth",
        *(["checkpoint-00000020.pth"] if copied else []),
    ]


@pytest.mark.parametrize(("tear", "reason"), TORN.values(), ids=TORN.keys())
def test_one_that_is_named_and_torn_is_refused(tmp_path, tear, reason):
    saved(tmp_path, 20)
    path = tmp_path / "checkpoint-00000020.pth"
    tear(path)
    if not _digest(path).exists():
        assert read(path)["step"] == 20  # as of a file that was copied without it
        return
    with pytest.raises(UsageError, match=reason):
        read(path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_one_that_is_cut_off_is_found_out_without_a_digest(tmp_path, share):
    path = tmp_path / "copied.pth"
    torch.save(state(20), path)
    _cut(share)(path)
    with pytest.raises(UsageError, match=r"copied\.pth"):
        read(path)


def test_where_all_are_torn_training_does_not_begin_anew(tmp_path):
    saved(tmp_path, 10, 20)
    for path in tmp_path.glob("*.pth"):
        _flip(path)
    with pytest.raises(UsageError, match=r"none of its checkpoints is whole(.|\n)*00000020(.|\n)*00000010"):
        find("auto", tmp_path)
    assert len(names(tmp_path)) == 4


# --- what is in a run's folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_are_kept_and_nothing_foreign_is_touched(tmp_path, keep):
    foreign = [
        "best.pth",
        "checkpoint-1.pth",
        "checkpoint-final.pth",
        ".checkpoint-notes",
        "log.csv",
        "model.pth.sha256",
    ]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".checkpoint-00000002.pth.0123abcd").write_text("of a writer that died")
    (tmp_path / ".best.pth.sha256.k_3x").write_text("of a writer that died")
    (tmp_path / "checkpoint-00000002.pth.sha256").write_text("of a checkpoint that never came")
    saved(tmp_path, 1, 3, 5, 7, 100000000, keep=keep)
    kept = [f"checkpoint-{step:08d}.pth" for step in (1, 3, 5, 7, 100000000)[-keep:]]
    assert names(tmp_path) == sorted([*foreign, *kept, *(f"{name}.sha256" for name in kept)])


def test_the_temporary_file_of_a_living_writer_stays(tmp_path):
    theirs = tmp_path / ".checkpoint-00000002.pth.0123abcd"
    with theirs.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        saved(tmp_path, 1)
        assert theirs.exists()
    saved(tmp_path, 2)
    assert not theirs.exists()


# --- what cannot be read ----------------------------------------------------------------------------------------------


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_code_in_a_file_is_not_run(tmp_path, save):
    path = tmp_path / "checkpoint-00000001.pth"
    save({**state(1), "about": _Code(tmp_path / "ran")}, path)
    with pytest.raises(UsageError, match=r"checkpoint-00000001.pth is damaged, or holds Python objects"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    with pytest.raises(UsageError, match="there is no file"):
        read(path)
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)
    torch.save({"fc.weight": torch.ones(2)}, path)
    with pytest.raises(UsageError, match=r"no checkpoint of fused-resnet train.*--pretrained"):
        read(path)
    torch.save({**state(1), "format": 2, "fused_resnet": "9.1"}, path)
    with pytest.raises(UsageError, match=r"format 2, written by fused_resnet 9.1; this one reads format 1"):
        read(path)
    path.write_text("not a checkpoint")
    with pytest.raises(UsageError, match=r"file.pth"):
        read(path)


def test_where_a_run_goes_on(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    assert find("auto", new) == (None, [])
    assert find("auto", tmp_path / "nowhere") == (None, [])
    with pytest.raises(UsageError, match="there is no checkpoint in that folder"):
        find(str(old), new)
    saved(old, 1, 2)
    assert find(str(old), new)[0]["step"] == 2
    assert find(old / "checkpoint-00000001.pth", new)[0]["step"] == 1
    with pytest.raises(UsageError, match=r"checkpoint-00000002.pth is newer than step 1"):
        find(old / "checkpoint-00000001.pth", old)
    write(old / "best.pth", {key: value for key, value in state(2).items() if key != "optimizer"})
    with pytest.raises(UsageError, match="holds a network alone"):
        find(old / "best.pth", new)
