"""The checkpoints of a run: the last few are kept, and the newest whole one is where it goes on."""

import contextlib
import fcntl
import re
from pathlib import Path

from fused_resnet.options import UsageError
from fused_resnet.training.errors import TrainingError
from fused_resnet.training.state_file import damage, read, why_not, write

CHECKPOINT = re.compile(r"checkpoint-(\d{8,})\.pth")
LEFT_BY_WRITERS = re.compile(r"\.(checkpoint-\d{8,}|best)\.pth(\.sha256)?\.\w+")


class Checkpoints:
    """The checkpoints in a run's folder, of which the newest `keep` are kept."""

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder = Path(folder)
        self.keep = keep
        self._whole: set[Path] = set()  # written or compared with their digests by this object
        self._last: Path | None = None

    def all(self) -> list[Path]:
        """Every one that has the name of a checkpoint, whole or not, newest first."""
        found = [path for path in self._names() if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=_step, reverse=True)

    def _names(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def save(self, state: dict) -> Path:
        """Write one, then remove what is older than the newest `keep`, torn, or left by a writer that died.

        Raises:
            TrainingError: it cannot be written; nothing is removed.
        """
        path = self.folder / f"checkpoint-{state['step']:08d}.pth"
        try:
            write(path, state)
        except TrainingError as error:
            raise TrainingError(f"{error}. The last good one: {self.last_good()}") from error
        self._whole.add(path)
        self._last = path
        with contextlib.suppress(OSError):  # what cannot be removed is no reason to end a run
            self._tidy(path)
        return path

    def _tidy(self, newest: Path) -> None:
        kept = 0
        for path in self.all():
            if path not in self._whole:
                try:
                    torn = damage(path)
                except OSError:  # somebody's copy without a digest, or a disk that does not answer
                    continue
                if torn:
                    path.unlink(missing_ok=True)
                    continue
                self._whole.add(path)
            kept += _step(path) <= _step(newest)
            if kept > self.keep:
                path.unlink(missing_ok=True)
                self._whole.discard(path)
        for path in self._names():
            digest = CHECKPOINT.fullmatch(path.name.removesuffix(".sha256"))
            if (digest and not path.with_name(digest[0]).exists()) or _left_behind(path):
                path.unlink(missing_ok=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest one that is whole, and a message about each that was passed over."""
        messages = []
        for path in self.all():
            reason = why_not(path)
            if not reason:
                self._whole.add(path)
                self._last = path
                return path, messages
            messages.append(f"passed over {path}: {reason}")
        return None, messages

    def last_good(self) -> str:
        """The path of the newest one that is whole, for an error's message."""
        return str(self._last or self.newest()[0] or "none was written yet")


def _step(path: Path) -> int:
    return int(CHECKPOINT.fullmatch(path.name)[1])


def _left_behind(path: Path) -> bool:
    """Whether it is a temporary file of ours whose writer is gone: a living one holds a lock."""
    if not LEFT_BY_WRITERS.fullmatch(path.name):
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def locate(resume: str | Path, folder: str | Path) -> tuple[Path | None, list[str]]:
    """The file that `--resume` names: "auto" (the newest of the output `folder`), a run's folder or a file; messages.

    Returns:
        the path; None for "auto" where there is none yet.

    Raises:
        UsageError: there is none, or none is whole.
    """
    path = Path(resume).expanduser()
    if resume != "auto" and not path.is_dir():
        return path, []
    path, messages = Checkpoints(folder if resume == "auto" else path).newest()
    if path is None and messages:
        raise UsageError("\n  ".join([f"--resume {resume}: none of its checkpoints is whole", *messages]))
    if path is None and resume != "auto":
        raise UsageError(f"--resume {resume}: there is no checkpoint in that folder")
    return path, messages


def find(resume: str | Path, folder: str | Path) -> tuple[dict | None, list[str]]:
    """What the checkpoint that `locate` finds holds, and messages; None for "auto" where there is none yet.

    Raises:
        UsageError: as `locate`; or the output folder holds a newer one, which would be in the way.
    """
    path, messages = locate(resume, folder)
    if path is None:
        return None, []
    state = read(path)
    if "optimizer" not in state:
        raise UsageError(
            f"--resume {path}: it holds a network alone; resume from a checkpoint-*.pth, or begin anew with "
            f"--pretrained {path}"
        )
    newer = None if resume == "auto" else Checkpoints(folder).newest()[0]
    if newer and _step(newer) > state["step"]:
        raise UsageError(
            f"--resume {resume}: {newer} is newer than step {state['step']}, and the next --resume auto would take it; "
            "give another --output, or move it away"
        )
    return state, messages
