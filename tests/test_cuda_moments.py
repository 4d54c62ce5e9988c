"""Batch norm's statistics by the kernels of csrc/cuda: on a GPU, or thread by thread on the CPU."""

import pytest
import torch
from cuda_kernels import DEVICE, library, shapes
from problems import dtypes, eager_bn_act, poisoned
from tolerances import assert_two_times, tolerance, ulp

from fused_resnet.backends.cuda import training
from fused_resnet.backends.norm import Norm

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

ops = torch.ops.fused_resnet_C


def normalised(x, act="none"):
    mean, var = training.moments(x)
    return training.norm_act(x, Norm(mean, var, None, None, 1e-5), None, None, act)[0], mean, var


@dtypes()
@shapes
def test_cuda_statistics_two_times(shape, dtype):
    x = (torch.randn(shape) * 3 - 2).to(DEVICE, dtype)
    eager = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, var = training.moments(x)
    assert_two_times(mean, eager[1], truth[1], "mean")
    assert_two_times(var, eager[0], truth[0], "variance")


@pytest.mark.parametrize("rows", [1, 7, 128, 100_000])
@pytest.mark.parametrize("channels", [5, 24])
def test_cuda_statistics_of_any_tiles(channels, rows):
    """As a convolution would leave them: tiles of one row, tiles that do not divide the rows, and one tile."""
    x = training.ready((torch.randn(3, channels, 13, 17) + 5).to(DEVICE))
    count = 3 * 13 * 17
    partials = torch.empty(-(-count // rows), 3, channels, device=DEVICE)
    ops.cuda_bn_stats(x, rows, partials)
    eager = torch.var_mean(x, (0, 2, 3), correction=0)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, var = training.merged_moments(x, partials, rows)
    assert_two_times(mean, eager[1], truth[1], "mean")
    assert_two_times(var, eager[0], truth[0], "variance")


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6], ids="{:.0e}".format)
def test_cuda_bn_cancellation(ratio):
    x = (torch.randn(4, 17, 19, 7) + ratio * torch.linspace(-1, 1, 17).view(-1, 1, 1)).to(DEVICE)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    y, mean, var = normalised(x)
    allowed = tolerance("cancellation") * ulp(torch.float32, ratio)
    assert (mean - truth[1]).abs().max() <= allowed
    assert (var / truth[0] - 1).abs().max() <= allowed
    normal = eager_bn_act(x.double(), act="none")
    assert (y - normal).abs().max() <= allowed * normal.abs().max()


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 1e6, 6e30, 3e38, -3.4e38], ids=str)
@pytest.mark.parametrize("channels", [5, 8])
def test_cuda_bn_constant_channels(channels, constant):
    x = torch.full((3, channels, 7, 3), constant, device=DEVICE)
    y, mean, var = normalised(x)
    assert torch.equal(mean, x[0, :, 0, 0])
    assert not var.any()
    assert not y.any()


# Beyond 1.8e19 squares overflow, beyond 1.7e38 differences do, and far below the sums of many.
@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("scale", [1e17, 1e18, 1e25, 1e37])
def test_cuda_bn_large_values(scale, channels, dtype):
    """The mean and the variance are right wherever fp32 has them, and Inf where the variance has none."""
    x = (torch.randn(8, channels, 17, 31) * 3 - 2) * scale
    _check_large(x.to(DEVICE, dtype))


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("value", [3e19, 2e38, 3.3e38])
def test_cuda_bn_large_values_of_both_signs(value, dtype):
    signs = torch.where(torch.rand(3, 8, 9, 9) < 0.5, -1.0, 1.0)
    signs[..., 1] = 1  # so that no mean is zero but for the signs' luck
    _check_large((signs * value).to(DEVICE, dtype))


def _check_large(x):
    variance, truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    aten = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    y, mean, var = normalised(x)
    assert_two_times(mean, aten[1], truth, "mean")
    assert torch.equal(var.isinf(), variance.float().isinf())
    finite = var.isfinite()
    if finite.any():
        assert_two_times(var[finite], aten[0][finite], variance[finite], "variance")
        few = x[:, finite]
        assert_two_times(y[:, finite], eager_bn_act(few, act="none"), eager_bn_act(few.double(), act="none"))
    representable = (x.float() - mean.view(-1, 1, 1)).isfinite()
    assert not y[~finite.view(-1, 1, 1) & representable].any()


@dtypes()
@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
def test_cuda_bn_not_finite(where, channels, dtype):
    """One channel each: +Inf, -Inf, both, NaN; the others know nothing of it."""
    x = torch.randn(4, channels, 9, 9).to(dtype)
    clean = normalised(x.to(DEVICE), "relu")
    pixels = {"first": [(0, 0, 0)], "last": [(3, 8, 8)], "everywhere": [(0, 0, 0), (1, 3, 5), (3, 8, 8)]}[where]
    inf, nan = float("inf"), float("nan")
    for n, h, w in pixels:
        x[n, :4, h, w] = torch.tensor([inf, -inf, inf, nan]).to(dtype)
    x[2, 2, 2, 2] = -inf
    y, mean, var = normalised(x.to(DEVICE), "relu")
    assert torch.equal(mean[:2], torch.tensor([inf, -inf], device=DEVICE))
    assert mean[2:4].isnan().all()
    assert var[:4].isnan().all()
    assert y[:, :4].isnan().all()
    for found, wanted in zip((y, mean, var), clean, strict=True):
        channel = 1 if found.dim() == 4 else 0
        assert torch.equal(found.narrow(channel, 4, channels - 4), wanted.narrow(channel, 4, channels - 4))
