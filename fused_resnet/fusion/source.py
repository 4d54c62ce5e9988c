"""The text of a Python function, written line by line from the operations of a trace."""

from collections import OrderedDict
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fused_resnet.fusion.symbols import Made

PLAIN = (type(None), bool, int, float, str, type(...))
# What may stand in a function besides tensors, numbers, their nests, and functions.
_CONSTANTS = (*PLAIN, torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)


class CannotWriteError(Exception):
    """A part of a trace that is no function of its module."""


class Source:
    """Lines, each the value of a variable; `constants`: what they name."""

    def __init__(self):
        self.variables: dict[fx.Node, str] = {}
        self.constants: dict[str, Any] = {}
        self.lines: list[tuple[str, str, set[str]]] = []  # variable, expression, variables that it reads
        self.reads: set[str] = set()

    def _function(self, arguments: list[str]) -> str:
        """The function `forward`. A variable ends with the last line that reads it, for it may hold a large map."""
        later: set[str] = set()
        found = []
        for variable, expression, reads in reversed(self.lines):
            ends = sorted(reads - later)
            later |= reads
            given = f"{variable} = " if variable else ""
            end = f"; {' = '.join(ends)} = None" if ends and variable else ""
            found.append(f"    {given}{expression}{end}\n")
        return f"def forward({', '.join(['self', *arguments])}):\n" + "".join(found[::-1])

    def _define(self, node: fx.Node, expression: str) -> None:
        self.variables[node] = self._fresh()
        self._line(self.variables[node], expression)

    def _fresh(self) -> str:
        return f"v{len(self.lines)}"

    def _line(self, variable: str, expression: str) -> None:
        self.lines.append((variable, expression, self.reads))
        self.reads = set()

    def _arguments(self, args: tuple, kwargs: dict) -> str:
        return ", ".join([self._text(a) for a in args] + [f"{key}={self._text(a)}" for key, a in kwargs.items()])

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value not in self.variables:
                raise CannotWriteError("it reads what was made inside a child")
            self.reads.add(self.variables[value])
            return self.variables[value]
        if isinstance(value, slice):
            return f"slice({', '.join(self._text(part) for part in (value.start, value.stop, value.step))})"
        if isinstance(value, Made):
            return f"{self._constant(value.kind)}({self._arguments((), value.fields)})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._constant(type(value))}({', '.join(self._text(item) for item in value)})"
        if type(value) in (tuple, torch.Size):
            return f"({''.join(self._text(item) + ', ' for item in value)})"
        if type(value) in (list, immutable_list):
            return f"[{', '.join(self._text(item) for item in value)}]"
        if type(value) in (dict, OrderedDict, immutable_dict):
            pairs = ", ".join(f"({self._text(key)}, {self._text(item)})" for key, item in value.items())
            kind = OrderedDict if type(value) is OrderedDict else dict
            return f"{self._constant(kind)}([{pairs}])"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if type(value) in (type(None), bool, int, str):
            return repr(value)
        if not (callable(value) or isinstance(value, _CONSTANTS)) or isinstance(value, nn.Module):
            raise CannotWriteError(f"a {type(value).__name__} stands in it")
        for name, known in self.constants.items():
            if known is value:
                return name
        name = f"{getattr(value, '__name__', 'constant').strip('_<>')}_{len(self.constants)}"
        self.constants[name if name.isidentifier() else f"constant_{len(self.constants)}"] = value
        return next(reversed(self.constants))
