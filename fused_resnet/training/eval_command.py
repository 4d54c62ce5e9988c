"""`fused-resnet eval`: how well a trained network does on the images that it was validated with, or on others."""

import argparse
import json
import sys

from torch import nn

from fused_resnet.options import UsageError, chosen_backend, positive
from fused_resnet.parity import table
from fused_resnet.training import options
from fused_resnet.training.contradictions import check_data
from fused_resnet.training.data import Data, make_data, validation_loader
from fused_resnet.training.evaluate import Score, evaluate
from fused_resnet.training.precision import memory_format
from fused_resnet.training.processes import Processes, joined
from fused_resnet.training.trained import described, load_trained
from fused_resnet.training.values import count

SHOWN = 20  # names of unreadable images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-resnet eval`."""
    parser.description += " What is not given is as in the run's training."
    parser.add_argument("trained", metavar="run_or_checkpoint", help="a run's folder (its best network), or a file")
    parser.add_argument("--data", help="folder of the data set, of which val/ is read")
    parser.add_argument("--dataset", choices=options.DATASETS)
    parser.add_argument("--batch-size", type=positive, help="images of a batch over all processes")
    parser.add_argument("--workers", type=count, help="processes that read images")
    either = argparse.BooleanOptionalAction
    parser.add_argument("--tencrop", action=either, help="the mean of ten crops of each image")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, where averages are kept too")
    parser.add_argument("--amp", action=either, help="compute in --amp-dtype where that is safe")
    parser.add_argument("--amp-dtype", choices=("bf16", "fp16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--backend", help="a backend's name (default: the automatic choice)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """`fused-resnet eval`; return the exit code."""
    model, about = load_trained(args.trained, ema=not args.no_ema)
    settings = _settings(args, about)
    with chosen_backend(args), joined(settings) as processes:
        data = processes.agreed(lambda: _data(about, settings))
        score = _score(model, data, settings, processes)
    if processes.first:
        _say(score, about, settings, as_json=args.json)
    return 0


def _settings(args: argparse.Namespace, about: dict) -> argparse.Namespace:
    """The options of the training, with those given now, and without what changes images at random."""
    settings = argparse.Namespace(**{**options.defaults(), **about.get("args", {})})
    other = args.dataset not in (None, about["dataset"])
    settings.dataset = args.dataset or about["dataset"]
    settings.data = args.data or (None if other else settings.data)
    for name in ("batch_size", "workers", "amp", "amp_dtype"):
        setattr(settings, name, getattr(settings if getattr(args, name) is None else args, name))
    for name in ("size", "val_size", "val_resize"):
        setattr(settings, name, about[name])
    named = settings.dataset != "synthetic"
    settings.classes = about["classes"] if named else None
    settings.num_classes = None if named else len(about["classes"])
    if args.tencrop and settings.dataset != "imagefolder":
        raise UsageError(f"--tencrop is for --dataset imagefolder, not for --dataset {settings.dataset}")
    folder = settings.dataset == "imagefolder"
    settings.val_tencrop = (settings.val_tencrop and folder) if args.tencrop is None else args.tencrop
    check_data(settings)
    settings.auto_augment, settings.random_erase, settings.fsdp = None, 0.0, False
    settings.device = args.device
    return settings


def _data(about: dict, settings: argparse.Namespace) -> Data:
    """The images to score the network on, which are to be as those that it learned from."""
    data = make_data(settings, train=False)
    channels = about["model_options"]["in_channels"]
    if data.in_channels != channels:
        raise UsageError(
            f"--dataset {settings.dataset}: its images have {data.in_channels} channels, the network takes {channels}"
        )
    if (data.mean, data.std) != (about["mean"], about["std"]):
        print(
            f"WARNING: images minus {data.mean} and divided by {data.std}; the network learned from images minus "
            f"{about['mean']} and divided by {about['std']}",
            file=sys.stderr,
        )
    return data


def _score(model: nn.Module, data: Data, settings: argparse.Namespace, processes: Processes) -> Score:
    model = model.to(processes.device, memory_format=memory_format(settings))
    return evaluate(model, validation_loader(data, settings, processes), settings, processes)


def _say(score: Score, about: dict, settings: argparse.Namespace, *, as_json: bool) -> None:
    for name, reason in list(score.unreadable.items())[:SHOWN]:
        print(f"fused-resnet eval: {name}: {reason}", file=sys.stderr)
    unreadable = len(score.unreadable)
    if unreadable:
        of_all = f"{unreadable} of {unreadable + score.images} images"
        print(f"fused-resnet eval: {of_all} could not be read and are not counted", file=sys.stderr)
    precision = settings.amp_dtype if settings.amp else "fp32"
    if as_json:
        found = {"model": about["model"], "source": about["source"], "dataset": settings.dataset, "data": settings.data}
        how = {"precision": precision, "tencrop": settings.val_tencrop}
        print(json.dumps({**found, **how, **vars(score)}, indent=2))
        return
    where = settings.dataset if settings.data is None else f"{settings.dataset} {settings.data}"
    rows = [
        ("network", f"{about['model']}, {len(about['classes'])} classes, {precision}"),
        ("from", described(about["source"])),
        ("images", f"{score.images:,} of {where}" + (", ten crops of each" if settings.val_tencrop else "")),
        ("loss", f"{score.loss:.4f}"),
        ("top-1", f"{score.top1:.2%}"),
        ("top-5", f"{score.top5:.2%}"),
    ]
    print("\n".join(table(("", "evaluated"), rows)))
