"""The fused forward of one module, as a Python function, and what must hold for it to be used.

What stands in the module's forward was read once, from a trace. It is compared at every call: where there is a hook
now, another activation, or a changed attribute, the module's own forward runs instead.
"""

import copy
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.fusion import kinds
from fused_resnet.fusion.attributes import STATE, attributes, never_changes, registered
from fused_resnet.fusion.report import FusionReport
from fused_resnet.modules import unit

Path = tuple[str, ...]


class State:
    """What `fuse` keeps in a module: its programs by mode, and in the network itself the report."""

    def __init__(self, programs: "dict[bool, Program]", report: FusionReport | None = None):
        self.programs, self.report = programs, report


def program_of(module: nn.Module) -> "Program | None":
    """The program of a module in its mode; a module that was only made by a fused class has none."""
    state = vars(module).get(STATE)
    return None if state is None else state.programs.get(module.training)


class Leaf(Enum):
    """Stands for a tensor among the arguments of a traced call."""

    TENSOR = "tensor"


@dataclass
class Seen:
    """A module that a program relies on, by its path from the program's own.

    `attributes` are those of a module whose forward is part of the program; None: the program calls it, or is told all
    about it by the module itself, so that only its kind matters. `norm`: any batch norm will do.
    """

    path: Path
    kind: type
    attributes: dict[str, Any] | None = None
    norm: bool = False
    # The same for the usual case, in which nothing was assigned: what is in the module's dict, object by object.
    objects: tuple | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> tuple:
        return self.path, self.kind, self.attributes, self.norm

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def still(self, root: nn.Module) -> bool:
        module = root
        for name in self.path:
            module = module._modules.get(name)
            if module is None:
                return False
        if self.norm:
            return kinds.is_norm_module(module) and not getattr(type(module), "taken_apart", False)
        found = vars(module)
        if own_class(module) is not self.kind or "forward" in found or (self.path and unit.hooked(module)):
            return False
        return self.attributes is None or self._same(module, found)

    def _same(self, module: nn.Module, found: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling():  # which guards all that is read: `objects` would be set, and compile it again
            return attributes(module) == self.attributes
        if self.objects is not None:
            count, objects, names = self.objects
            if len(found) == count and registered(module) == names:
                for name, value in objects:
                    if found.get(name) is not value:
                        break
                else:
                    return True
        if attributes(module) != self.attributes:
            return False
        own = [(name, value) for name, value in found.items() if name in self.attributes]
        if all(never_changes(value) for _, value in own):
            self.objects = len(found), own, self.attributes["registered"]
        return True


def own_class(module: nn.Module) -> type:
    """The class of a module, or the one that it had before `fuse`."""
    return getattr(type(module), "own_class", type(module))


class Program:
    """A fused forward.

    Args:
        source: of a function `forward(self, *tensors)`.
        constants: what the source names.
        form: the arguments of the call that was traced: constants and `Leaf.TENSOR` in a row, and pytree's spec.
        seen: what must still hold.
        alone: it is one block, and keeps nothing of its input and its output.
    """

    def __init__(self, source: str, constants: dict[str, Any], form: tuple, seen: list[Seen], alone: bool = False):
        self.__setstate__((source, constants, pytree.tree_unflatten(*form), seen, alone))

    def __setstate__(self, state: tuple) -> None:
        self.source, self.constants, form, self.seen, self.alone = state
        self.form = pytree.tree_flatten(form)
        scope = dict(self.constants)
        exec(compile(self.source, "<fused forward>", "exec"), scope)
        self.function = scope["forward"]
        leaves, spec = self.form
        plain = pytree.tree_structure(((0,) * len(leaves), {})) == spec and set(leaves) <= {Leaf.TENSOR}
        self.tensors = len(leaves) if plain else None  # so many arguments, all of them tensors

    def __getstate__(self) -> tuple:
        return self.source, self.constants, pytree.tree_unflatten(*self.form), self.seen, self.alone  # specs change

    def __deepcopy__(self, memo: dict) -> "Program":
        made = copy.copy(self)
        made.seen = copy.deepcopy(self.seen, memo)  # it holds objects that the modules hold too
        return made

    def holds(self, module: nn.Module) -> bool:
        """Whether all that was seen is as it was."""
        for seen in self.seen:  # noqa: SIM110 a generator takes as long again
            if not seen.still(module):
                return False
        return True

    def arguments(self, args: tuple, kwargs: dict) -> tuple | list | None:
        """The tensors of a call that has the form of the traced one; None: it has another."""
        if self.tensors is not None:
            fits = not kwargs and len(args) == self.tensors and all(isinstance(a, Tensor) for a in args)
            return args if fits else None
        found, spec = pytree.tree_flatten((args, kwargs))
        leaves, expected = self.form
        if spec != expected:
            return None
        pairs = list(zip(found, leaves, strict=True))
        if not all(isinstance(a, Tensor) if b is Leaf.TENSOR else type(a) is type(b) and a == b for a, b in pairs):
            return None
        return [a for a, b in pairs if b is Leaf.TENSOR]
