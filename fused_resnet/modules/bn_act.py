"""Drop-in batch norm (+ residual) + activation."""

from torch import Tensor, nn

from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import BatchNorm2d
from fused_resnet.ops.checks import check_act


class NormAct(nn.Module):
    """Stands before a batch norm among the bases of a class, and gives it an activation, in one operator with it."""

    act: str
    counts_once = True  # a batch that is computed again

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return unit.fused_bn_act(self, x, residual, self.act)

    def train(self, mode: bool = True) -> "NormAct":
        unit.forget(self)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


class BNAct2d(NormAct, BatchNorm2d):
    """`act(batch_norm(x) + residual)` in one operator; parameters, buffers and keys are `torch.nn.BatchNorm2d`'s.

    Shapes:
        x: [N, num_features, H, W]; residual: like x, or None.
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
        act: str = "relu",
    ):
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, track_running_stats=track_running_stats
        )
        check_act(type(self).__name__, act)
        self.act = act
