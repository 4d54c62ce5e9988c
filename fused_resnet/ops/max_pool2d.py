"""Max pooling that keeps no indices in inference."""

import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends.problem import windows
from fused_resnet.ops.conv_args import pair
from fused_resnet.ops.direct import may_call_directly
from fused_resnet.ops.library import select


def max_pool2d(x: Tensor, kernel_size, stride=None, padding=0) -> Tensor:
    """Return `torch.nn.functional.max_pool2d(x, kernel_size, stride, padding)`.

    It is that function wherever somebody needs an operator of PyTorch's (autograd, torch.compile, modes); elsewhere a
    kernel that, unlike aten's, writes no index of 8 bytes for each output.

    Shapes:
        x: [N, C, H, W]; returns: [N, C, P, Q].

    Raises:
        RuntimeError: as `torch.nn.functional.max_pool2d`.
    """
    if x.dim() == 4 and x.numel() and may_call_directly(x):
        kernel = pair("max_pool2d", "kernel_size", kernel_size, 1)
        step = kernel if stride is None else pair("max_pool2d", "stride", stride, 1)
        edge = pair("max_pool2d", "padding", padding, 0)
        size = windows(x.shape[2:], kernel, step, edge)
        if min(size) > 0 and 2 * edge[0] <= kernel[0] and 2 * edge[1] <= kernel[1]:
            return select("max_pool2d", "", x).max_pool2d(x, kernel, step, edge, size)
    return F.max_pool2d(x, kernel_size, stride, padding)
