"""The grouped kernel: tiles of several groups and of parts of one, tails of K, and other groups' NaN and infinities."""

import pytest
import torch
import torch.nn.functional as F
from problems import BACKEND_NAMES, dtypes, poisoned, representable
from tolerances import assert_two_times

from fused_resnet.backends import backend_report, canary, triton
from fused_resnet.backends.config import Kernel
from fused_resnet.backends.problem import Problem

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.triton import grouped

poison = pytest.fixture(autouse=True)(poisoned)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPABILITY = triton.capability(DEVICE)
LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
INF, NAN = float("inf"), float("nan")


def grouped_of(x, k, groups, window=3, stride=1, padding=None, dilation=1, dtype=HALF, residual=False, act="relu"):
    window = (window, window) if isinstance(window, int) else window
    padding = tuple(dilation * (w // 2) for w in window) if padding is None else padding
    geometry = (k, x[1] // groups, *window), (stride, stride), padding, (dilation, dilation), groups
    return Problem("conv_scale_act", x, dtype, *geometry, residual, act)


# In every configuration; the others in the likeliest.
PROBLEMS = (
    grouped_of((1, 64, 7, 9), 64, 16, residual=True),  # 32x4d: 16 groups a tile
    grouped_of((5, 128, 3, 2), 128, 16, dtype=LOW, act="relu6"),
    grouped_of((2, 64, 8, 6), 64, 4, 3, 2, dtype=FULL, residual=True),
    grouped_of((2, 128, 4, 6), 128, 2, 3, 2, dtype=LOW),  # a tile a group
    grouped_of((1, 256, 2, 3), 256, 2, (1, 3), residual=True),  # a group of two tiles, and of two steps
)
OTHERS = (
    grouped_of((1, 96, 5, 7), 96, 24, dtype=FULL, residual=True, act="none"),  # half a tile at the end
    grouped_of((1, 96, 6, 8), 96, 12, 3, 2, dtype=LOW),
    grouped_of((1, 24, 6, 4), 24, 6, 3, 2, residual=True),  # less than a tile
    grouped_of((2, 32, 5, 3), 64, 8, 1, dtype=FULL),  # fewer channels in than out
    grouped_of((1, 64, 4, 4), 32, 2, dilation=2, dtype=LOW, residual=True),  # and more
    grouped_of((1, 64, 2, 3), 64, 8, (5, 3), padding=(9, 1)),
    grouped_of((1, 64, 4, 6), 64, 8, 1, 2, dtype=FULL, act="relu6"),
)


def require(problem):
    reason = grouped.unsupported(problem, CAPABILITY)
    if reason:
        pytest.skip(f"grouped: {reason}")


@pytest.mark.parametrize("problem", [*PROBLEMS, *OTHERS], ids=str)
def test_grouped_exact(problem):
    require(problem)
    found = grouped.configs(problem, CAPABILITY)
    assert len(set(found)) == len(found) > 1
    if DEVICE.type == "cpu":  # where stages are nothing
        found = list({config.blocks: config for config in found}.values())
    for config in found if problem in PROBLEMS else found[:1]:
        expected, out = canary.run(triton, problem, Kernel(grouped.FAMILY, config), DEVICE)
        assert torch.equal(out, expected), config


def tensors_of(problem):
    """x, weight, scale, shift and residual of a problem, of whole numbers."""
    x, weight, scale, shift, residual = (None if t is None else t.to(DEVICE) for t in canary.integers(problem))
    last = {"memory_format": torch.channels_last}
    return x.contiguous(**last), weight, scale, shift, None if residual is None else residual.contiguous(**last)


def run(problem, config, x, weight, scale, shift, residual, out):
    weights = grouped.pack(weight, problem, config)
    triton.run_launches(grouped.launches(problem, config, x, weights, scale, shift, residual, out), DEVICE)
    return out.cpu()


def output_of(problem):
    return torch.empty(problem.output, dtype=problem.dtype, device=DEVICE, memory_format=torch.channels_last)


def plain(problem, x, weight, scale, shift, residual, dtype=torch.float64):
    x, weight, scale, shift = (t.cpu().to(dtype) for t in (x, weight, scale, shift))
    y = F.conv2d(x, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups)
    y = y * scale[:, None, None] + shift[:, None, None]
    y = y if residual is None else y + residual.cpu().to(dtype)
    return y if problem.act == "none" else F.relu(y)


def test_grouped_overwrites_the_residual():
    problem = grouped_of((2, 72, 5, 6), 72, 9, residual=True)
    require(problem)
    tensors = tensors_of(problem)
    expected = representable(plain(problem, *tensors), problem.dtype)
    for config in grouped.configs(problem, CAPABILITY)[:2]:
        out = tensors[-1].clone()
        assert torch.equal(run(problem, config, *tensors[:-1], out, out), expected), config


# By group, channel, row and column: alone, two that cancel, and in the last channel of an image.
PLANTED = {
    "nan": {(0, 0, 2, 2): NAN},
    "infinity": {(0, 5, 4, 4): INF},
    "both_infinities": {(0, 18, 1, 6): INF, (0, 19, 1, 5): -INF},
    "several_groups": {(0, 1, 2, 2): NAN, (0, 9, 5, 1): -INF, (0, 40, 7, 7): INF, (0, 41, 7, 7): NAN},
    "second_tile": {(0, 64, 2, 5): -INF, (0, 95, 7, 7): NAN},
    "next_to_the_tail": {(0, 0, 3, 4): INF, (0, 1, 4, 5): NAN},
}
planted = pytest.mark.parametrize("values", PLANTED.values(), ids=PLANTED.keys())


def check_planted(problem, values):
    require(problem)
    x, *rest = tensors_of(problem)
    for at, value in values.items():
        x[at] = value
    expected = plain(problem, x, *rest)
    assert not expected.isfinite().all()
    assert expected.isfinite().any(1).all()  # other groups have nothing of it
    for config in grouped.configs(problem, CAPABILITY)[:1]:
        out = run(problem, config, x, *rest, output_of(problem))
        torch.testing.assert_close(out, expected.to(problem.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's numpy
@planted
def test_grouped_nan_and_infinity_are_where_pytorch_has_them(values):
    check_planted(grouped_of((1, 96, 8, 8), 96, 24, act="none"), values)


@pytest.mark.filterwarnings("ignore:invalid value")
@dtypes()
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_nan_and_infinity_in_every_dtype(dtype, stride):
    """With stride 2 a tile that K does not fill reads channels of the next column beyond its own."""
    values = {**PLANTED["several_groups"], **PLANTED["second_tile"], **PLANTED["next_to_the_tail"]}
    check_planted(grouped_of((1, 96, 8, 8), 96, 12, 3, stride, dtype=dtype), values)


@dtypes()
def test_grouped_two_times(dtype):
    problem = grouped_of((1, 64, 6, 5), 64, 8, dtype=dtype)
    require(problem)
    x = torch.randn(problem.x).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(problem.weight) / 8).to(DEVICE, dtype)
    scale, shift = (torch.rand(64, device=DEVICE) + 0.5 for _ in range(2))
    config = grouped.configs(problem, CAPABILITY)[0]
    y = run(problem, config, x, weight, scale, shift, None, output_of(problem))
    if dtype == FULL and DEVICE.type == "cuda":  # TF32: what PyTorch's own convolution there rounds
        eager = plain(problem, x.half(), weight.half(), scale, shift, None, torch.float32)
    else:
        eager = plain(problem, x, weight, scale, shift, None, dtype)
    assert_two_times(y, eager, plain(problem, x, weight, scale, shift, None))


# --- without a kernel ---


def test_grouped_weight_is_zero_outside_of_the_group():
    problem = grouped_of((1, 96, 8, 8), 96, 12)
    weight = torch.rand(problem.weight, dtype=HALF) + 1
    packed = grouped.pack(weight, problem, grouped.CONFIGS[0]).view(96, 3, 3, 64)
    for k in (0, 7, 8, 63, 64, 95):
        first = k % 64 // 8 * 8
        assert torch.equal(packed[k, :, :, first : first + 8], weight[k].permute(1, 2, 0))
        assert packed[k].count_nonzero() == 9 * 8


def test_grouped_says_what_it_does_not_take():
    problem = grouped_of((1, 128, 8, 8), 128, 32)
    for other, reason in (
        (grouped_of((1, 64, 8, 8), 64, 1), "several groups"),
        (problem._replace(stride=(2, 1)), "a stride of 1 or 2"),
        (grouped_of((1, 96, 8, 8), 96, 4), "groups of 24 output channels"),
        (grouped_of((1, 24, 8, 8), 64, 2), "tiles read 24 channels"),
        (grouped_of((1, 36, 8, 8), 36, 9), "multiples of 16 bytes"),
        (grouped_of((1, 64, 7, 8), 64, 16, 3, 2), "an even height"),
    ):
        assert reason in grouped.unsupported(other, (9, 0))
    assert not grouped.unsupported(problem, (9, 0))
    assert "9.0" in grouped.unsupported(problem, (8, 9))
