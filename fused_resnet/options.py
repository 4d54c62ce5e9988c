"""What the commands share: options, the error that means bad usage, and small helpers."""

import argparse
import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fused_resnet.backends import use_backend
from fused_resnet.models import create_model, list_models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why."""


MODEL = "resnet50"
WEIGHTS = "a .pth or .safetensors file, or a name that torchvision knows"


def add_model_options(
    parser: argparse.ArgumentParser, *, backend: bool = True, model: str = "a network's name", weights: str = WEIGHTS
) -> None:
    """Options that say which network runs, and how; `model`, `weights`: what may be named."""
    parser.add_argument("--model", default=MODEL, help=f"{model} (default: {MODEL})")
    parser.add_argument("--weights", help=weights)
    parser.add_argument("--num-classes", type=positive, help="classes, where they are not the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    if backend:
        parser.add_argument("--backend", help="a backend's name (default: the automatic choice)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def positive(text: str) -> int:
    """argparse's type of a whole number of 1 or more."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return value


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model that the options name, seeded, with its weights."""
    torch.manual_seed(0)
    extra = {} if args.num_classes is None else {"num_classes": args.num_classes}
    if args.model not in list_models():
        raise UsageError(f"unknown model {args.model!r}, expected one of {', '.join(list_models())}")
    if args.weights is None:
        return create_model(args.model, **extra)
    with loading_errors(args.weights):
        return create_model(args.model, weights=args.weights, **extra)


@contextlib.contextmanager
def loading_errors(weights: str, option: str = "--weights") -> Iterator[None]:
    """What is raised while the weights are loaded is the user's to mend."""
    try:
        yield
    except Exception as error:  # of many kinds: safetensors has one of its own for a damaged file
        raise UsageError(f"{option} {weights}: {error}") from error


def chosen_backend(args: argparse.Namespace) -> use_backend:
    """`use_backend` with the option's backend."""
    try:
        return use_backend(args.backend)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--backend: {error}") from error


def calibrate(model: nn.Module, images: torch.Tensor, batches: int = 3) -> None:
    """Give a network with random weights realistic running statistics, by a few passes in train mode."""
    model.train()
    with torch.no_grad():
        for _ in range(batches):
            model(images)
    model.eval()
