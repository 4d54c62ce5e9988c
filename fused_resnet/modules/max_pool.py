"""Drop-in max pooling."""

from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.modules import unit

# Kernel, stride and padding of the pooling of a ResNet.
HALVING = ((3, 3), (2, 2), (1, 1))


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that keeps no indices in inference.

    Shapes:
        x: [N, C, H, W]; returns: [N, C, P, Q].
    """

    def forward(self, x: Tensor) -> Tensor:
        geometry = None if unit.is_unfused() else _geometry(self)
        return super().forward(x) if geometry is None else ops.max_pool2d(x, *geometry)


def pool_geometry(pool: nn.Module) -> tuple | None:
    """Kernel, stride and padding, each (height, width), of a max pooling; None: it is not one that ours can replace."""
    plain = type(pool) in (MaxPool2d, nn.MaxPool2d) and "forward" not in vars(pool) and not unit.hooked(pool)
    return _geometry(pool) if plain else None


def _geometry(pool: nn.MaxPool2d) -> tuple | None:
    if pool.return_indices or pool.ceil_mode or pool.dilation not in (1, (1, 1)):
        return None
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    return tuple((v, v) if isinstance(v, int) else tuple(v) for v in sizes)


def max_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """Return `pool(x)`, without indices where nobody needs them."""
    geometry = None if unit.is_unfused() else pool_geometry(pool)
    return pool(x) if geometry is None else ops.max_pool2d(x, *geometry)
