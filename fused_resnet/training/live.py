"""The line that tells how a training stands, as short as its terminal is narrow, and the time that is left."""

import math
import os
from dataclasses import dataclass

MEMORY = 60.0  # seconds after which a speed counts for 1/e: past a slow start, not upset by one slow batch


@dataclass
class Standing:
    """How a run stands after a batch. Shares are in 0..1, times in seconds; None: not known."""

    epoch: int
    images: int  # of this epoch, so far
    of_images: int
    step: int  # of the whole run
    images_per_second: float | None
    loss: float | None
    top1: float | None
    lr: float | None
    waited: float | None

    @property
    def done(self) -> float | None:
        """The share of the epoch."""
        return self.images / self.of_images if self.of_images else None


class TimeLeft:
    """Seconds that an epoch and the whole run still take, from what this process has seen of them.

    Images take the time that images took lately; an epoch takes besides what lay between earlier ones (validating,
    saving).
    """

    def __init__(self, epochs: int):
        self.epochs = epochs
        self._last: tuple[float, int, int] | None = None  # time, epoch, images
        self._images = self._seconds = 0.0  # sums in which what is long ago weighs less
        self._pauses: list[float] = []

    def see(self, now: float, epoch: int, images: int) -> None:
        """After each batch: `images` of the epoch are done."""
        if self._last is not None:
            then, last_epoch, before = self._last
            elapsed = now - then
            if epoch == last_epoch:
                weight = math.exp(-elapsed / MEMORY)
                self._images = self._images * weight + images - before
                self._seconds = self._seconds * weight + elapsed
            else:  # the new epoch's first batch is in that time too
                self._pauses.append(max(0.0, elapsed - images * self._of_an_image()))
        self._last = (now, epoch, images)

    def left(self, of_images: int) -> tuple[float, float] | None:
        """Of the epoch's images and of the whole run; None before anything is known."""
        if self._last is None or not (self._seconds or self._pauses):
            return None
        _, epoch, images = self._last
        image = self._of_an_image()
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else 0.0
        of_epoch = max(0, of_images - images) * image
        later = max(0, self.epochs - epoch)
        return of_epoch, of_epoch + pause + later * (of_images * image + pause)

    def _of_an_image(self) -> float:
        return self._seconds / self._images if self._images else 0.0


def line(run: Standing, epochs: int, left: tuple[float, float] | None, width: int) -> str:
    """How the run stands, in `width` characters: in full, else shorter, else without what matters least."""
    for form in (_full, _middle):
        text = "  ".join(part for part in form(run, epochs, left) if part)
        if len(text) <= width:
            return text
    parts = _short(run, epochs, left)
    for least in (None, "waited", "lr", "epoch left", "top1", "images_per_second", "left", "loss", "share"):
        parts.pop(least, None)
        text = " ".join(part for part in parts.values() if part)
        if len(text) <= width:
            return text
    return text[: max(0, width)]


def _full(run: Standing, epochs: int, left) -> list[str]:
    times = f"left {duration(left[0])} (all {epochs}: {duration(left[1])})" if left else ""
    return [
        f"epoch {run.epoch}/{epochs}",
        share(run.done),
        number(run.images_per_second, ",.0f", after=" images/s"),
        number(run.loss, ".3f", "loss "),
        share(run.top1, "top-1 ", ".1f"),
        number(run.lr, ".3g", "lr "),
        share(run.waited, "waited "),
        times,
    ]


def _middle(run: Standing, epochs: int, left) -> list[str]:
    return [
        f"{run.epoch}/{epochs}",
        share(run.done),
        number(run.images_per_second, ",.0f", after="/s"),
        number(run.loss, ".3f", "loss "),
        share(run.top1, decimals=".1f"),
        number(run.lr, ".3g", "lr "),
        share(run.waited, "wait "),
        f"{duration(left[0])} ({duration(left[1])})" if left else "",
    ]


def _short(run: Standing, epochs: int, left) -> dict[str, str]:
    return {
        "epoch": f"{run.epoch}/{epochs}",
        "share": share(run.done, percent="%"),
        "images_per_second": number(run.images_per_second, ".0f", after="/s"),
        "loss": number(run.loss, ".3f"),
        "top1": share(run.top1, decimals=".1f", percent="%"),
        "lr": number(run.lr, ".2g", "lr "),
        "waited": share(run.waited, "wait ", percent="%"),
        "epoch left": duration(left[0]) if left else "",
        "left": f"({duration(left[1]).replace(' ', '')})" if left else "",
    }


def number(value: float | None, form: str, before: str = "", after: str = "") -> str:
    return "" if value is None else f"{before}{value:{form}}{after}"


def share(value: float | None, before: str = "", decimals: str = ".0f", percent: str = " %") -> str:
    return "" if value is None else number(100 * value, decimals, before, percent)


def duration(seconds: float) -> str:
    """`3:05`, `1:23:45` or `2 d 3 h`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def width_of(stream) -> int | None:
    """Characters that a line may have on the terminal that `stream` is; None where it is none."""
    try:
        if not stream.isatty():
            return None
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):  # gone, closed, or not of the system's
        return None
    return (columns or 80) - 1  # some terminals begin a new line once the last column is filled
