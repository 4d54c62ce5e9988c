"""Checkpoints for tests, and what is in their folder."""

import multiprocessing

import torch

from fused_resnet.training.checkpoint import Checkpoints

FORK = multiprocessing.get_context("fork")


def state(step: int, values: int = 1000) -> dict:
    weights = torch.full((values,), float(step))
    return {
        "format": 1,
        "fused_resnet": "0",
        "model": {"fc.weight": weights},
        "optimizer": {"state": {0: {"momentum_buffer": weights.bfloat16()}}, "param_groups": [{"lr": 0.1}]},
        "step": step,
        "history": [{"epoch": 1, "val_loss": None}],
        "about": {"model": "resnet18"},
    }


def saved(folder, *steps: int, keep: int = 10) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(state(step))
    return checkpoints


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else type(a) is type(b) and a == b
