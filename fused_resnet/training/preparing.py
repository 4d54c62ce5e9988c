"""What has to be right before a run begins: the data, the folder, the checkpoint; the same for all its processes."""

import argparse
import contextlib
import fcntl
from dataclasses import dataclass
from pathlib import Path

from fused_resnet.options import UsageError
from fused_resnet.training import resuming
from fused_resnet.training.checkpoint import Checkpoints, find
from fused_resnet.training.data import Data, make_data
from fused_resnet.training.options import plain
from fused_resnet.training.processes import Processes
from fused_resnet.training.trained import BEST


@dataclass
class Prepared:
    """A run's data, the checkpoint that it goes on from, and what is to be said of that."""

    data: Data
    resumed: dict | None
    messages: list[str]


def prepare(args: argparse.Namespace, processes: Processes, stack: contextlib.ExitStack) -> Prepared:
    """All processes' agreement on what to train, and the folder for this run alone, until `stack` is closed.

    Raises:
        UsageError: in every process, where one of them finds something wrong, or something else than the first.
    """
    found = processes.agreed(lambda: _prepare(args, processes, stack))
    views = processes.gather(_view(args, found))
    for rank, view in enumerate(views):
        different = [name for name, value in view.items() if views[0][name] != value]
        if different:
            name = different[0]
            raise UsageError(
                f"process {rank} has another {name} than process 0: {view[name]}, not {views[0][name]}; all processes "
                "need the same options, images and --output"
            )
    return found


def _view(args: argparse.Namespace, found: Prepared) -> dict:
    """What must be the same for all processes."""
    options = {f"--{n.replace('_', '-')}": v for n, v in plain(args).items() if n not in resuming.OF_A_PROCESS}
    step = found.resumed["step"] if found.resumed else 0
    return {"step to go on from": step, **options, "classes": found.data.classes, "images": found.data.images}


def _prepare(args: argparse.Namespace, processes: Processes, stack: contextlib.ExitStack) -> Prepared:
    data = make_data(args)
    _check_sizes(args, data, processes)
    folder = Path(args.output)
    said = _claim(folder, stack) if processes.first else []
    if args.resume is None:
        held = Checkpoints(folder).all()
        if held:
            raise UsageError(
                f"--output {folder} holds a run already ({held[0].name}): --resume auto goes on with it, another "
                "--output begins anew"
            )
        return Prepared(data, None, said)
    found, messages = find(args.resume, folder)
    if found is None:
        return Prepared(
            data, None, [*said, f"--resume {args.resume}: {folder} has no checkpoint yet; a new run begins"]
        )
    resuming.check(args, data, found)
    if processes.first:
        messages += resuming.bring_best(args, found, folder)
    if not (folder / BEST).is_file():
        found["best"] = None  # what follows, or what is there now, is the best
    if found["epoch"] >= args.epochs:
        messages.append(f"this run has ended already, after {found['epoch']} epochs")
    else:
        messages.append(f"going on after step {found['step']}, in epoch {found['epoch'] + 1}")
    return Prepared(data, found, [*said, *messages])


def _check_sizes(args: argparse.Namespace, data: Data, processes: Processes) -> None:
    world = processes.world
    if args.batch_size < 2 * world:
        raise UsageError(
            f"--batch-size {args.batch_size} counts the images of all {world} processes: it must be {2 * world} or more"
        )
    if len(data.classes) < 2:
        raise UsageError(f"{args.data or args.dataset}: there is one class alone, and nothing to tell it from")
    least = max(world, 2)
    for part, images in (("train", len(data.train)), ("val", len(data.val))):
        if images < least:
            raise UsageError(f"{args.data or args.dataset}: {part} has {images} images, and needs {least} or more")


def _claim(folder: Path, stack: contextlib.ExitStack) -> list[str]:
    """Take the folder, made where there is none, for this process alone, until `stack` or the process ends.

    Returns:
        what is to be said where it cannot be locked.

    Raises:
        UsageError: it cannot be written to, or another run writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((folder / ".lock").open("w"))
    except OSError as error:
        raise UsageError(f"--output {folder}: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"--output {folder}: another run is writing there") from error
    except OSError as error:  # a file system without locks
        return [f"{folder} cannot be locked ({error.strerror or error}): see that no other run writes there"]
    return []
