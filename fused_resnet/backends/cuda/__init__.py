"""CUDA: the compiled kernels of csrc/cuda, on NVIDIA GPUs from sm_80 on.

The tests build the same kernels for the CPU (tests/emulator) and register them there: it takes CPU tensors then.
"""

import hashlib
import importlib
import re
import sys
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.backends import reference, tunable
from fused_resnet.backends.config import Kernel
from fused_resnet.backends.cpu import extension_missing
from fused_resnet.backends.cuda import depthwise, implicit_gemm, registry, training
from fused_resnet.backends.cuda.pooling import max_pool2d as max_pool2d
from fused_resnet.backends.cuda.pooling import norm_act_max_pool2d as norm_act_max_pool2d
from fused_resnet.backends.cuda.pooling import norm_act_max_pool2d_input_grad as norm_act_max_pool2d_input_grad
from fused_resnet.backends.cuda.pooling import norm_act_max_pool2d_reduce as norm_act_max_pool2d_reduce
from fused_resnet.backends.cuda.training import add_act as add_act
from fused_resnet.backends.cuda.training import add_act_backward as add_act_backward
from fused_resnet.backends.cuda.training import moments as moments
from fused_resnet.backends.cuda.training import norm_act as norm_act
from fused_resnet.backends.cuda.training import norm_act_input_grad as norm_act_input_grad
from fused_resnet.backends.cuda.training import norm_act_reduce as norm_act_reduce
from fused_resnet.backends.cuda.training import scale_act as scale_act
from fused_resnet.backends.layout import aligned, empty, ready, vector
from fused_resnet.backends.problem import Problem
from fused_resnet.backends.tunable import capability as capability

NAME = "cuda"

# Operators that have one kernel, and those that run a convolution of `registry`.
OPERATORS = ("add_act", "add_act_backward", "bn_act", "scale_act", "max_pool2d")
CONVOLUTIONS = ("conv_scale_act", "conv_bn_act")

NO_KERNELS = "the compiled extension has no CUDA kernels; install where nvcc is: pip install --no-build-isolation ."

# The operator by whose kernel for CPU tensors the tests' emulator is known.
EMULATED = "fused_resnet_C::cuda_add_act_fwd"

_this = sys.modules[__name__]


@cache
def architectures() -> str:
    """The compute capabilities that kernels were compiled for, such as "8.0+PTX;9.0a"; "": none were built."""
    return "" if extension_missing() else torch.ops.fused_resnet_C.cuda_architectures()


def library() -> Path:
    """The compiled extension, where it is not missing."""
    return Path(importlib.import_module("fused_resnet._C").__file__)


@cache
def _lacking() -> str:
    """What its kernels lack to run on a GPU."""
    if extension_missing():
        return extension_missing()
    if not architectures():
        return NO_KERNELS
    if torch.version.cuda is None:
        return "this torch is built for the CPU"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is here"
    return torch.ops.fused_resnet_C.cuda_driver_lacking()


def _emulated() -> bool:
    """Whether the kernels are registered for CPU tensors."""
    return not extension_missing() and torch._C._dispatch_has_kernel_for_dispatch_key(EMULATED, "CPU")


def unavailable() -> str:
    return "" if _lacking() and _emulated() else _lacking()


def device_type() -> str:
    """Where its tensors are."""
    return "cpu" if _lacking() and _emulated() else "cuda"


def covered(compiled: str, device: tuple[int, int]) -> bool:
    """Whether a library that was compiled for these architectures has code for a device; also where one has a name."""
    for architecture in compiled.split(";"):
        found = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", architecture)
        if found is None:
            return True
        version = int(found[1]), int(found[2])
        newer = version <= device and (found[4] or version[0] == device[0])
        if version == device or (newer and found[3] != "a"):
            return True
    return False


def unsupported(op: str, x: Tensor, weight: Tensor | None = None, args=None) -> str:
    if x.device.type != device_type():
        return f"x is on {x.device}"
    reason = tunable.unfit(x)
    if reason or op in OPERATORS:
        return reason or _no_code(x.device)
    if op not in CONVOLUTIONS:
        return "it has no kernel for that"
    problem = Problem.of("conv_scale_act", x, weight, args, None, "none")
    return (
        _no_code(x.device)
        if registry.takes(problem, capability(x.device))
        else "no kernel of it takes this convolution"
    )


def _no_code(device: torch.device) -> str:
    if device.type == "cpu" or covered(architectures(), capability(device)):
        return ""
    return f"its kernels were compiled for {architectures()}, and {device} is {'.'.join(map(str, capability(device)))}"


# --- which kernel -----------------------------------------------------------------------------------------------------


def candidates(problem: Problem, device: torch.device) -> list:
    """Every kernel that can run the problem, the likeliest first; [""] for an operator that has but one."""
    if problem.op in OPERATORS or problem.op == "conv_bn_act":
        return [""]
    return registry.candidates(problem, capability(device))


def explain(problem: Problem, device: torch.device) -> str:
    return tunable.explain(_this, problem, device)


def trusted(problem: Problem, device: torch.device) -> bool | None:
    return tunable.trusted(_this, problem, device)


@cache
def version() -> str:
    """Its architectures, and a digest of the compiled library."""
    return f"cuda{architectures()}-{hashlib.sha256(library().read_bytes()).hexdigest()[:16]}"


def convolves_by_torch(kernel: Kernel) -> bool:
    return False


def lasting(error: Exception) -> bool:
    """No: what a launch fails by may be the state of this process's device."""
    return False


# --- the operators ----------------------------------------------------------------------------------------------------


def runner(problem, kernel, weight, scale, shift):
    """`run(x, residual, out)` of one kernel; what an operator does not have is None."""
    if problem.op == "add_act":
        return lambda x, residual, out: add_act(x, residual, problem.act)
    if problem.op == "scale_act":
        return lambda x, residual, out: training.scale_act(x, scale, shift, residual, problem.act)
    launch = partial(kernel.family.run, problem, kernel.config)
    return tunable.family_runner(NAME, problem, kernel, launch, weight, scale, shift)


def conv_scale_act(x, weight, scale, shift, residual, args, act):
    return prepare_conv_scale_act(x, weight, scale, shift, residual, args, act)(x, residual, None)


def prepare_conv_scale_act(x, weight, scale, shift, residual, args, act):
    """Return `run(x, residual, out)` for inputs like these; `out` is the residual or None."""
    problem = Problem.of("conv_scale_act", x, weight, args, residual, act)
    return tunable.prepare(_this, problem, x.device, weight, scale, shift)


def prepare_conv_scale_act_max_pool2d(x, weight, scale, shift, args, act):
    """None: it has no such kernel."""


def conv_moments(x, norm, act, weight, bias, args):
    z, *partials = _convolution(x, norm, act, weight, bias, args)
    return z, *(training.merged_moments(z, *partials) if partials else training.moments(z))


def convolve(x, norm, act, weight, bias, args) -> Tensor:
    """The same launch, so that what is computed again is what it was, to the bit."""
    return _convolution(x, norm, act, weight, bias, args)[0]


def _convolution(x, norm, act, weight, bias, args) -> tuple:
    """Its output and, of the general convolution, which takes the moments of what it writes, those of its tiles."""
    x = _activated(x, norm, act)
    problem = Problem.of("conv_scale_act", x, weight, args, None, "none")
    family, config = candidates(problem, x.device)[0]
    if family is implicit_gemm.FAMILY:
        return implicit_gemm.with_moments(x, weight, bias, args)
    z, ones = empty(problem.output, x), torch.ones(weight.shape[0], device=x.device)
    # The weight has just changed, whether its version says so or not: no packed form of it is kept.
    weights = aligned(family.pack(weight.detach(), problem, config))
    shift = torch.zeros_like(ones) if bias is None else vector(bias)
    family.run(problem, config, x, weights, ones, shift, None, z)
    return (z,)


def _activated(x, norm, act):
    """What is convolved: act(norm(x)), or x where there is no norm."""
    return ready(x) if norm is None else norm_act(x, norm, None, None, act)[0]


def convolution_backward(grad, x, norm, act, weight, args, needs, residual):
    """Of a depthwise convolution by our own kernels, of others by aten (cuDNN)."""
    y = _activated(x, norm if needs[1] else None, act)  # the other gradients need no more than its size
    family = candidates(Problem.of("conv_scale_act", x, weight, args, None, "none"), x.device)[0].family
    if family is not depthwise.FAMILY:
        return reference.convolution_backward(grad, y, None, "none", weight, args, needs, residual)
    grad, d_y, d_weight, d_bias = ready(grad), None, None, None
    if needs[0]:
        d_y = depthwise.input_gradient(grad, x.shape, weight, args)
        d_y = d_y if residual is None else add_act(d_y, residual, "none")
    if needs[1]:
        d_weight = depthwise.weight_gradient(grad, y, weight.shape, args).to(weight.dtype)
    if needs[2]:
        of_bias = (False, False, True)
        d_bias = reference.convolution_backward(grad, y, None, "none", weight, args, of_bias, None)[2]
    return d_y, d_weight, d_bias
