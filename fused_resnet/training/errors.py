"""What ends a run on its way."""

import argparse

import torch

OUT_OF_MEMORY = ("can't allocate memory", "ALLOC_FAILED", "bad_alloc")  # of torch on the CPU, cuDNN and cuBLAS, C++


class TrainingError(Exception):
    """A run that cannot go on; the message says why, and what there is to go on from."""


def explained(error: BaseException, args: argparse.Namespace) -> str | None:
    """What an error means, and what to do about it; None: it is a fault of the program."""
    text = str(error)
    first = text.partition("\n")[0] or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in OUT_OF_MEMORY):
        return (
            f"out of memory: {first}\nSmaller: --batch-size (now {args.batch_size}; --grad-accum "
            "keeps the size of a step), --amp, --lean, --grad-checkpointing, --size"
        )
    if "DataLoader worker" in text:
        return f"{first}; --workers 0 reads the images in this process"
    if "more than 1 value per channel" in text:
        return (
            "batch norm has one value of each channel, which is too few; larger: --batch-size (now "
            f"{args.batch_size}) or --size"
        )
    return None
