"""Parts of random networks: modules that use convolutions, norms and activations in every way that a forward may."""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTS = {
    "ReLU": nn.ReLU,
    "ReLU_inplace": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "ReLU6_inplace": lambda: nn.ReLU6(inplace=True),
    "Hardswish": nn.Hardswish,
    "SiLU_inplace": lambda: nn.SiLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU_inplace": lambda: nn.LeakyReLU(0.1, inplace=True),
    "Hardtanh": lambda: nn.Hardtanh(0.0, 6.0),
    "SiLU": nn.SiLU,
    "Identity": nn.Identity,
}
FUNCTIONS = {
    "relu": F.relu,
    "relu_inplace": lambda x: F.relu(x, inplace=True),
    "torch_relu": torch.relu,
    "relu_method": lambda x: x.relu(),
    "relu_method_inplace": lambda x: x.relu_(),
    "hardswish": F.hardswish,
    "relu6": lambda x: F.relu6(x, True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "clamp": lambda x: x.clamp(min=0),
    "silu": F.silu,
    "silu_inplace": lambda x: F.silu(x, inplace=True),
    "none": lambda x: x,
}
SMOOTH = ("SiLU", "SiLU_inplace", "Identity", "silu", "silu_inplace", "none")


def _first_channel_doubled(x: Tensor) -> Tensor:
    view = x[:, :1]
    view.mul_(2.0)
    return x


def _assigned(x: Tensor) -> Tensor:
    x[:, 0] = x[:, 1]
    return x


BETWEEN = {  # a convolution and its norm
    "nothing": lambda x: x,
    "scaled_in_place": lambda x: x.mul_(0.5),
    "shifted_in_place": lambda x: operator.iadd(x, 1.0),
    "view_changed": _first_channel_doubled,
    "assigned": _assigned,
    "cloned": lambda x: x.clone(),
    "viewed": lambda x: x.view(x.shape),
    "contiguous": lambda x: x.contiguous(),
    "detour": lambda x: x + 0.0,
    "detached_half": lambda x: 0.5 * x + 0.5 * x.detach(),
}
SUMS = {
    "add": lambda a, b: a + b,
    "add_swapped": lambda a, b: b + a,
    "iadd": operator.iadd,
    "iadd_swapped": lambda a, b: operator.iadd(b, a),
    "torch": torch.add,
    "keywords": lambda a, b: torch.add(input=a, other=b),
    "alpha": lambda a, b: torch.add(a, b, alpha=2),
    "method": lambda a, b: a.add(b),
    "method_alpha": lambda a, b: a.add(b, alpha=0.5),
    "add_": lambda a, b: a.add_(b),
    "add_swapped_": lambda a, b: b.add_(a),
    "broadcast": lambda a, b: a + b.mean((2, 3), keepdim=True),
    "broadcast_swapped": lambda a, b: b.mean((2, 3), keepdim=True) + a,
    "sub": operator.sub,
    "sum": lambda a, b: sum([a, b]),
    "thrice": lambda a, b: a + b + a,
    "constant": lambda a, b: a + 1.0 + b,
    "out_of_itself": lambda a, b: (a + a) + b,
}


class Named(nn.Module):
    """Of which the repr tells the variant."""

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if isinstance(value, str))


class Unit(Named):
    """Convolution, something between, norm, activation; in its own forward, or in a function that it calls."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, between: str, function: str):
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act
        self.between, self.function = between, function

    def forward(self, x):
        y = BETWEEN[self.between](self.conv(x))
        if self.norm is not None:
            y = self.norm(y)
        return FUNCTIONS[self.function](y) if self.act is None else self.act(y)


class Residual(Named):
    """Sum of a body and a shortcut, and an activation."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, total: str, function: str):
        super().__init__()
        self.body, self.shortcut, self.total, self.function = body, shortcut, total, function

    def forward(self, x):
        return FUNCTIONS[self.function](SUMS[self.total](self.body(x), self.shortcut(x)))


class ReadTwice(Named):
    """A value in the middle is read again behind the end."""

    def __init__(self, unit: Unit, where: str, total: str):
        super().__init__()
        self.unit, self.where, self.total = unit, where, total

    def forward(self, x):
        seen = {"conv": self.unit.conv(x)}
        seen["norm"] = self.unit.norm(seen["conv"])
        seen["act"] = FUNCTIONS[self.unit.function](seen["norm"])
        return SUMS[self.total](seen["act"], 0.5 * seen[self.where] if self.where != "act" else seen["conv"])


class Shared(Named):
    """A module is used twice."""

    def __init__(self, first: Unit, second: Unit, what: str):
        super().__init__()
        self.first, self.second, self.what = first, second, what

    def forward(self, x):
        if self.what == "all":
            return self.first(self.second(self.first(x)))
        if self.what == "conv":
            return F.relu(self.second.norm(self.first.conv(self.first(x))))
        if self.what == "norm":
            return F.relu(self.first.norm(self.second.conv(self.first(x))))
        return self.first(x) + self.first(x)


class InPlace(Named):
    """Memory is written that something else reads."""

    def __init__(self, unit: Unit, how: str):
        super().__init__()
        self.unit, self.how = unit, how

    def forward(self, x):
        conv, norm = self.unit.conv, self.unit.norm
        if self.how == "skip_activated":
            return self.unit(x.relu_()) + x
        if self.how == "input_after":
            y = norm(conv(x))
            x.mul_(0.5)
            return F.relu(y + x)
        if self.how == "between_branches":
            y, skip = conv(x), x.relu_()
            return F.relu(norm(y) + skip)
        if self.how == "skip_after_read":
            y = conv(x)
            z = norm(y)
            return F.relu(z + y.relu_())
        if self.how == "act_of_skip":
            y = norm(conv(x))
            z = F.relu(y, inplace=True)
            return z + y
        if self.how == "output_scaled":
            return F.silu(norm(conv(x))).mul_(2.0)
        return self.unit(x).add_(x)


class Conditional(Named):
    """Control flow in a forward."""

    def __init__(self, body: nn.Module, on: str):
        super().__init__()
        self.body, self.on, self.flag, self.calls = body, on, True, 0

    def forward(self, x):
        if self.on == "values":
            return self.body(x) if x.detach().mean() > 0 else self.body(-x)
        if self.on == "attribute":
            return self.body(x) if self.flag else x
        if self.on == "isinstance":
            return self.body(x) if isinstance(x, Tensor) and isinstance(self.body, nn.Module) else x
        if self.on == "shape":
            return self.body(x) if x.shape[0] > 1 and x.dim() == 4 else x
        if self.on == "gradients":
            return self.body(x) if torch.is_grad_enabled() else 2.0 * self.body(x)
        if self.on == "training":
            return self.body(x) if self.training else 2.0 * self.body(x)
        if self.on == "calls":
            self.calls += 1
            return self.body(x) * self.calls
        return self.body(x) + 0.1 * torch.rand_like(x[:1, :1, :1, :1])


class Dropped(Named):
    """Dropout of three kinds behind a body."""

    def __init__(self, body: nn.Module, kind: str):
        super().__init__()
        self.body, self.kind, self.dropout = body, kind, nn.Dropout2d(0.3) if kind == "Dropout2d" else nn.Dropout(0.3)

    def forward(self, x):
        if self.kind == "function":
            return F.dropout(self.body(x), p=0.3, training=self.training)
        return self.dropout(self.body(x))
