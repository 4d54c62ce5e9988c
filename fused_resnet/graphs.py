"""A network in eval mode as CUDA graphs, one for each shape of input.

At batch 1, launching kernels one by one costs more time than they run. A replay launches all of them at once, and runs
no Python: what Python would have noticed is compared before it.
"""

import threading
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.capture import Captured, Graph, one_capture
from fused_resnet.modules.unit import is_unfused
from fused_resnet.ops.library import ORDINARY
from fused_resnet.watch import Watch

# Where graphs are captured. The tests put "cpu" in its place, and a double in that of `capture.record`.
DEVICE_TYPE = "cuda"


def _followed() -> bool:
    """Whether somebody follows what the model does, or changes it."""
    return (
        torch.is_autocast_enabled(DEVICE_TYPE)
        or is_unfused()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (DEVICE_TYPE == "cuda" and torch.cuda.is_current_stream_capturing())
    )


class GraphedModel:
    """What `fused_resnet.graph` returns: called as the model, whose parameters and mode stay the model's.

    Attributes:
        model: the network itself.
        max_shapes: how many shapes are captured at the most.
        shapes: what is captured now, each with `shape`, `dtype`, `device`, `memory_format` and `backend`.
    """

    def __init__(self, model: nn.Module, max_shapes: int):
        self._model, self.max_shapes = model, max_shapes
        self._watch = Watch(model)
        self._graphs: dict[Captured, Graph] = {}
        self._lock = threading.Lock()

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def shapes(self) -> list[Captured]:
        return list(self._graphs)

    def __repr__(self) -> str:
        shapes = "".join(f"\n  {what}" for what in self.shapes)
        return f"GraphedModel({type(self.model).__name__}, {len(self.shapes)} of {self.max_shapes} shapes:{shapes})"

    def __call__(self, x: Tensor):
        """Return `model(x)` in fresh tensors; see `fused_resnet.graph`."""
        if torch.compiler.is_compiling() or self._calls_model(x):
            return self.model(x)
        with torch.no_grad():
            with self._lock:
                found = self._find(x)
                if found is not None:
                    return found(x)
            return self.model(x)

    def __reduce__(self):
        raise TypeError("a GraphedModel cannot be copied or pickled; copy its .model, and call fr.graph for the copy")

    def reset(self) -> None:
        """Drop every graph and its memory: each shape is captured again at its next call."""
        with self._lock:
            self._drop()

    def _calls_model(self, x: Any) -> bool:
        return (
            type(x) not in ORDINARY
            or x.device.type != DEVICE_TYPE
            or self.model.training
            or (x.requires_grad and torch.is_grad_enabled())
            or _followed()
        )

    def _find(self, x: Tensor) -> Graph | None:
        """The graph for x, captured now where there is none; None: there is to be none."""
        if not self._watch.same() or any(graph.held.forgotten for graph in self._graphs.values()):
            self._drop()
        if self._watch.training() or x.numel() == 0:
            return None
        what = Captured.of(x)
        found = self._graphs.get(what)
        if found is None and len(self._graphs) < self.max_shapes:
            found = Graph(self.model, x, what)
            if not self._watch.same():
                raise RuntimeError(
                    f"fr.graph: a parameter, buffer or submodule of {type(self.model).__name__} changed while it was "
                    "captured, by its own forward or by another thread"
                )
            self._graphs[what] = found
        return found

    def _drop(self) -> None:
        for device in {what.device for what in self._graphs if what.device.type == "cuda"}:
            with one_capture:
                torch.cuda.synchronize(device)  # a replay may be under way, on any stream
        self._graphs = {}
        self._watch = Watch(self.model)


def graph(model: nn.Module, example: Tensor, *, max_shapes: int = 8) -> GraphedModel:
    """Capture `model`, in eval mode, in a CUDA graph for inputs like `example`; call what is returned as the model.

    A call copies its input into the graph's, replays the graph on the current stream and returns fresh tensors. No
    gradient is recorded, as under `torch.no_grad()`. The first input of another shape (or dtype, device, memory format,
    `use_backend`) is captured too, until there are `max_shapes` graphs; what comes then runs without one.

    Weights stay live. Parameters, buffers and submodules are compared before every replay; after a change
    (`load_state_dict`, an optimizer's step, `.to()`, another parameter) all graphs are dropped, and captured again at
    their next calls. What PyTorch does not count (written through `.data`, by an optimizer with `fused=True`, by the
    replay of another graph) is known after `model.train()` or `model.eval()`, after which the graphs of fused modules
    are captured anew, too: do not call them for every input. What only Python would have seen is not noticed:
    attributes (`eps`, `stride`, `act`), hooks, tensors that are neither parameters nor buffers, flags such as TF32, a
    new plan. After such a change, call `reset()`.

    Where there is nothing to replay the model itself is called, with gradients: in training mode, for an input that
    requires grad (where gradients are enabled), is not on a CUDA device or is of a subclass, under autocast,
    `torch.compile`, tracers, dispatch modes and transforms, and while another graph is captured. Without gradients it
    is called beyond `max_shapes`, for an empty input, and where only a part of it is in training mode.

    Threads may share it: a lock is held while copy, replay and clone are launched, and replays of one shape on several
    streams wait for each other. Every shape has memory of its own, and replaced weights live until the next call.

    Shapes:
        example: what `model(example)` takes, typically [N, C, H, W]; only its properties matter. The model returns
            tensors on its device, in lists, tuples and dicts.

    Raises:
        TypeError: model is no module, example no tensor, max_shapes no int, or an output none of the above.
        ValueError: max_shapes below 1; an example that is empty or not on a CUDA device; a model in training mode, or
            with tensors on another device.
        RuntimeError: the model cannot be captured, because it waits for the GPU, changes its own tensors or has
            inference tensors; or the call is under autocast, a mode, or the capture of another graph. A later call
            that captures raises the same; nothing is kept of a capture that failed.
    """
    _check(model, example, max_shapes)
    graphed = GraphedModel(model, max_shapes)
    with torch.no_grad():
        graphed._find(example)
    return graphed


def _check(model: nn.Module, example: Tensor, max_shapes: int) -> None:
    for name, value, right, kind in (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("example", example, type(example) in ORDINARY, "an ordinary tensor"),
        ("max_shapes", max_shapes, type(max_shapes) is int, "an int"),
    ):
        if not right:
            raise TypeError(f"fr.graph: {name} must be {kind}, got a {type(value).__name__}")
    if max_shapes < 1:
        raise ValueError(f"fr.graph: max_shapes must be at least 1, got {max_shapes}")
    if example.device.type != DEVICE_TYPE:
        raise ValueError(f"fr.graph: a CUDA graph needs a CUDA device; the example is on {example.device}")
    if example.numel() == 0:
        raise ValueError(f"fr.graph: the example is empty: {tuple(example.shape)}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"fr.graph: {name or 'the model'} is in training mode; call model.eval() first")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(
                f"fr.graph: the example is on {example.device}, and the model's {name} on {tensor.device}; "
                f"model.to({str(example.device)!r}) moves it"
            )
    if torch.compiler.is_compiling() or _followed():
        raise RuntimeError(
            "fr.graph: called under autocast, torch.compile, a tracer, mode or transform, or while another graph is "
            "captured; call it outside (for bf16: model.to(torch.bfloat16))"
        )
