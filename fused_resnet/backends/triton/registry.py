"""The families of kernels, and which of them runs a problem in which configuration: a pure function of the problem."""

from functools import lru_cache

from fused_resnet.backends.config import Config, Kernel
from fused_resnet.backends.plan import tf32
from fused_resnet.backends.problem import POOLED, Problem
from fused_resnet.backends.triton import (
    conv1x1,
    cudnn,
    depthwise,
    elementwise,
    general,
    grouped,
    implicit_gemm,
    stem,
    stem_pool,
)
from fused_resnet.backends.triton.launch import Family
from fused_resnet.backends.tunable import in_turn

# Those of one operator in the order in which they are asked: the special before the general.
FAMILIES: dict[str, tuple[Family, ...]] = {
    "conv_scale_act": (
        stem.FAMILY,
        stem_pool.ROWS,
        depthwise.FAMILY,
        grouped.FAMILY,
        conv1x1.FAMILY,
        implicit_gemm.FAMILY,
        general.FAMILY,
        cudnn.FAMILY,
    ),
    POOLED: (stem_pool.FAMILY,),
    "scale_act": (elementwise.SCALE_ACT,),
    "add_act": (elementwise.ADD_ACT,),
}


def _by_family(problem: Problem, capability: tuple[int, int]) -> list[list[Kernel]]:
    """The kernels that can run the problem, each family's likeliest first."""
    able = [f for f in FAMILIES.get(problem.op, ()) if not f.unsupported(problem, capability)]
    return [[Kernel(family, config) for config in family.configs(problem, capability)] for family in able]


def candidates(problem: Problem, capability: tuple[int, int]) -> list[Kernel]:
    """Every kernel that can run the problem: the heuristic's choice, each family's first, each one's second, ..."""
    families = _by_family(problem, capability)
    return list(dict.fromkeys([heuristic(problem, capability), *in_turn(families)])) if families else []


def heuristic(problem: Problem, capability: tuple[int, int]) -> Kernel:
    """The kernel for a problem that was not measured."""
    first = _by_family(problem, capability)[0][0]
    if first.family is conv1x1.FAMILY:
        other = implicit_gemm.configs(problem, capability)[0]
        if other.blocks[-1] > 1:  # too few tiles for the GPU: only the other family splits its sums
            return Kernel(implicit_gemm.FAMILY, other)
    return first


def in_training(problem: Problem, capability: tuple[int, int], normed: bool) -> tuple[Family, Config, bool]:
    """The family and the configuration of a convolution in training, and whether it applies a norm on load.

    That is the heuristic's choice, or where x is `normed` the first family that applies it, which saves a pass.
    """
    return _in_training(problem, capability, normed, tf32())


@lru_cache(4096)  # asked at every step
def _in_training(problem: Problem, capability: tuple[int, int], normed: bool, tf32: bool):
    for kernels in _by_family(problem, capability) if normed else ():
        if kernels[0].family.normalises(problem):
            return *kernels[0], True
    return *heuristic(problem, capability), False
