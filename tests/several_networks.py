"""Networks in several processes, in DDP and FSDP2; and all that one process does for tests/test_sync_batch_norm.py."""

import copy
import datetime
import inspect
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import largest, seeded
from several_processes import (
    CHANNELS,
    IMAGES,
    SHARES_OF_NETWORK,
    WORLDS,
    Counted,
    check_eval,
    check_modules,
    check_subgroup,
    kinds_of,
    share,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr


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
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9) for model in (ddp, fsdp)]
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
