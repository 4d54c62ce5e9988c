"""The command `fused-resnet tune`: measure every kernel for a network's problems on this GPU, and keep the plan."""

import argparse
import json
import sys
from dataclasses import asdict

import torch
from torch import nn
from tqdm import tqdm

from fused_resnet.backends import backend_report, tunable_backends
from fused_resnet.backends.selection import TUNABLE
from fused_resnet.options import DTYPES, UsageError, add_model_options, build_model, positive
from fused_resnet.tuning import tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, backend=False)
    parser.set_defaults(dtype="bf16")
    parser.add_argument("--size", type=positive, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--batch", type=positive, default=256, help="images in the batch (default: 256)")
    parser.add_argument("--most", type=positive, default=16, help="kernels tried for each problem (default: 16)")
    parser.add_argument("--out", help="the plan's file (default: your own for this GPU, which is read from then on)")


def run(args: argparse.Namespace) -> int:
    where = next((device for device in ("cuda:0", "cpu") if tunable_backends(device.partition(":")[0])), "")
    if not where:
        reasons = [f"{name}: {reason}" for name, reason in backend_report().items() if name in TUNABLE]
        raise UsageError(f"no backend is available whose kernels can be tuned: {'; '.join(reasons)}")
    device = torch.device(where)
    model = build_model(args)

    def progress(problems):
        return tqdm(problems, desc="tune", unit="problem")

    try:
        model = model.to(device, DTYPES[args.dtype]).eval()
        channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        images = torch.randn(args.batch, channels, args.size, args.size, device=device, dtype=DTYPES[args.dtype])
        images = images.contiguous(memory_format=torch.channels_last)
        report = tune(model, images, path=args.out, most=args.most, progress=progress)
    except KeyboardInterrupt:
        print("interrupted: the problems that were finished are in the plan", file=sys.stderr)
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(str(error)) from error
    print(json.dumps(asdict(report), indent=2) if args.json else report)
    return 0
