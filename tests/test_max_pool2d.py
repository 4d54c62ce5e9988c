"""max_pool2d: values, errors and gradients are torch's."""

import pytest
import torch
from problems import image
from torch import nn

import fused_resnet as fr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 5), (2, 1), (1, 2)), (1, 1, 0), (2, None, 1)],
)
@pytest.mark.parametrize("size", [(2, 64, 9, 8), (1, 3, 5, 7), (3, 33, 6, 6)])
def test_max_pool2d(size, kernel, stride, padding, dtype):
    x = image(*size, dtype=dtype)
    x[0, 0, 1, 1], x[0, 1], x[-1, -1, 0, 0] = float("nan"), -float("inf"), float("inf")
    with torch.no_grad():
        y = fr.ops.max_pool2d(x, kernel, stride, padding)
    truth = nn.functional.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(y.nan_to_num(7), truth.nan_to_num(7))
    assert torch.equal(y.isnan(), truth.isnan())
    assert y.stride() == truth.stride()


def test_max_pool2d_errors_are_those_of_torch():
    with torch.no_grad():
        for arguments in ((image(1, 2, 4, 4), 3, 1, 2), (image(1, 2, 2, 2), 3), (torch.randn(1, 2, 4), 9)):
            with pytest.raises(RuntimeError) as truth:
                nn.functional.max_pool2d(*arguments)
            with pytest.raises(RuntimeError) as found:
                fr.ops.max_pool2d(*arguments)
            assert str(found.value) == str(truth.value)


def test_max_pool2d_gradient():
    x = image(2, 8, 9, 9).requires_grad_()
    other = x.detach().clone().requires_grad_()
    fr.ops.max_pool2d(x, 3, 2, 1).square().sum().backward()
    nn.functional.max_pool2d(other, 3, 2, 1).square().sum().backward()
    assert torch.equal(x.grad, other.grad)
