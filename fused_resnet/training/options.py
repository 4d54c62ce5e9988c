"""The options of `fused-resnet train`."""

import argparse
from collections.abc import Mapping
from functools import cache
from typing import Any

from fused_resnet.options import MODEL, positive
from fused_resnet.training.values import (
    above_zero,
    count,
    not_negative,
    one_of,
    or_none,
    seed,
    share,
    share_above_zero,
    share_below_one,
)

SIZES = {"imagefolder": 224, "cifar10": 32, "digits": 16, "synthetic": 224}  # of images, unless they are told
DATASETS = tuple(SIZES)
OF_FILES = ("imagefolder", "cifar10")  # data sets that are read from --data
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "rmsprop")
SCHEDULERS = ("cosine", "step", "multistep", "exponential", "constant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-resnet train`, in groups."""
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    optimisation = parser.add_argument_group("optimisation")
    _add_optimisation(optimisation)
    _add_schedule(optimisation)
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_precision(parser.add_argument_group("precision and memory"))
    _add_processes(parser.add_argument_group("several processes"))
    _add_run(parser.add_argument_group("run"))


def _switch(group, name: str, text: str, default: bool = False) -> None:
    """`--name` and `--no-name`, so that a command line can take back what a recipe has set."""
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)


def _add_data(group) -> None:
    group.add_argument(
        "--data", help="folder of the data set: train/ and val/ with a folder for each class, or CIFAR-10"
    )
    group.add_argument("--dataset", choices=DATASETS, default="imagefolder", help="(default: imagefolder)")
    group.add_argument(
        "--classes", nargs="*", metavar="NAME", help="train on these classes, in this order (default: all)"
    )
    group.add_argument("--num-classes", type=positive, help="classes of synthetic images (default: 10)")
    group.add_argument(
        "--size", type=positive, help="height and width in training (default: 224, CIFAR-10's 32, digits' 16)"
    )
    group.add_argument("--val-size", type=positive, help="height and width in validation (default: --size)")
    group.add_argument(
        "--val-resize", type=positive, help="shorter side before the centre crop (default: 256/224 of --val-size)"
    )
    _switch(group, "--val-tencrop", "validate with the mean of ten crops")
    group.add_argument("--workers", type=count, help="processes that read images (default: chosen for the machine)")
    group.add_argument(
        "--max-unreadable", type=share, default=0.01, help="share of images that may be unreadable (default: 0.01)"
    )


def _add_model(group) -> None:
    group.add_argument("--model", default=MODEL, help=f"a network's name, see fused-resnet info (default: {MODEL})")
    group.add_argument(
        "--pretrained",
        nargs="?",
        const="DEFAULT",
        metavar="WEIGHTS",
        help="begin with a file's weights, or those of a name that torchvision knows (no value: its best)",
    )
    group.add_argument(
        "--freeze", nargs="*", default=[], metavar="NAME", help="modules that stay as they are; trunk: all but the head"
    )
    _switch(group, "--model-ema", "keep a moving average of the weights, and validate it too")
    group.add_argument(
        "--model-ema-decay", type=share_below_one, default=0.9998, help="its decay in each step (default: 0.9998)"
    )


def _add_optimisation(group) -> None:
    group.add_argument("--epochs", type=positive, default=90, help="(default: 90)")
    group.add_argument(
        "--batch-size", type=positive, default=256, help="images of a batch over all processes (default: 256)"
    )
    group.add_argument("--grad-accum", type=positive, default=1, help="batches of one step (default: 1)")
    group.add_argument("--opt", choices=OPTIMIZERS, default="sgd", help="(default: sgd)")
    group.add_argument("--momentum", type=share_below_one, default=0.9, help="of sgd, nesterov, rmsprop (default: 0.9)")
    group.add_argument("--weight-decay", type=not_negative, default=1e-4, help="(default: 0.0001)")
    group.add_argument(
        "--norm-weight-decay", type=or_none(not_negative), help="that of normalisation layers (default: as the others)"
    )
    group.add_argument("--clip-grad", type=or_none(above_zero), metavar="NORM", help="largest norm of the gradient")
    group.add_argument("--label-smoothing", type=share_below_one, default=0.0, help="(default: 0)")


def _add_schedule(group) -> None:
    group.add_argument("--lr", type=not_negative, default=0.1, help="(default: 0.1)")
    group.add_argument("--scheduler", choices=SCHEDULERS, default="cosine", help="(default: cosine)")
    group.add_argument(
        "--lr-step-size", type=positive, default=30, metavar="EPOCHS", help="of --scheduler step (default: 30)"
    )
    group.add_argument(
        "--lr-milestones",
        nargs="*",
        type=positive,
        default=[],
        metavar="EPOCH",
        help="of --scheduler multistep: multiply after so many epochs",
    )
    group.add_argument(
        "--lr-gamma",
        type=share_above_zero,
        default=0.1,
        help="factor at each step or milestone, or epoch of exponential (default: 0.1)",
    )
    group.add_argument("--min-lr", type=not_negative, default=0.0, help="where --scheduler cosine ends (default: 0)")
    group.add_argument(
        "--warmup-epochs", type=count, default=0, help="of linear warm-up, part of --epochs (default: 0)"
    )
    group.add_argument(
        "--warmup-factor", type=share_above_zero, default=0.01, help="share of --lr it begins with (default: 0.01)"
    )


def _add_augmentation(group) -> None:
    group.add_argument("--mixup", type=not_negative, default=0.0, metavar="ALPHA", help="(default: 0, none)")
    group.add_argument("--cutmix", type=not_negative, default=0.0, metavar="ALPHA", help="(default: 0, none)")
    group.add_argument("--random-erase", type=share, default=0.0, metavar="CHANCE", help="(default: 0)")
    names = ("ra", "ta_wide", "augmix", "imagenet", "cifar10")
    group.add_argument(
        "--auto-augment", type=or_none(one_of(*names)), metavar="POLICY", help=f"{', '.join(names)} (default: none)"
    )


def _add_precision(group) -> None:
    _switch(group, "--amp", "compute in --amp-dtype where that is safe")
    group.add_argument("--amp-dtype", choices=("bf16", "fp16"), default="bf16", help="(default: bf16)")
    _switch(group, "--channels-last", "images and weights in channels_last (default: on)", default=True)
    _switch(group, "--grad-checkpointing", "keep less for the backward pass: compute blocks again")
    _switch(group, "--lean", "keep only the blocks' inputs for the backward pass: compute blocks again")
    _switch(group, "--compile", "torch.compile the network")
    group.add_argument("--backend", help="a backend's name (default: the automatic choice)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    group.add_argument("--threads", type=positive, help="threads of each process on the CPU (default: torch's choice)")


def _add_processes(group) -> None:
    _switch(group, "--sync-bn", "batch norm over the images of all processes")
    _switch(group, "--fsdp", "spread weights, gradients and optimizer over the processes")
    group.add_argument(
        "--timeout", type=positive, default=60, help="seconds that a process waits for another (default: 60)"
    )


def _add_run(group) -> None:
    group.add_argument(
        "--config",
        metavar="FILE",
        help="a .toml file of options, or a shipped recipe's name; the command line overrides",
    )
    group.add_argument("--output", help="folder of the run (default: runs/MODEL-DATASET)")
    group.add_argument(
        "--resume", help="go on from a checkpoint, a run's folder, or auto: from --output, if it has any"
    )
    group.add_argument("--keep", type=positive, default=3, help="checkpoints kept (default: 3)")
    group.add_argument("--save-steps", type=or_none(positive), metavar="N", help="also save every N steps")
    group.add_argument(
        "--save-minutes", type=above_zero, default=10.0, metavar="N", help="also save every N minutes (default: 10)"
    )
    group.add_argument("--seed", type=seed, default=0, help="(default: 0)")
    _switch(group, "--deterministic", "only operators that give the same bits in every run")
    _switch(group, "--json", "summary as JSON on stdout")


def make_parser() -> argparse.ArgumentParser:
    """A parser of these options alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    return parser


@cache
def defaults() -> Mapping[str, Any]:
    """Every option's name, and what it is where it is not given."""
    return {action.dest: action.default for action in make_parser()._actions}


def plain(args: argparse.Namespace) -> dict:
    """The options alone, as a checkpoint keeps them."""
    return {name: getattr(args, name) for name in defaults()}
