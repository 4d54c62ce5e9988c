"""Drop-in max pooling."""

from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import uses_batch_statistics
from fused_resnet.modules.prepared import prepared

# Kernel, stride and padding of the pooling of a ResNet.
HALVING = ((3, 3), (2, 2), (1, 1))


def conv_bn_act_max_pool(conv: nn.Module, bn: nn.Module, pool: nn.Module, x: Tensor, act: str = "relu") -> Tensor:
    """Return `pool(act(bn(conv(x))))`: in training as one operator, in inference as one kernel, if there is one."""
    if type(pool) is MaxPool2d and pool.halves() and unit.fusible(conv, bn):
        layers = [unit.Layer(conv, bn, act)]
        if unit.trainable(layers) and x.dim() == 4:
            return unit.train(layers, x, max_pool=HALVING)
        unit.forget_sharded(conv, bn)
        run = None if uses_batch_statistics(bn) else prepared(conv, bn, x, None, act, max_pool=True)
        if run is not None:
            return run(x, None, None)
    return pool(unit.conv_bn_act(conv, bn, x, act=act))


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that keeps no indices in inference.

    Shapes:
        x: [N, C, H, W]; returns: [N, C, P, Q].
    """

    def halves(self) -> bool:
        """Whether it is the 3x3 pooling with stride 2 and padding 1 of a ResNet, and nobody hooks it."""
        geometry = [(v, v) if isinstance(v, int) else tuple(v) for v in (self.kernel_size, self.stride, self.padding)]
        plain = not (self.return_indices or self.ceil_mode) and self.dilation in (1, (1, 1))
        return plain and tuple(geometry) == HALVING and not unit.hooked(self)

    def forward(self, x: Tensor) -> Tensor:
        if unit.is_unfused() or self.return_indices or self.ceil_mode or self.dilation not in (1, (1, 1)):
            return super().forward(x)
        return ops.max_pool2d(x, self.kernel_size, self.stride, self.padding)
