"""What backends with several kernels share: which kernel runs a problem, and whether it may be chosen unasked."""

from collections.abc import Callable, Hashable, Iterable
from functools import cache
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_resnet.backends import canary, plan
from fused_resnet.backends.layout import aligned, empty, ready, vector
from fused_resnet.backends.packing import packed
from fused_resnet.backends.problem import Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (8, 0)

# Without a GPU kernels are run, and compiled, as those of the newest one.
WITHOUT_GPU = (9, 0)


class Tunable(Protocol):
    """A backend with several kernels. `str(kernel)` is a kernel's name in plans, "" where there is but one."""

    NAME: str

    def device_type(self) -> str:
        """Where its tensors are."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """The compute capability that its kernels are chosen for."""

    def candidates(self, problem: Problem, device: torch.device) -> list[Hashable]:
        """Every kernel that can run the problem, the likeliest first."""

    def runner(self, problem: Problem, kernel, weight, scale, shift) -> Callable:
        """`run(x, residual, out)` of one kernel in inference; what an operator does not have is None."""

    def version(self) -> str:
        """Of its kernels, for the name of a file: what was found out about others says nothing about them."""

    def convolves_by_torch(self, kernel) -> bool:
        """Whether the convolution is PyTorch's own, which may round integers."""

    def lasting(self, error: Exception) -> bool:
        """Whether an error of a kernel will come again in another process."""


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of `device`; of the newest GPU where there is none, as for fake tensors."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return WITHOUT_GPU
    return torch.cuda.get_device_capability(device)


def unfit(x: Tensor) -> str:
    """Why no kernel takes x, wherever it is; "": nothing."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} input; it takes float32, bfloat16 and float16"
    found = capability(x.device)
    return f"{x.device} has compute capability {found[0]}.{found[1]}; it needs 8.0" if found < LEAST_CAPABILITY else ""


def in_turn(lists: Iterable[list]) -> list:
    """The first of each list, then the second of each, ..."""
    missing = object()
    return [value for values in zip_longest(*lists, fillvalue=missing) for value in values if value is not missing]


# --- which kernel -----------------------------------------------------------------------------------------------------

# The kernel of each problem of each backend on each device; emptied with the plan.
_choices: dict[tuple, tuple] = {}


def choose(backend: Tunable, problem: Problem, device: torch.device) -> tuple[Any, str]:
    """The kernel and why: the plan's where it has one that this problem can take, else the first candidate."""
    key = (backend.NAME, problem, device, plan.switches(), plan.generation())
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= plan.MOST_PROBLEMS:
            _choices.clear()
        found = _choices[key] = _choose(backend, problem, device)
    return found


def _choose(backend: Tunable, problem: Problem, device: torch.device) -> tuple[Any, str]:
    kernels, entry = backend.candidates(problem, device), plan.find(problem, device)
    if entry is not None and entry.backend == backend.NAME:
        for kernel in kernels:
            if str(kernel) == entry.kernel:
                return kernel, entry.source
    return kernels[0], "heuristic"


def explain(backend: Tunable, problem: Problem, device: torch.device) -> str:
    """Which kernel runs the problem, and who chose it; for the log."""
    if not backend.candidates(problem, device):
        return ""
    kernel, source = choose(backend, problem, device)
    return f"{kernel}, by the {source}" if str(kernel) else ""


def trusted(backend: Tunable, problem: Problem, device: torch.device) -> bool | None:
    """Whether the kernel's first run on this GPU was right; None: it was not tried, and cannot be now."""
    if not backend.candidates(problem, device):
        return False
    return canary.verdict(backend, problem, choose(backend, problem, device)[0], device)


# --- running it -------------------------------------------------------------------------------------------------------


def prepare(backend: Tunable, problem: Problem, device: torch.device, weight, scale, shift) -> Callable:
    """`run(x, residual, out)` of the kernel that is chosen for the problem."""
    return backend.runner(problem, choose(backend, problem, device)[0], weight, scale, shift)


def family_runner(name: str, problem: Problem, kernel, launch: Callable, weight, scale, shift) -> Callable:
    """The runner of a kernel of a family, which `launch(x, weights, scale, shift, residual, out)` starts."""
    family, config = kernel
    form = (name, family.name, family.packed_by(config), problem.dtype, problem.groups)
    weights = None
    if weight is not None:
        weights = packed(weight, form, lambda: aligned(family.pack(weight.detach(), problem, config)))
    scale, shift = vector(scale), vector(shift)

    def run(x, residual, out):
        x, residual = ready(x), ready(residual)
        if out is None or out.data_ptr() % 16:
            out = empty(problem.output, x)
        launch(x, weights, scale, shift, residual, out)
        return out

    return run
