"""What the options of precision and memory come to."""

import argparse

import torch

from fused_resnet.options import DTYPES


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """--amp and --amp-dtype, around a forward pass."""
    return torch.autocast(device.type, DTYPES[args.amp_dtype], enabled=args.amp)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """--channels-last, of images and weights."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def make_scaler(args: argparse.Namespace, device: torch.device) -> torch.amp.GradScaler:
    """What keeps the gradients of fp16 from vanishing; it does nothing without fp16."""
    return torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "fp16")
