"""A file of tensors and plain containers: whole or not there, with its SHA-256 beside it; reading it runs no code.

The digest goes to the disk before the file gets its name, and stands beside the digest of what that replaces: whenever
the power goes, a file has a line that is right.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_resnet.files import sync_folder, write_atomically
from fused_resnet.models.weights import load_plain, sha256_of
from fused_resnet.options import UsageError
from fused_resnet.training.errors import TrainingError

FORMAT = 1
PLAIN = (bool, int, float, str, bytes, type(None), torch.Tensor, torch.nn.Parameter, torch.Size)
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "files may not be so big"}


class _Hashed:
    """A file that torch.save writes to, with the digest of what was written and the error that ended it."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except BaseException as error:  # torch makes another one of it, without the reason
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: str | Path, state: dict) -> None:
    """Write `state` to `path`, whole or not at all, and its SHA-256 to `<path>.sha256`.

    Raises:
        TrainingError: the file cannot be written, as on a full disk; what stood there before still does.
        TypeError: `state` holds what `read` would refuse.
    """
    path = Path(path)
    _check_plain(state, "state")
    try:
        with _temporary(path) as temporary:
            digest = _save(temporary, state)
            _replace(temporary, path, digest)
    except OSError as error:
        raise TrainingError(_no_room(path, error)) from error


def _check_plain(value: Any, where: str) -> None:
    """A file that could be written but never read again must not be found out when it is needed."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in PLAIN:
        raise TypeError(f"checkpoints hold tensors and plain containers only, but {where} is a {type(value).__name__}")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _save(path: Path, state: dict) -> str:
    with path.open("xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # by which others see that its writer lives
        hashed = _Hashed(file)
        try:
            torch.save(state, hashed)
        except BaseException as error:
            raise hashed.error or error from None
        file.flush()
        os.fsync(file.fileno())
    return hashed.digest.hexdigest()


def _replace(temporary: Path, path: Path, digest: str) -> None:
    line = f"{digest}  {path.name}\n"
    beside = _digest_file(path)
    before = path.exists()
    old = beside.read_text(encoding="utf-8", errors="replace") if before and beside.exists() else ""
    write_atomically(beside, line + old)
    try:
        os.replace(temporary, path)
    except OSError:
        if not before:
            beside.unlink()
        raise
    sync_folder(path.parent)
    if old:
        write_atomically(beside, line)


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _no_room(path: Path, error: OSError) -> str:
    reason = FULL.get(error.errno, error.strerror or str(error))
    try:
        free = f"; {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there"
    except OSError:
        free = ""
    return f"{path} could not be written: {reason}{free}. Checkpoints written before it are as they were"


def damage(path: Path) -> str:
    """What is wrong with a file, seen from the digest beside it; "" where nothing is.

    Raises:
        OSError: one of the two is not there, or cannot be read.
    """
    text = _digest_file(path).read_text(encoding="utf-8", errors="replace")
    if not path.stat().st_size:
        return "it is empty"
    known = re.findall(r"^([0-9a-f]{64}) [ *]", text, re.MULTILINE)
    if not known:
        return f"{_digest_file(path).name} holds no SHA-256"
    found = sha256_of(path)
    return "" if found in known else f"its SHA-256 is {found}, not the one beside it: it is cut off or damaged"


def why_not(path: Path) -> str:
    """Why a file is not to be trusted; "" where it is."""
    try:
        return damage(path)
    except FileNotFoundError as error:
        return f"there is no {Path(error.filename).name}"
    except OSError as error:
        return error.strerror or str(error)


def read(path: str | Path) -> dict:
    """A checkpoint, or the best network of a run, on the CPU.

    Raises:
        UsageError: there is none, it is damaged, it holds code (none of it is run), or it is a file of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"{path} is a folder, not a checkpoint" if path.is_dir() else f"there is no file {path}")
    reason = why_not(path) if _digest_file(path).exists() else ""
    if reason:
        raise UsageError(f"{path} is not loaded: {reason}")
    try:
        state = load_plain(path)
    except Exception as error:  # damaged files raise errors of many kinds, each with its own words
        first = str(error).partition("\n")[0] or type(error).__name__
        if not isinstance(error, pickle.UnpicklingError) and not zipfile.is_zipfile(path):
            first = "it is not a file that torch.save writes, or a part of one"
        raise UsageError(first if str(path) in first else f"{path} cannot be read: {first}") from error
    if not is_state(state):
        raise UsageError(
            f"{path} is no checkpoint of fused-resnet train; weights alone, as in a plain state dict, are taken by "
            "train --pretrained, predict --weights and verify --weights"
        )
    if state["format"] != FORMAT:
        raise UsageError(
            f"{path} is a checkpoint of format {state['format']}, written by fused_resnet "
            f"{state.get('fused_resnet', '(unknown)')}; this one reads format {FORMAT}"
        )
    return state


def is_state(found: Any) -> bool:
    """Whether a file's contents are a checkpoint's, of whatever format."""
    return isinstance(found, dict) and {"format", "model", "about"} <= found.keys()
