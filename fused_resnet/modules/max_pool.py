"""Drop-in max pooling."""

from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.modules import unit


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that keeps no indices in inference.

    Shapes:
        x: [N, C, H, W]; returns: [N, C, P, Q].
    """

    def forward(self, x: Tensor) -> Tensor:
        if unit.is_unfused() or self.return_indices or self.ceil_mode or self.dilation not in (1, (1, 1)):
            return super().forward(x)
        return ops.max_pool2d(x, self.kernel_size, self.stride, self.padding)
