"""csrc/cuda/depthwise*.cu, forward and gradients: on a GPU where there is one, else thread by thread on the CPU."""

import pytest
import torch
from cuda_convolutions import (
    check_exact,
    check_not_finite,
    check_orders,
    check_two_times,
    compute,
    plain,
    problem,
    random_numbers,
    whole_numbers,
)
from cuda_kernels import DEVICE, FENCES, IN_EMULATOR, both_orders, library, placed, sparse
from problems import dtypes, integers, poisoned
from tolerances import assert_two_times

from fused_resnet.backends.cuda import depthwise
from fused_resnet.backends.cuda.family import geometry
from fused_resnet.backends.reference import channels_last

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
poison = pytest.fixture(autouse=True)(poisoned)

FAMILY = depthwise.FAMILY
CAPABILITY = (9, 0)


def depthwise_of(x, *geometry, **options):
    return problem(x, x[1], *geometry, groups=x[1], **options)


PROBLEMS = (
    depthwise_of((2, 24, 9, 7), residual=True),
    depthwise_of((2, 20, 7, 8), 3, 2, act="relu6"),
    depthwise_of((1, 8, 6, 11), 5, residual=True),
    depthwise_of((2, 36, 8, 5), 5, 2, residual=True, act="none"),
    depthwise_of((2, 17, 5, 6), residual=True),
    depthwise_of((1, 3, 6, 5), 5, 2),
    depthwise_of((3, 33, 1, 1), residual=True),
    depthwise_of((1, 16, 5, 3), padding=0),
    depthwise_of((1, 16, 4, 4), padding=(4, 1)),
    depthwise_of((1, 8, 7, 5), 3, 2, padding=(0, 3)),
    depthwise_of((1, 8, 3, 6), 5, 2, padding=(3, 5)),
    depthwise_of((1, 24, 7, 6), 3, 1, 2, 2, residual=True),
    depthwise_of((1, 8, 6, 7), (1, 7), (2, 1)),
    depthwise_of((1, 5, 7, 8), (7, 2), 2, (3, 0)),
)
problems = pytest.mark.parametrize("case", PROBLEMS, ids=str)


def configs(case):
    """Those that the family offers, and one whose strips are of two rows."""
    found = depthwise.configs(case, CAPABILITY)
    return list(dict.fromkeys([*found, found[0]._replace(blocks=(2, found[0].blocks[1]))]))


def gradients(case, grad, x, weight):
    args = (grad.double(), x.double(), weight.double(), None, case.stride, case.padding, case.dilation)
    return torch.ops.aten.convolution_backward(*args, False, (0, 0), case.groups, [True, True, False])[:2]


@dtypes()
@problems
def test_depthwise_exact(case, dtype):
    case = case._replace(dtype=dtype)
    assert not depthwise.unsupported(case, CAPABILITY)
    check_exact(FAMILY, case, configs(case))


@dtypes()
@problems
def test_depthwise_gradients_exact(case, dtype):
    case = case._replace(dtype=dtype)
    x, weight, *_ = whole_numbers(case)
    grad = channels_last(integers(*case.output, low=-2, high=2, dtype=dtype)).to(DEVICE)
    d_x, d_weight = gradients(case, grad.cpu(), x.cpu(), weight.cpu())
    for at in FENCES:
        x, weight, grad = (placed(t, at) for t in (x, weight, grad))
        found = depthwise.input_gradient(grad, case.x, weight, case)
        assert found.dtype == dtype
        assert torch.equal(found.cpu().double(), d_x)
        found = depthwise.weight_gradient(grad, x, case.weight, case)
        assert found.dtype == torch.float32
        assert torch.equal(found.cpu().double(), d_weight)


@dtypes()
@pytest.mark.parametrize("act", ["relu", "hardswish", "silu"])
@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[3], PROBLEMS[11]], ids=str)
def test_depthwise_two_times(case, act, dtype):
    check_two_times(FAMILY, case._replace(dtype=dtype, act=act), configs(case._replace(dtype=dtype)))


@dtypes()
@pytest.mark.parametrize("case", PROBLEMS[:4], ids=str)
def test_depthwise_gradients_two_times(case, dtype):
    case = case._replace(dtype=dtype)
    x, weight, *_ = random_numbers(case)
    grad = channels_last(torch.randn(case.output).to(dtype)).to(DEVICE)
    plain_args = (None, case.stride, case.padding, case.dilation, False, (0, 0), case.groups, [True, True, False])
    eager = torch.ops.aten.convolution_backward(grad.cpu(), x.cpu(), weight.cpu(), *plain_args)[:2]
    truth = gradients(case, grad.cpu(), x.cpu(), weight.cpu())
    d_x = depthwise.input_gradient(grad, case.x, weight, case).cpu()
    d_weight = depthwise.weight_gradient(grad, x, case.weight, case).cpu().to(dtype)
    for found, plain_one, true_one in zip((d_x, d_weight), eager, truth, strict=True):
        assert_two_times(found, plain_one, true_one, floor="floor_ulps_gradient")


@dtypes()
@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[2], PROBLEMS[11]], ids=str)
def test_depthwise_not_finite(case, dtype):
    case = case._replace(dtype=dtype, act="none")
    check_not_finite(FAMILY, case, configs(case))


@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[3], PROBLEMS[11]], ids=str)
def test_depthwise_gradients_not_finite(case):
    """In the middle of the map, where every implementation multiplies the same values."""
    x, weight, *_ = random_numbers(case)
    weight += (weight == 0).to(weight.dtype)
    grad = channels_last(torch.randn(case.output).to(case.dtype)).to(DEVICE)
    middle = [size // 2 for size in grad.shape[2:]]
    grad[0, 3, middle[0], middle[1]], x[0, 5, 4, 3], x[0, 6, 4, 3] = torch.inf, torch.nan, -torch.inf
    d_x, d_weight = gradients(case, grad.cpu(), x.cpu(), weight.cpu())
    found = depthwise.input_gradient(grad, case.x, weight, case).cpu()
    found_weight = depthwise.weight_gradient(grad, x, case.weight, case).cpu()
    for one, other in ((found, d_x), (found_weight, d_weight)):
        assert not other.isfinite().all()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(one), kind(other))


@both_orders
@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[5], PROBLEMS[12]], ids=str)
def test_depthwise_is_deterministic(case, order):
    x, weight, scale, shift, residual = random_numbers(case)
    grad = channels_last(torch.randn(case.output).to(case.dtype)).to(DEVICE)
    check_orders(order, compute, FAMILY, case, configs(case)[0], x, weight, scale, shift, residual)
    check_orders(order, depthwise.input_gradient, grad, case.x, weight, case)
    check_orders(order, depthwise.weight_gradient, grad, x, case.weight, case)


def test_depthwise_of_many_images():
    """reliability.md, grid limits: one pixel each, all in one dimension of the grid."""
    case = depthwise_of((65536, 8, 1, 1))
    x, weight, scale, shift, _ = whole_numbers(case)
    found = compute(FAMILY, case, depthwise.configs(case, CAPABILITY)[0], x, weight, scale, shift, None)
    assert torch.equal(found.double(), plain(case, x, weight, scale, shift, None))


@pytest.mark.skipif(not IN_EMULATOR, reason="tests/test_gpu_large.py does it on a GPU")
@pytest.mark.parametrize("window", [3, (3, 5)], ids=str)
def test_depthwise_beyond_two_to_the_31(monkeypatch, window):
    """The last of more than 2^31 elements; memory that nobody touches is not there."""
    case = depthwise_of((3, 8, 9500, 9500), window, act="none")
    x, out = sparse(case.x, case.dtype), sparse(case.output, case.dtype)
    assert out.numel() > 1 << 31
    assert not depthwise.unsupported(case, CAPABILITY)
    x[-1, :, -1, -1] = torch.arange(8)
    weight = torch.zeros(case.weight)
    weight[:, :, case.weight[2] // 2, case.weight[3] // 2] = 1
    monkeypatch.setenv("FUSED_RESNET_EMULATOR_LAST", "1")
    for config in depthwise.configs(case, CAPABILITY):
        FAMILY.run(case, config, x, depthwise.pack(weight, case, config), torch.ones(8), torch.ones(8), None, out)
        assert out[-1, :, -1, -1].tolist() == list(range(1, 9)), config
        out[-1, :, -1, -1] = 0
    depthwise_args = (depthwise.pack(weight, case, None), geometry(case), (4, 8, 4), out)
    torch.ops.fused_resnet_C.cuda_depthwise_dgrad(x, *depthwise_args)
    assert out[-1, :, -1, -1].tolist() == list(range(8))


@pytest.mark.parametrize("window", range(1, 8))
@pytest.mark.parametrize("channels", [17, 20, 144])
def test_depthwise_has_configurations_for_every_window(channels, window):
    for stride in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            case = depthwise_of((1, channels, 14, 14), window, stride)._replace(dtype=dtype)
            found = depthwise.configs(case, CAPABILITY)
            assert len(set(found)) == len(found) > 0, case


def test_depthwise_says_why_not():
    assert "not a depthwise" in depthwise.unsupported(problem((1, 8, 4, 4), 8), CAPABILITY)
    assert "wider than 7" in depthwise.unsupported(depthwise_of((1, 8, 9, 9), 9), CAPABILITY)
    assert "2^31" in depthwise.unsupported(depthwise_of((1, 8, 32768, 8192)), CAPABILITY)
    assert "8.0" in depthwise.unsupported(PROBLEMS[0], (7, 5))


def test_depthwise_schema():
    case, ops = PROBLEMS[0], torch.ops.fused_resnet_C
    x, weight, scale, shift, residual = whole_numbers(case)
    weights, tile, sizes = depthwise.pack(weight, case, None), (4, 8, 4), geometry(case)
    out = channels_last(torch.empty(case.output, dtype=case.dtype, device=DEVICE))
    workspace = torch.empty((2, 9, 24), device=DEVICE)
    dweight = torch.empty(case.weight, device=DEVICE)
    for op, args in {
        ops.cuda_depthwise_fwd: (x, weights, scale, shift, residual, sizes, tile, 1, out),
        ops.cuda_depthwise_dgrad: (x, weights, sizes, tile, out),
        ops.cuda_depthwise_wgrad: (x, x, sizes, workspace, dweight),
    }.items():
        torch.library.opcheck(op.default, args, test_utils="test_schema")
