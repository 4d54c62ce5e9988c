"""What is put around a network: recomputing, SyncBN, an average of its weights, DDP or FSDP, `torch.compile`."""

import argparse
import inspect

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fused_resnet.modules import convert_sync_batchnorm
from fused_resnet.training import network
from fused_resnet.training.processes import Processes
from fused_resnet.training.state import local


def averaged(model: nn.Module, args: argparse.Namespace) -> AveragedModel:
    """The exponential moving average of the weights and running statistics, with the decay --model-ema-decay.

    In the first steps it decays faster, by (1 + n) / (10 + n), as in timm and TensorFlow: else the random weights of
    the beginning would stay in it for thousands of steps.
    """

    @torch.no_grad()
    def move(averages: list[Tensor], currents: list[Tensor], count: Tensor) -> None:
        steps = int(average.n_averaged)  # on the CPU; `count` may be on a GPU, which would be waited for
        averages, currents = [list(map(local, tensors)) for tensors in (averages, currents)]
        decay = min(args.model_ema_decay, (1 + steps) / (10 + steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - decay)
        else:
            torch._foreach_copy_(averages, currents)

    average = AveragedModel(model, multi_avg_fn=move, use_buffers=True)
    return average


def wrapped(
    model: nn.Module, average: AveragedModel | None, args: argparse.Namespace, processes: Processes
) -> nn.Module:
    """The network as the training calls it."""
    if args.grad_checkpointing:
        network.checkpoint_blocks(model)
    if args.compile:
        model.compile()
    synchronised = args.sync_bn and processes.world > 1
    if args.fsdp:
        if synchronised:
            convert_sync_batchnorm(model)
        for module in (model, average and average.module):
            if module is not None:
                _divide(module, processes)
        return model
    if processes.world == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    # Running statistics are the first process's, which the others are given before they are needed.
    names = inspect.signature(ddp).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # before torch 2.13
    model = ddp(model, device_ids=devices, gradient_as_bucket_view=True, **{no_sync: False})
    if synchronised:  # now, as DDP refuses them on the CPU, where ours work; the parameters stay the same objects
        convert_sync_batchnorm(model.module)
    return model


def _divide(model: nn.Module, processes: Processes) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in network.blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
