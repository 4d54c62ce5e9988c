"""The processes of a run: one, or those that `torchrun` started, and how they agree."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_resnet.options import UsageError
from fused_resnet.training.errors import TrainingError

T = TypeVar("T")

# Of another process's end in what gloo and NCCL say, whose errors are of no kind of their own.
SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/transport",
    "NCCL error", "NCCL communicator",
)  # fmt: skip


@dataclass
class Processes:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None  # for what is agreed on, over the CPU: nothing waits for the device there

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def ask(self, values: Sequence[int]) -> "Answer":
        """Begin to find the largest of each of the processes' `values`."""
        found = torch.tensor(values, dtype=torch.int64)
        if self.control is None:
            return Answer(found, None)
        return Answer(found, dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control, async_op=True))

    def tell(self, value: Any) -> Any:
        """The first process's `value`, in every process."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process."""
        if self.control is None:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def agreed(self, make: Callable[[], T]) -> T:
        """What `make` returns, once it has returned in every process.

        Raises:
            UsageError: in every process, where one of them finds something wrong; it says what each of them found.
        """
        found, problem = None, None
        try:
            found = make()
        except UsageError as error:
            problem = str(error)
        problems = self.gather(problem)
        if any(problems):
            said = {text: rank for rank, text in reversed(list(enumerate(problems))) if text}  # each once
            alone = len(set(problems)) == 1
            raise UsageError("\n".join(text if alone else f"process {rank}: {text}" for text, rank in said.items()))
        return found

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, on the CPU."""
        values = values.cpu()
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values


@dataclass
class Answer:
    """What the processes agree on, as soon as it is there."""

    values: Tensor
    work: dist.Work | None

    def wait(self) -> list[int]:
        if self.work is not None:
            self.work.wait()
        return self.values.tolist()


@contextlib.contextmanager
def joined(args: argparse.Namespace, way_out: str = "start again") -> Iterator[Processes]:
    """This process among those of `torchrun`; alone without it.

    A UsageError within it is to be raised in all of them, see `Processes.agreed`: the first one says it for all.

    Args:
        way_out: what to do where another process has died.

    Raises:
        UsageError: a device that is not there.
        TrainingError: another process has died, or has been silent for --timeout seconds.
        SystemExit: of the others, with 2, where the first one has a UsageError.
    """
    rank, world, local_rank = _place()
    device = _device(args.device, local_rank)
    if world == 1 and not args.fsdp:
        yield Processes(0, 1, device, None)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=args.timeout)
    store = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timeout, **store)
    try:
        # It is waited in while one process writes a checkpoint; that one has died is seen at once.
        control = dist.new_group(backend="gloo", timeout=10 * timeout)
        yield Processes(rank, world, device, control)
    except UsageError as error:
        if rank == 0:
            raise
        raise SystemExit(2) from error
    except (dist.DistError, RuntimeError) as error:
        if not _is_of_a_process(error):
            raise
        raise TrainingError(
            f"process {rank} of {world}: another process has ended, or has not answered for {args.timeout} s "
            f"({str(error).splitlines()[0][:200]}); {way_out}, with any number of processes"
        ) from error
    dist.destroy_process_group()  # after an error it could wait for a process that is no more


def _place() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of the environment, as torchrun sets them."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if not any(given[name] for name in ("RANK", "WORLD_SIZE")):
        return 0, 1, 0
    numbers = [given["RANK"], given["WORLD_SIZE"], os.environ.get("LOCAL_RANK", "0")]
    if not all(given.values()) or not all(number.isdigit() for number in numbers):
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"the environment names several processes, but not as torchrun does ({said}); use torchrun")
    return tuple(map(int, numbers))


def _is_of_a_process(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS)


def _device(name: str | None, local_rank: int) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch.cuda finds no GPU here")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
            "processes as there are GPUs (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
