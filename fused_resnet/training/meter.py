"""Sums over an epoch: losses, hits, images, seconds and those spent waiting."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fused_resnet.training.data import NO_CLASS
from fused_resnet.training.errors import TrainingError
from fused_resnet.training.processes import Processes

READ_EVERY_S = 0.25  # a GPU is waited for that often, to see its losses
NAMES = ("loss", "hits", "images")


class Meter:
    """What an epoch came to so far, of this process's images.

    Args:
        partial: what the sums were, over all processes, when the epoch was broken off.
    """

    def __init__(self, device: torch.device, partial: Mapping[str, float] | None = None):
        partial = partial or {}
        start = [partial.get(name, 0.0) for name in NAMES]
        self.totals = torch.tensor(start, dtype=torch.float64, device=device)
        self.seconds, self.waited = partial.get("seconds", 0.0), partial.get("waited", 0.0)
        self.unread: list[tuple[int, Tensor]] = []
        self.failed: int | None = None
        self.recent: deque[tuple[float, int]] = deque(maxlen=50)  # when, and how many images of this process so far
        self.images = 0
        self.lr = partial.get("lr", math.nan)  # of the latest step
        self.loss = math.nan
        self.top1 = math.nan
        self.begun: float | None = None  # None: the clock stands
        self.read_at = time.perf_counter()

    @contextlib.contextmanager
    def running(self, runs: bool = True) -> Iterator[None]:
        """Count the time, or not: that of steps, not of validating and saving."""
        ran = self.begun is not None
        self._set(runs)
        try:
            yield
        finally:
            self._set(ran)

    def _set(self, runs: bool) -> None:
        now = time.perf_counter()
        self.seconds = self._seconds()
        self.begun = now if runs else None
        self.recent.clear()
        self.recent.append((now, self.images))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """A batch's summed loss and its hits; of mixed images the class with the largest share is the right one."""
        if labels.dim() == 2:
            labels = labels.argmax(1)
        hits = (logits.argmax(1) == labels).sum()
        self.images += len(labels)
        self.totals += torch.stack([loss, hits, (labels != NO_CLASS).sum()]).double()
        self.unread.append((step, loss))
        self.recent.append((time.perf_counter(), self.images))

    def check(self) -> int | None:
        """The first step whose loss was not finite, as far as it is known; a GPU is not waited for at every step."""
        if self.totals.device.type == "cpu" or time.perf_counter() - self.read_at > READ_EVERY_S:
            self.read()
        return self.failed

    def read(self) -> None:
        """Wait for the losses of all steps so far."""
        self.read_at = time.perf_counter()
        if not self.unread:
            return
        losses = torch.stack([loss for _, loss in self.unread]).tolist()
        for (step, _), loss in zip(self.unread, losses, strict=True):
            if self.failed is None and not math.isfinite(loss):
                self.failed = step
        self.unread.clear()
        loss, hits, images = self.totals.tolist()
        if images:
            self.loss, self.top1 = loss / images, hits / images

    def speed(self) -> float:
        """Images a second of this process, over the latest batches."""
        (then, before), (now, images) = self.recent[0], self.recent[-1]
        return (images - before) / (now - then) if now > then else 0.0

    def waited_share(self) -> float:
        return self.waited / max(self._seconds(), 1e-9)

    def _seconds(self) -> float:
        return self.seconds + (0.0 if self.begun is None else time.perf_counter() - self.begun)

    def sums(self, processes: Processes) -> dict[str, float]:
        """The sums over all processes; the times of the first one."""
        totals = dict(zip(NAMES, processes.sum(self.totals.clone()).tolist(), strict=True))
        return {**totals, "seconds": self._seconds(), "waited": self.waited, "lr": self.lr}

    def figures(self, processes: Processes) -> dict[str, float]:
        """The columns of the log that an epoch's training fills."""
        sums = self.sums(processes)
        if not sums["images"]:
            raise TrainingError("none of the epoch's images can be read")
        return {
            "lr": sums["lr"],
            "train_loss": sums["loss"] / sums["images"],
            "train_top1": sums["hits"] / sums["images"],
            "images_per_second": sums["images"] / sums["seconds"],
            "waited": sums["waited"] / sums["seconds"],
            "seconds": sums["seconds"],
        }
