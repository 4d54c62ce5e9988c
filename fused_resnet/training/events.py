"""What TensorBoard reads: a file of events, written as the training goes."""

import contextlib
import importlib.util
import math
import os
import socket
import time
from pathlib import Path

MISSING = "no TensorBoard log: pip install tensorboard, or 'fused_resnet[train]'"

# Columns of the history, and the names under which people look for them in TensorBoard.
TAGS = {
    "train_loss": "train/loss",
    "train_top1": "train/top1",
    "val_loss": "val/loss",
    "val_top1": "val/top1",
    "val_top5": "val/top5",
    "ema_loss": "val/ema_loss",
    "ema_top1": "val/ema_top1",
    "ema_top5": "val/ema_top5",
    "lr": "lr",
    "images_per_second": "speed/images_per_second",
    "waited": "speed/waited",
}


def unavailable() -> str | None:
    """Why there can be no log for TensorBoard, and how to get it; None where there can be one."""
    if importlib.util.find_spec("tensorboard") is None:
        return MISSING
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # such as a protobuf that does not fit, which raises what it likes
        return f"no TensorBoard log: {type(error).__name__}: {error}"
    return None


class Events:
    """One file of events, which hides what earlier files of its folder hold of later steps.

    torch's SummaryWriter puts the same records into the same kind of file, but from a thread: what fails there is a
    traceback amid the output, and is known only some writes later. One write a second needs no thread.

    Raises:
        OSError: here and by `add`, where the file cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import RecordWriter

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard takes the files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115  it is open as long as this
        self._records = RecordWriter(self._file)
        start = SessionLog(status=SessionLog.START)
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))
            self._file.flush()
        except OSError:
            self.close()
            raise

    def add(self, step: int, row: dict) -> None:
        """The values of a row that TAGS names; what is None or not a number is left out."""
        from torch.utils.tensorboard.summary import scalar

        for column, tag in TAGS.items():
            value = row.get(column)
            if value is not None and math.isfinite(value):
                self._write(self._event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        self._file.flush()  # so that what TensorBoard shows is as old as the last call

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is lost anyway
            self._file.close()

    def _write(self, event) -> None:
        self._records.write(event.SerializeToString())
