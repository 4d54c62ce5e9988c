"""A training step of a ResNet on the CPU beside eager: forward, loss, backward, SGD.

    python -m bench.training [--models resnet50] [--batch 16] [--dtype fp32 bf16] [--out bench/results]

bf16 is autocast, as people train. Both networks start from the same weights; the losses of the first step must agree
before a speed is printed.
"""

import argparse
import contextlib
import copy

import torch
import torch.nn.functional as F

import fused_resnet as fr
from bench.record import Record
from bench.timing import alternate, summary
from fused_resnet.modules.unit import unfused

# Relative difference of the first step's losses: rounding of the forward pass in fp32, and in bf16 (8 bits).
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}


def step(model, x, target, dtype, around):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def call():
        with around(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = F.cross_entropy(model(x).float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def measure(record: Record, name: str, batch: int, dtype: str, size: int, window: float) -> None:
    torch.manual_seed(0)
    model = fr.create_model(name).to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (batch,))
    calls = {
        "eager": step(copy.deepcopy(model), x, target, dtype, unfused),
        "fused_resnet": step(model, x, target, dtype, contextlib.nullcontext),
    }
    losses = {system: call() for system, call in calls.items()}
    error = abs(losses["eager"] - losses["fused_resnet"]) / abs(losses["eager"])
    if error > LIMITS[dtype]:
        record.row(model=name, batch=batch, dtype=dtype, failed="parity", error=error)
        return
    times = {system: summary(seconds) for system, seconds in alternate(calls, window=window).items()}
    for system, numbers in times.items():
        record.row(
            model=name,
            batch=batch,
            dtype=dtype,
            system=system,
            images_per_s=batch / numbers["median_ms"] * 1e3,
            fused_is_faster_by=numbers["median_ms"] / times["fused_resnet"]["median_ms"],
            error=error,
            **numbers,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--dtype", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--window", type=float, default=4.0, help="seconds a system runs in each of three rounds")
    parser.add_argument("--out", help="folder of the record")
    args = parser.parse_args()
    record = Record(args.out, "training")
    for name in args.models:
        for batch in args.batch:
            for dtype in args.dtype:
                measure(record, name, batch, dtype, args.size, args.window)


if __name__ == "__main__":
    main()
