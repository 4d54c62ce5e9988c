"""A run that goes on does so as it began: its options are in its checkpoint, and only some can be others."""

import argparse
from pathlib import Path

from fused_resnet.options import UsageError
from fused_resnet.training.checkpoint import Checkpoints, locate
from fused_resnet.training.config import given
from fused_resnet.training.data import Data
from fused_resnet.training.state_file import read, write
from fused_resnet.training.trained import BEST

# What each process may have of its own.
OF_A_PROCESS = {"data", "workers", "output", "resume", "config", "json", "threads"}
# Where and how it runs, which changes no more than rounding (on another device dropout draws other masks).
FREE = OF_A_PROCESS | {
    "max_unreadable", "keep", "save_steps", "save_minutes", "device", "backend", "timeout", "fsdp", "compile", "lean",
    "grad_checkpointing", "channels_last", "deterministic", "pretrained",
}  # fmt: skip


def options_of(args: argparse.Namespace) -> argparse.Namespace:
    """The options of a run that goes on: those given now, the others as they were.

    Raises:
        UsageError: one that was given is another now, and would make another run of it.
    """
    if args.resume is None:
        return args
    path, _ = locate(args.resume, output_folder(args))
    if path is None:
        return args
    kept = dict(read(path)["about"].get("args", {}))
    now = given(args.argv)
    changed = [name for name, value in now.items() if name not in FREE and name in kept and kept[name] != value]
    if changed:
        differences = ", ".join(f"--{n.replace('_', '-')} was {kept[n]} and is {now[n]}" for n in changed)
        raise UsageError(
            f"--resume {args.resume}: {differences}; a run goes on as it began. Leave the option away, or begin a new "
            f"run from its weights: --pretrained {path} with another --output"
        )
    if args.output is None:
        kept["output"] = str(path.parent)
    own = {"resume": args.resume, "config": args.config}
    return argparse.Namespace(**{**vars(args), **kept, **now, **own})


def output_folder(args: argparse.Namespace) -> Path:
    """--output, or what it is by default."""
    return Path(args.output or f"runs/{args.model}-{args.dataset}").expanduser()


def bring_best(args: argparse.Namespace, found: dict, folder: Path) -> list[str]:
    """Bring the best network so far into the folder of a run that goes on in another one; say so where it is not there.

    Raises:
        UsageError: the folder holds another run.
    """
    given = folder if args.resume == "auto" else Path(args.resume).expanduser()
    source = given if given.is_dir() else given.parent
    if source.resolve() == folder.resolve():
        return []
    held = [held.name for held in [*Checkpoints(folder).all(), folder / BEST] if held.exists()]
    if held:
        raise UsageError(f"--output {folder} holds another run already ({held[0]}): give a folder of its own")
    if found["best"] is None:
        return []
    if (source / BEST).is_file():
        best = read(source / BEST)
        if {name: best[name] for name in found["best"]} == found["best"]:
            write(folder / BEST, best)
            return []
    epoch, top1 = found["best"]["epoch"], found["best"]["top1"]
    return [
        f"the best network so far, of epoch {epoch} ({top1:.2%}), "
        f"is not beside its checkpoint in {source}; {BEST} begins anew"
    ]


def check(args: argparse.Namespace, data: Data, found: dict) -> None:
    """Raise UsageError where the data set is not the one that the checkpoint was trained with."""
    about = found["about"]
    if about["classes"] != data.classes:
        missing = [name for name in about["classes"] if name not in data.classes]
        new = [name for name in data.classes if name not in about["classes"]]
        raise UsageError(
            f"--resume {args.resume}: it was trained with {len(about['classes'])} classes, and the data set has "
            f"{len(data.classes)}: missing {', '.join(missing[:5]) or 'none'}; new {', '.join(new[:5]) or 'none'}"
            + ("" if missing or new else "; their order differs")
        )
    if about["images"] != data.images:
        raise UsageError(
            f"--resume {args.resume}: it was trained with {_counted(about['images'])}, and the data set has "
            f"{_counted(data.images)}; a run goes on with its images. Begin a new one from its weights: --pretrained "
            "with another --output"
        )


def _counted(images: dict) -> str:
    return f"{images['train']} + {images['val']} images (names {images['names'][:8] or 'none'})"
