"""The command line's options, and what they default to for a suite and a device."""

import argparse

import torch

import fused_resnet as fr
from bench.runner import SUITES, Options, suite
from bench.systems import PEERS
from fused_resnet.options import UsageError, positive

DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32")}
ALL_DTYPES = ("fp32", "bf16", "fp16")
ROUNDS, QUICK_ROUNDS = 3, 2
QUICK = 0.5  # of the usual window


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every suite."""
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU where there is one)')
    parser.add_argument("--dtype", nargs="+", choices=ALL_DTYPES, help="default: fp32 and bf16")
    parser.add_argument("--batch", nargs="+", type=positive, help="batch sizes (default: the suite's)")
    parser.add_argument("--models", nargs="+", help="networks (default: the suite's)")
    parser.add_argument("--size", type=positive, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--backends", nargs="+", default=[], help="fused_resnet also by each of these backends alone")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all that the suite and the device have")
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter windows")
    parser.add_argument("--window", type=float, help="seconds a system runs in each round (default: the suite's)")
    parser.add_argument("--rounds", type=positive, help=f"default: {ROUNDS}, {QUICK_ROUNDS} with --quick")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds one system may take to get ready")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the cases whose title holds TEXT")
    parser.add_argument("--out", help="folder of the records (default: none are written)")


def wanted_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in DEFAULT_DTYPES:
        raise UsageError(f"--device {name}: expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    return name


def check_models(names: list[str]) -> None:
    unknown = sorted(set(names) - set(fr.list_models()))
    if unknown:
        raise UsageError(f"--models: unknown {', '.join(unknown)}; expected some of {', '.join(fr.list_models())}")


def options_of(args: argparse.Namespace, name: str) -> Options:
    """The options of one suite."""
    found, device = suite(name), wanted_device(args.device)
    kind = torch.device(device).type
    models = args.models or getattr(found, "QUICK_MODELS" if args.quick else "MODELS", ())
    check_models(models)
    unknown = sorted(set(args.backends) - set(fr.backends.backend_report()))
    if unknown:
        raise UsageError(f"--backends: unknown {', '.join(unknown)}")
    window = args.window or getattr(found, "WINDOWS", {}).get(kind, 1.0) * (QUICK if args.quick else 1.0)
    chosen = getattr(found, "PEERS", PEERS) if args.peers is None else args.peers
    return Options(
        device=device,
        dtypes=tuple(args.dtype or DEFAULT_DTYPES[kind]),
        batches=tuple(args.batch or found.BATCHES[kind]),
        models=tuple(models),
        backends=tuple(args.backends),
        peers=tuple(chosen),
        size=args.size,
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        window=window,
        limit=args.limit,
        quick=args.quick,
        only=args.only,
    )


def suites_of(name: str) -> tuple[str, ...]:
    return SUITES if name == "all" else (name,)
