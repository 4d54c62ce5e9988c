"""Modules in several processes, and their problems, which one process solves as well."""

import copy
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from networks import batch_norms, seeded
from torch import Tensor, nn

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
