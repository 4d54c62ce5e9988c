"""The images to learn from, in batches.

Every random change of an image follows from the seed, the epoch and the image, so that it is the same in whatever
process or worker it is made.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_resnet.images import UnreadableImage, shorter_side
from fused_resnet.training.options import SIZES
from fused_resnet.training.sampler import EpochSampler, seed_cpu

NO_CLASS = -100  # what cross entropy leaves out
BLANK = (256, 256)


@dataclass
class Batch:
    """Images [n, C, H, W] (of ten crops: [n, 10, C, H, W]), their classes [n], and why others could not be read.

    Where none could be read it holds a blank image of the class `NO_CLASS`.
    """

    images: Tensor
    labels: Tensor
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def blank(self) -> bool:
        return bool(self.unreadable) and len(self.labels) == 1 and int(self.labels[0]) == NO_CLASS

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> "Batch":
        images = self.images.to(device, non_blocking=True)
        if images.dim() == 4:
            images = images.contiguous(memory_format=memory_format)
        return Batch(images, self.labels.to(device, non_blocking=True), self.unreadable)


class Examples(Dataset):
    """Images one by one from `source` (index -> image, class), each changed by `transform`; read in batches.

    An image that cannot be read is left out of its batch, and named there.
    """

    def __init__(self, source: Sequence, transform: Callable[[Any], Tensor], seed: int = 0):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        images, labels, unreadable = [], [], {}
        for epoch, index in keys:
            seed_cpu(self.seed, "image", epoch, index)
            try:
                image, label = self.source[index]
            except UnreadableImage as error:
                unreadable[error.path] = error.reason
                continue
            images.append(self.transform(image))
            labels.append(label)
        if not images:  # nothing to learn from, but a batch as the other processes have one
            images, labels = [self.transform(Image.new("RGB", BLANK))], [NO_CLASS]
        return Batch(torch.stack(images), torch.tensor(labels), unreadable)


class Tensors(Dataset):
    """Images that are in memory, or made, as tensors: `images` takes a tensor of indices."""

    def __init__(self, images: Callable[[Tensor], Tensor], labels: Tensor, transform: Callable | None, seed: int = 0):
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        indices = torch.tensor([index for _, index in keys])
        images = self.images(indices)
        if self.transform is not None:
            changed = []
            for (epoch, index), image in zip(keys, images, strict=True):
                seed_cpu(self.seed, "image", epoch, index)
                changed.append(self.transform(image))
            images = torch.stack(changed)
        return Batch(images, self.labels[indices])


@dataclass
class Data:
    """A data set: images to train with and to validate, and what is known of them."""

    train: Dataset | None  # None where only validation was asked for
    val: Dataset
    classes: list[str]
    in_channels: int
    size: int
    val_size: int
    val_resize: int  # the shorter side before a crop of val_size is cut out; val_size where none is
    mean: list[float]
    std: list[float]
    images: dict  # how many there are of train and val, and the SHA-256 of their names and classes, if they have any
    workers: int  # processes that read images, unless told otherwise: 0 where they are in memory

    def about(self) -> dict:
        """What `eval`, `predict`, `export` and a resumed run have to know."""
        names = ("classes", "images", "size", "val_size", "val_resize", "mean", "std")
        return {name: getattr(self, name) for name in names}

    def readers(self, args: argparse.Namespace) -> int:
        """Processes that read images: --workers, or its own number."""
        return self.workers if args.workers is None else args.workers


def make_data(args: argparse.Namespace, *, train: bool = True) -> Data:
    """The data set that the options of `train` name; without `train` a folder is read for validation alone.

    Raises:
        UsageError: a folder that is missing or empty, classes that do not fit, a package that is not installed.
    """
    from fused_resnet.training import datasets

    args = argparse.Namespace(**vars(args))
    args.parts = ("train", "val") if train else ("val",)
    args.size = args.size or SIZES[args.dataset]
    args.val_size = args.val_size or args.size
    cut = args.dataset == "imagefolder"
    args.val_resize = args.val_resize or (shorter_side(args.val_size) if cut else args.val_size)
    return datasets.MAKERS[args.dataset](args)


def make_loader(
    dataset: Dataset, sampler: EpochSampler, *, workers: int, device: torch.device | None = None
) -> DataLoader:
    """A loader of whole batches, whose workers stay from epoch to epoch."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_worker,
        multiprocessing_context="fork" if workers else None,  # a start in no time, with the data set as it is
    )


def validation_loader(data: Data, args: argparse.Namespace, processes: Any) -> DataLoader:
    """The images to validate with, in their order; `processes`: which part of each batch is this one's."""
    world, device = processes.world, processes.device
    batch_size = max(args.batch_size, 2 * world)
    sampler = EpochSampler(len(data.val), batch_size, rank=processes.rank, world=world, shuffle=False)
    return make_loader(data.val, sampler, workers=data.readers(args), device=device)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _worker(number: int) -> None:
    """A worker leaves signals to the process that it works for, which saves before it ends and needs no dead worker.

    Schedulers send SIGTERM to every process of a job: a worker ends at the second one, or with its process.
    """
    os.setpgid(0, 0)  # what is sent to a whole group does not come here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    sys.excepthook = _unless_gone


def _unless_gone(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say nothing where the process that a worker hands its images to was killed: the thread that does so sees a broken
    pipe, and what the images themselves raise takes another way.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
