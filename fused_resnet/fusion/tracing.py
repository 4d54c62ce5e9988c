"""What a network computes, as a graph of operations and of the calls of modules that they stand in.

Every forward is run on symbols instead of tensors (`torch.fx`), down to the modules of `torch.nn`. A forward that
cannot be run so, or that is not a function of its arguments (it draws random numbers, changes its attributes, asks
whether gradients are on), is left whole: its module becomes one operation, and its children are traced by themselves.
"""

import builtins
import contextlib
import copy
import inspect
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fused_resnet.fusion.kinds import IN_PLACE_OPERATORS, is_leaf, returns_a_tensor
from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import foreign_norm

# What every module has, or is given by torch.compile or FSDP2, and no forward reads.
_GIVEN = ("_is_torch_compile", "_compiled_call_impl", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_INTERNAL = frozenset((*vars(nn.Module()), *_GIVEN))
_tracing = threading.RLock()  # fx patches nn.Module while it traces

# What may be asked of a tensor that is no symbol.
_METADATA = frozenset(("__get__", "dim", "size", "stride", "numel", "__len__", "__hash__", "is_floating_point"))


@dataclass(eq=False)
class Call:
    """One call of a module in a trace.

    Attributes:
        args, kwargs, output: nests of `fx.Node`s and constants.
        items: the operations and calls within it, in order.
        attributes: what its forward may have read of the module.
    """

    module: nn.Module
    parent: "Call | None"
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    output: Any = None
    items: list = field(default_factory=list)
    attributes: dict = field(default_factory=dict)

    def ancestors(self) -> "list[Call]":
        """Itself and the calls that it stands in, outermost first."""
        return [*(self.parent.ancestors() if self.parent else ()), self]

    def nodes(self) -> Iterator[fx.Node]:
        for item in self.items:
            if isinstance(item, Call):
                yield from item.nodes()
            else:
                yield item


@dataclass
class Trace:
    """What a module computes in one mode: `call` is None where its own forward could not be traced.

    `whole`: the modules that were left whole because of what their forward does, and what that is.
    """

    call: Call | None
    whole: dict[nn.Module, str]


class _NotAFunctionError(Exception):
    """A forward does something that a graph of operations does not tell."""


class _NoConstants(TorchFunctionMode):
    """Refuses what would be computed once and kept, as a random number is: functions of no symbol."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name not in _METADATA and not _holds_symbol([*args, *kwargs.values()]):
            raise _NotAFunctionError(f"it calls {name}, not on its arguments")
        return func(*args, **kwargs)


def _in_place(operation: Callable) -> Callable:
    def method(self, other):
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


def _holds_symbol(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_holds_symbol, value))
    return isinstance(value, fx.Proxy)


class Symbol(fx.Proxy):
    """A tensor without data; `known`: that it is a tensor, which cannot be said of what an unknown module returns."""

    known: bool = True

    def __getattr__(self, name: str) -> Any:
        if name == "known" or not hasattr(Tensor, name):  # forwards tell other things from tensors by what they have
            raise AttributeError(name)
        return super().__getattr__(name)


# fx takes `x += y` for `x = x + y`, and so loses that others see x change.
for _operator in IN_PLACE_OPERATORS:
    setattr(Symbol, f"__{_operator.__name__}__", _in_place(_operator))


class _One(nn.Module):
    """fx looks at a root's children, so that what is traced is a child."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class _Two(_One):
    def forward(self, x, y):
        return self.inner(x, y)


class _Three(_One):
    def forward(self, x, y, z):
        return self.inner(x, y, z)


_ROOTS = {1: _One, 2: _Two, 3: _Three}


def trace(module: nn.Module) -> Trace:
    """Trace a module, called with as many tensors as its forward has arguments without a default."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) not in _ROOTS:
        return Trace(None, {module: f"its forward takes {len(needed)} arguments without a default"})
    root = _ROOTS[len(needed)](module)
    tracer = _Tracer(root)
    with _tracing, tracer.surroundings():
        try:
            tracer.trace(root)
        except Exception as error:
            return Trace(None, {**tracer.whole, module: _reason(error)})
    return Trace(next((item for item in tracer.outermost.items if isinstance(item, Call)), None), tracer.whole)


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if isinstance(error, fx.proxy.TraceError) and "control flow" in text:
        return "it branches on the values or the shape of a tensor"
    return text if isinstance(error, _NotAFunctionError) else f"{type(error).__name__}: {text}"[:160]


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module):
        super().__init__()
        self.names = {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}
        self.thread = threading.get_ident()
        self.outermost = self.current = Call(root, None)
        self.whole: dict[nn.Module, str] = {}

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Where forwards that are no functions of their arguments fail, and symbols are Tensors for those that ask."""
        is_instance = isinstance

        def refuses(name):
            asked = getattr(torch, name)

            def refuse(*args):
                if threading.get_ident() == self.thread:
                    raise _NotAFunctionError(f"it asks torch.{name}")
                return asked(*args)

            return mock.patch.object(torch, name, refuse)

        def instance_of(value, kind):
            # Not by a `__class__` of the symbol: PyTorch's compiled part would believe it, and read its memory.
            if type(value) is not Symbol:
                return is_instance(value, kind)
            if is_instance(value, kind):
                return True
            if not value.known and _names(kind, (Tensor, tuple, list, dict)):
                raise _NotAFunctionError("it asks what a child has returned")
            return _names(kind, (Tensor,))

        with contextlib.ExitStack() as stack:
            for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"):
                stack.enter_context(refuses(name))
            stack.enter_context(mock.patch.object(builtins, "isinstance", instance_of))
            stack.enter_context(_NoConstants())
            yield

    # --- what fx calls ------------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> Symbol:
        return Symbol(node, self)

    def create_node(self, *args, **kwargs) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["call"] = self.current
        self.current.items.append(node)
        return node

    def create_arg(self, a: Any):
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """Parameters and buffers are symbols too, each time anew: a graph that is taken back takes its own back."""
        if not isinstance(attr_val, Tensor) or threading.get_ident() != self.thread:
            return attr_val
        name = self.names.get(id(attr_val))
        if name is None:
            return attr_val
        symbol = self.create_proxy("get_attr", name, (), {})
        symbol.node.meta["tensor"] = attr_val
        return symbol

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if foreign_norm(type(m)) == "norm+act" and not unit.hooked(m) and len(args) == 1 and not kwargs:
            return self._inline(m, lambda x: m.act(m.drop(self._operation(m, (x,), {}))), args, kwargs)
        if m is self.root.inner and "forward" not in vars(m):
            return self._inline(m, m.forward, args, kwargs)  # without its hooks, which are not to see symbols
        if is_leaf(m) or unit.hooked(m) or "forward" in vars(m):
            return self._operation(m, args, kwargs)
        start = len(self.current.items)
        try:
            return self._inline(m, m.forward, args, kwargs)
        except Exception as error:
            self.whole[m] = _reason(error)
            self._take_back(start)
            return self._operation(m, args, kwargs)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _operation(self, m: nn.Module, args: tuple, kwargs: dict) -> fx.Proxy:
        symbol = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        symbol.node.meta["module"] = m
        symbol.known = returns_a_tensor(m)
        return symbol

    def _inline(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        call = Call(m, self.current, as_nodes(args), as_nodes(kwargs), attributes=attributes(m))
        outer, self.current = self.current, call
        outer.items.append(call)
        chance, kept = _chance(), _Kept(m)
        try:
            output = forward(*args, **kwargs)
        finally:
            self.current = outer
            changed = kept.restore()
        if changed:
            raise _NotAFunctionError("it changes its attributes")
        if _chance() != chance:
            raise _NotAFunctionError("it draws random numbers")
        call.output = as_nodes(output)
        return output

    def _take_back(self, start: int) -> None:
        """Remove what a forward has left in the graph before it failed."""
        items = self.current.items[start:]
        del self.current.items[start:]
        for item in reversed(items):
            for node in reversed(list(item.nodes()) if isinstance(item, Call) else [item]):
                self.graph.erase_node(node)


def _chance() -> tuple:
    """The state of the random numbers that are not PyTorch's."""
    _, state, position, *_ = np.random.get_state()
    return random.getstate(), state.tobytes(), position


class _Kept:
    """What a module holds, to be put back: a forward on symbols leaves symbols where it assigns."""

    def __init__(self, module: nn.Module):
        holders = [vars(module), module._parameters, module._buffers, module._modules]
        holders += [value for value in vars(module).values() if type(value) in (list, dict)]
        self.copies = [(holder, copy.copy(holder)) for holder in holders]

    def restore(self) -> bool:
        """Put everything back; whether something was changed."""
        changed = False
        for holder, before in self.copies:
            now, then = (list(h.items()) if type(h) is not list else list(enumerate(h)) for h in (holder, before))
            if len(now) == len(then) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(now, then, strict=True)):
                continue
            changed = True
            holder.clear()
            holder.extend(before) if type(holder) is list else holder.update(before)
        return changed


def _names(kind: Any, wanted: tuple[type, ...]) -> bool:
    """Whether a class is one of `wanted`, or a tuple of classes has one."""
    kinds = kind if type(kind) is tuple else (kind,)
    return any(_names(k, wanted) if type(k) is tuple else k in wanted for k in kinds)


def as_nodes(value: Any) -> Any:
    """A nest of symbols as a nest of `fx.Node`s."""
    if isinstance(value, fx.Proxy):
        return value.node
    if isinstance(value, (tuple, list)):
        items = [as_nodes(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, as_nodes(item)) for key, item in value.items())
    return value


def _is_internal(name: str) -> bool:
    return name in _INTERNAL or name == STATE or name.startswith("__composable_api")  # the last is FSDP2's, too


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward may read of a module besides its parameters, buffers and children, and their names.

    Lists and dicts by the identity of what they hold. Equal where nothing was assigned.
    """
    found = {name: _frozen(value) for name, value in vars(module).items() if not _is_internal(name)}
    return {**found, "children": tuple(module._modules), "training": module.training}


STATE = "_fused_resnet"  # the attribute by which `convert` marks a module


class _Same:
    """An object that is equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None


def _frozen(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return _Same(value)
