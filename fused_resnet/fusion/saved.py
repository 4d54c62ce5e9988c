"""How much memory traffic the fused places of a network save in inference."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.fusion.attributes import in_mode
from fused_resnet.fusion.report import Fused
from fused_resnet.modules import unit


def saved_bytes(model: nn.Module, rows: Sequence[Fused], example: Any = None) -> tuple[int | None, tuple[int, ...]]:
    """Bytes an image, and the size of that image; None where the model does not run on it.

    Each operation that became part of another no longer writes its result, nor has it read back. The model is run on
    tensors without data, which tells the sizes.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if example is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            return None, ()
        inputs = (torch.empty(1, first.in_channels, 224, 224, device="meta", dtype=first.weight.dtype),)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # it tells of every operator that fails, at length
        sizes = _sizes(model, {name for row in rows for name in row.modules[-1:]}, inputs)
    except Exception:  # whatever a model does on an image that is not its own
        return None, ()
    finally:
        log.setLevel(level)
    images = inputs[0].shape[0]
    saved = sum(2 * row.pattern.count("+") * sizes.get(row.modules[-1], 0) for row in rows if row.modules)
    return saved // images, tuple(inputs[0].shape[1:])


def _sizes(model: nn.Module, names: set[str], inputs: tuple) -> dict[str, int]:
    """Bytes of the results of the modules of these names."""
    found: dict[str, int] = {}
    modules = dict(model.named_modules())

    def note(name):
        def hook(module, args, output):
            found.setdefault(name, math.prod(output.shape) * output.element_size())

        return hook

    hooks = [modules[name].register_forward_hook(note(name)) for name in names]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with in_mode(model, training=False), fake, torch.no_grad(), unit.unfused():
            model(*(_fake(fake, x, model) for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _fake(mode: FakeTensorMode, x: Any, model: nn.Module) -> Any:
    if not isinstance(x, Tensor):
        return x
    device = next((p.device for p in model.parameters()), x.device)
    with mode:
        return torch.empty(x.shape, dtype=x.dtype, device=device)
