"""The families of convolutions, and which of them runs a problem in which configuration."""

from functools import lru_cache

from fused_resnet.backends.config import Kernel
from fused_resnet.backends.cuda import depthwise, implicit_gemm, stem
from fused_resnet.backends.cuda.family import Family
from fused_resnet.backends.problem import Problem
from fused_resnet.backends.tunable import in_turn

# In the order in which they are asked: the special before the general.
FAMILIES: tuple[Family, ...] = (depthwise.FAMILY, stem.FAMILY, implicit_gemm.FAMILY)


def _able(families: tuple[Family, ...], problem: Problem, capability: tuple[int, int]) -> list[Family]:
    """The families that can run the problem."""
    if problem.op != "conv_scale_act":
        return []
    return [family for family in families if not family.unsupported(problem, capability)]


def takes(problem: Problem, capability: tuple[int, int]) -> bool:
    return bool(_able(FAMILIES, problem, capability))


def candidates(problem: Problem, capability: tuple[int, int]) -> list[Kernel]:
    """Every kernel that can run the problem: the likeliest of each family, the second of each, ..."""
    return _candidates(FAMILIES, problem, capability)


@lru_cache(4096)  # asked at every step of a training
def _candidates(families: tuple[Family, ...], problem: Problem, capability: tuple[int, int]) -> list[Kernel]:
    able = _able(families, problem, capability)
    return in_turn([Kernel(family, config) for config in family.configs(problem, capability)] for family in able)
