"""What every test needs: torchvision beside a CPU-only torch, seeds, and the GPU's absence said aloud."""

import pytest
import torch

# Beside a CPU-only torch, torchvision's compiled part does not load; its import registers fakes for these two names.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _TORCHVISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch.cuda finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
