"""What every system has."""

import importlib
import importlib.util
from collections.abc import Callable

from torch import Tensor, nn

from bench.timing import graphed


class System:
    """See `bench.systems`."""

    name: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    tasks: tuple[str, ...] = ()
    packages: dict[str, str] = {}  # imported name -> what pip installs
    model_options: dict = {}  # for `create_model`

    def missing(self, device: str) -> str:
        """Why it cannot be used on `device` here; "": it can."""
        lacking = [package for module, package in self.packages.items() if importlib.util.find_spec(module) is None]
        return f"{' and '.join(lacking)} not installed (pip install {' '.join(lacking)})" if lacking else ""

    def takes(self, model: str) -> bool:
        """Whether it runs the network of that name."""
        return True

    def imports(self) -> None:
        """Import what the system needs."""
        for module in self.packages:
            importlib.import_module(module)

    def forward(self, model: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What is called in place of `model`, with inputs of any shape; None: every shape is prepared by itself."""
        return None

    def network(self, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        run = self.forward(model)
        return lambda: run(x)


class Graphed:
    """Before a system in the bases of a class: its network, captured in a CUDA graph."""

    devices = ("cuda",)
    tasks = ("network",)

    def network(self, model, x):
        return graphed(super().network(model, x))
