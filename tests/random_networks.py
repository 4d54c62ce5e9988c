"""Random small networks, as hypothesis draws them: of parts that a network may have, in any order and nested."""

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from random_forms import Concat, Gate, Looped, Network, PreActivation, Scaled, Several
from random_parts import (
    ACTS,
    BETWEEN,
    FUNCTIONS,
    SMOOTH,
    SUMS,
    Conditional,
    Dropped,
    InPlace,
    ReadTwice,
    Residual,
    Shared,
    Unit,
)
from torch import nn

DEPTH = 2  # of parts in parts


class Maker:
    """Draws modules that keep the number of channels, and all but one of them the size of the image."""

    def __init__(self, draw: Callable, smooth: bool):
        self.draw = draw
        self.smooth = smooth
        self.channels = self.choice((4, 6, 8))
        self.may_shrink = True

    def choice(self, values: Sequence):
        return self.draw(st.sampled_from(list(values)))

    def often(self, usual, others: Sequence):
        """The usual one in two of three cases."""
        return usual if self.draw(st.integers(0, 2)) else self.choice(others)

    # --- modules of torch.nn ------------------------------------------------------------------------------------------

    def conv(self, inputs: int | None = None, outputs: int | None = None, plain: bool = False) -> nn.Conv2d:
        inputs, outputs = inputs or self.channels, outputs or self.channels
        kernel = self.choice((1, 3, 3, (1, 3)))
        dilation = self.often(1, (1, 2))
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        options = {
            "padding": self.often(tuple(dilation * (k // 2) for k in sizes), ("same",)),
            "dilation": dilation,
            "groups": self.often(1, (1, 2) if inputs % 4 else (1, 2, inputs)) if inputs == outputs else 1,
            "bias": self.draw(st.booleans()),
            "padding_mode": self.often("zeros", ("zeros", "zeros", "reflect", "circular")),
        }
        if not plain and self.may_shrink and self.draw(st.integers(0, 9)) == 0 and options["padding"] != "same":
            self.may_shrink, options["stride"] = False, 2
        return nn.Conv2d(inputs, outputs, kernel, **options)

    def norm(self, channels: int | None = None) -> nn.Module:
        options = {
            "eps": self.often(1e-5, (1e-3, 0.3, 1e-7)),
            "momentum": self.often(0.1, (None, 0.7, 1.0, 0.0)),
            "affine": self.often(True, (True, False)),
            "track_running_stats": self.often(True, (True, True, False)),
        }
        made = nn.BatchNorm2d(channels or self.channels, **options)
        if made.affine:
            nn.init.uniform_(made.weight, 0.5, 1.5)
            nn.init.normal_(made.bias)
        if made.running_mean is not None:
            nn.init.normal_(made.running_mean, std=0.3)
            nn.init.uniform_(made.running_var, 0.2, 1.0)
        return self.often(made, (nn.GroupNorm(2, channels or self.channels), nn.Identity(), made, made))

    def act(self) -> nn.Module:
        return ACTS[self.choice([name for name in ACTS if not self.smooth or name in SMOOTH])]()

    def function(self) -> str:
        return self.choice([name for name in FUNCTIONS if not self.smooth or name in SMOOTH])

    # --- parts --------------------------------------------------------------------------------------------------------

    def unit(self, plain: bool = False, inputs: int | None = None) -> Unit:
        act = self.act() if self.draw(st.booleans()) else None
        between = self.often("nothing", list(BETWEEN))
        return Unit(self.conv(inputs, plain=plain), self.norm(), act, between, self.function())

    def row(self, plain: bool) -> nn.Sequential:
        modules = []
        for _ in range(self.draw(st.integers(1, 3))):
            modules += [self.conv(plain=plain), self.norm(), *([self.act()] if self.draw(st.booleans()) else [])]
        return nn.Sequential(*modules)

    def shortcut(self) -> nn.Module:
        if self.draw(st.booleans()):
            return nn.Identity()
        return nn.Sequential(self.conv(plain=True), *([self.norm()] if self.draw(st.booleans()) else []))

    def part(self, depth: int = DEPTH, plain: bool = False) -> nn.Module:
        """`plain`: the size of the image stays."""
        simple = [self.unit, self.row]
        nested = [self.residual, self.conditional, self.dropped, self.looped, self.scaled, self.concat]
        tricky = [self.read_twice, self.shared, self.in_place, self.several, self.pre_activation, self.gate, self.pool]
        make = self.choice([*simple, *simple, *tricky, *(nested * 2 if depth else [])])
        if make in nested:
            return make(depth - 1, plain)
        return make(plain)

    def residual(self, depth: int, plain: bool) -> nn.Module:
        body = self.row(plain=True) if self.draw(st.booleans()) else self.part(depth, plain=True)
        function = "none" if self.smooth else self.often("relu", list(FUNCTIONS))
        return Residual(body, self.shortcut(), self.often("add", list(SUMS)), function)

    def conditional(self, depth: int, plain: bool) -> nn.Module:
        on = ("values", "attribute", "isinstance", "shape", "gradients", "training", "calls", "chance")
        return Conditional(self.part(depth, plain), self.choice(on[1:] if self.smooth else on))

    def dropped(self, depth: int, plain: bool) -> nn.Module:
        return Dropped(self.part(depth, plain), self.choice(("function", "Dropout", "Dropout2d")))

    def looped(self, depth: int, plain: bool) -> nn.Module:
        parts = [self.part(depth, plain=True) for _ in range(self.draw(st.integers(1, 3)))]
        return Scaled(parts[0], self.channels) if self.smooth else Looped(parts)

    def scaled(self, depth: int, plain: bool) -> nn.Module:
        return Scaled(self.part(depth, plain), self.channels)

    def concat(self, depth: int, plain: bool) -> nn.Module:
        left, right = self.part(depth, plain=True), self.unit(plain=True)
        return Concat(left, right, self.conv(2 * self.channels, plain=True), self.choice(("no", "input", "behind")))

    def read_twice(self, plain: bool) -> nn.Module:
        return ReadTwice(self.unit(plain=True), self.choice(("conv", "norm", "act")), self.choice(SUMS))

    def shared(self, plain: bool) -> nn.Module:
        what = self.choice(("all", "conv", "norm", "sum"))
        return self.unit(plain) if self.smooth else Shared(self.unit(plain=True), self.unit(plain=True), what)

    def in_place(self, plain: bool) -> nn.Module:
        hows = ("skip_activated", "input_after", "between_branches", "skip_after_read", "act_of_skip", "output_scaled")
        how = "sum" if self.smooth else self.choice((*hows, "sum"))
        return InPlace(self.unit(plain=True), how)

    def several(self, plain: bool) -> nn.Module:
        form, call = self.choice(("tuple", "dict", "named", "list", "plain")), ("one", "two", "keyword", "scale")
        if self.smooth:
            return self.unit(plain)
        return Several(self.unit(plain=True), form, self.choice(call))

    def pre_activation(self, plain: bool) -> nn.Module:
        return PreActivation(self.norm(), self.conv(plain=True), self.function(), self.choice(SUMS))

    def gate(self, plain: bool) -> nn.Module:
        squeeze = nn.Conv2d(self.channels, 2, 1)
        return self.unit(plain) if self.smooth else Gate(squeeze, nn.Conv2d(2, self.channels, 1))

    def pool(self, plain: bool) -> nn.Module:
        if plain or self.smooth or not self.may_shrink:
            pool = nn.AvgPool2d(3, 1, 1) if self.smooth else nn.MaxPool2d(3, 1, 1)
        else:
            self.may_shrink = False
            pool = nn.MaxPool2d(3, 2, 1, ceil_mode=self.draw(st.booleans()))
        return nn.Sequential(self.conv(plain=True), self.norm(), self.act(), pool)


@st.composite
def networks(draw, smooth: bool = False) -> nn.Module:
    """A network for images of 3 channels. `smooth`: its gradients are continuous functions of its input."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    make = Maker(draw, smooth)
    stem = make.unit(plain=True, inputs=3)
    parts = [make.part() for _ in range(draw(st.integers(1, 3)))]
    form = make.choice(("tensor", "tensor", "logits", "tuple", "dict", "list"))
    return Network(stem, parts, form, make.channels)
