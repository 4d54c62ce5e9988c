"""What a checkpoint holds of a training, and the way back."""

from typing import TYPE_CHECKING

import torch

from fused_resnet._version import __version__
from fused_resnet.training import state_file
from fused_resnet.training.errors import TrainingError
from fused_resnet.training.meter import Meter
from fused_resnet.training.network import model_options
from fused_resnet.training.options import plain
from fused_resnet.training.state import load_module, load_optimizer, whole
from fused_resnet.training.trained import BEST

if TYPE_CHECKING:
    from fused_resnet.training.loop import Training


def taken(training: "Training") -> dict:
    """All that the steps to come depend on, in tensors and plain containers. All processes must ask for it."""
    average = training.average
    return {
        "format": state_file.FORMAT,
        "fused_resnet": __version__,
        "model": whole(training.module.state_dict()),
        "ema": None if average is None else whole(average.module.state_dict()),
        "averaged": None if average is None else int(average.n_averaged),
        "optimizer": whole(training.optimizer.state_dict()),
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict() or None,
        "epoch": training.epoch,
        "seen": training.seen,
        "step": training.step,
        "history": training.history,
        "unreadable": training.unreadable,
        "best": training.best,
        "partial": training.meter.sums(training.processes),
        "about": {
            "model": training.args.model,
            "model_options": model_options(training.data),
            "dataset": training.args.dataset,
            **training.data.about(),
            "args": plain(training.args),
        },
    }


def write(training: "Training", best: bool) -> None:
    """Write a checkpoint, and with `best` the best network. All processes must ask for it.

    Raises:
        TrainingError: the weights are not finite, or the disk is full; the message names the last good checkpoint.
    """
    found, checkpoints = taken(training), training.checkpoints
    if training.processes.first:
        if not all(bool(torch.isfinite(t).all()) for t in found["model"].values() if t.is_floating_point()):
            raise TrainingError(f"step {training.step} left weights that are not finite. {_last_good(training)}")
        if best:  # first: what a checkpoint says of the best one must be true
            about = {key: found[key] for key in ("format", "about", "epoch", "step")}
            weights = found["ema"] or found["model"]
            try:
                state_file.write(checkpoints.folder / BEST, {**about, "model": weights, **training.best})
            except TrainingError as error:
                raise TrainingError(f"{error}. {_last_good(training)}") from error
        checkpoints.save(found)
    training.processes.tell(None)  # nobody goes on before it is written


def _last_good(training: "Training") -> str:
    return f"Last good checkpoint: {training.checkpoints.last_good()}"


def restore(training: "Training", found: dict) -> None:
    """Make a new training the one that `found` was taken of, whatever processes it had."""
    load_module(training.module, found["model"])
    if training.average is not None:
        load_module(training.average.module, found["ema"])
        training.average.n_averaged.fill_(found["averaged"])
    load_optimizer(training.optimizer, found["optimizer"])
    training.scheduler.load_state_dict(found["scheduler"])
    if found["scaler"] is not None:
        training.scaler.load_state_dict(found["scaler"])
    for name in ("epoch", "seen", "step", "unreadable", "best"):
        setattr(training, name, found[name])
    # The sums are those of all processes: the first one goes on from them.
    training.meter = Meter(training.device, found["partial"] if training.processes.first else None)
