"""How well a network does on images that it was not trained with."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fused_resnet.training.data import NO_CLASS, Batch
from fused_resnet.training.errors import TrainingError
from fused_resnet.training.precision import autocast, memory_format
from fused_resnet.training.processes import Processes


@dataclass
class Score:
    """Mean cross entropy, and the shares of images whose class was the likeliest, or among the five likeliest."""

    loss: float
    top1: float
    top5: float
    images: int
    unreadable: dict[str, str]


def evaluate(
    model: nn.Module,
    loader: DataLoader,
    args: argparse.Namespace,
    processes: Processes,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Score `model`, in eval mode and back, on the images of `loader`, which each process has its part of.

    Of ten crops of an image the probabilities are averaged. Every image is counted once, whatever the processes.
    `args`: its precision; `between` is called after each batch.
    """
    layout = memory_format(args)
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    unreadable: dict[str, str] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in loader:
            batch = batch.to(processes.device, layout)
            with autocast(args, processes.device):
                logits = _logits(model, batch, layout)
            sums += _counts(logits, batch.labels)
            unreadable |= batch.unreadable
            between()
    model.train(was_training)
    loss, top1, top5, images = processes.sum(sums).tolist()
    for others in processes.gather(unreadable):
        unreadable |= others
    if not images:
        raise TrainingError(f"none of the {len(unreadable)} images to validate with can be read")
    return Score(loss / images, top1 / images, top5 / images, int(images), unreadable)


def _logits(model: nn.Module, batch: Batch, layout: torch.memory_format) -> Tensor:
    """[n, classes], of ten crops the logarithm of the mean probability."""
    if batch.images.dim() == 4:
        return model(batch.images).float()
    views = batch.images.flatten(0, 1).contiguous(memory_format=layout)
    found = model(views).float().log_softmax(-1).unflatten(0, batch.images.shape[:2])
    return found.logsumexp(1) - torch.tensor(found.shape[1], device=found.device).log()


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over the images: loss, hits of the first and of the first five, images."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    five = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([loss, five[:, 0].sum(), five.sum(), (labels != NO_CLASS).sum()]).double()
