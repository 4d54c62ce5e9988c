"""Places of a trace that run as one operator: what belongs to each, and in which call of a module it stands.

    conv [+ batch norm] [+ add] [+ activation]      batch norm [+ add] + activation      add + activation

Convolutions with batch norm in a row, and a projection that is added to them, make one place: in training they are one
operator. Nothing is taken into a place whose value is read elsewhere.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from fused_resnet.fusion import kinds
from fused_resnet.fusion.tracing import Call

MOST_UNITS = 4  # in a row: what a block keeps for its gradients lives until the last of them is there


class Unit(NamedTuple):
    """A convolution, or None, a batch norm, or None, and an activation, as operations that follow each other."""

    conv: fx.Node | None
    norm: fx.Node | None
    act: fx.Node | None = None

    @property
    def first(self) -> fx.Node:
        return self.conv or self.norm

    @property
    def last(self) -> fx.Node:
        return self.act or self.norm or self.conv

    @property
    def x(self) -> fx.Node:
        return self.first.args[0]

    @property
    def complete(self) -> bool:
        return self.conv is not None and self.norm is not None

    def nodes(self) -> list[fx.Node]:
        return [node for node in self if node is not None]


@dataclass
class Place:
    """`units` in a row, or none; then `add`, to which `residual` or `projection` is the other side; `act`; `pool`."""

    units: list[Unit]
    add: fx.Node | None = None
    residual: fx.Node | None = None
    projection: Unit | None = None
    act: fx.Node | None = None
    pool: fx.Node | None = None
    call: Call = field(init=False)

    def __post_init__(self):
        self.call = common_call(self.nodes())

    def nodes(self) -> list[fx.Node]:
        """Its operations."""
        units = [*self.units, *([self.projection] if self.projection else [])]
        found = [node for unit in units for node in unit.nodes()]
        return found + [node for node in (self.add, self.act, self.pool) if node is not None]

    @property
    def x(self) -> fx.Node:
        return self.units[0].x if self.units else next(a for a in self.add.args if a is not self.residual)

    @property
    def last(self) -> fx.Node:
        return self.pool or self.act or self.add or self.units[-1].last


def common_call(nodes: list[fx.Node]) -> Call:
    """The innermost call in which all stand."""
    paths = [node.meta["call"].ancestors() for node in nodes]
    *_, found = (level[0] for level in zip(*paths, strict=False) if all(call is level[0] for call in level))
    while found.passing:
        found = found.parent
    return found


def only_user(node: fx.Node) -> fx.Node | None:
    """The operation that reads the value, if there is no other, and it reads it once."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


class Finder:
    """Finds the places of a trace.

    Args:
        problem: why a module cannot be fused, whatever stands around it; None: it can.
    """

    def __init__(self, call: Call, problem: Callable[[nn.Module], str | None]):
        self.nodes = list(call.nodes())
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.problem = problem
        self.taken: set[fx.Node] = set()
        self.by_end: dict[fx.Node, Unit] = {}

    def places(self) -> list[Place]:
        self._find_units()
        found = [*self._with_add(), *self._without_add()]
        return sorted(found, key=lambda place: self.order[place.last])

    # --- units --------------------------------------------------------------------------------------------------------

    def _usable(self, node: fx.Node) -> bool:
        plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        return plain and self.problem(kinds.module_of(node)) is None

    def _find_units(self) -> None:
        in_units = set()
        for node in self.nodes:
            if node in in_units:
                continue
            unit = None
            if kinds.is_convolution(node) and self._usable(node):
                unit = Unit(node, self._following(node, lambda n: kinds.is_norm(n) and self._usable(n)))
            elif kinds.is_norm(node) and self._usable(node):
                unit = Unit(None, node)
            if unit is None:
                continue
            unit = unit._replace(act=self._following(unit.last, self._fusible_act))
            in_units.update(unit.nodes())
            self.by_end[unit.last] = unit

    @staticmethod
    def _fusible_act(node: fx.Node) -> str | None:
        """The activation, unless its result, which fused operators keep where eager keeps its input, is written to."""
        act = kinds.act_of(node)
        written = any(user.op != "call_module" and node in kinds.changed_in_place(user) for user in node.users)
        return None if act != "relu" and written else act

    def _following(self, node: fx.Node, wanted: Callable) -> fx.Node | None:
        user = only_user(node)
        return user if user is not None and user in self.order and wanted(user) and user.args[:1] == (node,) else None

    # --- places that end with a sum -----------------------------------------------------------------------------------

    def _with_add(self) -> Iterator[Place]:
        for add in self.nodes:
            both = kinds.summands(add)
            if both is None:
                continue
            act = self._following(add, self._fusible_act)
            for place in self._sums(add, both, act):
                if self._take(place):
                    yield place
                    break

    def _sums(self, add: fx.Node, both: tuple[fx.Node, fx.Node], act: fx.Node | None) -> Iterator[Place]:
        """Ways to fuse a sum, the best first."""
        candidates = []
        for end, other in (both, both[::-1]):
            unit = self.by_end.get(end)
            if unit is not None and unit.act is None and only_user(end) is add and end not in self.taken:
                within = common_call([*unit.nodes(), add])
                candidates.append((self._chain(unit, lambda call, w=within: w in call.ancestors()), other))
        for units, other in sorted(candidates, key=lambda c: -len(c[0])):
            branch = self.by_end.get(other)
            projects = branch is not None and branch.complete and branch.act is None and only_user(other) is add
            if projects and branch.x is units[0].x and units[-1].complete and other not in self.taken:
                yield Place(units, add, projection=branch, act=act)
            yield Place(units, add, residual=other, act=act)
            if len(units) > 1:
                yield Place(units[-1:], add, residual=other, act=act)
        if act is not None:
            yield Place([], add, residual=both[1], act=act)

    def _chain(self, unit: Unit, joins: Callable[[Call], bool]) -> list[Unit]:
        """The convolutions with batch norm that lead to `unit`, as long as the call in which they stand `joins`."""
        units = [unit]
        while unit.complete and len(units) < MOST_UNITS:
            before = self.by_end.get(unit.x)
            if before is None or not before.complete or only_user(before.last) is None or before.last in self.taken:
                break
            if not joins(common_call(before.nodes())):
                break
            unit = before
            units.insert(0, unit)
        return units

    # --- places without a sum -----------------------------------------------------------------------------------------

    def _without_add(self) -> Iterator[Place]:
        for end in sorted(self.by_end, key=self.order.get, reverse=True):
            if end in self.taken:
                continue
            unit = self.by_end[end]
            own = common_call(unit.nodes())
            units = self._chain(unit, lambda call, own=own: call is own)
            pool = self._following(end, kinds.is_plain_pool) if unit.complete and unit.act is not None else None
            for place in (Place(units, pool=pool), Place(units), Place([unit])):
                if len(place.nodes()) > 1 and self._take(place):
                    yield place
                    break

    # --- whether a place may be one -----------------------------------------------------------------------------------

    def _take(self, place: Place) -> bool:
        nodes = set(place.nodes())
        if nodes & self.taken or not self._unchanged(place, nodes):
            return False
        self.taken |= nodes
        return True

    def _unchanged(self, place: Place, nodes: set[fx.Node]) -> bool:
        """Whether everything may be computed at the place's end: nothing that it reads is written before that."""
        for node in nodes:
            for changed in kinds.changed_in_place(node):
                if changed not in nodes and not self._private(changed, node):
                    return False
        positions = [self.order[node] for node in nodes]
        between = self.nodes[min(positions) + 1 : max(positions)]
        return all(
            self._private(changed, node)
            for node in between
            if node not in nodes
            for changed in kinds.changed_in_place(node)
        )

    def _private(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether nobody but the reader can see the memory of the value."""
        return value in self.order and kinds.is_fresh(value) and only_user(value) is reader
