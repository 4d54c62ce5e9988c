"""Triton, on NVIDIA GPUs from sm_80 on: one launch a convolution with scale, shift, residual and activation; in
training batch norm, and convolutions that take the moments of their output.

With TRITON_INTERPRET=1 it takes CPU tensors instead, and runs the same kernels in Triton's interpreter: slowly, to test
them. Triton itself is imported with the first kernel.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.backends import reference, tunable
from fused_resnet.backends.config import Kernel
from fused_resnet.backends.layout import empty
from fused_resnet.backends.problem import POOLED, Problem
from fused_resnet.backends.reference import channels_last
from fused_resnet.backends.tunable import capability as capability

NAME = "triton"

# Operators with one way to run them; "bn_act" and "conv_bn_act" are what the selection calls training.
OPERATORS = ("add_act_backward", "max_pool2d", "bn_act", "conv_bn_act")
OPS = ("conv_scale_act", POOLED, "scale_act", "add_act", *OPERATORS)

# The functions of training.py, which imports Triton.
TRAINING = (
    "moments",
    "conv_moments",
    "convolve",
    "norm_act",
    "norm_act_reduce",
    "norm_act_input_grad",
    "convolution_backward",
    "norm_act_max_pool2d",
    "norm_act_max_pool2d_reduce",
    "norm_act_max_pool2d_input_grad",
)

MOST_POOLED = 25

_interpreting = threading.RLock()
_this = sys.modules[__name__]


@cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_type() -> str:
    """Where its tensors are."""
    return "cpu" if interpreted() else "cuda"


@cache
def unavailable() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.is_available() or interpreted():
        return ""
    return "no NVIDIA GPU is here; TRITON_INTERPRET=1 runs it on the CPU, slowly, to test it"


def unsupported(op: str, x: Tensor, weight: Tensor | None = None, args=None) -> str:
    if x.device.type != device_type():
        return f"x is on {x.device}" + ("; with TRITON_INTERPRET=1 it takes the CPU's" if interpreted() else "")
    reason = tunable.unfit(x) or ("" if op in OPS else "it has no kernel for that")
    if reason or op != POOLED:
        return reason
    problem = Problem.of(op, x, weight, args, None, "none")
    return "" if candidates(problem, x.device) else "no kernel of it takes this convolution with the pooling"


# --- which kernel -----------------------------------------------------------------------------------------------------


def candidates(problem: Problem, device: torch.device) -> list[Kernel]:
    """Every kernel that can run the problem, the likeliest first; [""] for an operator that has but one."""
    if problem.op in OPERATORS:
        return [""]
    return _registry().candidates(problem, capability(device))


@cache
def _registry():
    from fused_resnet.backends.triton import registry

    return registry


def explain(problem: Problem, device: torch.device) -> str:
    return tunable.explain(_this, problem, device)


def trusted(problem: Problem, device: torch.device) -> bool | None:
    return tunable.trusted(_this, problem, device)


@cache
def version() -> str:
    """Triton's, and a digest of the kernels' sources."""
    import triton

    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return f"triton{triton.__version__}-{digest}"


def convolves_by_torch(kernel: Kernel) -> bool:
    return kernel.family.name == "cudnn"


def lasting(error: Exception) -> bool:
    import triton

    return isinstance(error, (triton.CompilationError, triton.runtime.errors.OutOfResources))


# --- the operators ----------------------------------------------------------------------------------------------------


def run_launches(launches, device: torch.device) -> None:
    """Run launches in order, on the current stream of their tensors' device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run_launches(launches, torch.device("cuda", torch.cuda.current_device()))
    # The interpreter replaces parts of triton.language while it runs a kernel: one at a time.
    with _interpreting if interpreted() else contextlib.nullcontext():
        for each in launches:
            each.run()
    return None


def __getattr__(name: str):
    if name not in TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.training"), name)


def conv_scale_act(x, weight, scale, shift, residual, args, act):
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    return prepare_conv_scale_act(x, weight, scale, shift, residual, args, act)(x, residual, None)


def prepare_conv_scale_act(x, weight, scale, shift, residual, args, act):
    """Return `run(x, residual, out)` for channels_last inputs like these; `out` is the residual or None."""
    problem = Problem.of("conv_scale_act", x, weight, args, residual, act)
    return _prepare(problem, x.device, weight, scale, shift)


def prepare_conv_scale_act_max_pool2d(x, weight, scale, shift, args, act):
    """As `prepare_conv_scale_act`, without a residual and with the pooling."""
    return _prepare(Problem.of(POOLED, x, weight, args, None, act), x.device, weight, scale, shift)


def _prepare(problem, device, weight, scale, shift):
    return tunable.prepare(_this, problem, device, weight, scale, shift)


def runner(problem, kernel, weight, scale, shift):
    """`run(x, residual, out)` of one kernel; what an operator does not have is None."""

    def launch(x, *tensors):
        run_launches(kernel.family.launches(problem, kernel.config, x, *tensors), x.device)

    return tunable.family_runner(NAME, problem, kernel, launch, weight, scale, shift)


def scale_act(x, scale, shift, residual, act):
    problem = Problem.of("scale_act", x, None, None, residual, act)
    return _prepare(problem, x.device, None, scale, shift)(x, residual, None)


def add_act(x, residual, act):
    problem = Problem.of("add_act", x, None, None, residual, act)
    return _prepare(problem, x.device, None, None, None)(x, residual, None)


def add_act_backward(grad, y, x, residual, act):
    if act == "none":
        return channels_last(grad)
    from fused_resnet.backends.triton.elementwise import add_backward_launch

    out = empty(y.shape, y)
    tensors = (None if t is None else channels_last(t) for t in (grad, y, x, residual))
    run_launches([add_backward_launch(*tensors, act, out)], y.device)
    return out


def max_pool2d(x, kernel, stride, padding, size):
    from fused_resnet.backends.triton.elementwise import max_pool2d_launch

    if kernel[0] * kernel[1] > MOST_POOLED:  # each is a load in the code
        return reference.max_pool2d(x, kernel, stride, padding, size)
    x = channels_last(x)
    out = empty((*x.shape[:2], *size), x)
    run_launches([max_pool2d_launch(x, kernel, stride, padding, out)], x.device)
    return out
