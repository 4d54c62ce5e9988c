"""What the processes of SyncBatchNorm exchange: moments in the forward pass, two sums in the backward.

A layer takes one collective each way. Moments are merged by Chan's formula (Chan, Golub & LeVeque 1983), in fp64 and in
the order of the ranks, so that every process gets the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def merged_moments(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over all processes, of which this one has `count` values a channel, maybe none.

    Returns:
        mean, var: [C], in the dtype they came in; total: the values a channel of all processes, fp64, [].
    """
    processes = _group(group)
    own = torch.cat([mean.double(), var.double() * count, mean.new_full((1,), count, dtype=torch.float64)])
    found = own.new_empty(processes.size() * len(own))  # flat: gloo takes no other shape
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(found, own, processes)
    means, m2, counts = found.view(-1, len(own)).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    least = total.clamp(min=1)
    merged = (means * (counts / least)).sum(0)
    m2 = (m2 + (means - merged).square() * counts).sum(0)
    return merged.to(mean.dtype), (m2 / least).to(var.dtype), total


def summed(sums: list[Tensor], count: int, total: Tensor, group: str) -> list[Tensor]:
    """The sums, [C] each, over all processes, times count / total: dividing them by `count` gives means over all."""
    joined = torch.cat(sums)
    dist.all_reduce(joined, group=_group(group))
    return list((joined * (count / total.clamp(min=1)).to(joined.dtype)).split([len(s) for s in sums]))
