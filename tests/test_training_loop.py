"""What a training loop does, with fused blocks: mixed precision, clipping, averages, checkpoints, copies, threads."""

import copy
import pickle
import threading

import pytest
import torch
from networks import assert_network_two_times, relative, statistics
from problems import poisoned
from tolerances import tolerance
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from training_steps import (
    BLOCKS,
    Operators,
    assert_close,
    assert_identical,
    block_of,
    blocks,
    eager,
    images,
    loss_of,
    results,
)

from fused_resnet.modules import unit

poison = pytest.fixture(autouse=True)(poisoned)

lowered = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


# --- precision --------------------------------------------------------------------------------------------------------


@lowered
@blocks
def test_autocast_with_grad_scaler(make, dtype):
    """Gradients, unscaled, beside eager's under the same autocast, by the two-times rule for a network."""
    module, x = block_of(make, torch.float32), images(dtype=torch.float32)

    def run(module):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype):
            y = module(x)
        assert y.dtype == dtype
        scaler.scale(y.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        gradients = [p.grad.double() for p in module.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10  # nothing was infinite
        return gradients, [t.double() for t in statistics(module)]

    plain, truth, before = (
        copy.deepcopy(module),
        copy.deepcopy(module).double(),
        [*map(torch.clone, module.parameters())],
    )
    truth(x.double()).square().mean().backward()
    with unit.unfused():
        expected = run(plain)
    found = run(module)
    true = [p.grad for p in truth.parameters()], statistics(truth)
    for mine, theirs, exact in zip(found, expected, true, strict=True):
        assert_network_two_times(mine, theirs, exact)
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))  # the step was taken


def test_grad_scaler_skips_a_step_of_infinities():
    module, scaler = block_of(BLOCKS["basic"], torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer, before = torch.optim.SGD(module.parameters(), lr=0.1), [p.clone() for p in module.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = module(images(dtype=torch.float32)).sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical(list(module.parameters()), before)
    assert scaler.get_scale() == 2.0**3


# --- gradients between backward and step ------------------------------------------------------------------------------


@blocks
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_and_their_norm(set_to_none, make):
    """The sum of two steps' gradients, after zero_grad of either kind; clipping finds eager's norm."""
    module, batches = block_of(make), [images(), images()]
    single = [results(copy.deepcopy(module), x)[2:] for x in batches]
    count = len(list(module.parameters()))
    results(module, images())
    module.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None or not (set_to_none or p.grad.any()) for p in module.parameters())
    for x in batches:
        loss_of(module(x)).backward()
    sums = [a + b for a, b in zip(single[0][:count], single[1][:count], strict=True)]
    assert_close([p.grad for p in module.parameters()], sums)
    wanted = torch.stack([g.norm() for g in sums]).norm()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    assert relative(norm, wanted) < tolerance("model_fp64")
    assert_close([p.grad for p in module.parameters()], [g / (wanted + 1e-6) for g in sums])


@blocks
def test_backward_twice_through_a_kept_graph(make):
    module, x = block_of(make), images().requires_grad_()
    loss = module(x).square().sum()
    grads = []
    for _ in range(2):
        loss.backward(retain_graph=True)
        grads.append([x.grad.clone(), *[p.grad.clone() for p in module.parameters()]])
    assert_identical(grads[1], [2 * g for g in grads[0]])


@blocks
def test_step_equals_eager_and_is_one_operator(make):
    """With a gradient of the input and without."""
    module, x = block_of(make), images()
    wanted = eager(module, x)
    with Operators() as operators:
        assert_close(results(module, x), wanted)
    assert operators.blocks() == 1
    module.zero_grad()
    loss_of(module(x)).backward()
    assert_close([p.grad for p in module.parameters()], wanted[2 : 2 + len(list(module.parameters()))])


# --- averages, modes, copies ------------------------------------------------------------------------------------------


@blocks
def test_average_of_weights_and_buffers(make):
    module = block_of(make)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer, x = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9), images()
    for _ in range(3):
        optimizer.zero_grad()
        module.train()(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(module)
        average.eval()
        module.eval()
        for evaluated in (average, module):
            with torch.no_grad():
                found = evaluated(x)
                with unit.unfused():
                    assert relative(found, copy.deepcopy(evaluated)(x)) < tolerance("model_fp64")
    assert relative(average(x), module(x)) > tolerance("model_fp64")


@blocks
def test_train_mode_without_gradients_updates_statistics(make):
    module, x = block_of(make), images()
    other = copy.deepcopy(module)
    wanted = results(other, x)
    with torch.no_grad():
        y = module(x)
    assert not y.requires_grad
    assert_identical([y, *[b.double() for b in module.buffers()]], [wanted[0], *wanted[-len(list(module.buffers())) :]])


@blocks
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_between_steps_goes_on_as_the_original(how, make):
    module, x = block_of(make), images()
    results(module, x)
    module.eval()(x)
    copied = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert_identical(results(copied.train(), x), results(module.train(), x))


@blocks
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved_tensor_hooks"])
@pytest.mark.parametrize("lean", [False, True], ids=["kept", "lean"])
def test_checkpoint_counts_once(lean, use_reentrant, make):
    """A block, and one inside another checkpoint: the same bits, statistics and count updated once."""
    module, x = block_of(make), images()
    module.lean = lean
    wanted = results(copy.deepcopy(module), x)
    for depth in (1, 2):
        run = other = copy.deepcopy(module)
        for _ in range(depth):
            run = lambda x, run=run: checkpoint(run, x, use_reentrant=use_reentrant)  # noqa: E731
        assert_identical(results(other, x, run), wanted)


def test_threads_train_models_of_their_own():
    """Eight at once with the same shapes, each to the bits that it has alone."""
    x, start, found = images(), threading.Barrier(8), [None] * 8

    def train(i):
        torch.manual_seed(0)
        module = models[i]
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            state = results(module, x)
            optimizer.step()
        return state

    def work(i):
        start.wait()
        found[i] = train(i)

    models = [block_of(BLOCKS["bottleneck_projected"]) for _ in range(9)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = train(8)
    for state in found:
        assert state is not None, "a thread failed"
        assert_identical(state, wanted)
