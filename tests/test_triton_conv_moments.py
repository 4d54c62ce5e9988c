"""The Triton backend's convolutions in training: the moments of their output, and a norm that they apply on load."""

import pytest
import torch
import torch.nn.functional as F
from problems import BACKEND_NAMES, CONV_CASES, LAYOUTS, LOW, acts, cases, dtypes, poisoned
from tolerances import assert_moments, assert_two_times

from fused_resnet.backends import backend_report, reference, triton
from fused_resnet.backends.layout import empty
from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import ConvArgs, Problem
from fused_resnet.ops.conv_args import normalise

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.triton import registry, statistics, training
from fused_resnet.backends.triton.statistics import Partials

poison = pytest.fixture(autouse=True)(poisoned)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPABILITY = triton.capability(DEVICE)
EPS = 1e-5
INF, NAN = float("inf"), float("nan")


def conv(x, k, window, stride=1, groups=1, padding=None):
    padding = window // 2 if padding is None else padding
    pairs = (stride, stride), (padding, padding), (1, 1)
    return Problem("conv_scale_act", x, torch.float32, (k, x[1] // groups, window, window), *pairs, groups)


# Each with tiles that go beyond the edges, and more than one tile where that takes few steps.
PROBLEMS = {
    "conv1x1": conv((3, 24, 7, 11), 72, 1),
    "implicit_gemm": conv((3, 16, 5, 9), 24, 3),
    "general": conv((3, 12, 9, 7), 18, 3, 2, groups=3),
    "stem": conv((3, 3, 13, 12), 16, 7, 2),
    "grouped": conv((5, 32, 5, 4), 32, 3, groups=8),
}
families = pytest.mark.parametrize("name", PROBLEMS)


def able(name, problem):
    """The family of that name; skips where it cannot run the problem."""
    family = next(family for family in registry.FAMILIES["conv_scale_act"] if family.name == name)
    reason = family.unsupported(problem, CAPABILITY)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return family


def norm_of(channels):
    vectors = torch.randn(channels), torch.rand(channels) + 0.5, torch.rand(channels) + 0.5, torch.randn(channels)
    return Norm(*(t.to(DEVICE) for t in vectors), EPS)


def tensors_of(problem):
    """x, the weight and a bias."""
    x, weight = (torch.randn(size).to(DEVICE, problem.dtype) for size in (problem.x, problem.weight))
    return LAYOUTS["channels_last"](x), weight, torch.randn(problem.weight[0]).to(DEVICE)


# All dtypes where they are quick to interpret.
EVERY = [(name, dtype) for name in ("conv1x1", "implicit_gemm", "general") for dtype in LOW]


@pytest.mark.parametrize(("name", "dtype"), [*EVERY, ("stem", torch.float16), ("grouped", torch.bfloat16)], ids=str)
def test_moments_in_every_configuration(name, dtype):
    """They are those of what is stored, which is what inference computes."""
    problem = PROBLEMS[name]._replace(dtype=dtype)
    family, (x, weight, shift), k = able(name, problem), tensors_of(problem), problem.weight[0]
    scale, seen = torch.ones(k, device=DEVICE), 0
    for config in family.configs(problem, CAPABILITY):
        tiles = family.tiles(problem, config)
        seen += tiles > 0
        if tiles:
            partials = Partials.empty(tiles, k, DEVICE)
            plain, z, mean, var = *(empty(problem.output, x) for _ in range(2)), *torch.empty(2, k, device=DEVICE)
            inputs = (problem, config, x, family.pack(weight, problem, config), scale, shift * 9, None)
            rows = z.numel() // k
            merging = statistics.merge_launch(partials, rows, mean, var)
            triton.run_launches(family.launches(*inputs, plain), DEVICE)
            triton.run_launches((*family.launches(*inputs, z, partials=partials), merging), DEVICE)
            assert torch.equal(z, plain), config
            assert partials.counts.sum() == rows, config
            assert_moments(z, mean, var)
    assert seen


@acts
@pytest.mark.parametrize(
    ("name", "channels", "dtype"),
    [("conv1x1", 24, torch.bfloat16), ("general", 17, torch.float32), ("general", 3, torch.float16)],
    ids=str,
)
def test_norm_on_load_is_the_norm_in_memory(name, channels, dtype, act):
    """To the bit, in every configuration."""
    problem = conv((3, channels, 5, 7), 40, 1)._replace(dtype=dtype)
    family, (x, weight, shift), norm = able(name, problem), tensors_of(problem), norm_of(channels)
    before, on_load = training._on_load(norm, act)
    triton.run_launches(before, DEVICE)
    normed, _ = triton.norm_act(x, norm, None, None, act)
    for config in family.configs(problem, CAPABILITY):
        weights, expected, z = family.pack(weight, problem, config), empty(problem.output, x), empty(problem.output, x)
        vectors = (torch.ones_like(shift), shift, None)
        triton.run_launches(family.launches(problem, config, normed, weights, *vectors, expected), DEVICE)
        launches = family.launches(problem, config, x, weights, *vectors, z, on_load=on_load)
        triton.run_launches(launches, DEVICE)
        assert torch.equal(z, expected), config


@cases(CONV_CASES)
@dtypes(torch.float32, torch.bfloat16)
def test_conv_moments_two_times(dtype, case):
    """Of a weight in fp32, also beside x in another dtype; with and without a norm."""
    x, weight, bias = torch.randn(case.x).to(dtype), torch.randn(case.weight), torch.randn(case.out_channels)
    weight /= weight[0].numel() ** 0.5
    x, weight, bias = (t.to(DEVICE) for t in (x, weight, bias.to(dtype).float()))
    x, args = normalise("conv_moments", x, weight, **case.geometry)
    for norm in (None, norm_of(x.shape[1])):
        z, mean, var = triton.conv_moments(x, norm, case.act, weight, bias, args)
        y = x if norm is None else triton.norm_act(x, norm, None, None, case.act)[0]
        eager, truth = (
            F.conv2d(y.to(to), weight.to(dtype).to(to), bias.to(to), *args) for to in (dtype, torch.float64)
        )
        assert_two_times(z, eager, truth)
        assert z.stride() == reference.channels_last(z).stride()
        assert_moments(z, mean, var)


ONE_PASS = ["{}_fwd_kernel", "moments_merge_kernel"]
PATHS = {
    "conv1x1": (conv((2, 32, 4, 4), 32, 1), ["norm_scale_kernel", *ONE_PASS]),
    "general": (conv((2, 17, 4, 4), 9, 1), ["norm_scale_kernel", *ONE_PASS]),
    "implicit_gemm": (conv((2, 16, 4, 4), 16, 3), ["norm_act_fwd_kernel", *ONE_PASS]),
    "general padded": (conv((2, 17, 4, 4), 9, 1, padding=1), ["norm_act_fwd_kernel", *ONE_PASS]),
    "depthwise": (
        conv((2, 16, 4, 4), 16, 3, groups=16),
        ["norm_act_fwd_kernel", "{}_fwd_kernel", "moments_kernel", "moments_merge_kernel"],
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_launches_of_conv_moments(name, monkeypatch):
    """A norm is applied on load by 1x1 convolutions, and the moments of the output take no pass of their own."""
    family, names, original = name.split()[0], [], training.run_launches

    def run(launches, device):
        names.extend(launch.kernel.__name__ for launch in launches)
        original(launches, device)

    monkeypatch.setattr(training, "run_launches", run)
    problem, wanted = PATHS[name]
    problem = problem._replace(dtype=torch.float16)
    able(family, problem)
    x, weight, _ = tensors_of(problem)
    training.conv_moments(x, norm_of(problem.x[1]), "relu", weight, None, problem.args)
    assert names == [kernel.format(family) for kernel in wanted]


@pytest.mark.parametrize("ratio", [1e4, 1e6], ids="{:.0e}".format)
@pytest.mark.parametrize("name", ["conv1x1", "implicit_gemm", "general"])
def test_conv_moments_cancellation(name, ratio):
    problem = PROBLEMS[name]
    x, weight, _ = tensors_of(problem)
    bias = ratio * torch.linspace(-1, 1, problem.weight[0]).to(DEVICE)
    assert_moments(*triton.conv_moments(x, None, "none", weight, bias, problem.args))


@families
def test_conv_moments_spoil_no_other_channel(name):
    problem = PROBLEMS[name]
    x, weight, bias = tensors_of(problem)
    clean = triton.conv_moments(x, None, "none", weight, bias, problem.args)
    bias[:2], weight[2] = torch.tensor([INF, -INF]), NAN
    found = triton.conv_moments(x, None, "none", weight, bias, problem.args)
    assert found[1][:2].tolist() == [INF, -INF]
    assert found[1][2].isnan()
    assert found[2][:3].isnan().all()
    for one, other in zip(found, clean, strict=True):
        channel, rest = 1 if one.dim() == 4 else 0, problem.weight[0] - 3
        assert torch.equal(one.narrow(channel, 3, rest), other.narrow(channel, 3, rest))


def test_the_weight_gradient_reads_what_the_forward_read(monkeypatch):
    """aten is given act(norm(x)) as it was multiplied, and x itself where only its shape counts."""
    calls = []
    monkeypatch.setattr(reference, "convolution_backward", lambda *args: calls.append(args))
    x, norm = LAYOUTS["channels_last"](torch.randn(2, 17, 5, 3)).to(DEVICE, torch.bfloat16), norm_of(17)
    rest = (torch.ones(4, 17, 1, 1), ConvArgs((1, 1), (0, 0), (1, 1), 1))
    for needs in ((True, True, False), (True, False, False)):
        triton.convolution_backward(x, x, norm, "relu", *rest, needs, None)
    triton.convolution_backward(x, x, None, "relu", *rest, (True, True, True), x)
    (_, first, *others), (_, second, *_), (_, third, *last) = calls
    assert torch.equal(first, triton.norm_act(x, norm, None, None, "relu")[0])
    assert second is third is x
    assert others == [None, "relu", *rest, (True, True, False), None]
    assert last == [None, "relu", *rest, (True, True, True), x]
