"""What tests/test_sync_batch_norm.py runs in several processes, and its problems, which one process solves as well."""

import copy
import datetime
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import batch_norms, largest, seeded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet.ops import synchronise

CHANNELS, IMAGES = 8, 8
WORLDS = (4, 2)

# The module, whose name in its package is its function's.
RESIDUAL_BLOCK = sys.modules["fused_resnet.ops.residual_block"]


def projection(out_planes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, out_planes, 1, 2, bias=False), nn.BatchNorm2d(out_planes))


def lean(block: nn.Module) -> nn.Module:
    block.lean = True
    return block


def cumulative(block: nn.Module) -> nn.Module:
    for bn in batch_norms(block):
        bn.momentum = None
    return block


MODULES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: fr.ConvBNAct2d(CHANNELS, 12, 3, bias=True, act="silu"),
    "bn": lambda: fr.BNAct2d(CHANNELS, act="hardswish"),
    "basic": lambda: fr.BasicBlock(CHANNELS, CHANNELS),
    "basic_projected": lambda: fr.BasicBlock(CHANNELS, 16, 2, projection(16)),
    "bottleneck": lambda: fr.Bottleneck(CHANNELS, 4, 2, projection(16)),
    "bottleneck_lean": lambda: lean(fr.Bottleneck(CHANNELS, 4, 2, projection(16))),
    "cumulative": lambda: cumulative(fr.BasicBlock(CHANNELS, CHANNELS)),
}

# Images of each process.
SHARES = {
    (2, "even"): (4, 4),
    (2, "one_empty"): (8, 0),
    (4, "uneven"): (1, 4, 2, 1),
    (4, "one_empty"): (3, 0, 4, 1),
}
SHARES_OF_NETWORK = ((2, "one_empty"), (4, "uneven"))


def share(x: Tensor, kind: str, rank: int, world: int) -> Tensor:
    return x.split(SHARES[world, kind])[rank]


def kinds_of(world: int, table=SHARES) -> list[str]:
    return [kind for processes, kind in table if processes == world]


def module_of(name: str) -> nn.Module:
    return seeded(MODULES[name]).double().train()


def batches(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Two batches of all processes, and gradients of the output for them."""
    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        x = torch.randn(IMAGES, CHANNELS, 7, 6, dtype=torch.double, generator=random) * 2 + 1
        shape = copy.deepcopy(module)(x).shape
        found.append((x, torch.randn(shape, dtype=torch.double, generator=random)))
    return found


def steps(module: nn.Module, given: list[tuple[Tensor, Tensor]]) -> dict:
    """Outputs and gradients of x for each batch, the gradients of the parameters, and the buffers."""
    found = []
    for x, grad in given:
        x = x.clone().requires_grad_()
        y = module(x)
        y.backward(grad)
        found.append((y.detach(), x.grad))
    return {
        "images": found,
        "parameters": [p.grad for p in module.parameters()],
        "buffers": [b.clone() for b in module.buffers()],
    }


class Counted:
    """Counts what the processes exchange, and notes the groups that blocks run with."""

    def __enter__(self):
        self.forward, self.backward, self.groups = 0, 0, []
        self._before = synchronise.merged_moments, synchronise.summed, RESIDUAL_BLOCK.run_block
        merged_moments, summed, run_block = self._before

        def moments(*args):
            self.forward += 1
            return merged_moments(*args)

        def sums(*args):
            self.backward += 1
            return summed(*args)

        def block(inputs, form):
            self.groups.append(form.group)
            return run_block(inputs, form)

        synchronise.merged_moments, synchronise.summed, RESIDUAL_BLOCK.run_block = moments, sums, block
        return self

    def __exit__(self, *exc):
        synchronise.merged_moments, synchronise.summed, RESIDUAL_BLOCK.run_block = self._before


def check_modules(rank: int, world: int) -> dict:
    """Every module with every division of the images."""
    found = {}
    for name in MODULES:
        for kind in kinds_of(world):
            module = module_of(name)
            given = [tuple(share(t, kind, rank, world) for t in batch) for batch in batches(module)]
            convert = fr.convert_sync_batchnorm if name == "bn" else nn.SyncBatchNorm.convert_sync_batchnorm
            with Counted() as counted:
                result = steps(convert(module), given)
            found[name, kind] = result | {"counts": (counted.forward, counted.backward), "groups": counted.groups}
    return found


def check_subgroup(rank: int, world: int) -> dict:
    """Statistics over two processes of all."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    module = module_of("basic")
    given = [tuple(share(t, kinds_of(world)[0], rank, world) for t in batch) for batch in batches(module)]
    return steps(fr.convert_sync_batchnorm(module, groups[rank // 2]), given)


def check_eval(rank: int, world: int) -> list[bool]:
    """Converted, a block in eval mode gives the bits of the plain one, and nothing is exchanged."""
    found = []
    for name in MODULES:
        module = module_of(name)
        (x, _), _ = batches(module)
        module.eval()
        with Counted() as counted, torch.no_grad():
            same = torch.equal(fr.convert_sync_batchnorm(copy.deepcopy(module))(x), module(x))
        found.append(same and counted.forward == 0)
    return found


# --- a network --------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return seeded(fr.resnet18, num_classes=10).double().train()


def images_and_labels() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(IMAGES, 3, 32, 32, dtype=torch.double, generator=random)
    return x, torch.randint(10, (IMAGES,), generator=random)


def loss_of(model: nn.Module, x: Tensor, labels: Tensor, world: int = 1) -> tuple[Tensor, Tensor]:
    """The logits, and a loss whose mean over the processes is the mean over all images."""
    logits = model(x)
    return logits, F.cross_entropy(logits, labels, reduction="sum") * (world / IMAGES)


class Parallel(DistributedDataParallel):
    """DDP refuses a SyncBatchNorm on the CPU, where torch's own has no kernels; that check alone is left out."""

    def _passing_sync_batchnorm_handle(self, module):
        pass


def check_ddp(rank: int, world: int, kind: str) -> dict:
    model = Parallel(nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    x, labels = (share(t, kind, rank, world) for t in images_and_labels())
    with Counted() as counted:
        logits, loss = loss_of(model, x, labels, world)
        loss.backward()
    return {
        "logits": logits.detach(),
        "gradients": [p.grad for p in model.parameters()] if rank == 0 else None,  # DDP has given all the same
        "buffers": list(model.module.buffers()),
        "counts": (counted.forward, counted.backward),
        "groups": counted.groups,
    }


# What keeps each process's statistics its own: its name in newer versions of PyTorch, or in older ones.
_NAMES = ("forward_sync_buffers", "broadcast_buffers")
OWN_BUFFERS = {next(n for n in _NAMES if n in inspect.signature(DistributedDataParallel).parameters): False}


def check_fsdp(rank: int, world: int) -> dict[str, float]:
    """Steps in training and in eval mode, each with an inference behind it, beside DDP: the largest relative errors.

    In eval mode the weights have to be derived anew though nobody sets the mode. Batch norm is plain: each process has
    its own statistics.
    """
    ddp, fsdp = DistributedDataParallel(network(), **OWN_BUFFERS), network()
    mesh = init_device_mesh("cpu", (world,))
    for block in fsdp.modules():
        if isinstance(block, fr.BasicBlock):
            fully_shard(block, mesh=mesh)
    fully_shard(fsdp, mesh=mesh)
    x, labels = (share(t, "even", rank, world) for t in images_and_labels())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ddp, fsdp)]
    errors = {}
    for step, training in enumerate((True, False, False)):
        outputs = []
        for model, optimizer in zip((ddp, fsdp), optimizers, strict=True):
            if model.training != training:
                model.train(training)
            logits, loss = loss_of(model, x, labels, world)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                outputs.append(torch.stack([logits, model(x)]))
        errors[f"outputs of step {step}"] = largest(*outputs[::-1])
    fsdp.reshard()
    pairs = zip((p.full_tensor() for p in fsdp.parameters()), ddp.parameters(), strict=True)
    errors["parameters"] = max(largest(*pair) for pair in pairs)
    errors["buffers"] = max(largest(*pair) for pair in zip(fsdp.buffers(), ddp.module.buffers(), strict=True))
    return errors


def check_fsdp_inference(rank: int, world: int) -> list[bool]:
    """Packed weights are those of now, also between steps in eval mode, which no `train()` or `eval()` announces."""
    module = nn.Sequential(fr.ConvBNAct2d(CHANNELS, 32, 3), fr.BasicBlock(32, 32), fr.BNAct2d(32)).eval()
    plain, mesh, x = copy.deepcopy(module), init_device_mesh("cpu", (world,)), torch.randn(2, CHANNELS, 9, 9)
    for child in module:
        fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer, found = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(3):
        with torch.no_grad():
            y = module(x)
            for mine, sharded in zip(plain.parameters(), module.parameters(), strict=True):
                mine.copy_(sharded.full_tensor())
            found.append(torch.equal(y, plain(x)))
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def check(rank: int, world: int) -> dict:
    return {
        "modules": check_modules(rank, world),
        "subgroup": check_subgroup(rank, world),
        "eval": check_eval(rank, world),
        "ddp": {kind: check_ddp(rank, world, kind) for kind in kinds_of(world, SHARES_OF_NETWORK)},
        "fsdp": check_fsdp(rank, world) if world == 2 else None,
        "fsdp_inference": check_fsdp_inference(rank, world),
    }


def work(rank: int, folder: str) -> None:
    """One process of as many as there are; of the smaller worlds in turn, the first ones."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    for world in WORLDS:
        if rank < world:
            store = f"file://{folder}/store{world}"
            dist.init_process_group("gloo", store, timeout=timeout, rank=rank, world_size=world)
            torch.save(check(rank, world), Path(folder, f"{world}_{rank}.pt"))
            dist.barrier()
            dist.destroy_process_group()
