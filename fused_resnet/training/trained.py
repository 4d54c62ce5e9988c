"""The network of a run, as its checkpoints hold it."""

from pathlib import Path

from torch import nn

from fused_resnet.models import create_model
from fused_resnet.models.weights import check_state_dict, load_plain
from fused_resnet.options import UsageError
from fused_resnet.training.checkpoint import Checkpoints
from fused_resnet.training.state_file import is_state, read

BEST = "best.pth"


def load_trained(path: str | Path, ema: bool = True) -> tuple[nn.Module, dict]:
    """The network of a checkpoint, or of a run's folder: its best one, else its newest; in eval mode, on the CPU.

    Args:
        ema: take the averaged weights where there are any.

    Returns:
        the network, and the checkpoint's "about" with "source" (path, step, epoch, ema) beside it.

    Raises:
        UsageError: there is none, or it is damaged or of another kind; no weights but averaged ones, and not `ema`.
    """
    path = Path(path).expanduser()
    state, path = _of_folder(path, ema) if path.is_dir() else (read(path), path)
    about = state["about"]
    if not ema and _is_average(state):
        raise UsageError(f"--no-ema: {path} holds the averaged weights alone; give a checkpoint-*.pth of that run")
    averaged = _is_average(state) or (ema and state.get("ema") is not None)
    weights = state["ema"] if ema and state.get("ema") is not None else state["model"]
    try:
        model = create_model(about["model"], **about["model_options"])
        check_state_dict(model, weights, path)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of another version's network, or made by hand
        raise UsageError(f"the network of {path} cannot be built: {error}") from error
    source = {"path": str(path), "step": state.get("step"), "epoch": state.get("epoch"), "ema": averaged}
    return model.eval(), {**about, "source": source}


def described(source: dict) -> str:
    """`load_trained`'s "source" in a table."""
    return f"{source['path']}, step {source['step']}" + (", averaged weights" if source["ema"] else "")


def is_trained(path: str | Path) -> bool:
    """Whether `path` is a folder, or a checkpoint that tells of its run: what `load_trained` is for."""
    path = Path(path).expanduser()
    if not path.is_file():
        return path.is_dir()
    try:
        return is_state(load_plain(path, mmap=True))
    except Exception:  # whatever is wrong with it is said where its weights are loaded
        return False


def _of_folder(folder: Path, ema: bool) -> tuple[dict, Path]:
    best = folder / BEST
    if best.exists():
        state = read(best)
        if ema or not _is_average(state):
            return state, best
    newest, messages = Checkpoints(folder).newest()
    if newest is None:
        raise UsageError("\n  ".join([f"{folder} holds no {BEST} and no checkpoint that is whole", *messages]))
    return read(newest), newest


def _is_average(state: dict) -> bool:
    """Whether the weights under "model" are averages, as in the best network of a run that keeps them."""
    return "ema" not in state and bool(state["about"].get("args", {}).get("model_ema"))
