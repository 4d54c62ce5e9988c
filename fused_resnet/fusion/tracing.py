"""What a network computes, as a graph of operations and of the calls of modules that they stand in.

Every forward is run on symbols instead of tensors (`torch.fx`), down to the modules of `torch.nn`. A forward that
cannot be run so, or that is not a function of its arguments (it draws random numbers, changes its attributes, asks
whether gradients are on), is left whole: its module becomes one operation, and its children are traced by themselves.
"""

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from fused_resnet.fusion.attributes import Kept, attributes
from fused_resnet.fusion.kinds import is_leaf, returns_a_tensor
from fused_resnet.fusion.symbols import ASKED, NotAFunctionError, Symbol, as_nodes, surroundings
from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import foreign_norm

_tracing = threading.RLock()  # fx patches nn.Module while it traces


@dataclass(eq=False)
class Call:
    """One call of a module in a trace.

    Attributes:
        args, kwargs, output: nests of `fx.Node`s and constants.
        items: the operations and calls within it, in order.
        attributes: what its forward may have read of the module.
        passing: the module was made for the call, as a slice of an `nn.Sequential` is.
    """

    module: nn.Module
    parent: "Call | None"
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    output: Any = None
    items: list = field(default_factory=list)
    attributes: dict = field(default_factory=dict)
    passing: bool = False

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
    tracer, chance = _Tracer(root), (random.getstate(), np.random.get_state())
    with _tracing, surroundings(tracer):
        try:
            tracer.trace(root)
        except Exception as error:
            return Trace(None, {**tracer.whole, module: _reason(error)})
        finally:
            random.setstate(chance[0])
            np.random.set_state(chance[1])
    return Trace(next((item for item in tracer.outermost.items if isinstance(item, Call)), None), tracer.whole)


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, NotAFunctionError) else f"{type(error).__name__}: {text}"[:160]


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module):
        super().__init__()
        self.names = {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}
        self.tensors = {module: _tensors(module) for module in root.modules()}
        self.failures = 0
        self.thread = threading.get_ident()
        self.outermost = self.current = Call(root, None)
        self.whole: dict[nn.Module, str] = {}

    def failed(self, reason: str) -> NotAFunctionError:
        """The error to raise. It is counted: a forward may catch it, and go on in another way than with tensors."""
        self.failures += 1
        return NotAFunctionError(reason)

    # --- what fx calls ------------------------------------------------------------------------------------------------

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.failed("it branches on the values or the shape of a tensor")

    def iter(self, obj: fx.Proxy) -> Iterator:
        raise self.failed("it iterates over a tensor")

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.failed("it takes a tensor for a dict")

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
        if _tensors(m) != self.tensors.get(m, ()):
            raise self.failed("it runs a module with other parameters than its own")
        if any("__call__" in vars(cls) for cls in type(m).__mro__ if cls is not nn.Module and cls is not object):
            raise self.failed(f"{type(m).__name__} has a __call__ of its own")
        if foreign_norm(type(m)) == "norm+act" and not unit.hooked(m) and len(args) == 1 and not kwargs:
            return self._inline(m, lambda x: m.act(m.drop(self._operation(m, (x,), {}))), args, kwargs)
        if m is self.root.inner and "forward" not in vars(m):
            return self._inline(m, m.forward, args, kwargs)  # without its hooks, which are not to see symbols
        if is_leaf(m) or unit.hooked(m) or "forward" in vars(m):
            return self._operation(m, args, kwargs)
        start, failures = len(self.current.items), self.failures
        try:
            return self._inline(m, m.forward, args, kwargs)
        except Exception as error:
            self.whole[m], self.failures = _reason(error), failures
            self._take_back(start)
            return self._operation(m, args, kwargs)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _operation(self, m: nn.Module, args: tuple, kwargs: dict) -> fx.Proxy:
        if m.training != self.root.inner.training:
            raise self.failed("it runs a child in another mode")
        symbol = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        symbol.node.meta["module"] = m
        symbol.known = returns_a_tensor(m)
        return symbol

    def _inline(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if any(name in getattr(inspect.unwrap(type(m).forward), "__globals__", ()) for name in ASKED):
            raise NotAFunctionError("it may ask whether gradients or autocast are on")
        call = Call(m, self.current, as_nodes(args), as_nodes(kwargs), attributes=attributes(m))
        call.passing = m not in self.tensors
        outer, self.current = self.current, call
        outer.items.append(call)
        chance, kept, failures = _chance(), Kept(m), self.failures
        try:
            output = forward(*args, **kwargs)
        finally:
            self.current = outer
            changed = kept.restore()
        if changed:
            raise NotAFunctionError("it changes its attributes")
        if _chance() != chance:
            raise NotAFunctionError("it draws random numbers")
        if self.failures != failures:
            raise NotAFunctionError("it catches an error, and goes on in another way than with tensors")
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


def _tensors(module: nn.Module) -> tuple[int, ...]:
    """Which parameters and buffers a module has."""
    return tuple([id(t) for holder in (module._parameters, module._buffers) for t in holder.values()])
