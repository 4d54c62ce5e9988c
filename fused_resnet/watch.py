"""Whether a network's weights are still those that something was made of."""

import operator
from itertools import chain

from torch import Tensor, nn

_training = operator.attrgetter("training")
_version = operator.attrgetter("_version")


class Watch:
    """Whether every parameter, buffer and submodule of a model is what it was when this was made.

    Asked at every call, so `packing.version` is written out for all tensors at once, and without what is known: their
    memory is held, so that an equal address means the same memory, on the same device. `.data = ...` can still give it
    other strides, though not to a vector; with another dtype the model would take other inputs. A batch norm's count of
    batches is not read in eval mode.

    Raises:
        RuntimeError: inference tensors, whose changes PyTorch does not count.
    """

    def __init__(self, model: nn.Module):
        self.modules = list(model.modules())
        dicts = [[m._parameters, m._buffers, m._modules] for m in self.modules]
        # Of a module without anything `_modules` is watched too: it may be a list that is filled later.
        self.views = [d.values() for of_module in dicts for d in [d for d in of_module if d] or of_module[-1:]]
        self.views.append((Watch,))  # an end: where something was added or removed it is elsewhere
        self.found = list(chain.from_iterable(self.views))
        counts = {id(m.num_batches_tracked) for m in self.modules if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        self.tensors = [t for t in self.found if isinstance(t, Tensor) and id(t) not in counts]
        if any(t.is_inference() for t in self.tensors):
            raise RuntimeError(
                f"{type(model).__name__} has inference tensors, whose changes PyTorch does not count; build it outside "
                "torch.inference_mode()"
            )
        self.matrices = [t for t in self.tensors if t.dim() > 1]
        self.memory = [t.detach() for t in self.tensors]
        self.versions = list(map(_version, self.tensors))
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.strides = list(map(Tensor.stride, self.matrices))

    def same(self) -> bool:
        return (
            all(map(operator.is_, chain.from_iterable(self.views), self.found))
            and list(map(_version, self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(Tensor.stride, self.matrices)) == self.strides
        )

    def training(self) -> bool:
        """Whether a part of the model is in training mode."""
        return any(map(_training, self.modules))
