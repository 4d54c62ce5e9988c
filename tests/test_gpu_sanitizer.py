"""Every operator once, forward and backward, on shapes so small and uneven that a sanitizer can follow each access.

`compute-sanitizer pytest -m gpu tests/test_gpu_sanitizer.py` with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that what lies
outside of a tensor is nobody's memory (bench/gpu.sh does it).
"""

import pytest
import torch
from devices import on_devices
from problems import ConvCase, dtypes, require

from fused_resnet.ops import add_act, bn_act, conv_bn_act, conv_scale_act, max_pool2d

CASES = (
    ConvCase("1x1_odd_channels", (1, 17, 3, 5), 33, (1, 1), residual=True),
    ConvCase("1x1_stride2", (2, 64, 5, 5), 64, (1, 1), stride=2),
    ConvCase("3x3", (1, 64, 7, 7), 64, (3, 3), padding=1, residual=True),
    ConvCase("3x3_stride2", (1, 64, 7, 6), 128, (3, 3), stride=2, padding=1),
    ConvCase("7x7_stem", (1, 3, 11, 9), 64, (7, 7), stride=2, padding=3),
    ConvCase("3x3_depthwise", (1, 33, 5, 7), 33, (3, 3), padding=1, groups=33),
)


def check(call, inputs, *options):
    """Forward and backward run, and nothing is left unwritten."""
    leaves = [t.requires_grad_() for t in inputs]
    y = call(*leaves, *options)
    found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    with torch.no_grad():
        alone = call(*leaves, *options)
    if y.is_cuda:
        torch.cuda.synchronize()
    for t in (y, alone, *found):
        assert torch.isfinite(t).all()


@on_devices("case", CASES)
@dtypes()
@pytest.mark.parametrize("op", ["conv_scale_act", "conv_bn_act"])
def test_convolution_touches_its_own_memory_alone(op, device, backend, case, dtype):
    x = torch.randn(case.x, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.weight, device=device, dtype=dtype)
    require(backend, op, x, weight, **case.geometry)
    vectors = [torch.rand(case.out_channels, device=device) + 0.5 for _ in range(2)]
    shape = torch.nn.functional.conv2d(x, weight, **case.geometry).shape
    residual = [torch.randn(shape, device=device, dtype=dtype)] if case.residual else []

    def call(x, weight, a, b, residual=None):
        options = {"residual": residual, "act": case.act, "backend": backend, **case.geometry}
        if op == "conv_scale_act":
            return conv_scale_act(x, weight, a, b, **options)
        return conv_bn_act(x, weight, a, b, None, None, training=True, **options)

    check(call, [x, weight, *vectors, *residual])


@on_devices("shape", {"odd": (2, 17, 3, 5), "even": (1, 64, 4, 4)})
@dtypes()
def test_elementwise_touches_its_own_memory_alone(device, backend, shape, dtype):
    def image():
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    vectors = [torch.rand(shape[1], device=device) + 0.5 for _ in range(2)]
    require(backend, "bn_act", image())
    check(
        lambda x, a, b, r: bn_act(x, a, b, None, None, residual=r, training=True, backend=backend),
        [image(), *vectors, image()],
    )
    check(lambda x, r: add_act(x, r, backend=backend), [image(), image()])
    check(lambda x: max_pool2d(x, 3, 2, 1), [image()])
