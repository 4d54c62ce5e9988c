"""Batch norm whose statistics are those of all processes' batches."""

import torch
from torch import nn

from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.modules.bn_act import BNAct2d, NormAct
from fused_resnet.ops.checks import check_act


class SyncBNAct2d(NormAct, nn.SyncBatchNorm):
    """`BNAct2d` with the statistics of all processes: `act(sync_batch_norm(x) + residual)`, under the same keys.

    Shapes:
        x: [N, num_features, H, W], N of 0 or more, another one in each process; residual: like x, or None.
        returns: [N, num_features, H, W] in channels_last.

    Args:
        act: "none", "relu", "relu6", "hardswish" or "silu".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group=None,
        act: str = "relu",
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group)
        check_act(type(self).__name__, act)
        self.act = act


# What becomes what. Every other batch norm has a forward of its own, or is torch's for other shapes.
_SYNCHRONISED = {
    BNAct2d: SyncBNAct2d,
    SyncBNAct2d: SyncBNAct2d,
    BatchNorm2d: nn.SyncBatchNorm,
    nn.BatchNorm1d: nn.SyncBatchNorm,
    nn.BatchNorm2d: nn.SyncBatchNorm,
    nn.BatchNorm3d: nn.SyncBatchNorm,
    nn.SyncBatchNorm: nn.SyncBatchNorm,
}


def convert_sync_batchnorm(module: nn.Module, process_group=None) -> nn.Module:
    """Make every batch norm of `module` take its statistics over `process_group`; return `module`, changed in place.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which would drop the activation of a `BNAct2d`: here it becomes
    a `SyncBNAct2d`. Parameters, buffers and keys stay; hooks of a batch norm are lost. A frozen one stays as it is, for
    it has nothing to exchange; thawed, it would take the statistics of its own process. A batch norm that stands in
    several places is one afterwards too.

    Args:
        module: a network, or one batch norm, for which the new one is returned.
        process_group: of `torch.distributed.new_group`; None: all processes.

    Raises:
        TypeError: a batch norm with a forward of its own, which would be lost; nothing was changed.
    """
    found = {
        child: _synchronised(name, child, process_group)
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not getattr(child, "frozen", False)
    }
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in found:
                setattr(parent, name, found[child])
    return found.get(module, module)


def _synchronised(name: str, bn: nn.Module, process_group) -> nn.Module:
    made = _SYNCHRONISED.get(type(bn))
    if made is None:
        raise TypeError(
            f"convert_sync_batchnorm: {name or 'module'} is a {type(bn).__name__}, whose own forward would be lost"
        )
    act = {"act": bn.act} if made is SyncBNAct2d else {}
    with torch.device("meta"):  # what it makes is replaced at once
        new = made(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, process_group, **act)
    new._parameters.update(bn._parameters)
    new._buffers.update(bn._buffers)
    return new.train(bn.training)
