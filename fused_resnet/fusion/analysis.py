"""Everything that can be fused in a network, and for everything else the reason."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

from fused_resnet.fusion import kinds
from fused_resnet.fusion.attributes import in_mode
from fused_resnet.fusion.places import Finder, Place, Unit, common_call
from fused_resnet.fusion.programs import Program
from fused_resnet.fusion.report import Fused, FusionReport, Skipped
from fused_resnet.fusion.source import CannotWriteError
from fused_resnet.fusion.tracing import Call, Trace, trace
from fused_resnet.fusion.writing import write, write_in_turn

Filter = Callable[[nn.Module, str], bool]


@dataclass
class Analysis:
    """Programs of modules, for eval mode (False) and train mode (True), and the report."""

    programs: dict[nn.Module, dict[bool, Program]] = field(default_factory=dict)
    report: FusionReport = field(default_factory=FusionReport)


def analyse(model: nn.Module, filter_fn: Filter | None = None, lean: bool = False) -> Analysis:
    """Find what `fuse` would do; the model is as it was afterwards."""
    return _Analyst(model, filter_fn, lean).run()


class _Analyst:
    def __init__(self, model: nn.Module, filter_fn: Filter | None, lean: bool):
        self.model, self.lean = model, lean
        self.names = {module: name for name, module in model.named_modules()}
        self.problems = {module: self._problem(module) for module in self.names if kinds.is_candidate(module)}
        if filter_fn is not None:
            for module in self.problems:
                if not filter_fn(module, self.names[module]):
                    self.problems[module] = "filter_fn left it out"
        names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        for module in self.problems:
            if names[module] > 1:
                self.problems[module] = self.problems[module] or "it has several names"
        self.found = Analysis()
        self.whole: dict[nn.Module, str] = {}
        self.lost: dict[nn.Module, str] = {}
        self.called: set[nn.Module] = set()
        self.fused: dict[nn.Module | str, Fused] = {}

    @staticmethod
    def _problem(module: nn.Module) -> str | None:
        return kinds.norm_problem(module) if kinds.is_norm_module(module) else kinds.convolution_problem(module)

    def run(self) -> Analysis:
        for training in (False, True):
            with in_mode(self.model, training):
                self._one_mode(training)
        self.found.report.fused = list(self.fused.values())
        self.found.report.skipped = list(self._skipped())
        return self.found

    def _one_mode(self, training: bool) -> None:
        traces = list(self._traces())
        uses = Counter(kinds.module_of(node) for t in traces for node in t.call.nodes() if kinds.module_of(node))
        self.called.update(uses)
        for module, times in uses.items():
            if times > 1 and module in self.problems and self.problems[module] is None:
                self.problems[module] = f"used {'twice' if times == 2 else f'{times} times'}"
        for t in traces:
            by_call: dict[Call, list[Place]] = {}
            for place in Finder(t.call, self.problems.get).places():
                by_call.setdefault(place.call, []).append(place)
            if by_call:  # a map in channels_last reaches what is asked for a view, and who called
                for node in t.call.nodes():
                    if kinds.views(node):
                        by_call.setdefault(common_call([node]), [])
                by_call.setdefault(t.call, [])
            for call, places in by_call.items():
                self._write(call, places, training, outermost=call is t.call)
        if not training:
            self._stages()

    def _traces(self) -> Iterator[Trace]:
        """A trace of the model, and of each part that could not be seen in it."""
        waiting, done = [self.model], set()
        while waiting:
            module = waiting.pop()
            if module in done or kinds.is_ours(module) or not kinds.contains_candidate(module):
                continue
            done.add(module)
            t = trace(module)
            self.whole.update(t.whole)
            if t.call is None:
                waiting += module.children()
                continue
            yield t
            for node in t.call.nodes():
                left = kinds.module_of(node)
                if left is not None and left not in done and len(left._modules) and not kinds.is_candidate(left):
                    waiting += left.children() if left in t.whole else [left]

    def _stages(self) -> None:
        """Rows of blocks, in inference."""
        for module in self.names:
            programs = self.found.programs.setdefault(module, {})
            blocks = [self.found.programs.get(block, {}).get(False) for block in module.children()]
            alone = len(blocks) > 1 and all(program is not None and program.alone for program in blocks)
            if type(module) is nn.Sequential and alone and not programs and "forward" not in vars(module):
                programs[False] = write_in_turn(module)

    def _write(self, call: Call, places: list[Place], training: bool, outermost: bool) -> None:
        module = call.module
        programs = self.found.programs.setdefault(module, {})
        if training in programs:
            return
        try:
            programs[training] = write(call, places, self.lean, outermost)
        except CannotWriteError as error:
            name = self.names[module] or type(module).__name__
            for left in {kinds.module_of(node) for place in places for node in place.nodes()} & set(self.problems):
                self.lost[left] = f"the forward of {name} cannot be written as a function: {error}"
            return
        for place in places:
            self._tell(place)

    # --- the report ---------------------------------------------------------------------------------------------------

    def _tell(self, place: Place) -> None:
        """Rows of a place: one for each operator that it is in inference."""
        path = self.names[place.call.module]
        for i, unit in enumerate(place.units):
            end = place if i == len(place.units) - 1 else None
            self._tell_unit(path, unit, end)
        if place.projection is not None:
            self._tell_unit(path, place.projection, None)
        if not place.units:
            self.fused.setdefault(f"{path} add", Fused(path, f"add+{kinds.act_of(place.act)}", (), path))

    def _tell_unit(self, path: str, unit: Unit, end: Place | None) -> None:
        modules = [kinds.module_of(node) for node in (unit.conv, unit.norm) if node is not None]
        parts = ["conv"] * (unit.conv is not None) + ["bn"] * (unit.norm is not None)
        if end is not None and end.add is not None:
            parts.append("add")
        act = unit.act or (end.act if end is not None else None)
        parts += [kinds.act_of(act)] if act is not None else []
        parts += ["max_pool"] if end is not None and end.pool is not None else []
        if len(parts) > 1:
            names = tuple(self.names[module] for module in modules)
            self.fused.setdefault(modules[0], Fused(names[0], "+".join(parts), names, path))

    def _skipped(self) -> Iterator[Skipped]:
        inside = {name for row in self.fused.values() for name in row.modules}
        own = {child for module in self.names if kinds.is_ours(module) for child in module.modules()}
        for module, problem in self.problems.items():
            name = self.names[module]
            if name in inside:
                continue
            kind = "bn" if kinds.is_norm_module(module) else "conv"
            if module in own:
                problem = "it is part of a module that runs fused by itself"
            yield Skipped(name, kind, problem or self._why(module, name))

    def _why(self, module: nn.Module, name: str) -> str:
        """Why a module that could be fused by itself was not."""
        if module in self.lost:
            return self.lost[module]
        if module in self.called:
            return "nothing to fuse it with: what follows is read elsewhere too, or is no batch norm, sum or activation"
        parts = name.split(".")
        for i in range(len(parts), -1, -1):
            outer = ".".join(parts[:i])
            for whole, reason in self.whole.items():
                if self.names.get(whole) == outer:
                    return f"the forward of {outer or type(whole).__name__} is left as it is: {reason}"
        return "never called"
