"""Batch norm + residual + ReLU on the shapes of ResNet-50, forward and backward, beside eager.

python -m bench.bn_act [--batch 16] [--dtype fp32 bf16] [--out bench/results]
"""

import argparse

import torch
import torch.nn.functional as F

import fused_resnet as fr
from bench.record import Record
from bench.timing import alternate, summary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))


def step(forward, inputs, grad):
    """One forward and one backward, gradients returned and not accumulated."""

    def call():
        return torch.autograd.grad(forward(*inputs), [t for t in inputs if t is not None], grad)

    return call


def eager(x, weight, bias, residual):
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    return F.relu_(y if residual is None else y.add_(residual))


def fused(x, weight, bias, residual):
    return fr.ops.bn_act(x, weight, bias, None, None, residual=residual, training=True)


def measure(record: Record, batch: int, dtype: str, channels: int, size: int, with_residual: bool) -> None:
    torch.manual_seed(0)

    def image():
        value = torch.randn(batch, channels, size, size, dtype=DTYPES[dtype])
        return value.contiguous(memory_format=torch.channels_last)

    weight, bias = torch.rand(channels).requires_grad_(), torch.randn(channels).requires_grad_()
    inputs = (image().requires_grad_(), weight, bias, image().requires_grad_() if with_residual else None)
    grad = image()
    calls = {"eager": step(eager, inputs, grad), "fused_resnet": step(fused, inputs, grad)}
    times = {name: summary(seconds) for name, seconds in alternate(calls, window=0.3).items()}
    for name, numbers in times.items():
        record.row(
            op="bn+add+relu" if with_residual else "bn+relu",
            shape=(batch, channels, size, size),
            dtype=dtype,
            system=name,
            fused_is_faster_by=numbers["median_ms"] / times["fused_resnet"]["median_ms"],
            **numbers,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", help="folder of the record")
    args = parser.parse_args()
    record = Record(args.out, "bn_act")
    for dtype in args.dtype:
        for with_residual in (True, False):
            for channels, size in SHAPES:
                measure(record, args.batch, dtype, channels, size, with_residual)


if __name__ == "__main__":
    main()
