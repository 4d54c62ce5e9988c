"""Parts of random networks that hand several values around, and the networks' own forms."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from random_parts import FUNCTIONS, SUMS, Named
from torch import nn


class Concat(Named):
    """Two branches side by side, or a dense block."""

    def __init__(self, left: nn.Module, right: nn.Module, merge: nn.Module, dense: str):
        super().__init__()
        self.left, self.right, self.merge, self.dense = left, right, merge, dense

    def forward(self, x):
        left = self.left(x)
        right = self.right(left if self.dense == "behind" else x)
        return self.merge(torch.cat([x if self.dense == "input" else left, right], 1))


class PreActivation(Named):
    """Norm and activation before the convolution, whose input a skip may read."""

    def __init__(self, norm: nn.Module, conv: nn.Module, function: str, total: str):
        super().__init__()
        self.norm, self.conv, self.function, self.total = norm, conv, function, total

    def forward(self, x):
        y = FUNCTIONS[self.function](self.norm(x))
        return SUMS[self.total](self.conv(y), x)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, squeeze: nn.Module, excite: nn.Module):
        super().__init__()
        self.squeeze, self.excite = squeeze, excite

    def forward(self, x):
        y = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)), inplace=True)
        return x * torch.sigmoid(self.excite(y))


class Scaled(nn.Module):
    """A parameter and a buffer of its own."""

    def __init__(self, body: nn.Module, channels: int):
        super().__init__()
        self.body = body
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return self.body(x) * self.gamma + self.offset


class Pair(NamedTuple):
    main: torch.Tensor
    side: torch.Tensor


class Several(Named):
    """An inner module takes two values, and returns them in a row, by name, or one of them alone."""

    class Inner(Named):
        def __init__(self, unit: nn.Module, form: str):
            super().__init__()
            self.unit, self.form = unit, form

        def forward(self, x, skip=None, *, scale=1.0):
            y = self.unit(x)
            y = F.relu(y if skip is None else y + skip) * scale
            return {"tuple": (y, x), "dict": {"main": y, "side": x}, "named": Pair(y, x), "list": [y, x]}.get(
                self.form, y
            )

    def __init__(self, unit: nn.Module, form: str, call: str):
        super().__init__()
        self.inner, self.form, self.call = self.Inner(unit, form), form, call

    def forward(self, x):
        calls = {
            "one": lambda: self.inner(x),
            "two": lambda: self.inner(x, x),
            "keyword": lambda: self.inner(x, skip=x),
            "scale": lambda: self.inner(x, x, scale=0.5),
        }
        found = calls[self.call]()
        if self.form == "dict":
            return found["main"] + found["side"]
        if self.form == "named":
            return found.main + found.side
        return found if self.form == "plain" else found[0] + found[1]


class Looped(nn.Module):
    """Parts in a ModuleList and a ModuleDict."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.named = nn.ModuleDict({"last": nn.ReLU()})

    def forward(self, x):
        for i, part in enumerate(self.parts):
            x = part(x) if i % 2 == 0 else x + part(x)
        return self.named["last"](x)


class Network(Named):
    """Stem and parts; the output has one of several forms."""

    def __init__(self, stem: nn.Module, parts: list[nn.Module], form: str, channels: int):
        super().__init__()
        self.stem, self.parts, self.form = stem, nn.ModuleList(parts), form
        self.head = nn.Linear(channels, 3)

    def forward(self, x, other=None):
        x = self.stem(x) if other is None else self.stem(x) + self.stem(other)
        found = []
        for part in self.parts:
            x = part(x)
            found.append(x)
        if self.form == "logits":
            return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        if self.form == "dict":
            return {"main": x, "first": found[0]}
        return {"tuple": (x, found[0]), "list": found}.get(self.form, x)
