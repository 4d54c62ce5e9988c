"""The Triton backend's kernels, family by family and configuration by configuration; on the CPU in the interpreter."""

import copy

import pytest
import torch
from devices import full_fp32
from networks import calibrate, largest, seeded
from problems import BACKEND_NAMES, LAYOUTS, dtypes, poisoned
from tolerances import assert_two_times, tolerance

import fused_resnet as fr
from fused_resnet import candidates as trials
from fused_resnet.backends import backend_report, canary, triton
from fused_resnet.backends.config import Config, Kernel
from fused_resnet.backends.problem import Problem
from fused_resnet.parity import compare

if "triton" not in BACKEND_NAMES:
    pytest.skip(backend_report()["triton"], allow_module_level=True)

from fused_resnet.backends.triton import elementwise, epilogue, general, registry, tiles
from fused_resnet.backends.triton.launch import Launch, is_wide

poison = pytest.fixture(autouse=True)(poisoned)


@pytest.fixture
def full_precision():
    """In the interpreter the switch changes only which kernels take fp32: there those of TF32 are run."""
    yield from full_fp32() if DEVICE.type == "cuda" else (None,)


DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPABILITY = triton.capability(DEVICE)


def convolution(x, k, window=3, stride=1, padding=None, dilation=1, groups=1, residual=False, act="relu"):
    window, stride, dilation = ((v, v) if isinstance(v, int) else v for v in (window, stride, dilation))
    padding = tuple(d * (w // 2) for d, w in zip(dilation, window, strict=True)) if padding is None else (padding,) * 2
    geometry = (k, x[1] // groups, *window), stride, padding, dilation, groups
    return Problem("conv_scale_act", x, torch.float16, *geometry, residual, act)


# By family: what a shared case does not reach.
PROBLEMS = {
    "conv1x1": (
        convolution((2, 24, 5, 7), 40, 1, residual=True),
        convolution((1, 8, 1, 1), 8, 1),
        convolution((257, 16, 1, 1), 72, 1, act="relu6"),
        convolution((3, 136, 7, 7), 16, 1, residual=True, act="none"),
    ),
    "implicit_gemm": (
        convolution((3, 64, 7, 5), 64, residual=True),
        convolution((257, 16, 2, 2), 8),
        convolution((1, 8, 3, 3), 136, padding=7, act="none"),
        convolution((2, 24, 9, 6), 24, (5, 2), dilation=(1, 3), act="relu6"),
        convolution((2, 32, 6, 10), 24, 1, 2, residual=True),
        convolution((2, 48, 10, 8), 64, 3, 2, residual=True),
        convolution((1, 16, 8, 6), 8, 4, 2, padding=1, dilation=2),
        convolution((1, 192, 2, 2), 64, residual=True),
    ),
    "general": (
        convolution((2, 17, 7, 5), 19, residual=True),
        convolution((257, 1, 2, 3), 1),
        convolution((1, 3, 9, 9), 16, 7, 2),
        convolution((2, 20, 5, 4), 30, (2, 3), (2, 1), padding=3, groups=5, residual=True),
        convolution((2, 64, 5, 5), 128, 1, 3),
        convolution((1, 9, 4, 4), 27, groups=9, act="relu6"),
    ),
    "cudnn": (convolution((2, 17, 7, 5), 19, residual=True), convolution((1, 3, 9, 9), 16, 7, 2)),
    "scale_act": (
        Problem("scale_act", (2, 17, 5, 3), torch.float16, residual=True, act="relu"),
        Problem("scale_act", (1, 1, 7, 9), torch.float16, act="relu6"),
        Problem("scale_act", (257, 192, 1, 1), torch.float16, act="none"),
    ),
    "add_act": (
        Problem("add_act", (2, 17, 5, 3), torch.float16, residual=True, act="relu"),
        Problem("add_act", (257, 16, 1, 1), torch.float16, residual=True, act="relu6"),
    ),
}
CASES = [(name, problem) for name, problems in PROBLEMS.items() for problem in problems]
cases = pytest.mark.parametrize(("name", "problem"), CASES, ids=[f"{name}-{p}" for name, p in CASES])


def family_of(name):
    return next(f for families in registry.FAMILIES.values() for f in families if f.name == name)


@cases
@dtypes()
def test_kernel_exact_in_every_configuration(name, problem, dtype):
    family, problem = family_of(name), problem._replace(dtype=dtype)
    reason = family.unsupported(problem, CAPABILITY)
    if reason:
        pytest.skip(f"{name}: {reason}")
    found = family.configs(problem, CAPABILITY)
    assert len(set(found)) == len(found) > 0
    for config in found:
        expected, out = canary.run(triton, problem, Kernel(family, config), DEVICE)
        assert torch.equal(out, expected), config


@cases
@dtypes()
def test_kernel_two_times(name, problem, dtype):
    """As `tune` checks a candidate: random values, the first configuration of each family."""
    problem = problem._replace(dtype=dtype, act="silu")
    with torch.no_grad():
        tensors = trials.random_tensors(problem, DEVICE)
        exact = trials.truth(problem, tensors)
        eager, *found = (c for c in trials.candidates(problem, tensors, 99) if c.backend != "cuda")
        seen = set()
        for candidate in found:
            family = Config.parse(candidate.kernel).family
            if family not in seen:
                seen.add(family)
                row = compare(("", "", "", ""), candidate.prepare()(), eager.prepare()(), exact, dtype)
                assert row.passed, (candidate.kernel, row)
    assert name in seen or family_of(name).unsupported(problem, CAPABILITY)


@dtypes(torch.bfloat16, torch.float16)
def test_results_are_rounded_to_the_nearest(dtype):
    """Of one sum, which fp32 holds whole; NaN and infinity stay. The interpreter's own casts to bf16 cut bits off."""
    x, residual = (LAYOUTS["channels_last"](torch.randn(2, 64, 9, 9).to(dtype)).to(DEVICE) for _ in range(2))
    x[0, :3, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    expected = (x.float() + residual.float()).to(dtype)
    identity, one = torch.eye(64).to(DEVICE, dtype)[:, :, None, None], torch.ones(64, device=DEVICE)
    sums = fr.ops.add_act(x, residual, act="none", backend="triton")
    assert torch.equal(sums.nan_to_num(9.0), expected.nan_to_num(9.0))
    finite = x.nan_to_num(0.0, 0.0, 0.0)
    expected = (finite.float() + residual.float()).to(dtype)
    y = fr.ops.conv_scale_act(finite, identity, one, 0 * one, residual=residual, act="none", backend="triton")
    assert torch.equal(y, expected)


def test_every_family_has_problems():
    """A family without one is not tested here: those with files of their own are named."""
    elsewhere = {"stem", "stem_rows", "stem_pool", "depthwise", "grouped"}
    assert {f.name for families in registry.FAMILIES.values() for f in families} - elsewhere == set(PROBLEMS)


def test_config_text_is_read_back():
    for name, problem in CASES:
        for config in family_of(name).configs(problem, (9, 0)):
            assert Config.parse(str(config)) == config
    for text in ("", "conv1x1", "conv1x1 128 w4", "conv1x1 axb w4 s3"):
        with pytest.raises(ValueError, match="not a kernel's configuration"):
            Config.parse(text)


# --- tiles and offsets ---


@pytest.mark.parametrize("edge", [56, 28, 14, 7])
@pytest.mark.parametrize("block_m", [128, 256])
def test_tile_shape_wastes_nothing_on_large_batches(edge, block_m):
    images, p, q = tiles.tile_shape(256, edge, edge, block_m)
    assert images * p * q == block_m
    assert 256 % images == edge % p == edge % q == 0


def test_tile_shape_on_small_batches():
    assert tiles.tile_shape(1, 56, 56, 64) == (1, 8, 8)
    images, p, q = tiles.tile_shape(1, 1, 300, 256)
    assert (images, p, q) == (1, 1, 256)


@pytest.mark.parametrize("tile", [0, (1 << 31) // 64 - 1, (1 << 33) // 64])
def test_pixel_numbers_leave_32_bits(tile):
    """reliability.md, more than 2^31 elements: where a pixel's number passes 2^31, it is counted in 64 bits."""
    import triton as language
    import triton.language as tl

    @language.jit
    def kernel(out_ptr, tile, WIDE: tl.constexpr):
        tl.store(out_ptr + tl.arange(0, 64), epilogue.pixel_numbers(tile + tl.program_id(0), WIDE, 64))

    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    wide = is_wide((tile + 1) * 64)
    Launch(kernel, 1, (out, tile), {"WIDE": wide}, 4, 1).run()
    assert out.tolist() == list(range(tile * 64, tile * 64 + 64))
    assert wide == (tile > 0)


@pytest.mark.parametrize("name", ["general", "max_pool2d"])
def test_wide_kernels_are_exact(name, monkeypatch):
    """With pixels counted in 64 bits, as for an image that needs it."""
    for module in (general, elementwise):
        monkeypatch.setattr(module, "is_wide", lambda count: True)
    if name == "general":
        problem = convolution((2, 17, 7, 5), 19, residual=True)
        expected, out = canary.run(
            triton, problem, Kernel(general.FAMILY, general.configs(problem, CAPABILITY)[0]), DEVICE
        )
        assert torch.equal(out, expected)
    else:
        x = LAYOUTS["channels_last"](torch.randn(2, 17, 7, 5)).to(DEVICE)
        with torch.no_grad(), fr.use_backend("triton"):
            assert torch.equal(fr.ops.max_pool2d(x, 3, 2, 1), torch.nn.functional.max_pool2d(x, 3, 2, 1))


def test_grids_of_large_images():
    """A stem's map at batch 4096 (t832): the programs cover it, and are fewer than 2^31."""
    large = torch.empty((4096, 64, 112, 112), device="meta", dtype=torch.float16, memory_format=torch.channels_last)
    vector = torch.empty(64, device="meta")
    problem = Problem("scale_act", tuple(large.shape), torch.float16, residual=True, act="relu")
    config = elementwise.scale_configs(problem, CAPABILITY)[0]
    (launch,) = elementwise.scale_launches(problem, config, large, None, vector, vector, large, large)
    rows, columns = config.blocks
    assert launch.grid * rows * columns == large.numel() > 1 << 31
    assert launch.grid < 1 << 31


# --- whole networks ---


def test_stem_and_pooling_are_one_kernel(monkeypatch):
    """In a network, for a channels_last image; not where somebody hooks the pooling or replaces the stem."""
    ran = []
    original = triton.runner
    monkeypatch.setattr(triton, "runner", lambda p, *rest: ran.append(p.op) or original(p, *rest))
    model = calibrate(seeded(fr.resnet18), torch.randn(4, 3, 32, 32))
    model.layer1 = model.layer2 = model.layer3 = torch.nn.Sequential()
    model.layer4, model.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Identity()
    model, x = model.to(DEVICE).half(), LAYOUTS["channels_last"](torch.randn(1, 3, 13, 17, device=DEVICE).half())
    with torch.no_grad():
        expected, truth = model(x), copy.deepcopy(model).double()(x.double())
        for changed in (None, "hook", "stem"):
            if changed == "hook":
                model.maxpool.register_forward_hook(lambda *_: None)
            if changed == "stem":
                model.maxpool._forward_hooks.clear()
                model.__class__ = type("Other", (fr.ResNet,), {"stem": lambda self, x: fr.ResNet.stem(self, x)})
            with fr.use_backend("triton"):
                assert_two_times(model(x), expected, truth)
    assert ran == ["conv_scale_act_max_pool2d", "conv_scale_act"]  # the third is the second, which is kept


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_resnet18_is_the_reference(dtype, full_precision):
    """The whole network at 32x32, kernel by kernel; in fp16 with the stem and its pooling in one."""
    model, x = calibrate(seeded(fr.resnet18), torch.randn(8, 3, 32, 32)).to(DEVICE), torch.randn(2, 3, 32, 32)
    truth = copy.deepcopy(model).double()
    model, x = model.to(dtype), x.to(DEVICE, dtype)
    x = LAYOUTS["channels_last"](x) if dtype == torch.float16 else x
    with torch.inference_mode():
        with fr.use_backend("reference"):
            expected, exact = model(x), truth(x.double())
        with fr.use_backend("triton"):
            y = model(x)
    assert_two_times(y, expected, exact)
    if dtype == torch.float32:
        assert largest(y, expected) < tolerance("model_eval_fp32")
