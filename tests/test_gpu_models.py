"""Networks on the GPU beside the plain network there: inference, a training step, `verify`, state and layouts."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from devices import devices, full_fp32, on_devices
from networks import assert_network_two_times, batch_norms, calibrate, largest, seeded, statistics, step
from problems import dtypes, poisoned
from test_verify import small
from tolerances import assert_two_times, tolerance
from torch import nn

import fused_resnet as fr
from fused_resnet.modules.unit import unfused

full_precision = pytest.fixture(autouse=True)(full_fp32)
deterministic = pytest.fixture(poisoned)

MODELS = {name: getattr(fr, name) for name in ("resnet18", "resnet50", "mobilenet_v2", "cifar_resnet20")}
models = on_devices("build", MODELS, few=("resnet18", "cifar_resnet20"))
trained_models = on_devices("build", MODELS, few=("cifar_resnet20",))

native = torch.channels_last


def image(build, device):
    size = 32 if build is fr.cifar_resnet20 else 64
    return torch.randn(4, 3, size, size).to(device, memory_format=native)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# --- inference ---


@models
@dtypes(torch.float32, torch.bfloat16)
def test_model_eval_two_times(device, backend, build, dtype):
    model = calibrate(seeded(build).to(device), image(build, device)).to(dtype)
    x = image(build, device).to(dtype)
    with torch.inference_mode():
        with fr.use_backend(backend):
            y = model(x)
        with unfused():
            plain, truth = copy.deepcopy(model)(x), copy.deepcopy(model).double()(x.double())
    assert y.device.type == device
    assert_two_times(y, plain, truth)
    if dtype == torch.float32:
        assert largest(y, plain) < tolerance("model_eval_fp32")


@models
def test_model_takes_nchw_and_channels_last(device, backend, build):
    model, x = calibrate(seeded(build).to(device), image(build, device)), image(build, device)
    with torch.inference_mode(), fr.use_backend(backend):
        y = model(x)
        assert largest(model(x.contiguous()), y) < tolerance("model_eval_fp32")
        assert largest(model.to(memory_format=native)(x), y) < tolerance("model_eval_fp32")


# --- training ---


def training_step(model, x, labels, mixed):
    """Loss, gradients and running statistics."""
    losses = []
    hook = model.register_forward_hook(lambda _, inputs, y: losses.append(F.cross_entropy(y.float(), labels)))
    with torch.autocast(x.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
        gradients = step(model, x, labels)
    hook.remove()
    return losses[0].item(), gradients, statistics(model)


@trained_models
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_model_training_step_two_times(device, backend, build, mixed):
    """Batch norm's shift keeps nearly all values away from the kinks, where a rounded sign moves whole gradients."""
    model = without_dropout(seeded(build)).to(device)
    for bn in batch_norms(model):
        nn.init.constant_(bn.bias, 3.0 if build is fr.mobilenet_v2 else 4.0)
    x, labels = image(build, device), torch.randint(10, (4,)).to(device)
    eager, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    with fr.use_backend(backend):
        loss, *mine = training_step(model, x, labels, mixed)
    with unfused():
        loss_eager, *plain = training_step(eager, x, labels, mixed)
        _, *expected = training_step(truth, x.double(), labels, mixed=False)
    name = "loss_autocast" if mixed else "model_eval_fp32"
    assert loss == pytest.approx(loss_eager, rel=tolerance(name))
    for found in zip(mine, plain, expected, strict=True):
        assert_network_two_times(*found)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert {int(bn.num_batches_tracked) for bn in batch_norms(model)} == {1}


@on_devices()
def test_model_training_is_deterministic(device, backend, deterministic):
    """The same bits in every run. Without max pooling, of which aten has no deterministic gradient on CUDA."""
    x, labels = torch.randn(8, 3, 32, 32).to(device), torch.randint(10, (8,)).to(device)
    runs = []
    for _ in range(2):
        model = seeded(fr.cifar_resnet20).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with fr.use_backend(backend):
            for _ in range(2):
                step(model, x, labels)
                optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


# --- verify ---


@on_devices()
@dtypes()
def test_verify_passes(device, backend, dtype):
    report = fr.verify(small().to(device), torch.randn(4, 3, 12, 12).to(device), dtype=dtype, backend=backend)
    assert report, report
    assert torch.device(report.about["device"]).type == device


@devices
def test_verify_passes_with_the_backend_left_open(device):
    report = fr.verify(small().to(device), torch.randn(4, 3, 12, 12).to(device), train=False)
    assert report, report


# --- state ---


@devices
def test_state_dict_goes_to_the_device_and_back(device):
    model = calibrate(seeded(fr.cifar_resnet20), torch.randn(8, 3, 32, 32))
    state = copy.deepcopy(model.state_dict())
    there = seeded(fr.cifar_resnet20, seed=1).to(device).eval()
    there.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert largest(there(x.to(device)).cpu(), model(x)) < tolerance("model_eval_fp32")
    back = seeded(fr.cifar_resnet20, seed=2)
    back.load_state_dict(there.state_dict())
    for key, value in back.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, state[key]), key


@devices
def test_model_moves_to_the_device_and_back(device):
    """Nothing that was derived on one device is used on the other."""
    model, x = calibrate(seeded(fr.cifar_resnet20), torch.randn(8, 3, 32, 32)), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        y = model(x)
        for _ in range(2):
            there = model.to(device)(x.to(device))
            assert there.device.type == device
            assert largest(there.cpu(), y) < tolerance("model_eval_fp32")
            assert torch.equal(model.cpu()(x), y)
