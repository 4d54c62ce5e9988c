"""Whole networks by the compiled CUDA kernels, in inference and in training; in the emulator where there is no GPU."""

import copy

import pytest
import torch
from cuda_kernels import DEVICE, library
from devices import full_fp32
from networks import assert_training_step, calibrate, largest, seeded
from problems import LAYOUTS
from tolerances import assert_two_times, tolerance

import fused_resnet as fr

pytestmark = pytest.mark.skipif(bool(library()), reason=library() or "it is there")
full_precision = pytest.fixture(autouse=True)(full_fp32)

INFERENCE = (("resnet18", torch.float32), ("resnet50", torch.bfloat16), ("mobilenet_v2", torch.bfloat16))
TRAINING = {"resnet18": (4, {}), "mobilenet_v2": (16, {"width_mult": 0.25})}  # batch, options


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), INFERENCE, ids=str)
def test_network_in_inference(name, dtype):
    model, x = (
        calibrate(seeded(getattr(fr.models, name)), torch.randn(8, 3, 32, 32)).to(DEVICE),
        torch.randn(2, 3, 32, 32),
    )
    truth = copy.deepcopy(model).double()
    model, x = model.to(dtype), LAYOUTS["channels_last"](x).to(DEVICE, dtype)
    with torch.inference_mode():
        with fr.use_backend("reference"):
            expected, exact = model(x), truth(x.double())
        with fr.use_backend("cuda"):
            y = model(x)
    assert_two_times(y, expected, exact)
    if dtype == torch.float32:
        assert largest(y, expected) < tolerance("model_eval_fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_network_training_step(name):
    batch, options = TRAINING[name]
    assert_training_step(name, "cuda", DEVICE, batch, **options)
