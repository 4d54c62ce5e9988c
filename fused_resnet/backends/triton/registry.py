"""The families of kernels, and which of them runs a problem in which configuration: a pure function of the problem."""

from itertools import zip_longest

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
from fused_resnet.backends.triton.launch import Config, Family

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


def _by_family(problem: Problem, capability: tuple[int, int]) -> list[list[tuple[Family, Config]]]:
    """The kernels that can run the problem, each family's likeliest first."""
    able = [f for f in FAMILIES.get(problem.op, ()) if not f.unsupported(problem, capability)]
    return [[(family, config) for config in family.configs(problem, capability)] for family in able]


def candidates(problem: Problem, capability: tuple[int, int]) -> list[tuple[Family, Config]]:
    """Every kernel that can run the problem: the heuristic's choice, each family's first, each one's second, ..."""
    families = _by_family(problem, capability)
    if not families:
        return []
    in_turn = [kernel for kernels in zip_longest(*families) for kernel in kernels if kernel is not None]
    return list(dict.fromkeys([heuristic(problem, capability), *in_turn]))


def heuristic(problem: Problem, capability: tuple[int, int]) -> tuple[Family, Config]:
    """The kernel for a problem that was not measured."""
    family, config = _by_family(problem, capability)[0][0]
    if family is conv1x1.FAMILY:
        other = implicit_gemm.configs(problem, capability)[0]
        if other.blocks[-1] > 1:  # too few tiles for the GPU: only the other family splits its sums
            return implicit_gemm.FAMILY, other
    return family, config
