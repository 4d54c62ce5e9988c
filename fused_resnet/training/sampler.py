"""Which images are seen when: a pure function of the seed, the epoch and how much of it was seen.

Nothing of it has to be kept but two numbers, and nothing of it depends on the number of processes or workers: a run
that goes on, also on other devices, sees every image of the epoch once, those that it had seen not again.
"""

import hashlib
import random
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits that is another one for every other `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def seed_cpu(*parts: int | str) -> None:
    """Seed what draws on the CPU: torch's default generator, and Python's."""
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)


def batch_sizes(images: int, batch_size: int) -> Iterator[int]:
    """Divide `images` into batches of `batch_size`, the last two of which share what is left.

    So no batch is smaller than half of `batch_size`, where there is more than one: batch norm's statistics of three
    images are worth little. What follows after some of the batches depends on the images that are left alone.
    """
    while images > 0:
        size = batch_size
        if images <= batch_size:
            size = images
        elif images < batch_size + batch_size // 2:
            size = -(-images // 2)
        yield size
        images -= size


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """The batches of this process, as lists of (epoch, index); each process takes its part of every batch.

    Args:
        images: in the data set.
        batch_size: of all processes together.
        shuffle: another order in each epoch; otherwise that of the data set.
    """

    def __init__(
        self, images: int, batch_size: int, *, rank: int = 0, world: int = 1, seed: int = 0, shuffle: bool = True
    ):
        self.images, self.batch_size, self.shuffle = images, batch_size, shuffle
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch, self.seen = 0, 0

    def start(self, epoch: int, seen: int = 0) -> None:
        """Where the next iteration begins."""
        self.epoch, self.seen = epoch, seen

    def sizes(self) -> list[int]:
        """Images of each batch that is left, over all processes."""
        return list(batch_sizes(self.images - self.seen, self.batch_size))

    def order(self) -> list[int]:
        """The epoch's images, in the order in which they are seen."""
        if not self.shuffle:
            return list(range(self.images))
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        return torch.randperm(self.images, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, begin, epoch = self.order(), self.seen, self.epoch
        for size in self.sizes():
            own = slice(begin + self.rank * size // self.world, begin + (self.rank + 1) * size // self.world)
            yield [(epoch, index) for index in order[own]]
            begin += size

    def __len__(self) -> int:
        return len(self.sizes())
