"""PyTorch's modes in which networks are compared: pieces of activations are noted or given, and nothing is random."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.ops.block import activations, pooled

# Functions that are ReLU or ReLU6, by the names that they have in PyTorch's Python and in aten.
_ACTS = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6"}


def _act(name: str, args: tuple, kwargs: dict) -> str:
    """Which activation with pieces the call of a PyTorch function is, or "none"."""
    if name not in ("hardtanh", "hardtanh_"):
        return _ACTS.get(name, "none")
    lowest, highest = [*args[1:3], *(-1.0, 1.0)[len(args[1:3]) :]]
    return "relu6" if (kwargs.get("min_val", lowest), kwargs.get("max_val", highest)) == (0, 6) else "none"


def _pieces(x: Tensor, act: str) -> Tensor:
    """Which piece of ReLU or ReLU6 every element is on, from the pre-activation or the output: 0, 1, or 2 above 6."""
    inside = ~(x <= 0)  # NaN is inside: it stays NaN
    return inside.to(torch.int8) + (x >= 6) if act == "relu6" else inside.to(torch.int8)


class Pieces(TorchFunctionMode):
    """Has plain activations note the pieces that they take, in the order of the calls, or take those that are given.

    A max pooling, which has pieces too, notes or takes the index of each output.
    """

    def __init__(self, given: list[Tensor] | None = None):
        super().__init__()
        self.given = None if given is None else iter(given)
        self.taken: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "max_pool2d":
            return self._max_pool2d(func, args, kwargs)
        act = _act(name, args, kwargs)
        if act == "none":
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        pieces = _pieces(x.detach(), act) if self.given is None else next(self.given)
        self.taken.append(pieces)
        if self.given is None:
            return func(*args, **kwargs)
        y = x if name.endswith("_") or kwargs.get("inplace") else x.clone()
        return y.masked_fill_(pieces == 0, 0).masked_fill_(pieces == 2, 6)

    def _max_pool2d(self, func, args: tuple, kwargs: dict) -> Tensor:
        if self.given is None:
            geometry = {name: value for name, value in kwargs.items() if name != "return_indices"}
            with torch.no_grad():
                self.taken.append(F.max_pool2d_with_indices(*args, **geometry)[1])
            return func(*args, **kwargs)
        self.taken.append(next(self.given))
        x, index = args[0] if args else kwargs["input"], self.taken[-1]
        return x.flatten(-2).gather(-1, index.flatten(-2)).reshape(index.shape)


class FusedPieces(TorchDispatchMode):
    """Notes the pieces that fused (and plain) activations and poolings take, from the outputs of the operators."""

    def __init__(self):
        super().__init__()
        self.taken: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        indices = None
        if func is torch.ops.fused_resnet.block.default:
            found, indices = list(activations(args, result)), pooled(args, result)
        elif func.namespace == "fused_resnet":
            names = [argument.name for argument in func._schema.arguments]
            found = [(result, args[names.index("act")])] if "act" in names else []
        elif func is torch.ops.aten.max_pool2d_with_indices.default:
            found, indices = [], result[1]
        else:
            found = [(result, _act(func._schema.name.removeprefix("aten::"), args, kwargs))]
        self.taken += [_pieces(y, act) for y, act in found if act in ("relu", "relu6")]
        self.taken += [] if indices is None else [indices]
        return result


def in_order_of(wanted: list[Tensor], pieces: list[Tensor]) -> list[Tensor] | None:
    """`pieces` in the order of `wanted`, those of the same calls; None: they are others.

    A fused forward computes a branch where its sum stands, and so perhaps after another branch.
    """
    left, ordered = list(pieces), []
    for want in wanted:
        same = {i: p for i, p in enumerate(left) if (p.shape, p.dtype) == (want.shape, want.dtype)}
        differences = {i: int((p != want).sum()) for i, p in same.items()}
        if not differences:
            return None
        ordered.append(left.pop(min(differences, key=differences.get)))
    return None if left else ordered


_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


class Settled(TorchFunctionMode):
    """Takes the chance out of dropout and stochastic depth: nothing is dropped, what is drawn is the likelier value.

    The modules keep their probabilities, on which fused forwards may rely.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _DROPOUTS:
            x = args[0] if args else kwargs["input"]
            return x if name.endswith("_") or kwargs.get("inplace") else x.clone()
        if name == "bernoulli_":
            x, chance = args[0], torch.as_tensor(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
            return x.copy_(chance >= 0.5)
        if name == "bernoulli":
            return (args[0] >= 0.5).to(args[0])
        if "dropout_p" in kwargs:  # of an attention
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
