"""A training step of a whole network by the Triton kernels, in the interpreter where there is no GPU."""

import pytest
from devices import full_fp32
from networks import assert_training_step

from fused_resnet.backends import backend_report, triton

pytestmark = pytest.mark.skipif(bool(backend_report()["triton"]), reason=backend_report()["triton"] or "it is there")
full_precision = pytest.fixture(autouse=True)(full_fp32)


@pytest.mark.slow
def test_network_training_step():
    assert_training_step("resnet18", "triton", triton.device_type(), 4)
