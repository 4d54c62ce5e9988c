"""Options of `fused-resnet train` that contradict each other, or that would do nothing."""

import argparse
import difflib

from fused_resnet.models import list_models
from fused_resnet.options import UsageError
from fused_resnet.training.options import OF_FILES, SIZES, defaults


def check(args: argparse.Namespace) -> None:
    """Raise UsageError where options contradict each other; `--classes` without a name is as if not given."""
    args.classes = args.classes or None
    _check_model(args)
    check_data(args)
    _check_schedule(args)
    if args.num_classes == 1:
        raise UsageError("--num-classes must be 2 or more")
    _check_idle(args)
    if args.opt == "nesterov" and args.momentum == 0:
        raise UsageError("--opt nesterov needs a --momentum above 0")


# Options that do nothing without another one: what they need, and when that is there.
NEEDS = (
    ("amp_dtype", "--amp", lambda args: args.amp),
    ("model_ema_decay", "--model-ema", lambda args: args.model_ema),
    ("momentum", "--opt sgd, nesterov or rmsprop", lambda args: args.opt in ("sgd", "nesterov", "rmsprop")),
    ("lr_step_size", "--scheduler step", lambda args: args.scheduler == "step"),
    (
        "lr_gamma",
        "--scheduler step, multistep or exponential",
        lambda args: args.scheduler in ("step", "multistep", "exponential"),
    ),
    ("warmup_factor", "--warmup-epochs", lambda args: args.warmup_epochs > 0),
    ("val_resize", "--dataset imagefolder", lambda args: args.dataset == "imagefolder"),
)


def _check_idle(args: argparse.Namespace) -> None:
    """An option that would be ignored is refused, unless it says what holds anyway."""
    for name, needed, there in NEEDS:
        if getattr(args, name) != defaults()[name] and not there(args):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} does nothing without {needed}")


def _check_model(args: argparse.Namespace) -> None:
    models = list_models()
    if args.model not in models:
        near = difflib.get_close_matches(args.model, models)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(models)}"
        raise UsageError(f"--model {args.model}: unknown; {hint}")
    if "trunk" in args.freeze and len(args.freeze) > 1:
        raise UsageError("--freeze trunk stands alone: it is all but the head")


def check_data(args: argparse.Namespace) -> None:
    """Raise UsageError where the options of the data contradict each other."""
    if args.dataset in OF_FILES and args.data is None:
        raise UsageError(f"--dataset {args.dataset} needs --data, the folder of its images")
    if args.dataset not in OF_FILES and args.data is not None:
        raise UsageError(f"--data {args.data} contradicts --dataset {args.dataset}, which reads no files")
    if args.num_classes and args.dataset != "synthetic":
        raise UsageError(f"--num-classes is for --dataset synthetic; --dataset {args.dataset} knows its classes")
    if args.val_tencrop and args.dataset != "imagefolder":
        raise UsageError(f"--val-tencrop is for --dataset imagefolder, not for --dataset {args.dataset}")
    names = args.classes or []
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--classes names {', '.join(twice)} twice")
    if len(names) == 1:
        raise UsageError("--classes needs two names or more")
    crop = args.val_size or args.size or SIZES[args.dataset]
    if args.dataset == "imagefolder" and args.val_resize and args.val_resize < crop:
        option = "--val-size" if args.val_size else "--size"
        raise UsageError(f"--val-resize {args.val_resize} is less than {option} {crop}, which is cut out of it")


def _check_schedule(args: argparse.Namespace) -> None:
    milestones = args.lr_milestones
    if milestones and args.scheduler != "multistep":
        raise UsageError(f"--lr-milestones is for --scheduler multistep, not for --scheduler {args.scheduler}")
    if args.scheduler == "multistep" and not milestones:
        raise UsageError("--scheduler multistep needs --lr-milestones")
    if sorted(set(milestones)) != milestones:
        raise UsageError(f"--lr-milestones must rise, got {' '.join(map(str, milestones))}")
    if args.min_lr and args.scheduler != "cosine":
        raise UsageError(f"--min-lr is for --scheduler cosine, not for --scheduler {args.scheduler}")
    if args.min_lr > args.lr:
        raise UsageError(f"--min-lr {args.min_lr:g} is more than --lr {args.lr:g}")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
