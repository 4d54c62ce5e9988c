"""What is tried for a problem: the candidates, the tensors that they get, the truth and the clock."""

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends import plan, reference, tunable_backends
from fused_resnet.backends.problem import POOLED, Problem
from fused_resnet.backends.tunable import in_turn

REFERENCE = "reference"


class Candidate(NamedTuple):
    """One way to run a problem; `kernel` is "" for a backend's only one."""

    backend: str
    kernel: str
    prepare: Callable[[], Callable[[], Tensor]]  # returns what computes the output, and nothing else, at every call

    @property
    def name(self) -> str:
        """Of all candidates for a problem no other has it."""
        return f"{self.backend} {self.kernel}".strip()


def candidates(problem: Problem, tensors: tuple, most: int, entries: dict | None = None) -> list[Candidate]:
    """The reference, then up to `most` kernels of the backends that have several, in turn; on `random_tensors`.

    The reference of a convolution with its pooling is the two of them, the convolution as `entries`, a plan, has it.
    """
    x, weight, scale, shift, residual = tensors
    backends = tunable_backends(x.device.type)

    def plain():
        return lambda: reference.compute(problem, *tensors)

    def separate():
        before = problem._replace(op="conv_scale_act")
        entry = (entries or {}).get(plan.key_of(before), {})
        backend = backends.get(entry.get("backend"))
        for kernel in backend.candidates(before, x.device) if backend else ():
            if str(kernel) == entry["kernel"]:
                run = backend.runner(before, kernel, weight, scale, shift)
                return lambda: F.max_pool2d(run(x, None, None), 3, 2, 1)
        return plain()

    def prepare(backend, kernel):
        run = backend.runner(problem, kernel, weight, scale, shift)
        return lambda: run(x, residual, None)

    def of_backend(name: str, backend) -> list[Candidate]:
        return [
            Candidate(name, str(kernel), partial(prepare, backend, kernel))
            for kernel in backend.candidates(problem, x.device)
        ]

    found = in_turn(of_backend(*item) for item in backends.items())
    return [Candidate(REFERENCE, "", separate if problem.op == POOLED else plain), *found[:most]]


def random_tensors(problem: Problem, device: torch.device) -> tuple:
    """x, weight, scale, shift and residual, or None, of the sizes that values in a network have."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(size, dtype=problem.dtype):
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    weight, k = None, problem.output[1]
    if problem.weight:
        weight = normal(problem.weight, torch.float32)
        weight = (weight / weight[0].numel() ** 0.5).to(problem.dtype)
    scale, shift = normal((k,), torch.float32).abs() + 0.5, normal((k,), torch.float32)
    return normal(problem.x), weight, scale, shift, normal(problem.output) if problem.residual else None


def truth(problem: Problem, tensors: tuple) -> Tensor:
    """The result in fp32 without TF32; for fp32 itself in fp64."""
    wide = torch.float64 if problem.dtype == torch.float32 else torch.float32
    with _full_fp32():
        return reference.compute(problem._replace(dtype=wide), *(None if t is None else t.to(wide) for t in tensors))


@contextlib.contextmanager
def _full_fp32():
    """Convolutions without TF32, whichever of torch's switches it was set by."""
    if not plan.tf32():
        yield
        return
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def measure(run: Callable[[], object], device: torch.device, limit: float = float("inf")) -> float:
    """Median microseconds of a call; on a GPU with a cold L2, by Triton's own benchmark.

    One that is beyond `limit` at first sight is not measured again.
    """
    if device.type != "cuda":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
            if times[-1] > limit:
                break
        return statistics.median(times)
    from triton.testing import do_bench

    guard = torch.cuda.device(device) if device.index is not None else contextlib.nullcontext()
    with guard:
        quick = do_bench(run, warmup=2, rep=5, return_mode="median") * 1e3
        if quick > limit:
            return quick
        return do_bench(run, warmup=20, rep=60, return_mode="median") * 1e3
