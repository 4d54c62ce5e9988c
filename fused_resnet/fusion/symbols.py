"""What forwards are run on while they are traced, and where those fail that are no functions of their arguments."""

import builtins
import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fused_resnet.fusion.kinds import IN_PLACE_OPERATORS

# What may be asked of a tensor that is no symbol.
_METADATA = frozenset(("__get__", "dim", "size", "stride", "numel", "__len__", "__hash__", "is_floating_point"))


# What a forward may ask of PyTorch, and then depends on something else than its arguments.
ASKED = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")


class NotAFunctionError(Exception):
    """A forward does something that a graph of operations does not tell."""


class _NoConstants(TorchFunctionMode):
    """Refuses what would be computed once and kept, as a random number is: functions of no symbol."""

    def __init__(self, tracer: fx.Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name not in _METADATA and not _holds_symbol([*args, *kwargs.values()]):
            raise self.tracer.failed(f"it calls {name}, not on its arguments")
        return func(*args, **kwargs)


def _in_place(operation: Callable) -> Callable:
    def method(self, other):
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


def _holds_symbol(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_holds_symbol, value))
    return isinstance(value, fx.Proxy)


def _refused(name: str) -> Callable:
    def method(self, *args):
        raise self.tracer.failed(f"it asks {name} of a tensor")

    return method


class Symbol(fx.Proxy):
    """A tensor without data; `known`: that it is a tensor, which cannot be said of what an unknown module returns."""

    known: bool = True

    def __getattr__(self, name: str) -> Any:
        if name == "known" or not hasattr(Tensor, name):  # forwards tell other things from tensors by what they have
            raise AttributeError(name)
        return super().__getattr__(name)


for _name in ("__int__", "__float__", "__complex__", "__index__", "__len__", "__contains__"):
    setattr(Symbol, _name, _refused(_name))

# fx takes `x += y` for `x = x + y`, and so loses that others see x change.
for _operator in IN_PLACE_OPERATORS:
    setattr(Symbol, f"__{_operator.__name__}__", _in_place(_operator))


@contextlib.contextmanager
def surroundings(tracer: fx.Tracer) -> Iterator[None]:
    """Where forwards that are no functions of their arguments fail, and symbols are Tensors for those that ask."""
    is_instance, thread = isinstance, threading.get_ident()

    def refuses(owner, name):
        asked = getattr(owner, name)

        def refuse(*args):
            if threading.get_ident() == thread:
                raise tracer.failed(f"it calls {owner.__name__}.{name}")
            return asked(*args)

        return mock.patch.object(owner, name, refuse)

    def instance_of(value, kind):
        # Not by a `__class__` of the symbol: PyTorch's compiled part would believe it, and read its memory.
        if type(value) is not Symbol:
            return is_instance(value, kind)
        if is_instance(value, kind):
            return True
        if not value.known and _names(kind, (Tensor, tuple, list, dict)):
            raise tracer.failed("it asks what a child has returned")
        return _names(kind, (Tensor,))

    with contextlib.ExitStack() as stack:
        for name in ASKED:
            stack.enter_context(refuses(torch, name))
        stack.enter_context(refuses(torch.inference_mode, "__enter__"))
        stack.enter_context(mock.patch.object(builtins, "isinstance", instance_of))
        stack.enter_context(_NoConstants(tracer))
        yield


def _names(kind: Any, wanted: tuple[type, ...]) -> bool:
    """Whether a class is one of `wanted`, or a tuple of classes has one."""
    kinds = kind if type(kind) is tuple else (kind,)
    return any(_names(k, wanted) if type(k) is tuple else k in wanted for k in kinds)


class Made(NamedTuple):
    """An object of a dataclass, as forwards of transformers return them."""

    kind: type
    fields: dict[str, Any]


def as_nodes(value: Any) -> Any:
    """A nest of symbols as a nest of `fx.Node`s."""
    if isinstance(value, fx.Proxy):
        return value.node
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        items = [as_nodes(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, as_nodes(item)) for key, item in value.items())
    if _is_made_of_its_fields(value):
        return Made(
            type(value), {field.name: as_nodes(getattr(value, field.name)) for field in dataclasses.fields(value)}
        )
    return value


def _is_made_of_its_fields(value: Any) -> bool:
    """Whether a dataclass' own constructor makes an equal object of the fields."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    names = {field.name for field in dataclasses.fields(value)}
    plain = type(value).__dataclass_params__.init and all(field.init for field in dataclasses.fields(value))
    # The outputs of transformers have a __post_init__ that fills the dict that they are too.
    known = not hasattr(value, "__post_init__") or type(value).__module__.startswith("transformers.")
    return plain and known and set(vars(value)) <= names
