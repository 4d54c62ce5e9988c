"""What is done to an image before a network sees it: torchvision's transforms, in its reference scripts' order."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_resnet.options import UsageError


def of_torchvision(name: str) -> ModuleType:
    """torchvision's module `name`.

    Raises:
        UsageError: it is not installed, or not for this torch.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise UsageError(
            f"images are read and changed by torchvision, which cannot be imported ({error}); "
            "pip install 'fused_resnet[train]'"
        ) from error


def _v2() -> ModuleType:
    return of_torchvision("transforms.v2")


def random_resized_crop(size: int) -> list:
    """A crop of random size and shape, perhaps mirrored: of ImageNet."""
    v2 = _v2()
    return [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]


def pad_and_crop(size: int, resize: bool) -> list:
    """A random crop of the image with an eighth of its size in zeros around it, perhaps mirrored (4 pixels of 32).

    He et al. 2015, arXiv:1512.03385, section 4.2.
    """
    v2 = _v2()
    return [v2.Resize(size)] * resize + [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]


def training(args: argparse.Namespace, crop: list, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """The crop, --auto-augment, normalisation, --random-erase."""
    v2 = _v2()
    auto = [_auto_augment(args.auto_augment)] if args.auto_augment else []
    return v2.Compose([*crop, *auto, *_to_tensor(mean, std), *_erase(args)])


def validation(args: argparse.Namespace, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """The central crop, or with --val-tencrop ten crops as [10, C, H, W]."""
    v2 = _v2()
    resize, tensor = v2.Resize(args.val_resize, antialias=True), _to_tensor(mean, std)
    if not args.val_tencrop:
        return v2.Compose([resize, v2.CenterCrop(args.val_size), *tensor])
    return v2.Compose([resize, v2.TenCrop(args.val_size), *tensor, torch.stack])


def whole(size: int | None, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """The image as it is, or resized."""
    v2 = _v2()
    return v2.Compose([*([] if size is None else [v2.Resize(size)]), *_to_tensor(mean, std)])


def of_tensors(args: argparse.Namespace) -> Callable | None:
    """What changes images that are tensors already; None: nothing does."""
    if args.auto_augment:
        raise UsageError(f"--auto-augment works on photographs, not on --dataset {args.dataset}")
    return _v2().Compose(_erase(args)) if args.random_erase else None


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list:
    v2 = _v2()
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]


def _auto_augment(name: str) -> Any:
    v2 = _v2()
    makers = {
        "ra": v2.RandAugment,
        "ta_wide": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
        "imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
        "cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    }
    return makers[name]()


def _erase(args: argparse.Namespace) -> list:
    return [_v2().RandomErasing(args.random_erase)] if args.random_erase else []


def make_mix(args: argparse.Namespace, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """MixUp, CutMix or one of them by chance: images [n, C, H, W] and classes [n] -> images and shares [n, classes]."""
    if not args.mixup and not args.cutmix:
        return None
    v2 = _v2()
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(chosen) if len(chosen) > 1 else chosen[0]
