"""csrc/cuda/implicit_gemm.h: every convolution, as a GEMM on tensor cores; and with the statistics of batch norm."""

import torch

from fused_resnet.backends.config import Config, shared_memory
from fused_resnet.backends.cpu.extension import ACT_CODES
from fused_resnet.backends.cuda.family import MULTIPROCESSORS, Family, cdiv, geometry, tf32_allowed
from fused_resnet.backends.layout import vector
from fused_resnet.backends.problem import Problem
from fused_resnet.backends.tunable import capability

NAME = "implicit_gemm"

# Pixels and channels of the tiles, their warps and stages, as `find_tile` in csrc/cuda/implicit_gemm.h has them.
TILES = (
    Config(NAME, (128, 128, 1), 8, 3),
    Config(NAME, (256, 64, 1), 8, 3),
    Config(NAME, (128, 64, 1), 4, 3),
    Config(NAME, (64, 128, 1), 4, 3),
    Config(NAME, (64, 64, 1), 4, 4),
)
HALF_ONLY = ((256, 64), (64, 128))

SPLITS = (2, 3, 4, 6, 8, 12, 16)
LEAST_STEPS = 4  # of a split: it takes three to fill the pipeline

# Positions in an image, and taps, are kept in 16 bits.
FARTHEST = (1 << 15) - 1


def unsupported(problem: Problem, capability: tuple[int, int]) -> str:
    for i in range(2):
        reach = problem.dilation[i] * (problem.weight[i + 2] - 1)
        if problem.x[i + 2] + 2 * problem.padding[i] > FARTHEST or reach > FARTHEST:
            return "an image of more than 32767 rows or columns"
    if problem.weight[1] * problem.weight[2] * problem.weight[3] + 64 >= 1 << 31:
        return "a filter of more than 2^31 weights"
    return "" if capability >= (8, 0) else "it needs compute capability 8.0"


def _chunk(problem: Problem) -> int:
    """Elements in 16 bytes, which are copied at once."""
    return 16 // problem.dtype.itemsize


def _steps(problem: Problem) -> int:
    """How often 128 bytes of the depth are multiplied."""
    depth = problem.weight[1] * problem.weight[2] * problem.weight[3]
    return cdiv(depth, 8 * _chunk(problem))


def _fits(config: Config, capability: tuple[int, int]) -> bool:
    """Whether a block's stages, scale, shift and flag fit its shared memory; as `Tile` in implicit_gemm_plan.h."""
    block_m, block_n = config.blocks[:2]
    return config.num_stages * (block_m + block_n) * 128 + 8 * block_n + 16 <= shared_memory(capability)


def _tiles(problem: Problem, capability: tuple[int, int]) -> list[Config]:
    if problem.weight[1] % _chunk(problem):  # channels that have to be gathered one by one
        return [TILES[-1]]
    half = problem.dtype != torch.float32
    return [config for config in TILES if (half or config.blocks[:2] not in HALF_ONLY) and _fits(config, capability)]


def configs(problem: Problem, capability: tuple[int, int]) -> list[Config]:
    """The cheapest first: the steps of the busiest multiprocessor, weighted by the size of a tile."""
    n, k, p, q = problem.output
    pixels, group_k, steps = n * p * q, k // problem.groups, _steps(problem)

    def blocks(config):
        return cdiv(pixels, config.blocks[0]) * cdiv(group_k, config.blocks[1]) * problem.groups * config.blocks[2]

    def cost(config):
        block_m, block_n, splits = config.blocks
        waves = cdiv(blocks(config), MULTIPROCESSORS)
        # A step of a small tile is bound by what it copies; a second launch, which also writes and reads the sums in
        # fp32, costs about as much as so many steps.
        row = waves * cdiv(steps, splits) * (1 + block_m * block_n / 8192)
        return row + (8 if splits > 1 else 0), -block_m * block_n, block_n

    tiles = _tiles(problem, capability)
    split = [
        config._replace(blocks=(*config.blocks[:2], splits))
        for config in tiles
        if blocks(config) < MULTIPROCESSORS
        for splits in SPLITS
        if steps // splits >= LEAST_STEPS
    ]
    return sorted([*tiles, *split], key=cost)


def pack(weight: torch.Tensor, problem: Problem, config: Config) -> torch.Tensor:
    """[K, R * S * C / groups], the input channels running first, filled up with zeros to whole chunks."""
    k, depth = weight.shape[0], weight[0].numel()
    packed = weight.new_zeros((k, cdiv(depth, _chunk(problem)) * _chunk(problem)), dtype=problem.dtype)
    packed[:, :depth] = weight.detach().permute(0, 2, 3, 1).reshape(k, depth)
    return packed


def _launch(problem, config, x, weights, scale, shift, residual, out, partials) -> None:
    block_m, block_n, splits = config.blocks
    sums = None
    if splits > 1:
        n, k, p, q = problem.output
        sums = torch.empty((splits, n * p * q, k), dtype=torch.float32, device=x.device)
    torch.ops.fused_resnet_C.cuda_conv(
        x, weights, scale, shift, residual, (*geometry(problem), problem.groups), ACT_CODES[problem.act],
        tf32_allowed(x), block_m, block_n, out, sums, partials,
    )  # fmt: skip


def run(problem, config, x, weights, scale, shift, residual, out) -> None:
    _launch(problem, config, x, weights, scale, shift, residual, out, None)


def with_moments(x, weight, bias, args) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A convolution, the moments of its output, [tiles, 3, K], and the pixels of a tile.

    A tile's moments are its mean, as the sum of two floats, and its sum of squared deviations.
    """
    problem = Problem.of("conv_scale_act", x, weight, args, None, "none")
    config = next(config for config in configs(problem, capability(x.device)) if config.blocks[2] == 1)
    n, k, p, q = problem.output
    z = torch.empty((n, k, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partials = torch.empty((cdiv(n * p * q, config.blocks[0]), 3, k), dtype=torch.float32, device=x.device)
    # The weight has just changed: its packed form is not worth keeping.
    _launch(problem, config, x, pack(weight, problem, config), None, vector(bias), None, z, partials)
    return z, partials, config.blocks[0]


FAMILY = Family(NAME, unsupported, configs, pack, run)
