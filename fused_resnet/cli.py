"""The command `fused-resnet`, which is also `python -m fused_resnet`.

Exit codes: 0, or 1 where a check failed, or 2 for bad usage (an unknown name, a file that cannot be read). Results go
to stdout, and everything else to stderr.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence

import torch

from fused_resnet import kernels, predict, tune_command, verify_command
from fused_resnet._version import __version__
from fused_resnet.backends import backend_report, cuda
from fused_resnet.backends.cpu import extension_missing
from fused_resnet.models import list_models
from fused_resnet.options import UsageError
from fused_resnet.parity import table
from fused_resnet.training import command as train_command
from fused_resnet.training import eval_command, export_command
from fused_resnet.training import options as train_options
from fused_resnet.training.config import with_config
from fused_resnet.training.errors import TrainingError

EXAMPLES = {
    "info": "fused-resnet info --json",
    "verify": "fused-resnet verify --model resnet18 --size 64 --batch 2 --dtype bf16",
    "predict": "fused-resnet predict photos/ --model resnet50 --weights resnet50.pth --topk 3",
    "demo": "fused-resnet demo --out demo_out",
    "tune": "fused-resnet tune --model resnet50 --batch 256 --dtype bf16",
    "train": "fused-resnet train --data photos --model resnet18 --pretrained resnet18.pth --epochs 10 --lr 0.01",
    "eval": "fused-resnet eval runs/resnet18-imagefolder --tencrop",
    "export": "fused-resnet export runs/resnet18-imagefolder --output resnet18.onnx",
    "kernels": "fused-resnet kernels --arch sm_80 sm_90 --family conv1x1",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    try:
        argv = with_config(argv)
        args = build_parser().parse_args(argv, argparse.Namespace(argv=argv))
        return args.run(args)
    except (UsageError, TrainingError) as error:
        print(f"fused-resnet {command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fused-resnet", description="ResNets with fused kernels.")
    parser.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_info(commands)
    verify_command.add_arguments(
        _command(commands, "verify", verify_command.run, "Compare a fused network with plain PyTorch, block by block.")
    )
    predict.add_arguments(_command(commands, "predict", predict.run, "The likeliest classes of images."))
    _add_demo(commands)
    tune_command.add_arguments(
        _command(commands, "tune", tune_command.run, "Measure every kernel for a network on this GPU; keep a plan.")
    )
    train_options.add_arguments(
        _command(commands, "train", train_command.run, "Train a network, or go on with it; nothing is lost.")
    )
    eval_command.add_arguments(_command(commands, "eval", eval_command.run, "Score a trained network."))
    export_command.add_arguments(
        _command(commands, "export", export_command.run, "A trained network as a program, as ONNX, or its weights.")
    )
    kernels.add_arguments(
        _command(
            commands, "kernels", kernels.run, "Every kernel, without a GPU: registers, spills, and whether it fits."
        )
    )
    return parser


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: {EXAMPLES[name]}", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


# --- info -------------------------------------------------------------------------------------------------------------


def _add_info(commands) -> None:
    parser = _command(commands, "info", run_info, "What is here: devices, backends and how to get the missing ones.")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def information() -> dict:
    """Versions, devices and backends."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    missing = extension_missing()
    return {
        "versions": {
            "fused_resnet": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton_version,
            "cuda": torch.version.cuda or "none: this torch is built for the CPU",
        },
        "devices": {
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
            **{f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())},
        },
        "extension": missing or f"loaded, kernels for {torch.ops.fused_resnet_C.cpu_capability()}",
        "cuda kernels": cuda.architectures() or "none",
        "backends": {name: reason or "available" for name, reason in backend_report().items()},
        "models": list_models(),
    }


def run_info(args: argparse.Namespace) -> int:
    found = information()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = []
    for part, value in found.items():
        entries = (
            value.items()
            if isinstance(value, dict)
            else [("", ", ".join(value))]
            if part == "models"
            else [("", value)]
        )
        rows += [(part if i == 0 else "", name, text) for i, (name, text) in enumerate(entries)]
    print("\n".join(table(("", "name", "value"), rows)))
    return 0


# --- demo -------------------------------------------------------------------------------------------------------------


def _add_demo(commands) -> None:
    parser = _command(
        commands, "demo", run_demo, "Two photographs, and a network trained on digits: fused beside plain."
    )
    parser.add_argument("--out", default="demo_out", help="folder for the pictures and the record")
    parser.add_argument("--quick", action="store_true", help="smaller images and fewer epochs")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the rest on stderr")


def run_demo(args: argparse.Namespace) -> int:
    try:
        from fused_resnet import demo
    except ImportError as error:
        raise UsageError(f"{error}; install what it needs: pip install 'fused_resnet[demo]'") from error
    return demo.run(args.out, quick=args.quick, as_json=args.json)
