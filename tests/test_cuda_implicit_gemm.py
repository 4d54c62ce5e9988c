"""csrc/cuda/implicit_gemm.h, kernel by kernel: on a GPU where there is one, else thread by thread on the CPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from cuda_convolutions import (
    MODES,
    check_exact,
    check_largest,
    check_not_finite,
    check_orders,
    check_two_times,
    compute,
    problem,
    random_numbers,
    tf32,
    whole_numbers,
)
from cuda_kernels import DEVICE, IN_EMULATOR, both_orders, library, sparse
from problems import dtypes, poisoned
from tolerances import assert_two_times, tolerance

from fused_resnet.backends.cuda import implicit_gemm, training
from fused_resnet.backends.cuda.family import geometry
from fused_resnet.backends.reference import channels_last

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

FAMILY = implicit_gemm.FAMILY
CAPABILITY = (9, 0)


PROBLEMS = (
    problem((3, 64, 7, 5), 72, residual=True),
    problem((2, 24, 9, 6), 24, (5, 2), dilation=(1, 3), act="relu6"),
    problem((2, 32, 6, 10), 130, 1, 2, residual=True),
    problem((257, 16, 1, 1), 72, 1, act="none"),
    problem((1, 8, 1, 1), 8, 1),
    problem((1, 192, 5, 5), 64, residual=True),
    problem((1, 8, 3, 3), 136, padding=7),
    problem((2, 17, 7, 5), 19, residual=True),
    problem((1, 3, 19, 17), 64, 7, 2),
    problem((2, 20, 5, 4), 30, (2, 3), (2, 1), padding=3, groups=5, residual=True),
    problem((2, 64, 5, 4), 96, groups=4, residual=True, act="relu6"),
    problem((1, 9, 4, 4), 27, groups=9),
)
problems = pytest.mark.parametrize("case", PROBLEMS, ids=str)


@pytest.fixture(autouse=True)
def full_precision():
    with tf32(implicit_gemm, False):
        yield


@problems
@pytest.mark.parametrize("mode", MODES)
def test_implicit_gemm_exact(case, mode):
    """In every configuration, also over its residual; and nothing outside of a tensor is touched."""
    case = case._replace(dtype=MODES[mode][0])
    configs = implicit_gemm.configs(case, CAPABILITY)
    assert len(set(configs)) == len(configs) > 0
    with tf32(implicit_gemm, MODES[mode][1]):
        check_exact(FAMILY, case, configs)


def test_implicit_gemm_splits_what_would_not_fill_a_gpu():
    names = {config.blocks[2] for config in implicit_gemm.configs(PROBLEMS[5], CAPABILITY)}
    assert max(names) > 1
    assert implicit_gemm.configs(problem((1, 2048, 7, 7), 512, 1), CAPABILITY)[0].blocks[2] > 1
    large = implicit_gemm.configs(problem((256, 256, 56, 56), 64, 1), CAPABILITY)
    assert all(config.blocks[2] == 1 for config in large)


@problems
@dtypes()
@pytest.mark.parametrize("act", ["relu", "hardswish", "silu"])
def test_implicit_gemm_two_times(case, dtype, act):
    """fp32 without TF32: three products of TF32 parts are as good as fp32's own."""
    case = case._replace(dtype=dtype, act=act)
    check_two_times(FAMILY, case, implicit_gemm.configs(case, CAPABILITY)[:3])


@dtypes()
def test_implicit_gemm_nan_and_inf(dtype):
    """They come out where aten has them, and nowhere else: zeros beside the filter meet none of them."""
    case = problem((2, 20, 6, 7), 24, act="none")._replace(dtype=dtype)
    check_not_finite(FAMILY, case, implicit_gemm.configs(case, CAPABILITY))


@pytest.mark.parametrize("mode", ["tf32", "fp32"])
def test_implicit_gemm_the_largest_fp32(mode):
    case = problem((1, 20, 3, 4), 16, 1, act="none")._replace(dtype=torch.float32)
    with tf32(implicit_gemm, MODES[mode][1]):
        check_largest(FAMILY, case, implicit_gemm.configs(case, CAPABILITY))


@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[5], PROBLEMS[7], PROBLEMS[10]], ids=str)
@dtypes()
def test_implicit_gemm_moments(case, dtype):
    """Batch norm's first stage: mean and variance of each tile, of what was rounded and stored."""
    case = case._replace(dtype=dtype, residual=False, act="none")
    x, weight, *_ = random_numbers(case)
    bias = torch.randn(case.weight[0], device=DEVICE) * 1000
    args = (case.stride, case.padding, case.dilation, case.groups)
    z, partials, rows = implicit_gemm.with_moments(x, weight, bias, args)
    plain_z = F.conv2d(x.cpu().double(), weight.cpu().double(), bias.cpu().double(), *args)
    eager = F.conv2d(x.cpu(), weight.cpu(), None, *args).float() + bias.cpu().view(1, -1, 1, 1)
    assert_two_times(z.cpu(), eager.to(dtype), plain_z)
    flat = z.cpu().double().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    high, low, variance = partials.cpu().double().unbind(1)
    for tile, part in enumerate(flat.split(rows)):
        wanted, mean = torch.var_mean(part, 0, correction=0)
        allowed = tolerance("tile_moments")
        assert (high[tile] + low[tile] - mean).abs().le(allowed * wanted.sqrt()).all()
        assert (variance[tile] - wanted).abs().le(allowed * wanted).all()


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("value", [1e18, 3e19, 2e38])
def test_implicit_gemm_moments_of_large_values(value, dtype):
    """Whose squares, differences or sums overflow; the first channel is constant, and the last one infinite."""
    case = problem((2, 16, 9, 19), 16, 1, act="none")._replace(dtype=dtype)
    x = torch.where(torch.rand(case.x) < 0.5, -value, value).to(DEVICE, dtype)
    x[:, 0] = value
    bias = torch.zeros(16, device=DEVICE)
    bias[-1] = torch.inf
    weight = torch.eye(16, device=DEVICE, dtype=dtype).view(case.weight)
    args = (case.stride, case.padding, case.dilation, case.groups)
    z, partials, rows = implicit_gemm.with_moments(channels_last(x), weight, bias, args)
    mean, var = training.merged_moments(z, partials, rows)
    aten, truth = (torch.var_mean(t[:, :-1], (0, 2, 3), correction=0) for t in (z.float(), z.double()))
    assert_two_times(mean[:-1], aten[1], truth[1], "mean")
    finite = truth[0].float().isfinite()
    assert torch.equal(var[:-1].isinf(), ~finite)
    assert_two_times(var[:-1][finite], aten[0][finite], truth[0][finite], "variance")
    assert (mean[-1], var[0]) == (torch.inf, 0)
    assert var[-1].isnan()


@both_orders
@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[2], PROBLEMS[9]], ids=str)
def test_implicit_gemm_needs_no_luck(case, order):
    """The same bits whichever warp and block runs first: every barrier is there."""
    inputs = random_numbers(case)
    for config in implicit_gemm.configs(case, CAPABILITY):
        check_orders(order, compute, FAMILY, case, config, *inputs)


@pytest.mark.skipif(not IN_EMULATOR, reason="tests/test_gpu_large.py does it on a GPU")
def test_implicit_gemm_beyond_two_to_the_31(monkeypatch):
    """The last of more than 2^31 elements of the input, and of the output; memory that nobody touches is not there."""
    case = problem((1, 8, 32760, 8200), 8, 1, (32759, 8199))
    x = sparse(case.x, case.dtype)
    assert x.numel() > 1 << 31
    x[0, :, -1, -1] = torch.arange(8)
    weight = torch.eye(8).view(8, 8, 1, 1).half()
    for config in implicit_gemm.configs(case, CAPABILITY):
        found = compute(FAMILY, case, config, x, weight, torch.ones(8), torch.zeros(8), None)
        assert found[0, :, -1, -1].tolist() == list(range(8)), config
    case = problem((1, 8, 16500, 16500), 8, 1)
    x, out = sparse(case.x, case.dtype), sparse(case.output, case.dtype)
    assert out.numel() > 1 << 31
    x[0, :, -1, -1] = torch.arange(8)
    monkeypatch.setenv("FUSED_RESNET_EMULATOR_LAST", "1")
    for config in implicit_gemm.configs(case, CAPABILITY):
        implicit_gemm.run(case, config, x, weight.reshape(8, 8), torch.ones(8), torch.ones(8), None, out)
        assert out[0, :, -1, -1].tolist() == list(range(1, 9)), config
        out[0, :, -1, -1] = 0


def test_implicit_gemm_wrong_input():
    case = PROBLEMS[0]
    x, weight, scale, shift, residual = whole_numbers(case)
    weights = implicit_gemm.pack(weight, case, implicit_gemm.TILES[0])
    where = (*geometry(case), case.groups)
    out = channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE))

    def conv(weights=weights, geometry=where, tile=(64, 64), sums=None):
        torch.ops.fused_resnet_C.cuda_conv(
            x, weights, scale, shift, residual, geometry, 1, True, *tile, out, sums, None
        )

    for message, options in {
        "weight is Half .72, 568. .* expected .K, at least 576": {"weights": weights[:, :-8].contiguous()},
        "weight is Float .* expected contiguous Half": {"weights": weights.float()},
        "geometry is 8 numbers; expected 9": {"geometry": where[:-1]},
        "tile is 96 x 64; expected": {"tile": (96, 64)},
        "the splits of sums is 99; expected 1 to 9": {"sums": torch.empty(99, 1, 1, device=DEVICE)},
        "sums is Float .2, 1, 1.": {"sums": torch.empty(2, 1, 1, device=DEVICE)},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            conv(**options)


def test_implicit_gemm_schema():
    case = PROBLEMS[0]
    x, weight, scale, shift, residual = whole_numbers(case)
    weights = implicit_gemm.pack(weight, case, implicit_gemm.TILES[0])
    out = channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE))
    args = (
        x,
        weights,
        scale,
        shift,
        residual,
        (*geometry(case), case.groups),
        1,
        True,
        64,
        64,
        out,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.fused_resnet_C.cuda_conv.default, args, test_utils="test_schema")


def test_implicit_gemm_fits_the_shared_memory():
    case = problem((256, 64, 56, 56), 64)
    small, large = (implicit_gemm.configs(case, capability) for capability in ((8, 6), (9, 0)))
    assert {config.blocks[:2] for config in large} - {config.blocks[:2] for config in small} == {(256, 64)}


def test_implicit_gemm_refuses_images_beyond_16_bits():
    assert "32767" in implicit_gemm.unsupported(problem((1, 8, 1, 40000), 8, 1), CAPABILITY)
    assert "8.0" in implicit_gemm.unsupported(PROBLEMS[0], (7, 5))
    assert os.environ.get("FUSED_RESNET_EMULATOR_LAST") is None
