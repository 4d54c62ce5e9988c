"""Fused networks in two processes: DDP, batch norm over both, and FSDP2, beside plain networks; in fp64."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from small_networks import assert_near, images, is_running_fused, labels, net
from torch import Tensor, nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

from several_networks import Parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr

WORLD, IMAGES, STEPS = 2, 8, 3
FUSED = {"plain": lambda: net(), "fused": lambda: fr.fuse(net()), "lean": lambda: fr.fuse(net(), lean=True)}


def share(rank: int) -> tuple[Tensor, Tensor]:
    """Images and labels of one process; its images are unlike the other's."""
    x = images(IMAGES) * torch.linspace(0.5, 2.0, IMAGES, dtype=torch.double).view(-1, 1, 1, 1)
    return x.chunk(WORLD)[rank], labels(IMAGES).chunk(WORLD)[rank]


def train(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """Losses of some steps, then an output in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    with torch.no_grad():
        return [*found, model.eval()(x)]


def state(model: nn.Module) -> list[Tensor]:
    return [t.detach().double() for t in model.state_dict().values()]


def check_ddp(rank: int) -> dict:
    found = {}
    for name, make in FUSED.items():
        model = DistributedDataParallel(make())
        assert is_running_fused(model.module, share(rank)[0]) == (name != "plain")
        found[name] = train(model, *share(rank)) + state(model.module)
    return found


def check_sync(rank: int) -> dict:
    """Converted after it was fused, and before."""
    late, early = fr.convert_sync_batchnorm(fr.fuse(net())), fr.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
    found = {}
    for name, model in (("late", late), ("early", early)):
        assert is_running_fused(model.eval(), images())
        wrapped = Parallel(model)
        losses = train(wrapped, *share(rank))
        found[name] = losses, state(model)
    return found


def check_fsdp(rank: int) -> dict:
    found, mesh = {}, init_device_mesh("cpu", (WORLD,))
    for name, make in FUSED.items():
        model = make()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = train(model, *share(rank))
        with torch.no_grad():
            assert is_running_fused(model, share(rank)[0]) == (name != "plain")
        model.reshard()
        found[name] = losses + [p.full_tensor().detach() for p in model.parameters()]
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "timeout": datetime.timedelta(seconds=120)}
    dist.init_process_group("gloo", f"file://{folder}/store", **options)
    found = {"ddp": check_ddp(rank), "sync": check_sync(rank), "fsdp": check_fsdp(rank)}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["fused", "lean"])
def test_fuse_parallel_as_plain(ranks, kind, name):
    """Losses, outputs, parameters and running statistics."""
    for found in ranks:
        assert_near(found[kind][name], found[kind]["plain"])
    if kind == "ddp":  # whose processes had images of their own, and hold the same parameters
        assert not torch.equal(ranks[0]["ddp"][name][0], ranks[1]["ddp"][name][0])


@pytest.mark.parametrize("name", ["late", "early"])
def test_fuse_batch_norm_over_processes(ranks, name):
    """As one process with all the images: the mean of the losses, the outputs side by side, one state for both."""
    model = net()
    expected = train(model, *(torch.cat(pair) for pair in zip(share(0), share(1), strict=True)))
    (losses, mine), (others, other) = (found["sync"][name] for found in ranks)
    assert_near([(a + b) / 2 for a, b in zip(losses[:STEPS], others[:STEPS], strict=True)], expected[:STEPS])
    assert_near([torch.cat([losses[-1], others[-1]])], expected[-1:])
    assert_near(mine, state(model))
    assert_near(other, state(model))
