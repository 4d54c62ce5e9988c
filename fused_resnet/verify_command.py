"""The command `fused-resnet verify`: parity of a network, ours or any other that `fuse` converts, and its speed."""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fused_resnet.backends import use_backend
from fused_resnet.foreign_models import FORMS, build_foreign, from_library, is_foreign, library, one_line
from fused_resnet.fusion import fuse, fusion_report
from fused_resnet.models import load_weights
from fused_resnet.modules.unit import unfused
from fused_resnet.options import (
    DTYPES,
    UsageError,
    add_model_options,
    build_model,
    calibrate,
    chosen_backend,
    loading_errors,
    positive,
)
from fused_resnet.parity import VerifyReport, table
from fused_resnet.twins import tensors
from fused_resnet.verify import verify

CALLS = 5  # of each network and mode that are timed

Seconds = dict[str, dict[str, float]]  # mode -> network -> seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, model=f"a network's name, or one to fuse first: {FORMS}; nothing is downloaded")
    parser.add_argument("--size", type=positive, default=64, help="height and width of the images (default: 64)")
    parser.add_argument("--batch", type=positive, default=4, help="images in the batch (default: 4)")
    parser.add_argument("--eval-only", action="store_true", help="leave out train mode")
    parser.add_argument("--reference", choices=["torchvision"], help="compare with torchvision's network of that name")


def run(args: argparse.Namespace) -> int:
    with chosen_backend(args):
        pass
    return _run_foreign(args) if is_foreign(args.model) else _run_ours(args)


def _images(model: nn.Module, args: argparse.Namespace, batch: int) -> Tensor:
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = next((convolution.in_channels for convolution in convolutions), 3)
    return torch.randn(batch, channels, args.size, args.size)


def _calibrate(model: nn.Module, args: argparse.Namespace) -> None:
    print("weights are random, running statistics from random images", file=sys.stderr)
    with use_backend("reference"):
        calibrate(model, _images(model, args, max(args.batch, 4)))


def _verify(model: nn.Module, images: Tensor, args: argparse.Namespace, reference: nn.Module | None) -> VerifyReport:
    def progress(jobs):
        return tqdm(jobs, desc="verify", unit="block")

    options = {"dtype": DTYPES[args.dtype], "train": not args.eval_only, "backend": args.backend}
    return verify(model, images, reference=reference, progress=progress, **options)


# --- networks of ours -------------------------------------------------------------------------------------------------


def _run_ours(args: argparse.Namespace) -> int:
    model = build_model(args)
    images = _images(model, args, args.batch)
    reference = _torchvision(args.model, args.num_classes) if args.reference else None
    try:
        if args.weights is None:
            _calibrate(model, args)
        report = _verify(model, images, args, reference)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    print(report.to_json() if args.json else report)
    return 0 if report.passed else 1


def _torchvision(name: str, num_classes: int | None) -> nn.Module:
    models = library("torchvision", "--reference torchvision").models
    if not hasattr(models, name):
        raise UsageError(f"--reference torchvision: it has no model {name!r}")
    return getattr(models, name)(**({} if num_classes is None else {"num_classes": num_classes}))


# --- other networks ---------------------------------------------------------------------------------------------------


def _run_foreign(args: argparse.Namespace) -> int:
    if args.reference:
        raise UsageError(f"--reference is for networks of this library; {args.model} is compared with itself")
    model = _foreign_model(args)
    images = _images(model, args, args.batch)
    try:
        fused = fuse(model)
        found = fusion_report(fused, images)
        if not args.json:
            print(f"{found}\n", flush=True)
        report = _verify(fused, images, args, reference=model)
        if not args.json:
            print(f"{report}\n", flush=True)
        speed = measured(model, fused, images, args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--model {args.model}: {one_line(error)}") from error
    if args.json:
        rows = {kind: [row._asdict() for row in getattr(found, kind)] for kind in ("fused", "skipped")}
        together = {"model": args.model, "passed": report.passed, "fusion": rows, "parity": report.to_dict()}
        print(json.dumps({**together, "speed": {"unit": "seconds", "calls": CALLS, **speed}}, indent=2))
    else:
        print(speed_table(speed, args))
    return 0 if report.passed else 1


def _foreign_model(args: argparse.Namespace) -> nn.Module:
    """The plain network that the options name, seeded, with its weights; it has run once."""
    torch.manual_seed(0)
    model = build_foreign(args.model, args.num_classes)
    if args.weights is not None:
        with loading_errors(args.weights):
            load_weights(model, args.weights)
    try:
        if args.weights is None and from_library(args.model):  # a factory may have loaded its own
            wake(model)
            _calibrate(model, args)
        else:
            with torch.no_grad():
                model.eval()(_images(model, args, args.batch))
    except Exception as error:  # code of others: it may raise anything
        shape = "x".join(map(str, _images(model, args, args.batch).shape))
        raise UsageError(
            f"--model {args.model}: it does not run on images of {shape}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return model


def wake(model: nn.Module) -> None:
    """Give norms a weight whose weight is 0, as timm begins with: parity of what they hide would mean nothing."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None and module.weight is not None and not module.weight.any():
            nn.init.uniform_(module.weight, 0.5, 1.0)


# --- speed ------------------------------------------------------------------------------------------------------------


def measured(model: nn.Module, fused: nn.Module, images: Tensor, args: argparse.Namespace) -> Seconds:
    """Median seconds of a call of both networks, in turn, so that a slow spell of the machine hits both."""
    native = {"dtype": DTYPES[args.dtype], "memory_format": torch.channels_last}
    images = images.to(**native)
    networks = {"eager": model.to(**native), "fused": fused.to(**native)}
    found = {}
    for mode, call in {"inference": _inference, "training": _training}.items():
        training = mode == "training"
        if training and args.eval_only:
            break
        for network in networks.values():
            network.train(training)  # once: it drops what was derived from the weights
        found[mode] = _medians(networks, call, images, args)
    return found


def _medians(networks: dict[str, nn.Module], call, images: Tensor, args: argparse.Namespace) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + CALLS):
        for name, network in networks.items():
            with unfused() if name == "eager" else chosen_backend(args):
                call(network, images)  # back to speed after the other network
                start = time.perf_counter()
                call(network, images)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def _inference(network: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        network(images)


def _training(network: nn.Module, images: Tensor) -> None:
    network.zero_grad()
    sum(output.float().mean() for output in tensors(network(images)) if output.requires_grad).backward()


def speed_table(speed: Seconds, args: argparse.Namespace) -> str:
    what = {"inference": "inference", "training": "training (forward and backward)"}
    rows = [
        (what[mode], f"{1e3 * s['eager']:.2f}", f"{1e3 * s['fused']:.2f}", f"{s['eager'] / s['fused']:.2f}")
        for mode, s in speed.items()
    ]
    header = ("speed", "eager ms", "fused ms", "eager / fused")
    explanation = (
        f"median of {CALLS} calls of each in turn, {args.dtype}, batch {args.batch}, {args.size}x{args.size}, "
        f"{torch.get_num_threads()} threads; eager: the network before fuse, channels_last"
    )
    return "\n".join([*table(header, rows, right={1, 2, 3}), explanation])
