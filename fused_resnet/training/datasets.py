"""The data sets by name. Folders and CIFAR-10 are read by torchvision, and changed by its transforms."""

import argparse
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fused_resnet.images import MEAN, STD, read_image
from fused_resnet.options import UsageError
from fused_resnet.training import augment
from fused_resnet.training.data import Data, Examples, Tensors
from fused_resnet.training.options import SIZES
from fused_resnet.training.sampler import seed_of

CIFAR_MEAN, CIFAR_STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of the 50,000 training images
SYNTHETIC = {"classes": 10, "train": 1024, "val": 256}


# --- a folder of images -----------------------------------------------------------------------------------------------


def image_folder(args: argparse.Namespace) -> Data:
    """`train/<class>/*.jpg` and `val/<class>/*.jpg` below --data."""
    root = Path(args.data).expanduser()
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    parts = {}
    for part in args.parts:
        if not (root / part).is_dir():
            raise UsageError(f"--data {root}: there is no folder {part!r} in it, expected {part}/<class>/<image>")
        parts[part] = _folder(root / part, args.classes)
    classes = parts["val"].classes
    val = Examples(parts["val"], augment.validation(args, MEAN, STD))
    if "train" not in parts:
        return _data(args, None, val, classes, MEAN, STD)
    known = parts["train"].classes
    if known != classes:
        raise UsageError(
            f"--data {root}: the classes of train and val differ: only in train: "
            f"{', '.join(sorted(set(known) - set(classes))) or 'none'}; only in val: "
            f"{', '.join(sorted(set(classes) - set(known))) or 'none'}"
        )
    crop = augment.random_resized_crop(args.size)
    train = Examples(parts["train"], augment.training(args, crop, MEAN, STD), args.seed)
    return _data(args, train, val, classes, MEAN, STD)


def _folder(path: Path, classes: list[str] | None) -> Dataset:
    """torchvision's ImageFolder of all classes, or of `classes` in their order."""
    datasets = augment.of_torchvision("datasets")

    class Folder(datasets.ImageFolder):
        def find_classes(self, directory):
            found, numbers = super().find_classes(directory)
            if not classes:
                return found, numbers
            _check_classes(classes, found, f"--data {path}")
            return list(classes), {name: number for number, name in enumerate(classes)}

    try:
        return Folder(str(path), loader=read_image)
    except FileNotFoundError as error:  # no class, or a class without images
        raise UsageError(f"--data {path}: {error}") from error


def _check_classes(wanted: list[str], found: list[str], where: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UsageError(f"--classes: {where} has no class {', '.join(missing)}; it has {', '.join(found)}")


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


class _Chosen(Dataset):
    """The images of some classes, renumbered in their order."""

    def __init__(self, dataset: Dataset, classes: list[str]):
        numbers = {dataset.class_to_idx[name]: number for number, name in enumerate(classes)}
        self.dataset = dataset
        self.chosen = [(i, numbers[t]) for i, t in enumerate(dataset.targets) if t in numbers]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int):
        place, label = self.chosen[index]
        return self.dataset[place][0], label


def cifar10(args: argparse.Namespace) -> Data:
    """The archive `cifar-10-batches-py` below --data, in its original format; not downloaded."""
    datasets = augment.of_torchvision("datasets")
    try:
        parts = [datasets.CIFAR10(args.data, train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"--data {args.data}: CIFAR-10 is not there, or a file of it is not the original one; the folder must hold "
            "cifar-10-batches-py, unpacked from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
        ) from error
    classes = args.classes or parts[0].classes
    _check_classes(classes, parts[0].classes, "CIFAR-10")
    train, val = (_Chosen(part, classes) for part in parts)
    crop = augment.pad_and_crop(args.size, resize=args.size != SIZES["cifar10"])
    examples = Examples(train, augment.training(args, crop, CIFAR_MEAN, CIFAR_STD), args.seed)
    resize = None if args.val_size == SIZES["cifar10"] else args.val_size
    return _data(
        args,
        examples,
        Examples(val, augment.whole(resize, CIFAR_MEAN, CIFAR_STD)),
        list(classes),
        CIFAR_MEAN,
        CIFAR_STD,
    )


# --- in memory --------------------------------------------------------------------------------------------------------


def split_digits(size: int) -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged to `size`, less 0.3, in a fixed order, with their classes.

    The first 1,347 to train with, the other 450 to validate.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(f"--dataset digits: {error}; pip install 'fused_resnet[train]'") from error
    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16 - 0.3
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(found.target)[order]
    return [(images[:1347], labels[:1347]), (images[1347:], labels[1347:])]


def digits(args: argparse.Namespace) -> Data:
    """The digits of `split_digits`, or some of them."""
    known = [str(number) for number in range(10)]
    classes = args.classes or known
    _check_classes(classes, known, "digits")
    numbers = torch.full((10,), -1)
    numbers[[int(name) for name in classes]] = torch.arange(len(classes))
    parts = []
    for part, size in enumerate((args.size, args.val_size)):
        images, labels = split_digits(size)[part]
        chosen = numbers[labels] >= 0
        parts.append((images[chosen], numbers[labels][chosen]))
    (train, train_labels), (val, val_labels) = parts
    return _data(
        args,
        Tensors(train.__getitem__, train_labels, augment.of_tensors(args), args.seed),
        Tensors(val.__getitem__, val_labels, None),
        classes,
        [0.3],
        [1.0],
    )


def synthetic(args: argparse.Namespace) -> Data:
    """Made-up images that cost next to nothing to make: noise, and a pattern of each class faint in it."""
    count = args.num_classes or SYNTHETIC["classes"]
    if args.classes:
        raise UsageError("--classes: a synthetic data set has no names; give --num-classes")
    parts = []
    for part, size in (("train", args.size), ("val", args.val_size)):
        labels = torch.arange(SYNTHETIC[part]) % count
        parts.append(Tensors(_noise(part, size, labels, count), labels, None, args.seed))
    parts[0].transform = augment.of_tensors(args)
    return _data(args, *parts, [str(number) for number in range(count)], [0.0] * 3, [1.0] * 3)


def _noise(part: str, size: int, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed_of("synthetic", "patterns"))
    patterns = torch.randn(classes, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=(size, size), mode="bilinear").mul_(0.5)
    generator.manual_seed(seed_of("synthetic", part))
    shifts = 64
    noise = torch.randn(3, size + shifts, size + shifts, generator=generator)

    def images(indices: Tensor) -> Tensor:
        found = patterns[labels[indices]]
        for image, index in zip(found, indices.tolist(), strict=True):
            y, x = index // shifts % shifts, index % shifts
            image += noise[:, y : y + size, x : x + size]
        return found

    return images


MAKERS: dict[str, Callable[[argparse.Namespace], Data]] = {
    "imagefolder": image_folder,
    "cifar10": cifar10,
    "digits": digits,
    "synthetic": synthetic,
}


def _data(args: argparse.Namespace, train: Dataset | None, val: Dataset, classes: list[str], mean, std) -> Data:
    in_memory = isinstance(val, Tensors)
    return Data(
        train=train,
        val=val,
        classes=list(classes),
        in_channels=len(mean),
        size=args.size,
        val_size=args.val_size,
        val_resize=args.val_resize,
        mean=list(mean),
        std=list(std),
        images=_fingerprint(train, val),
        workers=0 if in_memory else _workers(),
    )


def _fingerprint(train: Dataset | None, val: Dataset) -> dict:
    """How many images there are, and the SHA-256 of the names and classes of those in folders."""
    digest = hashlib.sha256()
    named = hasattr(getattr(train, "source", None), "samples")
    if named:
        for path, label in train.source.samples:
            digest.update(f"{os.path.relpath(path, train.source.root)} {label}\n".encode(errors="surrogateescape"))
    return {"train": len(train) if train else 0, "val": len(val), "names": digest.hexdigest() if named else ""}


def _workers() -> int:
    """As many as this process has of the machine's cores, up to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
