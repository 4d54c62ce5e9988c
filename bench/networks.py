"""The convolutions of a network, as the network itself calls them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr
from fused_resnet.backends.problem import windows


@dataclass(frozen=True)
class Layer:
    """One problem of `conv_scale_act`: act(conv(x) * scale + shift + residual).

    `x` is [N, C, H, W], `weight` [K, C / groups, R, S].
    """

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    act: str = "relu"

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The shape of the output, [N, K, P, Q]."""
        size = windows(self.x[2:], self.weight[2:], self.stride, self.padding, self.dilation)
        return self.x[0], self.weight[0], *size

    @property
    def geometry(self) -> dict:
        """The arguments of the convolution."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def label(self) -> str:
        """Such as "1x1 256->64 56px +residual"."""
        kind = f"{self.weight[2]}x{self.weight[3]}"
        depthwise = self.groups > 1 and self.groups == self.x[1]
        channels = f"depthwise {self.x[1]}" if depthwise else f"{self.x[1]}->{self.weight[0]}"
        groups = f" g{self.groups}" if self.groups > 1 and not depthwise else ""
        stride = f" /{self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{kind}{stride} {channels}{groups} {self.x[2]}px{' +residual' if self.residual else ''}"

    def to_dict(self) -> dict:
        return {**asdict(self), "label": self.label}

    @classmethod
    def of(cls, fields: dict) -> "Layer":
        """The layer that `to_dict` wrote, also after a way through JSON."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "label"})


class _Calls(TorchDispatchMode):
    """Notes the operators that a network calls."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names, self.layers, self.pools, self.linears = names, [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "fused_resnet::conv_scale_act":
            x, weight, _, _, residual, stride, padding, dilation, groups, act = args[:10]
            geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
            layer = Layer(tuple(x.shape), tuple(weight.shape), *geometry, residual is not None, act)
            self.layers.append((self.names.get(id(weight), "?").removesuffix(".weight"), layer))
        elif name == "aten::max_pool2d_with_indices":
            self.pools.append((args[0].numel(), result[0].numel()))
        elif name == "aten::addmm":
            self.linears.append((args[1].shape[0], args[1].shape[1], args[2].shape[1]))
        return result


@dataclass(frozen=True)
class Network:
    """What one forward pass of a network computes.

    `layers`: (name, problem) in the order of the calls; `pools`: elements read and written by each max pooling;
    `linears`: (rows, inputs, outputs).
    """

    layers: tuple[tuple[str, Layer], ...]
    pools: tuple[tuple[int, int], ...]
    linears: tuple[tuple[int, int, int], ...]


def network(name: str, batch: int, size: int = 224) -> Network:
    """Read the network off a forward pass without data."""
    with torch.device("meta"):
        model = fr.create_model(name).eval()
        x = torch.empty(batch, 3, size, size)
    calls = _Calls({id(parameter): key for key, parameter in model.named_parameters()})
    with torch.no_grad(), calls:
        model(x)
    return Network(tuple(calls.layers), tuple(calls.pools), tuple(calls.linears))


def distinct_layers(names: Iterable[str], batch: int, size: int = 224) -> dict[Layer, dict[str, list[str]]]:
    """Every problem that the networks have, each once, with the layers of each network that pose it."""
    found: dict[Layer, dict[str, list[str]]] = {}
    for name in names:
        for layer, problem in network(name, batch, size).layers:
            found.setdefault(problem, {}).setdefault(name, []).append(layer)
    return found


def numel(shape: Iterable[int]) -> int:
    return math.prod(shape)
