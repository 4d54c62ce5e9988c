"""The gradients of a convolution's input, weight and bias."""

from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.ops.direct import may_call_directly
from fused_resnet.ops.library import select


def convolution_backward(
    op: str, grad: Tensor, x: Tensor, weight: Tensor, args, needs: tuple[bool, bool, bool], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias where `needs` asks for them, None elsewhere, for the backward of operator `op`.

    Where PyTorch has to see what is computed it is aten's formula, elsewhere the kernels of the backend.
    """
    if not may_call_directly(grad, x):
        return reference.convolution_backward(grad, x, weight, args, needs)
    return select(op, backend, x, weight, args).convolution_backward(grad, x, weight, args, needs)
