"""Classes of images: `fused-resnet predict`."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fused_resnet.files import write_atomically
from fused_resnet.images import IMAGENET, Preprocessing, UnreadableImage, find_images, read_image
from fused_resnet.models.weights import last_linear
from fused_resnet.options import (
    DTYPES,
    MODEL,
    WEIGHTS,
    UsageError,
    add_model_options,
    build_model,
    chosen_backend,
    positive,
)
from fused_resnet.parity import table
from fused_resnet.training.trained import is_trained, load_trained


@dataclass
class Prediction:
    """The likeliest classes of one file: index, label and probability of each, likeliest first."""

    path: str
    classes: list[tuple[int, str, float]]


def probabilities(model: nn.Module, views: Tensor) -> Tensor:
    """Softmax over the classes, averaged over an image's views.

    Shapes:
        views: [N, V, 3, H, W], V views of each image; returns: [N, classes] in fp32.
    """
    with torch.inference_mode():
        logits = model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return logits.float().softmax(-1).view(*views.shape[:2], -1).mean(1)


def predict(
    model: nn.Module,
    paths: Sequence[str | Path],
    *,
    topk: int = 5,
    tencrop: bool = False,
    batch_size: int = 16,
    preprocessing: Preprocessing = IMAGENET,
    labels: Sequence[str] | None = None,
    errors: list[str] | None = None,
) -> Iterator[Prediction]:
    """Yield the `topk` classes of every image of `paths` (files), in order, `batch_size` images at a time.

    Args:
        model: in eval mode; images are cast to its dtype and device.
        tencrop: average the probabilities of ten crops.
        preprocessing: what makes a tensor of an image.
        labels: names of the classes; by default their indices.
        errors: takes the messages of files that cannot be read, which are passed over; None: they raise.

    Raises:
        UnreadableImage: a file that cannot be read, where `errors` is None.
        ValueError: fewer labels than the model has classes.
    """
    like = next(model.parameters())
    for start in range(0, len(paths), batch_size):
        names, views = [], []
        for path in paths[start : start + batch_size]:
            try:
                image = read_image(path)
            except UnreadableImage as error:
                if errors is None:
                    raise
                errors.append(str(error))
                continue
            names.append(str(path))
            views.append(preprocessing.ten_crops(image) if tencrop else preprocessing.crop(image)[None])
        if not names:
            continue
        found = probabilities(model, torch.stack(views).to(like))
        if labels is not None and len(labels) < found.shape[1]:
            raise ValueError(f"{len(labels)} labels for a model of {found.shape[1]} classes")
        values, indices = found.topk(min(topk, found.shape[1]))
        for name, p, index in zip(names, values.tolist(), indices.tolist(), strict=True):
            classes = [(i, str(i) if labels is None else labels[i], v) for i, v in zip(index, p, strict=True)]
            yield Prediction(name, classes)


def imagenet_labels() -> list[str] | None:
    """The names of ImageNet's classes, if torchvision is there to tell."""
    try:
        from torchvision.models import ResNet50_Weights
    except Exception:  # its compiled part may not fit this torch, in several ways
        return None
    return list(ResNet50_Weights.DEFAULT.meta["categories"])


def as_json(predictions: list[Prediction], errors: list[str], about: dict) -> str:
    found = [
        {"path": p.path, "classes": [{"index": i, "label": label, "probability": v} for i, label, v in p.classes]}
        for p in predictions
    ]
    return json.dumps({**about, "predictions": found, "errors": errors}, indent=2) + "\n"


def as_csv(predictions: list[Prediction]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("path", "rank", "index", "label", "probability"))
    writer.writerows((p.path, rank, *entry) for p in predictions for rank, entry in enumerate(p.classes, 1))
    return out.getvalue()


def as_table(predictions: list[Prediction]) -> str:
    lines = [
        (p.path if rank == 1 else "", str(rank), str(index), label, f"{value:.4f}")
        for p in predictions
        for rank, (index, label, value) in enumerate(p.classes, 1)
    ]
    return "\n".join(table(("image", "rank", "index", "label", "probability"), lines, right={1, 2, 4})) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-resnet predict`."""
    parser.description += (
        " A file that cannot be read is named on stderr and passed over; where none can be read, the exit code is 2."
    )
    parser.add_argument("paths", nargs="+", metavar="path", help="an image, or a folder of images")
    add_model_options(parser, weights=f"{WEIGHTS}, or a run's folder or checkpoint")
    parser.set_defaults(model=None)  # a run knows its own
    parser.add_argument("--topk", type=positive, default=5, help="classes shown of each image (default: 5)")
    parser.add_argument("--tencrop", action="store_true", help="average ten crops of each image")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--size", type=positive, help="height and width of the crop (default: 224, or the run's)")
    parser.add_argument("--labels", help="a file with the name of one class a line")
    parser.add_argument("--csv", action="store_true", help="CSV instead of a table")
    parser.add_argument("--output", help="write there, whole or not at all, instead of to stdout")


@dataclass
class _Network:
    """A network, the names of its classes, and what makes tensors of images for it."""

    name: str
    model: nn.Module
    labels: list[str] | None
    preprocessing: Preprocessing


def _network(args: argparse.Namespace) -> _Network:
    """What the options name: a network and its weights, or the best network of a run."""
    if args.weights is not None and is_trained(args.weights):
        return _of_run(args)
    args.model = args.model or MODEL
    model = build_model(args)
    thousand = model.get_submodule(last_linear(model)).out_features == 1000
    labels = imagenet_labels() if args.weights and thousand else None
    return _Network(args.model, model, labels, Preprocessing(args.size or 224))


def _of_run(args: argparse.Namespace) -> _Network:
    model, about = load_trained(args.weights)
    if args.model not in (None, about["model"]):
        raise UsageError(f"--model {args.model}: {args.weights} holds a {about['model']}")
    if args.num_classes not in (None, len(about["classes"])):
        raise UsageError(f"--num-classes {args.num_classes}: {args.weights} has {len(about['classes'])} classes")
    channels = about["model_options"]["in_channels"]
    if channels != 3:
        raise UsageError(
            f"--weights {args.weights}: a network of --dataset {about['dataset']}, which takes images of {channels} "
            "channel, not photographs; `fused-resnet eval` scores it"
        )
    size = args.size or about["val_size"]
    shorter = size * about["val_resize"] // about["val_size"]
    made = Preprocessing(size, shorter, about["mean"], about["std"])
    return _Network(about["model"], model, about["classes"], made)


def _labels(args: argparse.Namespace, known: list[str] | None) -> list[str] | None:
    if not args.labels:
        return known
    try:
        with open(args.labels, encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels {args.labels}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """`fused-resnet predict`; return the exit code."""
    if args.csv and args.json:
        raise UsageError("--csv and --json exclude each other")
    try:
        files = find_images(args.paths)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    with chosen_backend(args):
        network = _network(args)
        model = network.model.to(DTYPES[args.dtype]).eval()
        if args.weights is None:
            print("WARNING: no --weights: the weights are RANDOM, and so are these predictions", file=sys.stderr)
        errors: list[str] = []
        options = {"topk": args.topk, "tencrop": args.tencrop, "batch_size": args.batch_size}
        how = {"preprocessing": network.preprocessing, "labels": _labels(args, network.labels)}
        try:
            found = list(
                tqdm(
                    predict(model, files, **options, **how, errors=errors),
                    total=len(files),
                    desc="predict",
                    unit="image",
                    delay=2,
                )
            )
        except (ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from error
    for message in errors:
        print(f"fused-resnet predict: {message}", file=sys.stderr)
    if not found:
        raise UsageError("no image could be read")
    _write(args, network.name, found, errors)
    return 0


def _write(args: argparse.Namespace, name: str, found: list, errors: list[str]) -> None:
    if args.json:
        text = as_json(found, errors, {"model": name, "weights": args.weights or "random"})
    else:
        text = as_csv(found) if args.csv else as_table(found)
    if not args.output:
        sys.stdout.write(text)
        return
    try:
        write_atomically(args.output, text)
    except OSError as error:
        raise UsageError(f"--output {args.output}: {error}") from error
