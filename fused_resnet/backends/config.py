"""A kernel's configuration, by whose name plans know it, and what it has to fit."""

from typing import Any, NamedTuple

# Shared memory a block may take, and registers a thread: what a configuration has to fit.
SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may take; of an unknown device, what the nearest older one has."""
    known = [c for c in SHARED_MEMORY if c <= capability]
    return SHARED_MEMORY[max(known)] if known else 48 << 10


class Config(NamedTuple):
    """One way to run a kernel: the sizes of its tile in the order of its family's `BLOCKS`, warps and stages."""

    family: str
    blocks: tuple[int, ...]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.family} {'x'.join(map(str, self.blocks))} w{self.num_warps} s{self.num_stages}"

    @classmethod
    def parse(cls, text: str) -> "Config":
        """The configuration that `str` wrote.

        Raises:
            ValueError: another text.
        """
        try:
            family, blocks, warps, stages = text.split()
            numbers = tuple(map(int, blocks.split("x"))), int(warps.removeprefix("w")), int(stages.removeprefix("s"))
        except ValueError:
            raise ValueError(f"not a kernel's configuration: {text!r}") from None
        return cls(family, *numbers)


class Kernel(NamedTuple):
    """A family of kernels in one configuration, whose name is its own."""

    family: Any
    config: Config

    def __str__(self) -> str:
        return str(self.config)
