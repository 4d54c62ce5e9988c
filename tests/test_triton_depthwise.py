"""The depthwise kernel: tiles that do not fit, strides, windows, narrow channels, NaN, and its configurations."""

import pytest
import torch
import torch.nn.functional as F
from problems import BACKEND_NAMES, dtypes, poisoned, representable
from tolerances import assert_two_times

from fused_resnet.backends import backend_report, canary, triton
from fused_resnet.backends.config import Config, Kernel
from fused_resnet.backends.problem import Problem

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.triton import depthwise

poison = pytest.fixture(autouse=True)(poisoned)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPABILITY = triton.capability(DEVICE)
LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


def depthwise_of(x, window=3, stride=1, padding=None, dtype=HALF, residual=False, act="relu"):
    window = (window, window) if isinstance(window, int) else window
    padding = tuple(w // 2 for w in window) if padding is None else padding
    geometry = (x[1], 1, *window), (stride, stride), padding, (1, 1), x[1]
    return Problem("conv_scale_act", x, dtype, *geometry, residual, act)


# In every configuration, on the CPU in every tile; the others in the likeliest configuration.
PROBLEMS = (
    depthwise_of((1, 17, 4, 7), residual=True),
    depthwise_of((1, 40, 5, 3), 3, 2, dtype=FULL, act="relu6"),
    depthwise_of((1, 8, 3, 6), 5, dtype=LOW, act="none"),
)
OTHERS = (
    depthwise_of((5, 24, 3, 2), dtype=LOW, residual=True),
    depthwise_of((2, 36, 7, 9), dtype=FULL),
    depthwise_of((1, 64, 8, 6), 3, 2),
    depthwise_of((1, 72, 3, 3), padding=(0, 0), residual=True),
    depthwise_of((1, 17, 5, 9), 5, 2, residual=True),
    depthwise_of((1, 16, 2, 1), 5, padding=(4, 9), dtype=FULL),
    depthwise_of((3, 9, 1, 1), dtype=LOW, residual=True),
    depthwise_of((1, 24, 2, 9), (1, 7), dtype=FULL, act="relu6"),
    depthwise_of((1, 10, 5, 4), (7, 2), 2, (3, 0)),
    depthwise_of((1, 12, 5, 5), 1, 2, dtype=FULL),
)

# Fewer rows than the output has, and more; fewer columns, and more.
TILES = (
    Config("depthwise", (3, 4, 16, 4), 1, 1),
    Config("depthwise", (56, 32, 8, 2), 1, 1),
    Config("depthwise", (1, 4, 32, 1), 1, 1),
)


@pytest.mark.parametrize("problem", [*PROBLEMS, *OTHERS], ids=str)
def test_depthwise_exact(problem):
    assert not depthwise.unsupported(problem, (8, 0))
    found = depthwise.configs(problem, CAPABILITY)
    assert len(set(found)) == len(found) > 1
    if DEVICE.type == "cpu":  # where warps are nothing
        found = list({config.blocks: config for config in found}.values())
    for config in found if problem in PROBLEMS else found[:1]:
        expected, out = canary.run(triton, problem, Kernel(depthwise.FAMILY, config), DEVICE)
        assert torch.equal(out, expected), config


@pytest.mark.parametrize("config", TILES, ids=str)
def test_depthwise_exact_in_any_tile(config):
    problem = PROBLEMS[0]
    expected, out = canary.run(triton, problem, Kernel(depthwise.FAMILY, config), DEVICE)
    assert torch.equal(out, expected)


def tensors_of(problem):
    """x, weight, scale, shift and residual of a problem, of whole numbers."""
    moved = (None if t is None else t.to(DEVICE) for t in canary.integers(problem))
    x, weight, scale, shift, residual = moved
    last = {"memory_format": torch.channels_last}
    return x.contiguous(**last), weight, scale, shift, None if residual is None else residual.contiguous(**last)


def run(problem, config, x, weight, scale, shift, residual, out):
    weights = depthwise.pack(weight, problem, config)
    triton.run_launches(depthwise.launches(problem, config, x, weights, scale, shift, residual, out), DEVICE)
    return out.cpu()


def plain(problem, x, weight, scale, shift, residual, dtype=torch.float64):
    x, weight, scale, shift = (t.cpu().to(dtype) for t in (x, weight, scale, shift))
    y = F.conv2d(x, weight, None, problem.stride, problem.padding, groups=problem.groups)
    y = y * scale[:, None, None] + shift[:, None, None]
    return F.relu(y if residual is None else y + residual.cpu().to(dtype))


def test_depthwise_overwrites_the_residual():
    problem = depthwise_of((2, 36, 4, 9), residual=True)
    tensors = tensors_of(problem)
    expected = representable(plain(problem, *tensors), problem.dtype)
    for config in depthwise.configs(problem, CAPABILITY)[:1]:
        out = tensors[-1].clone()
        assert torch.equal(run(problem, config, *tensors[:-1], out, out), expected), config


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's numpy
@dtypes()
def test_depthwise_nan_and_infinity_are_where_pytorch_has_them(dtype):
    problem = depthwise_of((2, 20, 6, 7), 3, 2, dtype=dtype)
    x, *rest = tensors_of(problem)
    inf, nan = float("inf"), float("nan")
    for at, value in {(0, 0, 0, 0): nan, (0, 3, 5, 6): inf, (1, 19, 2, 3): -inf, (1, 7, 3, 3): inf}.items():
        x[at] = value
    x[1, 7, 3, 4] = -inf
    expected = plain(problem, x, *rest)
    assert expected.isnan().any()
    assert expected.isinf().any()
    config = depthwise.configs(problem, CAPABILITY)[0]
    out = torch.empty(problem.output, dtype=dtype, device=DEVICE, memory_format=torch.channels_last)
    torch.testing.assert_close(run(problem, config, x, *rest, out), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@dtypes()
def test_depthwise_two_times(dtype):
    problem = depthwise_of((1, 24, 5, 8), 5, dtype=dtype)
    x = torch.randn(problem.x).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(problem.weight) / 5).to(DEVICE, dtype)
    scale, shift = (torch.rand(24, device=DEVICE) + 0.5 for _ in range(2))
    out = torch.empty(problem.output, dtype=dtype, device=DEVICE, memory_format=torch.channels_last)
    y = run(problem, depthwise.configs(problem, CAPABILITY)[0], x, weight, scale, shift, None, out)
    truth, eager = (plain(problem, x, weight, scale, shift, None, kind) for kind in (torch.float64, dtype))
    assert_two_times(y, eager, truth)


# --- the choice of configurations, without a kernel ---


@pytest.mark.parametrize("dtype", [LOW, FULL], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("channels", [17, 20, 144])
def test_depthwise_has_configurations_for_every_window(channels, dtype):
    for window in range(1, depthwise.MOST_TAPS + 1):
        for stride in (1, 2):
            problem = depthwise_of((1, channels, 14, 14), window, stride, dtype=dtype)
            assert depthwise.configs(problem, (8, 0)), problem


def test_depthwise_takes_more_rows_of_more_images():
    few, many = (depthwise.configs(depthwise_of((n, 192, 56, 56)), (9, 0))[0].blocks[0] for n in (1, 256))
    assert few < 7 < many


def test_depthwise_says_what_it_does_not_take():
    problem = depthwise_of((1, 16, 9, 9))
    for other, reason in (
        (problem._replace(groups=1), "not a depthwise"),
        (problem._replace(weight=(32, 1, 3, 3)), "not a depthwise"),
        (problem._replace(stride=(2, 1)), "a stride of 1 or 2"),
        (problem._replace(dilation=(2, 2)), "no dilation"),
        (problem._replace(weight=(16, 1, 3, 9)), "wider than 7"),
        (problem._replace(x=(1, 16, 4, 1 << 27)), "2^31 elements"),
    ):
        assert reason in depthwise.unsupported(other, (9, 0))
    assert "8.0" in depthwise.unsupported(problem, (7, 5))
