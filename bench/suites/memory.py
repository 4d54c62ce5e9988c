"""Memory: the peak of inference and of a training step, and what a forward pass keeps for the backward pass."""

import contextlib
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.suites import models, training
from bench.suites.common import image, on_device, system_for, trained_like

TASKS = models.MODE_TASKS
cases = models.mode_cases
MODELS = ("resnet50",)
QUICK_MODELS = ("resnet18",)
BATCHES = {"cpu": (16,), "cuda": (256,)}
FRESH = True  # every row in a process of its own
REPEATS = 3


def title(case) -> str:
    return f"{case['model']} {case['mode']} memory  batch {case['batch']} {case['dtype']}"


class CPUMemory:
    """Resident memory of this process. The kernel's high-water mark can be set back."""

    def __init__(self):
        self.before = self._status("VmRSS")

    def _status(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._status("VmHWM") - self.before


class CUDAMemory:
    """What torch's allocator gave out."""

    def __init__(self):
        torch.cuda.synchronize()
        self.before = torch.cuda.memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


class _Made(TorchDispatchMode):
    """Notes the memory that operators make, without keeping it."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, but: set[int]) -> int:
        """Bytes that are still held; `but`: of what was there before, which operators return views of."""
        found = self.found.items()
        return sum(size for key, (reference, size) in found if key not in but and not reference.expired())


def kept_for_backward(call: "training.Step", *, compiled: bool) -> int:
    """Bytes that live after the forward pass, made by it and held by its loss alone.

    Operators cannot be followed inside compiled code: there the tensors are counted that it says it saves.
    """
    given = {t.untyped_storage()._cdata for t in [*call.model.parameters(), *call.model.buffers(), call.x]}
    if not compiled:
        made = _Made()
        with made:
            loss = call.loss()
        kept = made.alive(given)
        del loss
        return kept
    saved: dict[int, int] = {}

    def note(t):
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = call.loss()
        kept = sum(size for key, size in saved.items() if key not in given)
    del loss
    return kept


def values(case, system) -> dict:
    """Bytes above what the process had before the network was made; of the first call, and of those after it."""
    subject, device = system_for(system, case["device"]), case["device"]
    memory = CUDAMemory() if torch.device(device).type == "cuda" else CPUMemory()
    memory.reset()
    with contextlib.ExitStack() as stack:
        if case["mode"] == "training":
            call = training.step(case, subject)
        else:
            model = on_device(trained_like(case["model"], 64), case["dtype"], device)
            x = image((case["batch"], 3, case["size"], case["size"]), case["dtype"], device)
            stack.enter_context(torch.inference_mode())
            call = subject.network(model, x)
        call()
        first = memory.peak()
        memory.reset()
        for _ in range(REPEATS):
            call()
        numbers = {"first_peak_mb": first / 1e6, "peak_mb": memory.peak() / 1e6}
    if case["mode"] == "training":
        numbers["kept_mb"] = kept_for_backward(call, compiled="compile" in system) / 1e6
    return numbers
