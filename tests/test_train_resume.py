"""Nothing is lost: a run that is killed and goes on ends with the same bits as one that was never stopped."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from train_runs import SMALL, Run, assert_same_state, final, on_terminal, started, train, wait_for_checkpoint

from fused_resnet.training.checkpoint import Checkpoints

pytest.importorskip("sklearn")

EVERYTHING = ("--epochs", 5, "--save-steps", 2, "--model-ema", "--mixup", "0.2", "--random-erase", "0.25")


@dataclass
class Whole:
    """What a run that nothing stops comes to, and how long it takes."""

    state: dict
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    for name in ("warm", "run"):  # the first start imports everything
        folder = tmp_path_factory.mktemp("whole") / name
        begun = time.monotonic()
        run = train(folder, *EVERYTHING, *(("--epochs", 1) if name == "warm" else ()))
        assert run.wait() == 0, run.said()
    return Whole(final(folder), time.monotonic() - begun)


def assert_same_end_though_stopped(folder: Path, number: int, times: int, whole: Whole, *options) -> str:
    """Stop it at `times` random moments, going on each time; what the last one said.

    A run that comes to its end in between must be the whole one, and the next one begins anew.
    """
    chance, hits, runs = random.Random(number), 0, 0
    while True:
        where = folder / str(runs)
        run = train(where, *EVERYTHING, "--resume", "auto", *options)
        if hits < times:
            time.sleep(whole.seconds * chance.uniform(0.02, 0.2))
            run.signal(number)
        code = run.wait()
        # Before the handlers are there, a signal ends the process as it would any other.
        assert code in (-number, 128 + number, 0), run.said()
        if code:
            hits += 1
            continue
        assert_same_state(final(where), whole.state)
        runs += 1
        if hits == times:
            return run.said()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 20), (signal.SIGTERM, 5), (signal.SIGINT, 3)])
def test_stopped_at_random_moments(number, times, tmp_path, whole):
    said = assert_same_end_though_stopped(tmp_path, number, times, whole)
    assert "Traceback" not in said


@pytest.mark.slow
def test_killed_with_workers(tmp_path, whole):
    """Images are read in other processes, ahead of the step that needs them."""
    said = assert_same_end_though_stopped(tmp_path, signal.SIGKILL, 3, whole, "--workers", 2)
    assert "Traceback" not in said


def test_a_torn_checkpoint_is_passed_over(tmp_path, whole):
    folder = tmp_path / "run"
    run = train(folder, *EVERYTHING)
    wait_for_checkpoint(folder, 3)
    run.kill()
    torn, kept = Checkpoints(folder).all()[:2]
    torn.write_bytes(torn.read_bytes()[:-1000])
    run = train(folder, *EVERYTHING, "--resume", "auto")
    assert run.wait() == 0, run.said()
    assert f"passed over {torn}" in run.said()
    assert f"going on after step {int(kept.stem.split('-')[1])}," in run.said()
    assert_same_state(final(folder), whole.state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_says_so(tmp_path, workers):
    """Also one that is sent to all processes of a job, as schedulers do."""
    folder = tmp_path / "run"
    run = train(folder, "--epochs", 50, "--workers", workers)
    while "parameters, on" not in run.said():
        time.sleep(0.02)
    time.sleep(0.5)
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    assert len(children) >= workers
    for child in children:
        os.kill(int(child), signal.SIGTERM)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.said()
    assert "Traceback" not in run.said()
    state = final(folder)
    assert f"SIGTERM: saved step {state['step']} in {folder}" in run.said()
    assert state["step"] > 0


def test_goes_on_with_the_options_that_it_began_with(tmp_path):
    folder = tmp_path / "run"
    run = train(folder, "--epochs", 50, "--lr", "0.02", "--save-steps", 1)
    wait_for_checkpoint(folder)
    run.kill()
    other = Run("train", "--resume", folder, "--lr", "0.03", output=tmp_path / "other.txt")
    assert other.wait() == 2
    assert "--lr was 0.02 and is 0.03" in other.said()
    run = Run("train", "--resume", folder, "--threads", 1, output=tmp_path / "again.txt")
    while "epoch " not in run.said():
        time.sleep(0.02)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    found = final(folder)["about"]["args"]
    assert (found["lr"], found["epochs"], found["model"]) == (0.02, 50, "cifar_resnet20")


def test_one_run_in_a_folder(tmp_path):
    folder = tmp_path / "run"
    run = train(folder, "--epochs", 50)
    wait_for_checkpoint(folder)
    other = Run("train", "--resume", folder, output=tmp_path / "other.txt")
    assert other.wait() == 2
    assert "another run is writing there" in other.said()
    run.kill()
    again = Run("train", "--resume", folder, "--threads", 1, output=tmp_path / "again.txt")
    while "going on after step" not in again.said():
        time.sleep(0.02)
    again.kill()


def test_a_terminal_that_goes(tmp_path):
    """Nothing can be said any more, but everything is saved."""
    folder = tmp_path / "run"
    window, terminal = os.openpty()
    argv = ["train", *SMALL, "--batch-size", "8", "--epochs", "50", "--output", str(folder)]
    run = started(on_terminal, argv, os.ttyname(terminal))
    said = b""
    while b"loss" not in said:
        said += os.read(window, 4096)
    os.close(terminal)
    os.close(window)
    run.join(60)
    assert run.exitcode == 128 + signal.SIGHUP
    found = final(folder)
    assert found["epoch"] == 0
    assert found["step"] > 0
