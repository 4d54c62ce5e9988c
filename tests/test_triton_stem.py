"""The Triton kernels of the stem: what they do about odd sizes, missing channels, NaN and the max-pool."""

import pytest
import torch
import torch.nn.functional as F
from problems import LAYOUTS, finish, integers, poisoned, representable

triton = pytest.importorskip("triton", reason="Triton is not installed")

from fused_resnet.backends.problem import Problem  # noqa: E402
from fused_resnet.backends.triton import stem, stem_pool  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CAPABILITY = torch.cuda.get_device_capability() if GPU else (9, 0)

pytestmark = pytest.mark.skipif(
    not GPU and not triton.knobs.runtime.interpret,
    reason="needs an NVIDIA GPU or Triton's interpreter, and TRITON_INTERPRET is not set",
)

# Of each kernel the smallest tile, by both ways to lay the windows out.
SMALLEST = {
    "tiles": (stem.FAMILY, (64, 64)),
    "rows": (stem_pool.ROWS, (3, 32, 64)),
    "pool": (stem_pool.FAMILY, (3, 32, 64)),
}
PITCHES = {"overlapping": stem.OVERLAPPING, "written_out": stem.WRITTEN_OUT}
kernels = pytest.mark.parametrize(
    ("family", "blocks"),
    [
        pytest.param(family, (*blocks, pitch), id=f"{kernel}-{how}")
        for kernel, (family, blocks) in SMALLEST.items()
        for how, pitch in PITCHES.items()
    ],
)

poison = pytest.fixture(autouse=True)(poisoned)


def config_of(family, problem, blocks):
    [config] = [c for c in family.configs(problem, CAPABILITY) if c.blocks == blocks]
    return config


def compute(family, blocks, x, weight, scale, shift, act, residual=None):
    """The kernel's output and, from fp64, the true one; both in the dtype of `x`. `out` is the residual."""
    pool, dtype = family is stem_pool.FAMILY, x.dtype
    op = "conv_scale_act_max_pool2d" if pool else "conv_scale_act"
    shapes = tuple(x.shape), dtype, tuple(weight.shape)
    problem = Problem(op, *shapes, (2, 2), (3, 3), residual=residual is not None, act=act)
    if reason := family.unsupported(problem, CAPABILITY):
        pytest.skip(reason)
    config = config_of(family, problem, blocks)
    truth = F.conv2d(x.double(), weight.double(), stride=2, padding=3)
    truth = truth * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    truth = finish(truth, None if residual is None else residual.double(), act)
    truth = F.max_pool2d(truth, 3, 2, 1) if pool else truth
    out = torch.full_like(truth, float("nan"), dtype=dtype) if residual is None else residual.clone()
    out, x = (LAYOUTS["channels_last"](t).to(DEVICE) for t in (out, x))
    weights = family.pack(weight.to(DEVICE), problem, config)
    vectors = scale.to(DEVICE), shift.to(DEVICE)
    for launch in family.launches(problem, config, x, weights, *vectors, None if residual is None else out, out):
        launch.run()
    return out.cpu(), truth


def problem_of(n, c, h, w, k, dtype=torch.float16):
    """Integers, so that every sum is exact; scales of both signs, so that the pool must come last."""
    weight = integers(k, c, 7, 7, dtype=dtype) * (torch.rand(k, c, 7, 7) < 0.4)
    scale = 2.0 ** integers(k) * (1 - 2 * integers(k, low=0))
    return LAYOUTS["channels_last"](integers(n, c, h, w, dtype=dtype)), weight, scale, integers(k, low=-4, high=4)


# N, C, H, W, K and the dtype: parities of H and W, of P and Q; several tiles, strips and images; one pixel.
CASES = {
    "rgb": (1, 3, 13, 52, 64, torch.float16),
    "one_channel": (1, 1, 20, 7, 72, torch.bfloat16),
    "two_channels": (1, 2, 1, 1, 8, torch.bfloat16),
    "four_channels": (3, 4, 6, 11, 16, torch.float32),
}


@kernels
@pytest.mark.parametrize("case", CASES)
def test_stem_is_exact(family, blocks, case):
    out, truth = compute(family, blocks, *problem_of(*CASES[case]), "relu6" if case == "rgb" else "none")
    assert torch.equal(out, representable(truth, out.dtype))


LARGER = {
    "tiles": (stem.FAMILY, (256, 64, stem.WRITTEN_OUT)),
    "tiles_of_channels": (stem.FAMILY, (128, 128, stem.OVERLAPPING)),
    "rows": (stem_pool.ROWS, (7, 64, 64, stem.WRITTEN_OUT)),
    "pool": (stem_pool.FAMILY, (1, 64, 64, stem.OVERLAPPING)),
}


@pytest.mark.parametrize(("family", "blocks"), LARGER.values(), ids=LARGER.keys())
def test_stem_in_larger_tiles_is_exact(family, blocks):
    out, truth = compute(family, blocks, *problem_of(1, 3, 7, 38, 72), "relu")
    assert torch.equal(out, representable(truth, out.dtype))


def test_stem_adds_a_residual_in_place():
    residual = LAYOUTS["channels_last"](integers(2, 16, 5, 6, dtype=torch.float16))
    problem = problem_of(2, 3, 9, 11, 16)
    out, truth = compute(stem.FAMILY, (64, 64, stem.OVERLAPPING), *problem, "relu", residual)
    assert torch.equal(out, representable(truth, out.dtype))


@kernels
@pytest.mark.filterwarnings("ignore:invalid value")
def test_stem_puts_nan_where_pytorch_does(family, blocks):
    """Corners, both parities of a row and of a column: no window may reach over its seven pixels."""
    x, *rest = problem_of(2, 3, 20, 27, 8)
    nan, inf = float("nan"), float("inf")
    for i, c, h, w, value in ((0, 0, 0, 0, nan), (0, 2, 19, 26, inf), (0, 1, 8, 11, nan), (0, 0, 9, 20, -inf)):
        x[i, c, h, w], x[1, c, h - 1, w - 1] = value, -value
    out, truth = compute(family, blocks, x, *rest, "relu")
    assert 0 < truth.isnan().sum() < truth.numel()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.nan_to_num(7).double(), truth.to(out.dtype).nan_to_num(7).double())


def test_stem_max_pool_spreads_nan_and_ignores_what_is_outside():
    """Values below zero at every edge, where a window of the pool reaches outside of the map."""
    x, weight, scale, shift = problem_of(1, 3, 17, 31, 8)
    x[0, 0, 3, 30] = float("nan")
    out, truth = compute(stem_pool.FAMILY, (3, 32, 64, stem.OVERLAPPING), x, weight, scale, shift - 512, "none")
    assert truth.nan_to_num(-1).max() < 0
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.nan_to_num(7).double(), truth.nan_to_num(7))


REFUSED = {
    "not a 7x7 convolution with stride 2 and padding 3": {"padding": (2, 2)},
    "more than 4 channels": {"x": (1, 5, 9, 9), "weight": (8, 5, 7, 7)},
    "its channels are not multiples of 16 bytes": {"weight": (12, 3, 7, 7)},
    "more than 2^31 programs": {"x": (1 << 27, 3, 9, 9)},
    "": {},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_stem_says_what_it_does_not_take(reason):
    problem = Problem("conv_scale_act", (1, 3, 9, 9), torch.float16, (8, 3, 7, 7), (2, 2), (3, 3))
    for family in (stem.FAMILY, stem_pool.ROWS, stem_pool.FAMILY):
        assert family.unsupported(problem._replace(**REFUSED[reason]), (9, 0)) == reason
        assert family.unsupported(problem, (8, 0))
