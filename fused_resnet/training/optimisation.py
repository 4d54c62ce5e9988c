"""Optimizers and learning rates, all of them torch's own."""

import argparse
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from fused_resnet.options import UsageError

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # the first: batch norm and instance norm of every kind


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> Optimizer:
    """The optimizer that the options name, over the parameters of `model` that are trained.

    Where `norm_weight_decay` is given the normalisation layers' parameters are a second group.

    Raises:
        UsageError: no parameter is trained.
    """
    groups = _groups(model, args)
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.opt in ("sgd", "nesterov"):
        return SGD(groups, momentum=args.momentum, nesterov=args.opt == "nesterov", **common)
    if args.opt == "rmsprop":  # alpha and eps are those of torchvision's references
        return RMSprop(groups, momentum=args.momentum, alpha=0.9, eps=0.0316, **common)
    return {"adam": Adam, "adamw": AdamW}[args.opt](groups, **common)


def _groups(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    of_norms = {id(parameter) for parameter in _norm_parameters(model)} if args.norm_weight_decay is not None else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UsageError("--freeze leaves no parameter to train")
    groups = [
        {"params": [parameter for parameter in trained if id(parameter) not in of_norms]},
        {"params": [p for p in trained if id(p) in of_norms], "weight_decay": args.norm_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, NORMS):
            yield from module.parameters(recurse=False)


def make_scheduler(optimizer: Optimizer, args: argparse.Namespace, steps_per_epoch: int) -> LRScheduler:
    """The learning rate of every step; `step()` follows each step of the optimizer.

    Epochs of `lr_step_size` and `lr_milestones` count from the start of the run, as papers give them, and not from the
    end of the warm-up. What lies within the warm-up takes effect at its end. Cosine and exponential begin there.
    """
    warmup = args.warmup_epochs * steps_per_epoch
    if not warmup:
        return _main(optimizer, args, steps_per_epoch, warmup)
    first = LinearLR(optimizer, start_factor=args.warmup_factor, total_iters=warmup)
    return SequentialLR(optimizer, [first, _main(optimizer, args, steps_per_epoch, warmup)], milestones=[warmup])


def _main(optimizer: Optimizer, args: argparse.Namespace, steps_per_epoch: int, warmup: int) -> LRScheduler:
    """What follows the warm-up, whose own steps it does not count."""
    if args.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=args.epochs * steps_per_epoch - warmup, eta_min=args.min_lr)
    if args.scheduler == "exponential":  # lr_gamma is an epoch's
        return ExponentialLR(optimizer, gamma=args.lr_gamma ** (1 / steps_per_epoch))
    if args.scheduler == "constant":
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    # `step` too: StepLR could not begin in the middle of a period, as it has to after a warm-up
    epochs = args.lr_milestones
    if args.scheduler == "step":
        epochs = range(args.lr_step_size, args.epochs + 1, args.lr_step_size)
    return MultiStepLR(optimizer, [epoch * steps_per_epoch - warmup for epoch in epochs], gamma=args.lr_gamma)
