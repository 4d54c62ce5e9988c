"""Which backend runs a problem: an explicit name, else `use_backend`, else FUSED_RESNET_BACKEND, else the heuristic.

A name that was asked for is never replaced in silence: a backend that is missing, or that cannot run the problem, is
an error that says why and how to go on. Only the heuristic falls back.
"""

import contextvars
import os
from types import ModuleType

import torch
from torch import Tensor

from fused_resnet.backends import cpu, reference

ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}

# What the heuristic tries, in this order, before the reference.
PREFERRED = {"cpu": ("cpu",)}

# The heuristic's answers: a pure function of the problem, asked at every call.
_heuristic: dict[tuple, ModuleType] = {}

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("fused_resnet_backend", default=None)


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine; "reference" always can."""
    return [name for name, backend in BACKENDS.items() if not backend.unavailable()]


def backend_report() -> dict[str, str]:
    """Every backend's name, with the reason why it cannot be used here; empty: it can."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


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


def _find(name: str, asked_by: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"{asked_by}: unknown backend {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    reason = BACKENDS[name].unavailable()
    if reason:
        raise RuntimeError(f"{asked_by}: backend {name!r} is not available: {reason}")
    return BACKENDS[name]


def select(op: str, backend: str, x: Tensor, weight: Tensor | None = None, args=None) -> ModuleType:
    """The backend that runs operator `op` on this problem; `backend` is "" where the caller leaves it open."""
    name, asked_by = backend or context_backend(), op
    if not name:
        name, asked_by = os.environ.get("FUSED_RESNET_BACKEND", ""), "FUSED_RESNET_BACKEND"
    if name and name != "auto":
        found = _find(name, asked_by)
        reason = found.unsupported(op, x, weight, args)
        if reason:
            raise RuntimeError(f"{op}: backend {name!r} cannot run this: {reason}; use backend='reference'")
        return found
    problem = (op, x.device, x.dtype, None if weight is None else weight.shape, args, torch._C._get_mkldnn_enabled())
    found = _heuristic.get(problem)
    if found is None:
        found = _heuristic[problem] = _first_that_can(op, x, weight, args)
    return found


def _first_that_can(op: str, x: Tensor, weight: Tensor | None, args) -> ModuleType:
    for name in PREFERRED.get(x.device.type, ()):
        if not BACKENDS[name].unavailable() and not BACKENDS[name].unsupported(op, x, weight, args):
            return BACKENDS[name]
    return reference
