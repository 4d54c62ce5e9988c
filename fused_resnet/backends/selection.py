"""Which backend runs a problem: an explicit name, else `use_backend`, else FUSED_RESNET_BACKEND, else a plan that was
measured on this GPU, else the heuristic.

A name that was asked for is never replaced in silence: a backend that is missing, or that cannot run the problem, is
an error that says why and how to go on. Only the automatic choice falls back. FUSED_RESNET_LOG=1 tells every choice.
"""

import contextvars
import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from fused_resnet.backends import cpu, cuda, plan, reference, triton
from fused_resnet.backends.problem import POOLED, Problem

ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}

# Those with several kernels for a problem, which plans choose from; see `tunable.Tunable`.
TUNABLE = ("triton", "cuda")

# What the heuristic tries, in this order, before the reference. The kernels for GPUs have not run on one yet: there
# only a plan, which was measured, chooses them.
PREFERRED = {"cpu": ("cpu",), "cuda": ()}

# The choices so far: a pure function of the problem, asked at every call.
_selected: dict[tuple, ModuleType] = {}

# Lines that FUSED_RESNET_LOG has printed.
_logged: set[str] = set()

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("fused_resnet_backend", default=None)


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine; "reference" always can."""
    return [name for name, backend in BACKENDS.items() if not backend.unavailable()]


def backend_report() -> dict[str, str]:
    """Every backend's name, with the reason why it cannot be used here; empty: it can."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def tunable_backends(device_type: str) -> dict[str, ModuleType]:
    """The backends of `TUNABLE` that are available and take tensors of a device, by name."""
    found = {name: BACKENDS[name] for name in TUNABLE if not BACKENDS[name].unavailable()}
    return {name: backend for name, backend in found.items() if backend.device_type() == device_type}


class use_backend:
    """Choose the backend for everything that does not name one.

    As a call, from here on: `use_backend("reference")`; as a context manager, for a block; None goes back to the
    automatic choice. It holds for the current thread (or asyncio task).

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not available, with the way to get it.
    """

    def __init__(self, name: str | None):
        if name is not None:
            _find(name, "use_backend")
        self._token = _chosen.set(name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        _chosen.reset(self._token)


def context_backend() -> str:
    """The name that `use_backend` holds here; empty: none."""
    return _chosen.get() or ""


def surroundings() -> tuple:
    """All that a choice depends on beside the problem, for those who keep one."""
    return context_backend(), os.environ.get("FUSED_RESNET_BACKEND"), plan.switches(), plan.generation()


def _find(name: str, asked_by: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"{asked_by}: unknown backend {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    reason = BACKENDS[name].unavailable()
    if reason:
        raise RuntimeError(f"{asked_by}: backend {name!r} is not available: {reason}")
    return BACKENDS[name]


def select(
    op: str,
    backend: str,
    x: Tensor,
    weight: Tensor | None = None,
    args=None,
    residual: Tensor | None = None,
    act: str = "none",
) -> ModuleType:
    """The backend that runs operator `op` on this problem; `backend` is "" where the caller leaves it open."""
    name, asked_by = backend or context_backend(), op
    if not name:
        name, asked_by = os.environ.get("FUSED_RESNET_BACKEND", ""), "FUSED_RESNET_BACKEND"
    problem = Problem.of(op, x, weight, args, residual, act)
    if name and name != "auto":
        found = _find(name, asked_by)
        reason = found.unsupported(op, x, weight, args)
        if reason:
            raise RuntimeError(f"{op}: backend {name!r} cannot run this: {reason}; use backend='reference'")
        _log(problem, x.device, found, "asked for")
        return found
    key = (problem, x.device, plan.switches(), plan.generation())
    found = _selected.get(key)
    if found is None:
        found, why, lasts = _automatic(problem, x, weight, args)
        _log(problem, x.device, found, why)
        if lasts:
            if len(_selected) >= plan.MOST_PROBLEMS:
                _selected.clear()
            _selected[key] = found
    return found


def select_pooled(x: Tensor, weight: Tensor, args, act: str) -> ModuleType | None:
    """The backend with one kernel for a convolution and the max-pool behind it; None: the named one has none."""
    name = context_backend() or os.environ.get("FUSED_RESNET_BACKEND", "")
    if name in BACKENDS and (BACKENDS[name].unavailable() or BACKENDS[name].unsupported(POOLED, x, weight, args)):
        return None
    return select(POOLED, "", x, weight, args, None, act)


def _automatic(problem: Problem, x: Tensor, weight: Tensor | None, args) -> tuple[ModuleType, str, bool]:
    """The backend, why it is that one, and whether the choice holds for the next call."""
    entry = plan.find(problem, x.device) if tunable_backends(x.device.type) else None
    if entry is not None and entry.backend in BACKENDS:
        planned = BACKENDS[entry.backend]
        reason = planned.unavailable() or planned.unsupported(problem.op, x, weight, args)
        trusted = not reason and planned.trusted(problem, x.device)
        if trusted:
            return planned, entry.source, True
        if trusted is None:
            return reference, f"{entry.backend} was not tried yet, and nothing is while a graph is captured", False
        return reference, f"{entry.backend} of the {entry.source} cannot: {reason or 'its first run failed'}", True
    for name in PREFERRED.get(x.device.type, ()):
        if not BACKENDS[name].unavailable() and not BACKENDS[name].unsupported(problem.op, x, weight, args):
            return BACKENDS[name], "heuristic", True
    return reference, "heuristic", True


def _log(problem: Problem, device: torch.device, backend: ModuleType, why: str) -> None:
    """One line on stderr for each problem and backend, where FUSED_RESNET_LOG asks for it."""
    if os.environ.get("FUSED_RESNET_LOG", "0") in ("", "0"):
        return
    name = next(name for name, known in BACKENDS.items() if known is backend)
    kernel = backend.explain(problem, device)
    line = f"fused_resnet: {problem} on {device}: {name}{kernel and f' ({kernel})'}; {why}"
    if line not in _logged:
        _logged.add(line)
        print(line, file=sys.stderr)
