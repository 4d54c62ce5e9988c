"""What CUDA adds to an operator: streams, graphs, devices, threads, memory that ends, and torch.compile."""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from devices import full_fp32, gpu_backends, moved, on_devices, skip_without
from networks import largest, statistics
from problems import LAYOUTS, poisoned, randomised, run
from test_reliability import OPERATORS, SHAPE, require_for, tensors_of
from test_verify import small
from tolerances import tolerance

import fused_resnet as fr

poison = pytest.fixture(autouse=True)(poisoned)
full_precision = pytest.fixture(autouse=True)(full_fp32)

operators = pytest.mark.parametrize("name", OPERATORS)

CYCLES = 50_000_000  # a GPU's clock is near 2 GHz: some 25 ms, far more than the launches after it take


def problem(name, device, backend, shape=SHAPE):
    tensors = moved(tensors_of(name, shape), device)
    require_for(backend, name, tensors)
    return OPERATORS[name][0], tensors, torch.randn(shape).to(device)


# --- streams ---


@pytest.mark.gpu
@gpu_backends
@operators
def test_operator_runs_on_the_current_stream(name, backend):
    """A producer that is late on a side stream: a kernel on any other stream reads NaN."""
    function, tensors, grad = problem(name, "cuda", backend)
    y, grads = run(function, tensors, grad, act="silu", backend=backend)
    late = {key: torch.full_like(t, float("nan")) for key, t in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for key, t in tensors.items():
            late[key].copy_(t)
        again, gradients = run(function, late, grad, act="silu", backend=backend)
    stream.synchronize()
    assert torch.equal(again, y)
    assert all(torch.equal(gradients[key], grads[key]) for key in grads)


# --- graphs ---


def warm_up(device, call):
    """As torch.cuda.graphs asks: on a side stream, before the capture."""
    side = contextlib.nullcontext()
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        side = torch.cuda.stream(stream)
    with side:
        for _ in range(3):
            call()
    if device == "cuda":
        torch.cuda.current_stream().wait_stream(stream)


def capture(device, call):
    """What runs `call` again: the replay of its CUDA graph; on the CPU, which has none, `call` itself."""
    if device == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@on_devices()
def test_graph_replays_train_as_eager(device, backend):
    """Outputs, gradients and running statistics of three replays; neither the capture nor the warm-up counts."""
    captured = randomised(torch.nn.Sequential(fr.BasicBlock(8, 8), fr.BNAct2d(8, act="silu"))).to(device).train()
    module, before, found = copy.deepcopy(captured), copy.deepcopy(captured.state_dict()), {}
    x = LAYOUTS["channels_last"](torch.randn(4, 8, 9, 7).to(device))

    def step(trained):
        trained.zero_grad(set_to_none=True)
        y = trained(x)
        y.square().sum().backward()
        return y.detach()

    with fr.use_backend(backend):
        warm_up(device, lambda: step(captured))
        captured.load_state_dict(before)  # in place, as a graph needs it
        replay = capture(device, lambda: found.update(y=step(captured)))
        assert all(torch.equal(value, before[key]) for key, value in captured.state_dict().items())
        for n in range(1, 4):
            x.copy_(torch.randn(x.shape))
            replay()
            assert torch.equal(found["y"], step(module))
            for (key, p), q in zip(module.named_parameters(), captured.parameters(), strict=True):
                assert torch.equal(q.grad, p.grad), key
            for key, value in module.state_dict().items():
                assert torch.equal(captured.state_dict()[key], value), key
            assert int(captured[1].num_batches_tracked) == n


@on_devices()
def test_graph_replays_infer_as_eager(device, backend):
    model, found = randomised(fr.cifar_resnet20()).to(device), {}
    x = LAYOUTS["channels_last"](torch.randn(4, 3, 32, 32).to(device))

    def call():
        found["y"] = model(x)

    with torch.no_grad(), fr.use_backend(backend):
        warm_up(device, call)
        replay = capture(device, call)
        for _ in range(3):
            x.copy_(torch.randn(x.shape))
            replay()
            assert largest(found["y"], model(x)) < tolerance("model_eval_fp32")


# --- devices ---


@pytest.mark.gpu
@gpu_backends
@operators
def test_operator_runs_on_its_tensors_device(name, backend):
    """Not on the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and there is one")
    assert torch.cuda.current_device() == 0
    function, tensors, grad = problem(name, "cuda:0", backend)
    y, grads = run(function, tensors, grad, act="silu", backend=backend)
    other, gradients = run(function, moved(tensors, "cuda:1"), grad.to("cuda:1"), act="silu", backend=backend)
    assert torch.cuda.current_device() == 0
    assert other.device == torch.device("cuda:1")
    torch.testing.assert_close(other.cpu(), y.cpu())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu(), grads[key].cpu())


# --- threads ---


def eight_threads(device: str, backend: str) -> None:
    """t11494: every operator, first used by eight threads at once, gives each of them the same bits."""
    torch.use_deterministic_algorithms(True)
    for name in OPERATORS:
        function, tensors, grad = problem(name, device, backend)
        start, results = threading.Barrier(8), [None] * 8

        def work(i, start=start, results=results, function=function, tensors=tensors, grad=grad):
            start.wait()
            results[i] = [run(function, tensors, grad, act="silu", backend=backend) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        y, grads = run(function, tensors, grad, act="silu", backend=backend)
        assert all(found is not None for found in results), f"{name}: a thread failed"
        for out, gradients in (pair for found in results for pair in found):
            assert torch.equal(out, y), name
            assert all(torch.equal(gradients[key], grads[key]) for key in grads), name


@on_devices()
def test_operator_threads_with_cold_caches(device, backend, tmp_path):
    """In a process of its own, with no kernel compiled in memory or on disk."""
    code = f"import test_gpu_runtime; test_gpu_runtime.eight_threads({device!r}, {backend!r})"
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# --- memory ---


@pytest.mark.gpu
@gpu_backends
@pytest.mark.parametrize("make", [lambda: fr.ConvBNAct2d(8, 8, 3), lambda: fr.BNAct2d(8)], ids=["conv", "bn"])
def test_out_of_memory_leaves_state_unchanged(make, backend):
    """The error propagates, the module is as before, and a smaller batch works under the same limit."""
    module = randomised(make()).cuda().train()
    before = copy.deepcopy(module.state_dict())
    skip_without(1 << 30)
    x = LAYOUTS["channels_last"](torch.randn(16, 8, 512, 512, device="cuda"))  # 128 MiB, and so is the output
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        with fr.use_backend(backend):
            with pytest.raises(torch.OutOfMemoryError):
                module(x)
            assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
            module(x[:1, :, :64, :64]).sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    counts = [int(value) for key, value in module.state_dict().items() if key.endswith("batches_tracked")]
    assert counts == [1]


# --- torch.compile ---


@pytest.mark.parametrize(
    ("device", "compiler", "training"),
    [
        pytest.param("cpu", "aot_eager", True, id="cpu"),
        pytest.param("cuda", "inductor", True, marks=pytest.mark.gpu, id="cuda-train"),
        pytest.param("cuda", "inductor", False, marks=pytest.mark.gpu, id="cuda-eval"),
    ],
)
def test_compile(device, compiler, training):
    """Outputs and running statistics of a small network are eager's."""
    if device == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        pytest.skip("Triton needs a C compiler, and there is none")
    torch.use_deterministic_algorithms(False)  # inductor compiles other code for them; the fixture sets it back
    model = small().to(device).train(training)
    model.dropout.p = 0.0
    other, x = copy.deepcopy(model), torch.randn(4, 3, 12, 12, device=device)
    with torch.set_grad_enabled(training):
        y, expected = torch.compile(other, backend=compiler)(x), model(x)
    torch.compiler.reset()
    assert largest(y, expected) < tolerance("model_eval_fp32")
    for found, wanted in zip(statistics(other), statistics(model), strict=True):
        assert largest(found, wanted) < tolerance("model_eval_fp32")
    if training:
        for out in (y, expected):
            out.square().sum().backward()
        for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert largest(q.grad, p.grad) < tolerance("model_eval_fp32"), key
