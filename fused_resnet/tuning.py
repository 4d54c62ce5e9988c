"""`tune`: every kernel for every problem of a model, measured on this GPU; the fastest right one goes into the plan."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet._version import __version__
from fused_resnet.backends import plan, reference, tunable_backends
from fused_resnet.backends.problem import POOLED, Problem
from fused_resnet.backends.selection import BACKENDS, TUNABLE
from fused_resnet.candidates import candidates, measure, random_tensors, truth
from fused_resnet.parity import compare, table

# A candidate that takes so many times as long as the best one so far is not measured to the end.
HOPELESS = 3.0


@dataclass
class Tuned:
    """What was found for one problem; times in microseconds."""

    problem: str
    best: str
    microseconds: float
    reference_microseconds: float
    tried: int
    wrong: dict[str, str] = field(default_factory=dict)  # candidate -> why it was left out


@dataclass
class TuneReport:
    """What `tune` measured; prints as a table.

    Attributes:
        device: the GPU's name.
        path: the plan's file.
        rows: one for each distinct problem, in the order of the model's calls.
    """

    device: str
    path: str
    rows: list[Tuned] = field(default_factory=list)

    def __str__(self) -> str:
        header = ("problem", "fastest", "us", "reference us", "speed-up", "tried", "left out")
        lines = [
            (
                row.problem, row.best, f"{row.microseconds:.1f}", f"{row.reference_microseconds:.1f}",
                f"{row.reference_microseconds / row.microseconds:.2f}", str(row.tried), str(len(row.wrong)),
            )
            for row in self.rows
        ]  # fmt: skip
        left_out = [f"left out: {row.problem}: {name}: {why}" for row in self.rows for name, why in row.wrong.items()]
        about = f"{self.device}, plan {self.path}"
        return "\n".join([about, *table(header, lines, right={2, 3, 4, 5, 6}), *left_out])


def tune(
    model: nn.Module,
    example: Tensor,
    *,
    path: str | Path | None = None,
    most: int = 16,
    progress: Callable[[Iterable], Iterable] = iter,
) -> TuneReport:
    """Measure every candidate for every distinct problem of `model` on `example`'s GPU, and write the plan.

    A candidate's numbers are checked before its speed (the two-times rule, see `verify`); the plan is written after
    every problem, so that an interrupted run keeps what it has. From then on the automatic choice follows it.

    Args:
        model: a network in eval mode, on the device of `example`.
        example: an input, [N, C, H, W], of the batch, size and dtype that the model will see.
        path: the plan's file; by default the user's own for this GPU, the one that is read.
        most: candidates measured for each problem, the likeliest of each backend first.
        progress: wraps the list of problems, as `tqdm` does.

    Raises:
        ValueError: a model in training mode, or nothing in it that could be tuned; a file that is not this GPU's plan.
        OSError: the plan cannot be written.
        RuntimeError: no backend with kernels to choose from is available, or takes the example.
    """
    _check(model, example)
    name = plan.device_name(example.device)
    path = plan.user_path(name) if path is None else Path(path)
    problems = problems_of(model, example)
    if not problems:
        raise ValueError("tune: the model has no fused operator; convert it first, or use this package's modules")
    report, entries = TuneReport(name, str(path)), plan.own(path, name)
    plan.write(path, name, versions(), entries)  # before anything is measured: can it be written?
    try:
        for problem in progress(problems):
            row, entry = _tune_problem(problem, example.device, most, entries)
            report.rows.append(row)
            entries = {**entries, plan.key_of(problem): entry}
            plan.write(path, name, versions(), entries)
    finally:
        plan.reload()
    return report


def _check(model: nn.Module, example: Tensor) -> None:
    if model.training:
        raise ValueError("tune: the model is in training mode; call model.eval() first")
    reasons = {name: BACKENDS[name].unavailable() or BACKENDS[name].unsupported("add_act", example) for name in TUNABLE}
    if all(reasons.values()):
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"tune: nothing can be tuned here: {text}")
    if example.is_cuda and importlib.util.find_spec("triton") is None:
        raise RuntimeError("tune: its clock is Triton's, which is not installed (pip install triton)")


def versions() -> dict[str, str]:
    """Of what a plan was measured with."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    cuda = torch.version.cuda or "none"
    return {"fused_resnet": __version__, "torch": torch.__version__, "triton": triton, "cuda": cuda}


class _Problems(TorchDispatchMode):
    """Notes the problems that a network poses, each once, in order."""

    def __init__(self):
        super().__init__()
        self.found: dict[Problem, None] = {}
        self.last: tuple[Tensor, Problem] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("fused_resnet::")
        if name == "conv_scale_act":
            x, weight, _, _, residual, *geometry, act, _ = args
            problem = Problem.of(name, x, weight, geometry, residual, act)
            self.found[problem] = None
            self.last = (result, problem)
        elif name in ("scale_act", "add_act"):
            residual = args[1] if name == "add_act" else args[3]
            self.found[Problem.of(name, args[0], None, None, residual, args[-2])] = None
        elif name == "aten::max_pool2d_with_indices" and self.last is not None and args[0] is self.last[0]:
            pooled = self.last[1]._replace(op=POOLED)
            backends = tunable_backends(args[0].device.type).values()
            takes = any(backend.candidates(pooled, args[0].device) for backend in backends)
            if args[1:4] == ([3, 3], [2, 2], [1, 1]) and takes:
                self.found[pooled] = None
        return result


def problems_of(model: nn.Module, example: Tensor) -> list[Problem]:
    """The distinct problems of one forward pass, in order."""
    problems = _Problems()
    with torch.no_grad(), problems:
        model(example)
    return list(problems.found)


@torch.no_grad()
def _tune_problem(problem: Problem, device: torch.device, most: int, entries: dict) -> tuple[Tuned, dict]:
    tensors = random_tensors(problem, device)
    first, *others = candidates(problem, tensors, most, entries)
    run = first.prepare()
    eager, exact = reference.compute(problem, *tensors), truth(problem, tensors)
    times, wrong = {first.name: measure(run, device)}, {}
    best = first
    for candidate in others:
        try:
            run = candidate.prepare()
            row = compare(("", "", "", ""), run(), eager, exact, problem.dtype)
            if not row.passed:
                wrong[candidate.name] = f"error {row.fused_error:.2e}, eager's is {row.eager_error:.2e}"
                continue
            times[candidate.name] = measure(run, device, HOPELESS * times[best.name])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's or the driver's: this one does not run here
            wrong[candidate.name] = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
            continue
        if times[candidate.name] < times[best.name]:
            best = candidate
    entry = {
        "backend": best.backend, "kernel": best.kernel, "microseconds": round(times[best.name], 2),
        "candidates": {name: round(value, 2) for name, value in times.items()},
    }  # fmt: skip
    row = Tuned(str(problem), best.name, times[best.name], times[first.name], len(others) + 1, wrong)
    return row, entry
