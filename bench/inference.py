"""ResNet inference on the CPU beside eager, torch.compile with freezing, and OpenVINO.

    python -m bench.inference [--models resnet50] [--batch 16 1] [--dtype fp32 bf16] [--out bench/results]

All systems run in one process on the same weights and the same random input, in turn. A speed is printed only after the
system's output has passed the check against the fp32 network.
"""

import argparse
import copy
import time

import torch

import fused_resnet as fr
from bench.record import Record
from bench.timing import alternate, summary
from fused_resnet.modules.unit import unfused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Largest error over the largest output, against eager fp32: rounding of 50 layers in fp32, and in bf16 (8 bits).
LIMITS = {"fp32": 2e-5, "bf16": 3e-2}


def eager(model, x):
    """The plain network: the same weights through torch's own modules."""

    def call():
        with unfused():
            return model(x)

    return call


def compiled(model, x):
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.freezing = True
    with unfused():
        call = torch.compile(model)
        with torch.no_grad():
            call(x)

    def run():
        with torch.no_grad():
            return call(x)

    return run


def openvino(model, x):
    import openvino as ov

    with unfused():
        converted = ov.convert_model(copy.deepcopy(model).float(), example_input=x.float(), input=[list(x.shape)])
    hints = {
        "INFERENCE_PRECISION_HINT": "f32" if x.dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(converted, "CPU", hints).create_infer_request()
    image = x.float().contiguous().numpy()
    return lambda: torch.from_numpy(next(iter(request.infer({0: image}, share_inputs=True).values())))


def fused(model, x):
    return lambda: model(x)


SYSTEMS = {"eager": eager, "compile+freezing": compiled, "openvino": openvino, "fused_resnet": fused}


def measure(record: Record, name: str, batch: int, dtype: str, size: int, peers: list[str]) -> None:
    torch.manual_seed(0)
    plain = fr.create_model(name)
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad():  # realistic running statistics: without them the outputs of a deep random net explode
        plain.train()(torch.randn(8, 3, size, size))
    plain.eval()
    with torch.inference_mode(), fr.use_backend("reference"):
        truth = plain(x)
    image = x.to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    # Made outside inference mode: parameters made inside keep no version, and could not be packed once and for all.
    systems = [*peers, "fused_resnet"]
    models = {s: copy.deepcopy(plain).to(DTYPES[dtype]).to(memory_format=torch.channels_last) for s in systems}
    calls, ready, errors = {}, {}, {}
    with torch.inference_mode():
        for system, model in models.items():
            start = time.perf_counter()
            try:
                call = SYSTEMS[system](model, image)
                out = call()
            except ImportError as missing:
                record.row(model=name, batch=batch, dtype=dtype, system=system, failed=str(missing))
                continue
            ready[system] = time.perf_counter() - start
            errors[system] = ((out.float() - truth).abs().max() / truth.abs().max()).item()
            if errors[system] > LIMITS[dtype]:
                record.row(model=name, batch=batch, dtype=dtype, system=system, failed="parity", error=errors[system])
                continue
            calls[system] = call
        times = {system: summary(seconds) for system, seconds in alternate(calls).items()}
    for system, numbers in times.items():
        record.row(
            model=name,
            batch=batch,
            dtype=dtype,
            system=system,
            images_per_s=batch / numbers["median_ms"] * 1e3,
            fused_is_faster_by=numbers["median_ms"] / times["fused_resnet"]["median_ms"],
            ready_s=ready[system],
            error=errors[system],
            **numbers,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 1])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--peers", nargs="*", choices=list(SYSTEMS)[:-1], default=list(SYSTEMS)[:-1])
    parser.add_argument("--out", help="folder of the record")
    args = parser.parse_args()
    record = Record(args.out, "inference")
    for name in args.models:
        for batch in args.batch:
            for dtype in args.dtype:
                measure(record, name, batch, dtype, args.size, args.peers)


if __name__ == "__main__":
    main()
