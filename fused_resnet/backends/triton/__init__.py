"""Triton: one launch a convolution with scale, shift, residual and activation, on NVIDIA GPUs from sm_80 on.

With TRITON_INTERPRET=1 it takes CPU tensors instead, and runs the same kernels in Triton's interpreter: slowly, to test
them. Triton itself is imported with the first kernel.
"""

import contextlib
import importlib.util
import os
import threading
from functools import cache

import torch
from torch import Tensor

from fused_resnet.backends import plan, reference
from fused_resnet.backends.packing import packed
from fused_resnet.backends.problem import POOLED, Problem
from fused_resnet.backends.reference import channels_last

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPS = ("conv_scale_act", POOLED, "scale_act", "add_act", "add_act_backward", "max_pool2d")

# The interpreter has no compute capability: it runs the kernels of the newest GPU.
INTERPRETED_CAPABILITY = (9, 0)

MOST_POOLED = 25

_interpreting = threading.RLock()


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


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of `device`; of the newest GPU where there is none, as for fake tensors."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETED_CAPABILITY
    return torch.cuda.get_device_capability(device)


def unsupported(op: str, x: Tensor, weight: Tensor | None = None, args=None) -> str:
    if x.device.type != device_type():
        return f"x is on {x.device}" + ("; with TRITON_INTERPRET=1 it takes the CPU's" if interpreted() else "")
    if x.dtype not in DTYPES:
        return f"{x.dtype} input; it takes float32, bfloat16 and float16"
    if op not in OPS:
        return "it has no kernels for training"
    if capability(x.device) < (8, 0):
        return f"{x.device} has compute capability {'.'.join(map(str, capability(x.device)))}; it needs 8.0"
    if op == POOLED:
        problem = Problem.of(op, x, weight, args, None, "none")
        return "" if candidates(problem, x.device) else "no kernel of it takes this convolution with the pooling"
    return ""


@cache
def _registry():
    from fused_resnet.backends.triton import registry

    return registry


# --- which kernel -----------------------------------------------------------------------------------------------------

# The kernel of each problem on each device; emptied with the plan.
_choices: dict[tuple, tuple] = {}


def choose(problem: Problem, device: torch.device) -> tuple:
    """The family, the configuration and why: the plan's where it has one that this problem can take."""
    key = (problem, device, plan.switches(), plan.generation())
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= plan.MOST_PROBLEMS:
            _choices.clear()
        found = _choices[key] = _choose(problem, device)
    return found


def _choose(problem: Problem, device: torch.device) -> tuple:
    entry = plan.find(problem, device)
    if entry is not None and entry.backend == "triton":
        for family, config in candidates(problem, device):
            if str(config) == entry.kernel:
                return family, config, entry.source
    return *_registry().heuristic(problem, capability(device)), "heuristic"


def candidates(problem: Problem, device: torch.device) -> list[tuple]:
    """Every (family, configuration) that can run the problem, the likeliest first."""
    return _registry().candidates(problem, capability(device))


def explain(problem: Problem, device: torch.device) -> str:
    """Which kernel runs the problem, and who chose it; for the log."""
    if not candidates(problem, device):
        return ""
    _, config, source = choose(problem, device)
    return f"{config}, by the {source}"


def trusted(problem: Problem, device: torch.device) -> bool | None:
    """Whether the kernel's first run on this GPU was right; None: it was not tried, and cannot be now."""
    if not candidates(problem, device):
        return False
    from fused_resnet.backends.triton.canary import verdict

    family, config, _ = choose(problem, device)
    return verdict(problem, family, config, device)


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


def _ready(x: Tensor | None) -> Tensor | None:
    """x as the kernels read it: channels_last, and from an address that is a multiple of 16, as TMA needs it."""
    if x is None:
        return None
    return _aligned(channels_last(x))


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def empty(size, x: Tensor) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


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
    family, config, _ = choose(problem, device)
    return runner(problem, family, config, weight, scale, shift)


def runner(problem, family, config, weight, scale, shift):
    """`run(x, residual, out)` of one kernel; what an operator does not have is None."""
    form = ("triton", family.name, family.packed_by(config), problem.dtype, problem.groups)
    weights = None
    if weight is not None:
        weights = packed(weight, form, lambda: _aligned(family.pack(weight.detach(), problem, config)))
    scale, shift = (None if t is None else t.detach().float().contiguous() for t in (scale, shift))

    def run(x, residual, out):
        x, residual = _ready(x), _ready(residual)
        if out is None or out.data_ptr() % 16:
            out = empty(problem.output, x)
        run_launches(family.launches(problem, config, x, weights, scale, shift, residual, out), x.device)
        return out

    return run


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
