"""Two networks against the truth, tensor by tensor: errors, the two-times rule, and the report that holds them."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

# The rule: max|fused - truth| <= LIMIT * max|eager - truth| (+ a floor).
LIMIT = 2.0

# The floor, in units of the dtype's epsilon times the tensor's largest value, for tensors where eager happens to be
# exact. fp32: sums are rounded in the same format, and another order of summation moves the last two bits. bf16, fp16:
# the neighbour of the right value. fp64: eager is the truth itself, bit by bit, and has no error to compare with; a
# wrong formula is wrong by far more than 1e-10.
FLOORS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0, torch.float64: 2.0**19}


@dataclass
class Row:
    """One tensor of one part of the network; errors are the largest absolute differences from the fp64 network."""

    name: str
    mode: str  # "eval" or "train"
    quantity: str  # "output", "input gradient", "parameter gradient" or "running statistics"
    tensor: str
    fused_error: float
    eager_error: float
    scale: float  # the largest value of the true tensor
    floor: float

    @property
    def ratio(self) -> float:
        """Fused error over eager error, with half the floor added to the latter: passing is `ratio <= 2`."""
        if self.fused_error == 0.0:
            return 0.0
        if math.isinf(self.fused_error):
            return math.inf
        allowed = self.eager_error + self.floor / LIMIT
        return self.fused_error / allowed if allowed else math.inf

    @property
    def passed(self) -> bool:
        return self.ratio <= LIMIT


def compare(where: tuple[str, str, str, str], fused: Tensor, eager: Tensor, truth: Tensor, dtype, scale=0.0) -> Row:
    """The row of one tensor; `scale`: what the floor is relative to, if that is more than the tensor's own maximum.

    Where fused and eager are both NaN or infinite they agree; where only fused is, its error is infinite.
    """
    truth = truth.detach().to(torch.float64)
    fused, eager = fused.detach().to(truth), eager.detach().to(truth)
    if fused.shape != truth.shape:
        return Row(*where, math.inf, 0.0, 0.0, 0.0)
    own = _largest(truth)
    own = own if math.isfinite(own) else _largest(torch.nan_to_num(truth, 0.0, 0.0, 0.0))
    floor = FLOORS[dtype] * torch.finfo(dtype).eps * max(own, scale)
    fused_error, eager_error = _largest(fused - truth), _largest(eager - truth)
    if not math.isfinite(fused_error):
        both = ~torch.isfinite(fused) & ~torch.isfinite(eager)
        fused_error, eager_error = (_largest((t - truth).masked_fill(both, 0.0)) for t in (fused, eager))
    return Row(*where, fused_error, eager_error, own, floor)


def _largest(x: Tensor) -> float:
    """The largest absolute value, infinite where there is a NaN."""
    value = float(x.abs().max()) if x.numel() else 0.0
    return math.inf if math.isnan(value) else value


@dataclass
class VerifyReport:
    """What `verify` found. True when every row passed; prints as a table of the worst tensor of each quantity.

    Attributes:
        rows: every tensor compared.
        about: model, dtype, backend, device and versions.
    """

    rows: list[Row] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def worst(self) -> Row:
        """The row with the largest ratio."""
        return max(self.rows, key=lambda row: row.ratio)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    def summary(self) -> str:
        """One line: the verdict, how many tensors were compared, and the worst ratio."""
        if not self.rows:
            return "FAILED: nothing was compared"
        worst, failed = self.worst, len(self.failures)
        verdict = f"FAILED: {failed} of {len(self.rows)} tensors" if failed else f"passed: {len(self.rows)} tensors"
        return (
            f"{verdict}, worst ratio {_number(worst.ratio)} of {LIMIT:g} allowed "
            f"({worst.name}, {worst.mode}, {worst.quantity}, {worst.tensor})"
        )

    def __str__(self) -> str:
        header = ("block", "mode", "quantity", "worst tensor", "fused error", "eager error", "ratio", "verdict")
        lines = [_cells(row) for row in _worst_of_each(self.rows)]
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        explanation = "errors: max |x - fp64|; ratio: fused / (eager + half the floor); passed: ratio <= 2"
        return "\n".join([about, explanation, *table(header, lines, right={4, 5, 6}), self.summary()])

    def to_dict(self) -> dict:
        rows = [{**asdict(row), "ratio": row.ratio, "passed": row.passed} for row in self.rows]
        finite = [{key: _jsonable(value) for key, value in row.items()} for row in rows]
        return {"passed": self.passed, "summary": self.summary(), **self.about, "rows": finite}

    def to_json(self) -> str:
        """The whole report as JSON; infinite errors are null."""
        return json.dumps(self.to_dict(), indent=2)


def table(header: Iterable[str], lines: Iterable[Iterable[str]], right: Iterable[int] = ()) -> list[str]:
    """Lines of text with aligned columns; those of `right` (indices) are aligned to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = set(right)
    cells.insert(1, ["-" * width for width in widths])
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _worst_of_each(rows: list[Row]) -> list[Row]:
    worst: dict[tuple, Row] = {}
    for row in rows:
        key = (row.name, row.mode, row.quantity)
        if key not in worst or row.ratio > worst[key].ratio:
            worst[key] = row
    return list(worst.values())


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.mode,
        row.quantity,
        row.tensor,
        f"{row.fused_error:.2e}",
        f"{row.eager_error:.2e}",
        _number(row.ratio),
        "ok" if row.passed else "FAILED",
    )


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.1e}"


def _jsonable(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
