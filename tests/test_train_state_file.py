"""One file of a run: what is written is what is read, and a full disk leaves what was there."""

import errno
import hashlib
import os
import resource
import shutil
import subprocess

import pytest
import torch
from run_checkpoints import FORK, names, same, saved, state

from fused_resnet.training import state_file
from fused_resnet.training.checkpoint import Checkpoints, find, read, write
from fused_resnet.training.errors import TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")  # forked children have none of their parent's

# --- what is written is what is read ----------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    before = state(7)
    before["model"]["nan"] = torch.tensor([float("nan"), -0.0, 1e-45])
    before["model"]["channels_last"] = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before["ema"] = None
    path = saved(tmp_path).save(before)
    assert path == tmp_path / "checkpoint-00000007.pth"
    after = read(path)
    assert same(before, after)
    assert after["model"]["channels_last"].is_contiguous(memory_format=torch.channels_last)


def test_sha256sum_takes_the_digest(tmp_path):
    saved(tmp_path, 7)
    digest = tmp_path / "checkpoint-00000007.pth.sha256"
    expected = hashlib.sha256((tmp_path / "checkpoint-00000007.pth").read_bytes()).hexdigest()
    assert digest.read_text() == f"{expected}  checkpoint-00000007.pth\n"
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", digest.name], cwd=tmp_path, check=True, capture_output=True)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    torn = {**state(1), "about": {"args": {"rates": [0.1, tmp_path]}}}
    with pytest.raises(TypeError, match=r"state\['about'\]\['args'\]\['rates'\]\[1\] is a PosixPath"):
        write(tmp_path / "best.pth", torn)
    assert names(tmp_path) == []


def test_schedulers_and_optimizers_are_plain_enough(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    parts = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": scaler}
    write(tmp_path / "best.pth", {**state(1), "model": model.state_dict(), **parts})
    assert read(tmp_path / "best.pth")["scheduler"]["milestones"] == scheduler.milestones


def test_a_file_that_is_written_again_has_a_right_digest_at_every_moment(tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    write(path, state(1))
    seen = []

    def watched(what):
        def call(*args):
            what(*args)
            seen.append(state_file.why_not(path))

        return call

    monkeypatch.setattr(state_file, "write_atomically", watched(state_file.write_atomically))
    monkeypatch.setattr(os, "replace", watched(os.replace))
    write(path, state(2))
    assert seen == [""] * 5  # three files, two of them through `write_atomically`
    assert read(path)["step"] == 2
    assert len((tmp_path / "best.pth.sha256").read_text().splitlines()) == 1


# --- a full disk ------------------------------------------------------------------------------------------------------


def _save_with_small_files(folder, tell):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        Checkpoints(folder, 1).save(state(20, 50_000))
    except TrainingError as error:
        tell.send(str(error))


def test_a_file_that_grows_too_big_leaves_the_last_good_one(tmp_path):
    saved(tmp_path, 10)
    before = names(tmp_path)
    here, there = FORK.Pipe()
    child = FORK.Process(target=_save_with_small_files, args=(tmp_path, there))
    child.start()
    assert here.poll(60)
    message = here.recv()
    child.join()
    assert child.exitcode == 0
    assert "checkpoint-00000020.pth could not be written: files may not be so big" in message
    assert "MB are free" in message
    assert f"{tmp_path}/checkpoint-00000010.pth" in message
    assert names(tmp_path) == before
    assert find("auto", tmp_path)[0]["step"] == 10


class _Small:
    """A file of a disk with little room."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.fixture
def disk(monkeypatch):
    def small(room: int, error: BaseException) -> None:
        hashed = state_file._Hashed
        monkeypatch.setattr(state_file, "_Hashed", lambda file: hashed(_Small(file, room, error)))

    return small


FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EIO: "Input/output error"}


@pytest.mark.parametrize("room", [0, 100, 3000, 100_000, 300_000])
@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_a_full_disk(tmp_path, disk, room, number):
    checkpoints = saved(tmp_path, 10)
    before = names(tmp_path)
    disk(room, OSError(number, os.strerror(number)))
    with pytest.raises(TrainingError, match=rf"{FULL[number]}.*last good one: .*checkpoint-00000010\.pth"):
        checkpoints.save(state(20, 100_000))
    assert names(tmp_path) == before


def test_a_stop_while_writing_is_a_stop(tmp_path, disk):
    disk(100, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "best.pth", state(1))
    assert names(tmp_path) == []


def test_no_room_for_the_digest(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 10)
    before = names(tmp_path)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_file, "write_atomically", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        checkpoints.save(state(20))
    assert names(tmp_path) == before
