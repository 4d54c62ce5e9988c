"""What `fuse` did, and why it did no more."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from fused_resnet.parity import table


class Fused(NamedTuple):
    """One operator of the fused network: where, of what, and whose forward runs it."""

    path: str
    pattern: str
    modules: tuple[str, ...]
    by: str


class Skipped(NamedTuple):
    """A convolution or a batch norm that was left alone."""

    path: str
    pattern: str
    reason: str


@dataclass
class FusionReport:
    """What `fuse` did to a network; prints as a table with counts, modules with the same reason in one row.

    Attributes:
        fused: the operators that stand for several modules; `by`: the path of the module whose forward runs them.
        skipped: convolutions and batch norms that were left alone, each with the reason.
        saved: bytes an image that inference no longer writes to memory and reads again; None: not estimated.
        size: the image for which they were estimated.
    """

    fused: list[Fused] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    saved: int | None = None
    size: tuple[int, ...] = ()

    def counts(self) -> dict[str, int]:
        """How often each pattern was fused, the most frequent first."""
        return dict(Counter(row.pattern for row in self.fused).most_common())

    def summary(self) -> str:
        saved = "" if self.saved is None else f"; about {self.saved / 1e6:.1f} MB less memory traffic an image of "
        saved += "x".join(map(str, self.size)) if saved else ""
        return f"{len(self.fused)} places fused, {len(self.skipped)} modules left alone{saved}"

    def __str__(self) -> str:
        lines = table(("fused", "places"), [(name, str(n)) for name, n in self.counts().items()], right={1})
        if self.skipped:
            lines += ["", *table(("left alone", "modules", "first", "reason"), self._reasons(), right={1})]
        return "\n".join([*lines, self.summary()])

    def _reasons(self) -> list[tuple[str, ...]]:
        """Kind, how many, the first one, and the reason that they share."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.skipped:
            found.setdefault((row.pattern, row.reason), []).append(row.path)
        return [(kind, str(len(paths)), paths[0], reason) for (kind, reason), paths in found.items()]
