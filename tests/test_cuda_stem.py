"""csrc/cuda/stem.cu: on a GPU where there is one, else thread by thread on the CPU."""

import pytest
import torch
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

from fused_resnet.backends.cuda import stem
from fused_resnet.backends.cuda.family import geometry
from fused_resnet.backends.reference import channels_last

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

FAMILY = stem.FAMILY
CAPABILITY = (9, 0)

PROBLEMS = (
    problem((2, 3, 19, 24), 64, 7, 2),
    problem((1, 3, 9, 17), 64, 7, 2, residual=True),
    problem((2, 3, 8, 8), 24, residual=True),
    problem((1, 3, 6, 7), 33, 3, 2, act="relu6"),
    problem((2, 1, 7, 10), 17, 5, residual=True),
    problem((1, 1, 9, 9), 72, 7, 2),
    problem((1, 2, 5, 6), 3, 5, act="none"),
    problem((1, 4, 9, 8), 130, residual=True),
    problem((1, 4, 7, 7), 32, 7, 2, padding=0),
    problem((5, 3, 1, 1), 20, residual=True),
    problem((1, 3, 6, 9), 8, (3, 5), (1, 2), (0, 5)),
    problem((1, 3, 4, 5), 16, 1),
)
problems = pytest.mark.parametrize("case", PROBLEMS, ids=str)


def configs(case):
    """Those that the family offers, and one of three rows."""
    found = stem.configs(case, CAPABILITY)
    return list(dict.fromkeys([*found, found[-1]._replace(blocks=(3, *found[-1].blocks[1:]))]))


@pytest.mark.parametrize("mode", MODES)
@problems
def test_stem_exact(case, mode):
    case = case._replace(dtype=MODES[mode][0])
    assert not stem.unsupported(case, CAPABILITY)
    with tf32(stem, MODES[mode][1]):
        check_exact(FAMILY, case, configs(case))


@dtypes()
@pytest.mark.parametrize("act", ["relu", "hardswish", "silu"])
@pytest.mark.parametrize("case", [PROBLEMS[1], PROBLEMS[2], PROBLEMS[4]], ids=str)
def test_stem_two_times(case, act, dtype):
    """fp32 without TF32: three products of TF32 parts are as good as fp32's own."""
    case = case._replace(dtype=dtype, act=act)
    with tf32(stem, False):
        check_two_times(FAMILY, case, configs(case))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[2], PROBLEMS[4], PROBLEMS[7]], ids=str)
def test_stem_not_finite(case, mode):
    """Of the pixels beside the filter, which are in its cells, none is multiplied, not even by zero."""
    case = case._replace(dtype=MODES[mode][0], act="none", residual=False)
    with tf32(stem, MODES[mode][1]):
        check_not_finite(FAMILY, case, configs(case))


@pytest.mark.parametrize("mode", ["tf32", "fp32"])
def test_stem_the_largest_fp32(mode):
    case = problem((1, 3, 3, 4), 16, 1, act="none")._replace(dtype=torch.float32)
    with tf32(stem, MODES[mode][1]):
        check_largest(FAMILY, case, stem.configs(case, CAPABILITY))


def test_stem_wide_image():
    """A row that does not fit in shared memory is computed in columns."""
    for dtype in (torch.float16, torch.float32):
        case = problem((1, 4, 4, 4001), 16, 7, 2)._replace(dtype=dtype)
        found = stem.configs(case, CAPABILITY)
        assert any(0 < stem._columns(case, config.blocks[0], 32) < case.size[1] for config in found)
        check_exact(FAMILY, case, found[-1:])


@both_orders
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [PROBLEMS[1], PROBLEMS[2]], ids=str)
def test_stem_needs_no_luck(case, mode, order):
    case = case._replace(dtype=MODES[mode][0])
    inputs = random_numbers(case)
    with tf32(stem, MODES[mode][1]):
        for config in configs(case):
            check_orders(order, compute, FAMILY, case, config, *inputs)


@pytest.mark.skipif(not IN_EMULATOR, reason="tests/test_gpu_large.py does it on a GPU")
def test_stem_beyond_two_to_the_31(monkeypatch):
    """The last of more than 2^31 elements of the output, and of the input; memory that nobody touches is not there."""
    monkeypatch.setenv("FUSED_RESNET_EMULATOR_LAST", "1")
    for case in (problem((5, 1, 5200, 5200), 16, act="none"), problem((3, 4, 13500, 13500), 1, act="none")):
        x, out = sparse(case.x, case.dtype), sparse(case.output, case.dtype)
        assert max(x.numel(), out.numel()) > 1 << 31
        assert not stem.unsupported(case, CAPABILITY)
        x[-1, :, -1, -1] = 3
        k = case.weight[0]
        weight = torch.zeros(case.weight)
        weight[:, 0, 1, 1] = torch.arange(1, k + 1)
        for config in stem.configs(case, CAPABILITY):
            weights = stem.pack(weight, case, config)
            FAMILY.run(case, config, x, weights, torch.ones(k), torch.ones(k), None, out)
            assert out[-1, :, -1, -1].tolist() == list(range(4, 3 * k + 2, 3)), config
            out[-1, :, -1, -1] = 0


def test_stem_says_why_not():
    assert "grouped" in stem.unsupported(problem((1, 4, 4, 4), 8, groups=2), CAPABILITY)
    assert "4 channels" in stem.unsupported(problem((1, 5, 4, 4), 8), CAPABILITY)
    assert "wider than 7" in stem.unsupported(problem((1, 3, 9, 9), 8, 9), CAPABILITY)
    assert "dilation" in stem.unsupported(problem((1, 3, 9, 9), 8, dilation=2), CAPABILITY)
    assert "dilation" in stem.unsupported(problem((1, 3, 9, 9), 8, stride=4), CAPABILITY)
    assert "8.0" in stem.unsupported(PROBLEMS[0], (7, 5))


def test_stem_wrong_input():
    case = PROBLEMS[1]
    x, weight, scale, shift, residual = whole_numbers(case)
    weights = stem.pack(weight, case, stem.configs(case, CAPABILITY)[0])
    out = channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE))
    for message, packed, tile in (
        ("weight is Half", weights[..., :1].contiguous(), (2, 9, 2, 64)),
        ("expected 32 or 64", weights, (2, 9, 2, 16)),
        ("expected a whole row, or even", weights, (2, 5, 2, 64)),
    ):
        args = (x, packed, scale, shift, residual, geometry(case), tile, False, 1, out)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fused_resnet_C.cuda_stem(*args)


def test_stem_schema():
    case = PROBLEMS[1]
    x, weight, scale, shift, residual = whole_numbers(case)
    weights = stem.pack(weight, case, stem.configs(case, CAPABILITY)[0])
    out = channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE))
    args = (x, weights, scale, shift, residual, geometry(case), (2, 9, 2, 64), False, 1, out)
    torch.library.opcheck(torch.ops.fused_resnet_C.cuda_stem.default, args, test_utils="test_schema")
