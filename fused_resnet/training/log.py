"""What a run of training says and writes down of itself.

Only checkpoints are needed to go on. So where a log cannot be written (a full disk, a terminal that is gone), one line
says so and the training goes on.
"""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fused_resnet.files import write_atomically
from fused_resnet.training import curves, events, live, summary
from fused_resnet.training.live import Standing, TimeLeft

COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5",
    "ema_loss", "ema_top1", "ema_top5",
    "images_per_second", "waited", "seconds", "unreadable",
)  # fmt: skip

DRAW = 0.1  # seconds between two states of the live line
RECORD = 1.0  # seconds between two values in TensorBoard within an epoch
LIFE = 30.0  # seconds between two lines where there is no terminal, so that a cluster's log shows life


class Log:
    """A live line, log.csv, TensorBoard's events, and at the end curves.png, summary.json and a table.

    Args:
        folder: the run's.
        epochs: of the whole run.
        history: rows of the epochs that have ended; `epoch` appends to this very list.
        step: optimizer steps done; earlier logs of later steps no longer count.
        stream: what people read (default: stderr). A line that moves only on a terminal.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int,
        history: list[dict],
        step: int,
        stream=None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.epochs, self.history = Path(folder), epochs, history
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._time_left = TimeLeft(epochs)
        self._epoch = len(history) + 1
        self._shown = ""  # what the terminal's last line holds
        self._passing = False  # whether that line is of no use once what it says has ended
        self._drawn = -math.inf
        self._said = self._recorded = clock()
        self._held: tuple[int, dict] | None = None  # values of TensorBoard's, see `_record`
        self._events: events.Events | None = None
        self._complained: set[str] = set()
        self._closed = False
        self._written_step = step
        self._attempt("log.csv", self._write_csv)
        self._open_events()

    def batch(self, run: Standing) -> None:
        """After each batch."""
        now = self._clock()
        self._epoch = run.epoch
        self._time_left.see(now, run.epoch, run.images)
        if now - self._recorded >= RECORD:
            self._recorded = now
            self._record(run.step, {"train_loss": run.loss, "train_top1": run.top1, "lr": run.lr})
        if now - self._drawn >= DRAW:
            self._passing = False
            left = self._time_left.left(run.of_images)
            self._draw(now, lambda width: live.line(run, self.epochs, left, width))

    def phase(self, text: str) -> None:
        """What goes on that has no batches, such as "validating"."""
        self._passing = True
        self._draw(self._clock(), lambda width: f"epoch {self._epoch}/{self.epochs}  {text}"[:width])

    def say(self, text: str) -> None:
        """A line that stays."""
        shown = self._shown
        self._said = self._clock()
        self._put(f"{self._erased()}{text}\n{shown}")
        self._shown = shown

    def epoch(self, row: dict) -> None:
        """An epoch has ended: the row goes into the history, the CSV and TensorBoard, and a line says it."""
        self.history.append(row)
        self._attempt("log.csv", self._write_csv)
        self._held = None  # at the epoch's last step the epoch's own values count
        self._open_events()
        self._add_events(row["step"], row)
        self._shown, erase = "", self._erased()
        self._said = self._clock()
        self._put(f"{erase}{summary.line(row, self.epochs)}\n")

    def close(self) -> None:
        """End the live line and TensorBoard's file; a second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._shown:
            end = self._erased() if self._passing else "\n"
            self._shown = ""
            self._put(end)

    def finish(self, about: dict, *, as_json: bool = False) -> str:
        """Close, write curves.png and summary.json, and return the table of the whole run, or what is in summary.json.

        `about`: what there is to say of the run besides, such as its network and data, in the table's order.
        """
        self.close()
        title = ", ".join(str(value) for value in list(about.values())[:2])
        self._attempt("curves.png", lambda: curves.draw(self.history, self.folder / "curves.png", title))
        found = {**about, **summary.results(self.history), "history": self.history}
        text = json.dumps(summary.finite(found), indent=2, default=str)
        self._attempt("summary.json", lambda: write_atomically(self.folder / "summary.json", f"{text}\n"))
        return text if as_json else summary.text(about, self.history, self.folder)

    def _write_csv(self) -> None:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.history:
            values = [row.get(column) for column in COLUMNS]
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
        write_atomically(self.folder / "log.csv", file.getvalue())

    def _attempt(self, what: str, write: Callable[[], None]) -> bool:
        """Whether it was written; the first failure of several is told."""
        try:
            write()
        except OSError as error:
            if what not in self._complained:
                self._complained.add(what)
                self.say(f"{what} cannot be written: {error}; the training goes on without")
            return False
        self._complained.discard(what)
        return True

    def _open_events(self) -> None:
        """A file of events where there is none: at the start, and after an epoch in which writing failed."""
        if self._events is not None or "tensorboard package" in self._complained:
            return
        reason = events.unavailable()
        if reason is not None:
            self._complained.add("tensorboard package")
            self.say(reason)
            return

        def make() -> None:
            self._events = events.Events(self.folder / "tensorboard", self._written_step)

        self._attempt("tensorboard", make)

    def _record(self, step: int, values: dict) -> None:
        """Values within an epoch, written once a later step is known: of an epoch's last step the epoch tells."""
        if self._held is not None and step > self._held[0]:
            self._add_events(*self._held)
            self._held = None
        if self._held is None and step > self._written_step:
            self._held = (step, values)

    def _add_events(self, step: int, values: dict) -> None:
        if self._events is None:
            return
        self._written_step = step
        open_events = self._events
        if not self._attempt("tensorboard", lambda: open_events.add(step, values)):
            open_events.close()  # it may end amid a record, so nothing is written behind it
            self._events = None

    def _draw(self, now: float, text: Callable[[int], str]) -> None:
        """The live line anew; without a terminal a line at times."""
        self._drawn = now
        width = live.width_of(self._stream)
        if width is not None:
            new = text(width)
            erase, self._shown = self._erased(width), new
            self._put(f"{erase}{new}")
        elif now - self._said >= LIFE:
            self._said = now
            self._put(f"{text(1000)}\n")

    def _erased(self, width: int | None = None) -> str:
        """What clears the terminal's last line. Blanks: not every terminal knows a control sequence for it."""
        if not self._shown:
            return ""
        width = live.width_of(self._stream) if width is None else width
        blanks = " " * min(len(self._shown), width or 0)
        self._shown = ""
        return f"\r{blanks}\r"

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a terminal or pipe that is gone
            self._shown = ""


class Silent:
    """The same for the processes of a run that say nothing; they keep the history."""

    def __init__(self, history: list[dict]):
        self.history = history

    def batch(self, run: Standing) -> None: ...

    def phase(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def epoch(self, row: dict) -> None:
        self.history.append(row)

    def close(self) -> None: ...

    def finish(self, about: dict, *, as_json: bool = False) -> str:
        return ""
