"""The families of convolutions, and which of them runs a problem in which configuration."""

from fused_resnet.backends.config import Kernel
from fused_resnet.backends.cuda import implicit_gemm
from fused_resnet.backends.cuda.family import Family
from fused_resnet.backends.problem import Problem
from fused_resnet.backends.tunable import in_turn

# In the order in which they are asked: the special before the general.
FAMILIES: tuple[Family, ...] = (implicit_gemm.FAMILY,)


def _able(problem: Problem, capability: tuple[int, int]) -> list[Family]:
    """The families that can run the problem."""
    if problem.op != "conv_scale_act":
        return []
    return [family for family in FAMILIES if not family.unsupported(problem, capability)]


def takes(problem: Problem, capability: tuple[int, int]) -> bool:
    return bool(_able(problem, capability))


def candidates(problem: Problem, capability: tuple[int, int]) -> list[Kernel]:
    """Every kernel that can run the problem: the likeliest of each family, the second of each, ..."""
    able = _able(problem, capability)
    return in_turn([Kernel(family, config) for config in family.configs(problem, capability)] for family in able)
