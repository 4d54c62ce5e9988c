"""One CUDA graph of a network: its capture, its replay, and the memory that it reads."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fused_resnet.backends import context_backend
from fused_resnet.backends.packing import holding

WARM_UP = 3  # runs before a capture: libraries choose their kernels, weights are packed
CONSTANTS = (type(None), bool, int, float, str)  # what a network may return beside tensors

one_capture = threading.Lock()


def _warm_up(call: Callable[[], Any], device: torch.device) -> None:
    """Run `call` on a stream of its own, as PyTorch asks before a capture."""
    if device.type != "cuda":
        for _ in range(WARM_UP):
            call()
        return
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        current.wait_stream(stream)


def record(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return `replay()`, which does on the current stream what `call` does now, and returns the same tensors."""
    captured = torch.cuda.CUDAGraph()
    # PyTorch captures one graph at a time, and leaves its stream behind when that fails: the current one is set again.
    # What other threads do meanwhile (one that pins memory, say) is no part of it.
    with (
        one_capture,
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(captured, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        outputs = call()

    def replay():
        captured.replay()
        return outputs

    return replay


class Captured(NamedTuple):
    """What one graph was captured for. `memory_format`: channels_last, or contiguous for all other strides."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format
    backend: str  # that `use_backend` held; "": none

    @classmethod
    def of(cls, x: Tensor) -> "Captured":
        native = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if native else torch.contiguous_format
        return cls(x.shape, x.dtype, x.device, layout, context_backend())

    def __str__(self) -> str:
        names = [str(value).removeprefix("torch.") for value in (self.dtype, self.memory_format)]
        return " ".join(["x".join(map(str, self.shape)), *names, str(self.device), *filter(None, [self.backend])])


class Graph:
    """A model captured for one shape, with all memory that its kernels read. It is called by one thread at a time."""

    def __init__(self, model: nn.Module, x: Tensor, what: Captured):
        with torch.inference_mode(False), torch.no_grad():
            self.x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=what.memory_format).copy_(x)
            call = partial(_run, model, self.x)
            _warm_up(call, x.device)
            try:
                with holding() as self.held:
                    self.replay = record(call, x.device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                first = error.__context__ or error  # the end of a capture that has failed raises again
                raise RuntimeError(
                    f"fr.graph: {type(model).__name__} cannot be captured for an input of {what}: {first}\nIn a CUDA "
                    "graph a network must not wait for the GPU (.item(), .cpu(), branches on values of tensors)."
                ) from error
        self.stream = torch.cuda.current_stream(x.device) if x.is_cuda else None

    def __call__(self, x: Tensor):
        if self.stream is not None:
            self._take_turn()
        self.x.copy_(x)
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.replay())

    def _take_turn(self) -> None:
        """On another stream, wait for the replay before this one, whose input and outputs are overwritten."""
        stream = torch.cuda.current_stream(self.x.device)
        if stream != self.stream:
            stream.wait_stream(self.stream)
            self.x.record_stream(stream)
            self.stream = stream


def _run(model: nn.Module, x: Tensor):
    """`model(x)`, refused where a replay would overwrite what cannot be cloned."""
    outputs = model(x)
    for leaf in tree_leaves(outputs):
        if not (leaf.device == x.device if isinstance(leaf, Tensor) else isinstance(leaf, CONSTANTS)):
            what = f"a tensor on {leaf.device}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise TypeError(
                f"fr.graph: {type(model).__name__} returns {what}, and not tensors on {x.device}, in lists, tuples and "
                "dicts"
            )
    return outputs
