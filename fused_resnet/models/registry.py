"""Networks by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

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


def with_weights(build: Callable[[], nn.Module], weights: Any, *, progress: bool = True) -> nn.Module:
    """`build()`, with `weights` loaded into it where there are any."""
    if weights is not None:
        raise NotImplementedError("weights")
    return build()
