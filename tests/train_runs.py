"""Runs of `fused-resnet train` in processes of their own, which can be killed at any moment.

They are forked from a server that has imported everything, so that a start costs a second less of many.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import torch

import bench.torchvision_operators  # noqa: F401
from fused_resnet import cli
from fused_resnet.training.checkpoint import Checkpoints

_FORKS = multiprocessing.get_context("forkserver")
SMALL = ["--dataset", "digits", "--model", "cifar_resnet20", "--size", "8", "--batch-size", "64", "--threads", "1"]


def _start_server() -> None:
    """The server that all runs are forked from; it finds modules by PYTHONPATH alone."""
    modules = ["train_runs", "sklearn.datasets", "torchvision.transforms.v2", "matplotlib.figure"]
    _FORKS.set_forkserver_preload([*modules, "torch.utils.tensorboard"])
    tests = Path(__file__).parent
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tests), str(tests.parent), before)))
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def command(argv: list[str], output: str, environment: dict[str, str]) -> None:
    """The command line in this process, its output and errors in a file."""
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.exit(cli.main(argv))


def on_terminal(argv: list[str], terminal: str) -> None:
    """The command line in this process, as a shell starts it on the terminal of that name."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)  # which makes it the session's own
    for number in range(3):
        os.dup2(opened, number)
    sys.exit(cli.main(argv))


def started(target: Callable[..., None], *args) -> multiprocessing.Process:
    """A process that calls `target`."""
    _start_server()
    process = _FORKS.Process(target=target, args=args)
    process.start()
    return process


class Run:
    """A started command."""

    def __init__(self, *argv, output: Path, environment: dict[str, str] | None = None):
        self.output = output
        self.process = started(command, [str(a) for a in argv], str(output), environment or {})

    def wait(self, seconds: float = 300) -> int:
        """The exit code; minus the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def train(folder: Path, *argv, said: str = "", **kwargs) -> Run:
    """A small training into `folder`; what it says in `<folder><said>.txt` beside that."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.parent / f"{folder.name}{said}.txt"
    return Run("train", *SMALL, "--output", folder, *argv, output=output, **kwargs)


def several(folder: Path, world: int, port: int, *argv, own: Sequence[Sequence] = ()) -> list[Run]:
    """The same in `world` processes, as torchrun starts them; `own`: further options of each."""
    own = own or [()] * world
    return [
        train(folder, *argv, *own[rank], said=f"-{rank}", environment=environment)
        for rank, environment in enumerate(environments(world, port))
    ]


def environments(world: int, port: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def wait_for_checkpoint(folder: Path, count: int = 1) -> None:
    """Until a run has written so many."""
    while len(Checkpoints(folder).all()) < count:
        time.sleep(0.01)


def final(folder: Path) -> dict:
    """What the newest whole checkpoint holds."""
    path, _ = Checkpoints(folder).newest()
    return torch.load(path, weights_only=True)


def assert_same_state(found: dict, expected: dict) -> None:
    """Every bit of weights, averages, optimizer and schedule."""
    for part in ("model", "ema"):
        if expected[part] is None:
            assert found[part] is None
            continue
        assert found[part].keys() == expected[part].keys()
        different = [key for key, value in expected[part].items() if not torch.equal(found[part][key], value)]
        assert not different, f"{part}: {different}"
    assert str(found["scheduler"]) == str(expected["scheduler"])
    for index, entries in expected["optimizer"]["state"].items():
        for name, value in entries.items():
            other = found["optimizer"]["state"][index][name]
            assert torch.equal(torch.as_tensor(other), torch.as_tensor(value)), (index, name)
    assert (found["epoch"], found["seen"], found["step"]) == (expected["epoch"], expected["seen"], expected["step"])
    columns = ("epoch", "step", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "ema_top1")
    assert [[row[c] for c in columns] for row in found["history"]] == [
        [row[c] for c in columns] for row in expected["history"]
    ]
