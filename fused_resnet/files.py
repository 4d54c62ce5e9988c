"""Files that are whole or not there, and the folder for what is kept from run to run."""

import contextlib
import os
import tempfile
from functools import cache
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """The whole file or none, even where the power goes: written beside it under another name, then renamed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync_folder(folder: str | Path) -> None:
    """Have the disk keep the names in `folder`, which a file's own fsync leaves out."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not sync folders
            os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """FUSED_RESNET_CACHE, else `fused_resnet` in XDG_CACHE_HOME, else in ~/.cache; it may not exist yet."""
    own = os.environ.get("FUSED_RESNET_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_resnet"
    except RuntimeError:  # a user without a home
        return _of_this_process()


@cache
def _of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="fused_resnet_"))
