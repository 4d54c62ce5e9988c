"""Records as a benchmark writes them, made of plain JSON."""

import json


def header(suite, **changed):
    hardware = {"name": "Test <b>CPU</b>", "threads": 2, "cores": 4, "capability": "avx2"}
    about = {"format": 1, "date": "2026-01-02", "time": "10:00:00", "device": "cpu", "hardware": hardware}
    about |= {"versions": {}, "commit": "abc123", "clean": True, "suite": suite, "dtypes": ["fp32"]}
    return {**about, "command": f"python -m bench {suite}", **changed}


def timed(suite, case, system, ms, ours_ms):
    numbers = {"median_ms": ms, "flops": 2e9, "bytes": 1e8, "floor_ms": 2.0, "copy_gb_per_s": 50.0, "peak_tflops": 1.0}
    numbers |= {"images_per_s": 1000 / ms, "fused_is_faster_by": ms / ours_ms}
    return {"suite": suite, "case": case, "system": system, "status": "ok", **numbers}


def pair(suite, case, ours_ms, eager_ms):
    return [timed(suite, case, "eager", eager_ms, ours_ms), timed(suite, case, "fused_resnet", ours_ms, ours_ms)]


def layer(label, **used_by):
    used_by = {name: [f"layer{i}" for i in range(count)] for name, count in used_by.items()}
    return {"device": "cpu", "dtype": "fp32", "batch": 2, "layer": {"label": label}, "used_by": used_by}


def network(**more):
    return {"device": "cpu", "dtype": "fp32", "batch": 1, "model": "resnet50", "size": 224, **more}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
