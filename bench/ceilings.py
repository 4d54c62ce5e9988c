"""What this machine can do: bytes copied and matrix products a second, measured in the run that uses them."""

import torch

from bench.timing import clock, measure, summary
from fused_resnet.options import DTYPES

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # several times the caches
SIDE = {"cpu": 2048, "cuda": 8192}


def measure_ceilings(device: str, dtype: str, window: float) -> dict[str, float]:
    """`bandwidth` in bytes/s, reads plus writes, of a large copy; `peak` in FLOP/s of a large product in `dtype`."""
    return {"bandwidth": _copy(device, window), "peak": _product(device, dtype, window)}


def _copy(device: str, window: float) -> float:
    size = COPY_BYTES[torch.device(device).type]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, window)


def _product(device: str, dtype: str, window: float) -> float:
    side = SIDE[torch.device(device).type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device, window)


def _best(call, device: str, window: float) -> float:
    """The 20th percentile in seconds: a ceiling is what the machine does when nothing disturbs it."""
    return summary(measure(clock(call, device, network=False), window))["p20_ms"] * 1e-3
