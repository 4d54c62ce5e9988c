"""The backend of the compiled CUDA kernels: where it is available, what it takes, and its first runs; in the emulator
where there is no GPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from problems import BACKEND_NAMES, LAYOUTS, dtypes
from tolerances import tolerance

import fused_resnet as fr
from fused_resnet import candidates as trials
from fused_resnet._version import __version__
from fused_resnet.backends import backend_report, canary, cuda, plan, reference, tunable, tunable_backends
from fused_resnet.backends.problem import ConvArgs, Problem

if "cuda" not in BACKEND_NAMES:
    pytest.skip(backend_report()["cuda"], allow_module_level=True)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ADD = Problem("add_act", (2, 20, 5, 3), torch.float32, residual=True, act="relu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder, and nothing remembered."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSED_RESNET_BACKEND", raising=False)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    plan.reload()
    canary._verdicts.clear()
    canary._path.cache_clear()


def write_plan(problem, kernel=""):
    entries = {plan.key_of(problem): {"backend": "cuda", "kernel": kernel}}
    plan.write(plan.user_path(plan.device_name(DEVICE)), "a GPU", {"fused_resnet": __version__}, entries)
    plan.reload()


def pair(problem=ADD):
    return [LAYOUTS["channels_last"](torch.randn(problem.x).to(problem.dtype)).to(DEVICE) for _ in range(2)]


@dtypes()
def test_add_act_is_the_references(dtype):
    x, residual = pair(ADD._replace(dtype=dtype))
    assert torch.equal(fr.ops.add_act(x, residual, backend="cuda"), F.relu(x + residual))
    with fr.use_backend("cuda"):
        assert torch.equal(fr.ops.add_act(x, residual), F.relu(x + residual))


def test_nothing_chooses_it_without_a_plan(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_RESNET_LOG", "1")
    fr.ops.add_act(*pair())
    assert ": cuda" not in capsys.readouterr().err


def test_plan_chooses_it_and_the_log_says_so(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_RESNET_LOG", "1")
    write_plan(ADD)
    x, residual = pair()
    assert torch.equal(fr.ops.add_act(x, residual), F.relu(x + residual))
    assert f"add_act 2x20x5x3 +residual relu float32 on {DEVICE}: cuda; tuned plan" in capsys.readouterr().err


def test_plans_kernel_of_a_convolution():
    x, weight = torch.randn(2, 16, 5, 5, device=DEVICE), torch.randn(24, 16, 3, 3, device=DEVICE)
    problem = Problem.of("conv_scale_act", x, weight, ((1, 1), (1, 1), (1, 1), 1), None, "relu")
    second = cuda.candidates(problem, DEVICE)[1]
    write_plan(problem, str(second))
    assert tunable.choose(cuda, problem, DEVICE) == (second, "tuned plan")
    assert cuda.explain(problem, DEVICE) == f"{second}, by the tuned plan"
    assert cuda.trusted(problem, DEVICE)


# Those of an operator of training have no residual and no activation: a choice holds for every call of it.
FIRST_RUNS = [
    ADD,
    Problem("add_act_backward", (2, 20, 5, 3), torch.bfloat16, residual=True, act="silu"),
    Problem("conv_scale_act", (2, 16, 9, 9), torch.float16, (24, 16, 3, 3), padding=(1, 1), act="silu"),
    Problem("scale_act", (2, 20, 5, 3), torch.float16, act="relu6"),
    Problem("max_pool2d", (2, 20, 5, 3), torch.bfloat16),
    *[Problem("bn_act", (2, 20, 5, 3), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    Problem("conv_bn_act", (2, 16, 9, 9), torch.bfloat16, (24, 16, 3, 3), padding=(1, 1)),
    Problem("conv_bn_act", (2, 16, 9, 9), torch.float32, (16, 1, 3, 3), padding=(1, 1), groups=16),
]


@pytest.mark.parametrize("problem", FIRST_RUNS, ids=str)
def test_first_run_is_right(problem, cache):
    weight = torch.empty(problem.weight, device=DEVICE) if problem.weight else None
    assert not cuda.unsupported(problem.op, pair(problem)[0], weight, problem.args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.trusted(problem, DEVICE) is True
    assert len(list(cache.glob("verdicts-*-cuda*.json"))) == 1


# The functions that operators of training call.
OF_TRAINING = (
    "moments", "norm_act", "norm_act_reduce", "norm_act_input_grad", "norm_act_max_pool2d",
    "norm_act_max_pool2d_reduce", "norm_act_max_pool2d_input_grad", "conv_moments", "convolve", "convolution_backward",
    "max_pool2d", "add_act_backward",
)  # fmt: skip


# The same operators of another backend: what a first run compares is right where nothing is broken.
@pytest.mark.parametrize("problem", [p for p in FIRST_RUNS if p.op in canary.TRAINING], ids=str)
@pytest.mark.parametrize("how", ["right", "wrong", "raises"])
def test_first_run_of_training(problem, how, monkeypatch):
    broken_one = {"bn_act": "norm_act", "conv_bn_act": "conv_moments"}.get(problem.op, problem.op)
    original = getattr(reference, broken_one)

    def broken(*args):
        if how == "raises":
            raise RuntimeError("no launch\nmore")
        found = original(*args)
        first, *rest = found if isinstance(found, tuple) else (found,)
        first = first.clone()
        first[-1, -1, -1, -1] += 1
        return (first, *rest) if rest else first

    class Other:
        NAME = "other"
        lasting = staticmethod(lambda error: False)

    for name in OF_TRAINING:
        monkeypatch.setattr(Other, name, staticmethod(getattr(reference, name)), raising=False)
    if how != "right":
        monkeypatch.setattr(Other, broken_one, staticmethod(broken))
    right, reason, lasts = canary._try(Other, canary.tiny(problem), "", DEVICE)
    assert right is (how == "right")
    assert reason.startswith({"right": "", "wrong": "1 of ", "raises": "RuntimeError: no launch"}[how])
    assert lasts is (how != "raises")


def test_kernel_that_fails_is_left_out(monkeypatch):
    monkeypatch.setattr(cuda, "add_act", lambda x, residual, act: x)
    write_plan(ADD)
    x, residual = pair()
    with pytest.warns(UserWarning, match=r"kernel cuda failed its first run on add_act .* values are wrong"):
        y = fr.ops.add_act(x, residual)
    assert torch.equal(y, F.relu(x + residual))


def test_tune_takes_backends_in_turn():
    tensors = trials.random_tensors(ADD, DEVICE)
    names = [candidate.name for candidate in trials.candidates(ADD, tensors, 99)]
    assert names[0] == "reference"
    assert names.index("cuda") <= len(tunable_backends(DEVICE.type))
    assert len(set(names)) == len(names)
    assert len(trials.candidates(ADD, tensors, 1)) == 2


@pytest.mark.parametrize(
    ("compiled", "device", "expected"),
    [
        ("8.0+PTX;9.0a", (8, 0), True),
        ("8.0+PTX;9.0a", (8, 6), True),
        ("8.0+PTX;9.0a", (9, 0), True),
        ("8.0+PTX;9.0a", (12, 0), True),
        ("9.0a", (8, 0), False),
        ("9.0a", (10, 0), False),
        ("9.0", (8, 9), False),
        ("8.0", (9, 0), False),
        ("8.6;9.0", (8, 0), False),
        ("10.0f", (10, 3), True),
        ("Ampere;9.0a", (8, 0), True),  # a name says nothing: the launch will tell
    ],
)
def test_library_has_code_for_a_device(compiled, device, expected):
    assert cuda.covered(compiled, device) is expected


def test_first_run_tells_tf32_from_fp32(monkeypatch):
    """A kernel that rounds where it may not fails; and what was found out about one is not believed of the other."""
    x, weight, _ = convolution("implicit_gemm")
    problem = Problem.of("conv_scale_act", x, weight, ConvArgs.of((1, 1), (1, 1), (1, 1), 1), None, "none")
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=True):
        assert cuda.trusted(problem, DEVICE)
    monkeypatch.setattr(cuda.implicit_gemm, "tf32_allowed", lambda x: True)
    full = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with full, pytest.warns(UserWarning, match="failed its first run"):
        assert not cuda.trusted(problem, DEVICE)


def test_missing_kernels_say_why(monkeypatch):
    monkeypatch.setattr(cuda, "_lacking", lambda: cuda.NO_KERNELS)
    monkeypatch.setattr(cuda, "_emulated", lambda: False)
    assert cuda.unavailable() == cuda.NO_KERNELS
    with pytest.raises(
        RuntimeError, match="backend 'cuda' is not available: the compiled extension has no CUDA kernels"
    ):
        fr.ops.add_act(*pair(), backend="cuda")


def test_an_old_driver_is_said(monkeypatch):
    """Torch's own CUDA may be content with it."""
    reason = "the NVIDIA driver is older than CUDA 13.0, which the kernels were built with: it has CUDA 12.8"
    monkeypatch.setattr(cuda, "architectures", lambda: "8.0+PTX;9.0a")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.ops.fused_resnet_C, "cuda_driver_lacking", lambda: reason)
    for available, lacking in ((True, reason), (False, "no NVIDIA GPU is here")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert cuda._lacking.__wrapped__() == lacking


def test_unsupported_says_why():
    x = torch.randn(1, 4, 3, 3, device=DEVICE)
    assert cuda.unsupported("add_act", x.double()) == "torch.float64 input; it takes float32, bfloat16 and float16"
    assert cuda.unsupported("add_act", x.to("meta")) == "x is on meta"
    weight = torch.randn(4, 4, 1, 1, device=DEVICE)
    args = Problem.of("conv_scale_act", x, weight, ((1, 1), (0, 0), (1, 1), 1), None, "none").args
    assert cuda.unsupported("conv_scale_act_max_pool2d", x, weight, args) == "it has no kernel for that"


CONVOLUTIONS = {
    "implicit_gemm": ((2, 16, 6, 6), (8, 16, 3, 3), {"padding": 1}),
    "depthwise": ((2, 16, 6, 6), (16, 1, 3, 3), {"padding": 1, "groups": 16}),
    "stem": ((2, 3, 12, 12), (16, 3, 7, 7), {"padding": 3, "stride": 2}),
}
convolutions = pytest.mark.parametrize("name", CONVOLUTIONS)


def convolution(name):
    """x and weight, and the options of a convolution that this family runs."""
    x, weight, options = CONVOLUTIONS[name]
    x, weight = torch.randn(x, device=DEVICE), torch.randn(weight, device=DEVICE)
    args = ConvArgs.of(*(_pair(options.get(key, default)) for key, default in GEOMETRY), options.get("groups", 1))
    problem = Problem.of("conv_scale_act", x, weight, args, None, "none")
    assert cuda.candidates(problem, DEVICE)[0].family.name == name
    return LAYOUTS["channels_last"](x), weight, options


GEOMETRY = (("stride", 1), ("padding", 0), ("dilation", 1))


def _pair(value):
    return (value, value)


def both_backends(function):
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return function("cuda"), function("reference")


@convolutions
def test_training_sees_a_weight_whose_version_stays(name):
    """Fused optimizers, `.data` and graph replays change it so: nothing packed is kept from step to step."""
    x, weight, options = convolution(name)
    ones = torch.ones(weight.shape[0], device=DEVICE)

    def step(backend):
        return fr.ops.conv_bn_act(
            x, weight, ones, ones, None, None, training=True, act="none", backend=backend, **options
        )

    for _ in range(2):
        found, expected = both_backends(step)
        assert_close_to(found, expected)
        before = weight._version
        weight.data.uniform_(-1, 1)
        assert weight._version == before


@convolutions
def test_vectors_may_lie_anywhere(name):
    """Slices, strided and expanded vectors: the kernels read 16 bytes at a time from addresses that have to fit."""
    x, weight, options = convolution(name)
    k = weight.shape[0]
    numbers = torch.rand(2 * k, device=DEVICE) + 0.5
    for vector in (numbers[1 : k + 1], numbers[::2], numbers[3:4].expand(k)):

        def inference(backend, vector=vector):
            return fr.ops.conv_scale_act(x, weight, vector, vector, act="none", backend=backend, **options)

        def training(backend, vector=vector):
            mean, var = torch.zeros(k, device=DEVICE), torch.ones(k, device=DEVICE)
            y = fr.ops.conv_bn_act(
                x, weight, vector, vector, mean, var, conv_bias=vector, training=True, backend=backend, **options
            )
            return torch.cat([y.flatten(), mean, var])

        for function in (inference, training):
            assert_close_to(*both_backends(function))


def assert_close_to(found, expected):
    bound = tolerance("other_backend") * expected.abs().max()
    assert (found - expected).abs().max() <= bound
