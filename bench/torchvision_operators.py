"""torchvision beside a torch that its compiled part does not fit: imported before torchvision is.

Its import registers fakes for two of its operators, which are then made here. Where the compiled part loads it has
them, and no operator can be defined twice.
"""

import contextlib
import importlib.util
from pathlib import Path

import torch

_found = importlib.util.find_spec("torchvision")
for _library in Path(_found.origin).parent.glob("_C*") if _found else ():
    with contextlib.suppress(OSError):
        torch.ops.load_library(_library)

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
