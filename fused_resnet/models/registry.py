"""Networks by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fused_resnet.models.weights import load_weights

MODELS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make `build` known under `name`; return it."""
    build.__name__ = build.__qualname__ = name
    build.__doc__ = build.__doc__ or f"Build `{name}`; `weights`: a file, a known name or a torchvision enum."
    MODELS[name] = build
    return build


def list_models() -> list[str]:
    """Names of the networks that `create_model` and the command line know, sorted."""
    return sorted(MODELS)


def create_model(name: str, weights: Any = None, **kwargs) -> nn.Module:
    """Build the network `name`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(list_models())}")
    return MODELS[name](weights, **kwargs)


def factory(network: Callable[..., nn.Module], *args, num_classes: int = 1000, **defaults) -> Callable[..., nn.Module]:
    """A function that builds `network(*args, **defaults)`, with the arguments that all networks share."""

    def build(
        weights: Any = None,
        *,
        progress: bool = True,
        num_classes: int = num_classes,
        in_channels: int = 3,
        lean: bool = False,
        **kwargs,
    ) -> nn.Module:
        kwargs = {**defaults, **kwargs, "num_classes": num_classes, "in_channels": in_channels, "lean": lean}
        return with_weights(lambda: network(*args, **kwargs), weights, name=build.__name__, progress=progress)

    return build


def with_weights(build: Callable[[], nn.Module], weights: Any, *, name: str = "", progress: bool = True) -> nn.Module:
    """`build()`, with `weights` loaded into it where there are any; `name` finds the weights known by name."""
    model = build()
    return model if weights is None else load_weights(model, weights, name=name, progress=progress)
