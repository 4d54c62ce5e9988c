"""`fused-resnet train` called in this process, which is quicker than starting one."""

import contextlib
import json
from pathlib import Path

import torch

from fused_resnet import cli
from fused_resnet.training import loop

# Some 270 images of 8 x 8 pixels: an epoch is five steps.
TINY = [
    "--dataset", "digits", "--classes", "0", "1", "--model", "cifar_resnet20", "--size", "8", "--batch-size", "54",
    "--threads", "1", "--epochs", "1", "--lr", "0.05",
]  # fmt: skip


@contextlib.contextmanager
def settings_kept():
    """What a run sets for its whole process, put back: threads, and what is deterministic."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def call(*argv) -> int:
    """The exit code of `fused-resnet train` with these options; argparse's own errors too."""
    with settings_kept():
        try:
            return cli.main(["train", *map(str, argv)])
        except SystemExit as end:
            return end.code


def tiny(folder: Path, *argv) -> int:
    """A run of a second into `folder`; later options override its own."""
    return call(*TINY, "--output", folder, *argv)


def checkpoint(folder: Path, name: str = "") -> dict:
    """What a run's newest checkpoint holds, or the file `name`."""
    path = folder / name if name else sorted(folder.glob("checkpoint-*.pth"))[-1]
    return torch.load(path, weights_only=True)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def different(found: dict, expected: dict) -> list[str]:
    """The names of tensors that are not the same bits."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def said_since(capfd):
    """What was said on stderr since the last time; never a traceback. A fixture."""

    def read() -> str:
        text = capfd.readouterr().err
        assert "Traceback" not in text, text
        return text

    return read


def network_that(monkeypatch, fails) -> None:
    """Every training step asks `fails(step)` first, which may raise."""
    step = loop.Training._backward

    def tried(self, *args, **kwargs):
        fails(self.step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(loop.Training, "_backward", tried)


def failing_at(number: int, error: Exception):
    def fails(step):
        if step == number:
            raise error

    return fails
