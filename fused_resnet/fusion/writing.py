"""Writing the part of a trace that is one module's forward as a Python function, every place one call of `fusion.run`.

A call of a child in which none of the places stands stays a call of that child; of others the forward becomes part of
the function.
"""

from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from fused_resnet.fusion import kinds, run
from fused_resnet.fusion.attributes import attributes
from fused_resnet.fusion.places import Place, Unit
from fused_resnet.fusion.programs import Leaf, Path, Program, Seen, own_class
from fused_resnet.fusion.source import PLAIN, CannotWriteError, Source
from fused_resnet.fusion.symbols import Made
from fused_resnet.fusion.tracing import Call
from fused_resnet.modules.batch_norm import foreign_norm


def write(call: Call, places: list[Place], lean: bool, outermost: bool) -> Program:
    """The fused forward of `call.module`, in which `places` stand; `outermost`: what reads its result was not traced.

    Raises:
        CannotWriteError: it uses what cannot be reached from the module.
    """
    return _Writer(call, places, lean, outermost).program()


def write_in_turn(stage: nn.Sequential) -> Program:
    """The forward of blocks in a row that are each alone: one may overwrite what the one before it has returned."""
    source = "def forward(self, x0):\n    return in_turn(self, x0)\n"
    form = ([Leaf.TENSOR], pytree.tree_structure(((0,), {})))
    return Program(source, {"in_turn": run.in_turn}, form, [Seen((), own_class(stage), attributes(stage))])


class _Writer(Source):
    def __init__(self, call: Call, places: list[Place], lean: bool, outermost: bool):
        super().__init__()
        self.call, self.lean, self.outermost = call, lean, outermost
        self.ends = {place.last: place for place in places}
        self.members = {node for place in places for node in place.nodes()}
        self.opened = {outer for node in self.members for outer in node.meta["call"].ancestors()}
        self.paths: dict[nn.Module, Path] = {
            module: tuple(name.split(".")) if name else () for name, module in call.module.named_modules()
        }
        self.seen: dict[Path, Seen] = {}
        self.used: set[Path] = set()

    def program(self) -> Program:
        leaves, spec = pytree.tree_flatten((self.call.args, self.call.kwargs))
        names = []
        for leaf in leaves:
            if leaf in self.variables:
                raise CannotWriteError("it was called with one tensor twice")
            if isinstance(leaf, fx.Node):
                names.append(f"x{len(names)}")
                self.variables[leaf] = names[-1]
            elif not isinstance(leaf, PLAIN):
                raise CannotWriteError(f"an argument is a {type(leaf).__name__}")
        form = ([Leaf.TENSOR if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec)
        self._open(self.call)
        self._line("", "return " + self._text(self._laid_out(self.call.output, names)))
        self._see_owners()
        place = self.ends.get(self.call.output) if isinstance(self.call.output, fx.Node) else None
        block = place is not None and place.add is not None and bool(place.units) and place.units[-1].complete
        alone = block and len(self.lines) == 2  # nothing before it and nothing behind
        return Program(self._function(names), self.constants, form, list(self.seen.values()), alone)

    def _laid_out(self, output: Any, names: list[str]) -> Any:
        """The result, which nobody knows to be in channels_last, as a map that came in is laid out."""
        if not (self.outermost and names and isinstance(output, fx.Node)):
            return output
        text = f"{self._constant(run.laid_out)}({self._text(output)}, {names[0]})"
        self.reads.add(names[0])
        self._define(output, text)
        return output

    # --- operations and calls -----------------------------------------------------------------------------------------

    def _open(self, call: Call) -> None:
        if not call.passing:
            self._see(call.module, call.attributes)
            if kinds.asks_modes_of_children(own_class(call.module)):
                for child in call.module.children():
                    self._see(child, attributes(child))
        for item in call.items:
            if isinstance(item, Call):
                if item in self.opened or item.passing or not self._made_within(item):
                    self._open(item)
                else:
                    self._call(item)
            elif item in self.ends:
                self._define(item, self._place(self.ends[item]))
            elif item not in self.members:
                self._define(item, self._operation(item))

    def _made_within(self, call: Call) -> bool:
        """Whether what a call returns was made in it: a child that returns its argument cannot stay a call."""
        nodes = set(call.nodes())
        returned = [leaf for leaf in pytree.tree_leaves(call.output) if isinstance(leaf, fx.Node)]
        return bool(returned) and nodes.issuperset(returned)

    def _call(self, call: Call) -> None:
        result = self._fresh()
        self._line(result, f"{self._module(call.module)}({self._arguments(call.args, call.kwargs)})")
        self._unpack(result, call.output)

    def _unpack(self, name: str, output: Any) -> None:
        if isinstance(output, fx.Node):
            self.variables[output] = name
        elif isinstance(output, Made):
            self._unpack_each({f".{key}": item for key, item in output.fields.items()}, name)
        elif isinstance(output, (tuple, list, dict)):
            pairs = output.items() if isinstance(output, dict) else enumerate(output)
            self._unpack_each({f"[{self._text(key)}]": item for key, item in pairs}, name)

    def _unpack_each(self, parts: dict[str, Any], name: str) -> None:
        for access, item in parts.items():
            part = self._fresh()
            self.reads.add(name)
            self._line(part, f"{name}{access}")
            self._unpack(part, item)

    def _operation(self, node: fx.Node) -> str:
        arguments = self._arguments(node.args, node.kwargs)
        if node.op == "call_module":
            module = kinds.module_of(node)
            if foreign_norm(type(module)) == "norm+act" and node.meta["call"].module is module:
                return f"{self._constant(run.norm)}({self._module(module)}, {arguments})"
            if kinds.views(node):
                arguments = ", ".join(f"{self._constant(run.viewable)}({self._text(a)})" for a in node.args)
                arguments += "".join(f", {key}={self._text(a)}" for key, a in node.kwargs.items())
            return f"{self._module(module)}({arguments})"
        if node.op == "call_function":
            return f"{self._constant(node.target)}({arguments})"
        if kinds.views(node):
            return f"{self._constant(run.view)}({arguments})"
        if node.op == "call_method":
            return f"{self._text(node.args[0])}.{node.target}({self._arguments(node.args[1:], node.kwargs)})"
        return self._parameter(node)

    def _parameter(self, node: fx.Node) -> str:
        for module, path in self.paths.items():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor is node.meta.get("tensor"):
                    self.used.add((*path, name))
                    return f"{_dotted(path)}.{name}"
        raise CannotWriteError("a tensor is not a parameter or a buffer of it")

    # --- places -------------------------------------------------------------------------------------------------------

    def _place(self, place: Place) -> str:
        act = "none" if place.act is None else self._act(place.act)
        residual = "None" if place.residual is None else self._text(place.residual)
        x = self._text(place.x)
        if not place.units:
            return f"{self._constant(run.add_act)}({x}, {residual}, {act!r}{_into(place)})"
        *_, last = place.units
        if place.add is None:
            act = "none" if last.act is None else self._act(last.act)
        if not last.complete:
            function = run.bn_act if last.conv is None else run.conv_act
            module = self._unit_modules(last)[0]
            return f"{self._constant(function)}({module}, {x}, {residual}, {act!r}{_into(place)})"
        return f"{self._constant(run.block)}({self._units(place, act)}, {x}{self._options(place, residual)})"

    def _units(self, place: Place, act: str) -> str:
        acts = ["none" if unit.act is None else self._act(unit.act) for unit in place.units[:-1]] + [act]
        layers = [f"({', '.join(self._unit_modules(unit))}, {a!r})" for unit, a in zip(place.units, acts, strict=True)]
        return f"({', '.join(layers)},)"

    def _options(self, place: Place, residual: str) -> str:
        options = ""
        if place.projection is not None:
            options += f", projection=({', '.join(self._unit_modules(place.projection))}, 'none')"
        elif place.add is not None:
            options += ", add_input=True" if place.residual is place.x else f", residual={residual}"
        if place.pool is not None:
            pool = kinds.module_of(place.pool)
            self._see(pool, attributes(pool))
            options += f", pool={self._module(pool)}"
        return options + (", lean=True" if self.lean else "") + _into(place)

    def _unit_modules(self, unit: Unit) -> list[str]:
        modules = [kinds.module_of(node) for node in (unit.conv, unit.norm) if node is not None]
        for module in modules:
            if foreign_norm(type(module)) != "norm+act":  # of which the forward is part of the program
                self._see(module, None, norm=kinds.is_norm_module(module))
        return [self._module(module) for module in modules]

    def _act(self, node: fx.Node) -> str:
        module = kinds.module_of(node)
        if module is not None:
            self._see(module, attributes(module))
        return kinds.act_of(node)

    # --- text ---------------------------------------------------------------------------------------------------------

    def _see(self, module: nn.Module, read: dict | None, norm: bool = False) -> None:
        path = self._path(module)
        if path not in self.seen:
            self.seen[path] = Seen(path, own_class(module), read, norm)

    def _see_owners(self) -> None:
        """Modules of which children are used without a call: lists of modules, and those with another method called."""
        for path in self.used:
            for end in range(1, len(path)):
                if path[:end] not in self.seen:
                    owner = self.call.module.get_submodule(".".join(path[:end]))
                    self.seen[path[:end]] = Seen(path[:end], own_class(owner), attributes(owner))

    def _path(self, module: nn.Module) -> Path:
        if module not in self.paths:
            raise CannotWriteError(f"a {type(module).__name__} that it calls is not a child")
        self.used.add(self.paths[module])
        return self.paths[module]

    def _module(self, module: nn.Module) -> str:
        return _dotted(self._path(module))


def _into(place: Place) -> str:
    if place.add is None or not kinds.adds_in_place(place.add):
        return ""
    other = place.residual if place.projection is None else place.projection.last
    return f", into={'added' if place.add.args[0] is other else 'y'!r}"


def _dotted(path: Path) -> str:
    return "self" + "".join(f".{name}" if name.isidentifier() else f"._modules[{name!r}]" for name in path)
