"""The kernels that are shipped, as launches of meta tensors: what is compiled to see that all of them fit a GPU."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends.norm import Norm
from fused_resnet.backends.problem import POOLED, Problem
from fused_resnet.backends.triton import elementwise, training
from fused_resnet.backends.triton.launch import Config, Family, Launch
from fused_resnet.backends.triton.registry import FAMILIES, in_training
from fused_resnet.backends.triton.statistics import Partials, merge_launch, moments_launch

# What is multiplied: the dtype, and whether fp32 may be rounded to TF32.
MODES = {
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}

# Which blocks of a family leave its tile as it is: they say how often a loop runs, or how far apart windows lie.
LOOSE = {"implicit_gemm": (3,), "stem": (2,), "stem_pool": (0, 3), "stem_rows": (0, 3), "depthwise": (0,)}


class Shipped(NamedTuple):
    """One kernel in one configuration, and a problem that it is for."""

    kernel: str
    family: str
    config: str
    mode: str  # a key of MODES
    problem: str
    capability: tuple[int, int]
    launch: Launch


def conv(x, k, window, stride=1, groups=1, residual=False, act="relu", op="conv_scale_act") -> Problem:
    """A convolution of x, [N, C, H, W], padded by half its window."""
    pairs = (stride, stride), (window // 2, window // 2), (1, 1)
    return Problem(op, x, torch.bfloat16, (k, x[1] // groups, window, window), *pairs, groups, residual, act)


def plain(op, x, residual, act="relu") -> Problem:
    return Problem(op, x, torch.bfloat16, residual=residual, act=act)


# The problems of each family, and the modes in which they are compiled: each configuration that a family offers comes
# up in each of its modes. In fp16, whose code is that of bf16 but for names, only the likeliest is compiled.
PROBLEMS: dict[str, tuple[tuple[Problem, str], ...]] = {
    "conv1x1": (
        (conv((256, 128, 28, 28), 512, 1, residual=True), "bf16 fp16 tf32"),  # ResNet-50, the block's last
        (conv((256, 256, 56, 56), 64, 1), "bf16 tf32"),  # and the block's first
        (conv((256, 144, 56, 56), 24, 1, residual=True, act="none"), "bf16"),  # MobileNetV2, projection
    ),
    "implicit_gemm": (
        (conv((256, 128, 28, 28), 128, 3, residual=True), "bf16 tf32"),  # ResNet-34, the block's second
        (conv((256, 128, 56, 56), 128, 3, stride=2), "bf16 tf32"),  # ResNet-50, the first block of a stage
        (conv((256, 512, 28, 28), 1024, 1, stride=2, act="none"), "fp16"),  # its shortcut
        (conv((128, 16, 32, 32), 16, 3, residual=True), "bf16 tf32"),  # CIFAR
        (conv((1, 1024, 7, 7), 1024, 3, residual=True), "bf16 tf32"),  # Wide ResNet-50-2, last stage, one image
    ),
    "stem": (
        (conv((256, 3, 224, 224), 64, 7, stride=2), "bf16 fp16 tf32"),
        (conv((256, 3, 224, 224), 128, 7, stride=2), "bf16 tf32"),
    ),
    "stem_pool": ((conv((256, 3, 224, 224), 64, 7, stride=2, op=POOLED), "bf16 fp16 tf32"),),
    "stem_rows": ((conv((256, 3, 224, 224), 64, 7, stride=2), "bf16 tf32"),),
    "depthwise": (
        (conv((256, 960, 7, 7), 960, 3, groups=960, residual=True, act="none"), "bf16 fp16 fp32"),
        (conv((256, 192, 28, 28), 192, 3, groups=192, act="relu6"), "bf16 fp32"),  # MobileNetV2
        (conv((256, 32, 112, 112), 32, 3, groups=32, act="relu6"), "bf16 fp32"),
        (conv((256, 96, 112, 112), 96, 3, stride=2, groups=96, act="relu6"), "bf16 fp32"),
        (conv((256, 192, 28, 28), 192, 3, stride=2, groups=192, act="relu6"), "bf16 fp32"),
        (conv((256, 576, 14, 14), 576, 3, stride=2, groups=576, act="relu6"), "bf16 fp32"),
        (conv((8, 3, 14, 14), 3, 3, groups=3), "bf16 fp32"),  # rows of channels that are not aligned
        (conv((256, 3, 56, 56), 3, 3, groups=3), "bf16 fp32"),
        (conv((1, 3, 7, 7), 3, 3, groups=3), "fp32"),
        (conv((1, 144, 56, 56), 144, 5, stride=2, groups=144, act="silu"), "bf16"),  # EfficientNet
        (conv((32, 96, 56, 56), 96, 7, groups=96, act="none"), "bf16"),  # ConvNeXt
        (conv((32, 96, 56, 56), 96, 7, stride=2, groups=96, act="none"), "bf16 fp32"),
    ),
    "grouped": (
        (conv((256, 128, 56, 56), 128, 3, groups=32, residual=True), "bf16 fp16 tf32"),  # ResNeXt-50 32x4d
        (conv((256, 512, 28, 28), 512, 3, stride=2, groups=32), "bf16 tf32"),
        (conv((256, 2048, 7, 7), 2048, 3, groups=32), "bf16 tf32"),  # ResNeXt-101 32x8d
    ),
    "general": (
        (conv((256, 128, 28, 28), 128, 3, residual=True), "bf16 tf32 fp32"),
        (conv((256, 256, 56, 56), 512, 1, stride=2, act="none"), "bf16 fp16 tf32"),
        (conv((256, 3, 224, 224), 64, 7, stride=2), "bf16 tf32 fp32"),
        (conv((256, 128, 56, 56), 128, 3, groups=32), "bf16 tf32 fp32"),
        (conv((128, 16, 32, 32), 32, 3, stride=2), "bf16 tf32 fp32"),  # CIFAR
        (conv((1 << 16, 16, 256, 256), 16, 3, residual=True), "bf16"),  # 2^32 pixels
    ),
    "cudnn": (),  # its kernel is scale_act's
    "scale_act": (
        (plain("scale_act", (256, 256, 56, 56), True), "bf16 fp16 fp32"),
        (plain("scale_act", (256, 256, 56, 56), False), "bf16 fp32"),
        (plain("scale_act", (128, 16, 32, 32), False, "hardswish"), "bf16 fp32"),
        (plain("scale_act", (256, 24, 56, 56), True, "silu"), "bf16 fp32"),
        (plain("scale_act", (256, 8, 56, 56), False), "bf16 fp32"),
        (plain("scale_act", (256, 3, 224, 224), False, "none"), "bf16 fp32"),
        (plain("scale_act", (256, 1, 28, 28), False, "none"), "bf16 fp32"),
    ),
    "add_act": (
        (plain("add_act", (256, 256, 56, 56), True), "bf16 fp16 fp32"),
        (plain("add_act", (128, 16, 32, 32), True, "silu"), "bf16 fp32"),
    ),
}


def families() -> dict[str, Family]:
    """All families of the registry by name."""
    return {family.name: family for of_operator in FAMILIES.values() for family in of_operator}


def names() -> list[str]:
    """What `only` of `shipped` may be."""
    return sorted({*families(), "add_act", "max_pool2d", "batch_norm"})


def shipped(capability: tuple[int, int], only: str = "", quick: bool = False) -> Iterator[Shipped]:
    """The kernels for a compute capability, or those of the family `only`.

    `quick`: of every problem the likeliest configuration, and the others once a mode, of which those that differ only
    in `LOOSE` blocks count as one.
    """
    seen: set[tuple] | None = set() if quick else None
    for name, family in families().items():
        for problem, modes in PROBLEMS.get(name, ()) if only in ("", name) else ():
            for mode in modes.split():
                yield from _of_family(family, problem, mode, capability, seen)
    for mode in ("bf16", "fp32"):
        rows = (*_of_no_family(mode, capability), *_of_training(mode, capability))
        yield from (row for row in rows if only in ("", row.family))


def _of_family(family: Family, problem: Problem, mode: str, capability, seen: set | None) -> list[Shipped]:
    dtype, tf32 = MODES[mode]
    problem = problem._replace(dtype=dtype)
    found: dict[tuple, Shipped] = {}
    # Whether TF32 is allowed is torch's setting, which the launches are made by.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=tf32):
        configs = [] if family.unsupported(problem, capability) else family.configs(problem, capability)
        for config in configs[:1] if mode == "fp16" else configs if seen is None else _new(configs, mode, seen):
            for launch in _launches(family, problem, config):
                # What configurations share is compiled once, such as the launch before or after the one that is theirs.
                key = (launch.kernel.__name__, *launch.constants.items(), launch.num_warps, launch.num_stages)
                row = launch.kernel.__name__, family.name, str(config), mode, str(problem), capability, launch
                found.setdefault(key, Shipped(*row))
    return list(found.values())


def tile(config: Config) -> Config:
    """The configuration without its loose blocks."""
    loose = LOOSE.get(config.family, ())
    return config._replace(blocks=tuple(size for i, size in enumerate(config.blocks) if i not in loose))


def _new(configs: list[Config], mode: str, seen: set) -> list[Config]:
    """The likeliest, and each that has a tile or a loose block that was not `seen`."""
    kept = configs[:1]
    for config in configs:
        loose = {(mode, config.family, i, config.blocks[i]) for i in LOOSE.get(config.family, ())}
        parts = {(mode, tile(config)), *loose}
        if not parts <= seen and config not in kept:
            kept.append(config)
        seen |= parts
    return kept


def _launches(family: Family, problem: Problem, config: Config, **training) -> tuple[Launch, ...]:
    k = problem.output[1]
    x, out = meta(problem.x, problem.dtype), meta(problem.output, problem.dtype)
    weights = family.pack(meta(problem.weight, problem.dtype), problem, config) if problem.weight else None
    vectors = meta((k,), torch.float32), meta((k,), torch.float32)
    residual = meta(problem.output, problem.dtype) if problem.residual else None
    return family.launches(problem, config, x, weights, *vectors, residual, out, **training)


def meta(size, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def _row(family: str, problem: str, mode: str, capability, launch: Launch) -> Shipped:
    """Of a launch without a configuration's name."""
    blocks = tuple(value for name, value in launch.constants.items() if name.startswith("BLOCK"))
    config = Config(family, blocks, launch.num_warps, launch.num_stages)
    text = f"{problem} {str(MODES[mode][0]).removeprefix('torch.')}"
    return Shipped(launch.kernel.__name__, family, str(config), mode, text, capability, launch)


def _of_no_family(mode: str, capability) -> Iterator[Shipped]:
    dtype = MODES[mode][0]
    x = meta((256, 256, 56, 56), dtype)
    for act, inputs in (("relu", (None, None)), ("silu", (x, x))):
        launch = elementwise.add_backward_launch(x, x, *inputs, act, x)
        yield _row("add_act", f"add_act gradient 256x256x56x56 {act}", mode, capability, launch)
    for n, c, size in ((256, 64, 112), (1, 3, 224), (1 << 16, 64, 256)):
        tensors = meta((n, c, size, size), dtype), meta((n, c, size // 2, size // 2), dtype)
        launch = elementwise.max_pool2d_launch(tensors[0], (3, 3), (2, 2), (1, 1), tensors[1])
        yield _row("max_pool2d", f"max_pool2d 3x3/2 {n}x{c}x{size}x{size}", mode, capability, launch)


# --- training ---------------------------------------------------------------------------------------------------------

# x, what is added to it (nothing, a residual, one with a norm of its own), and the activation.
NORMS = (
    ((256, 64, 56, 56), "", "relu"),
    ((256, 512, 28, 28), "residual with norm", "relu"),
    ((256, 24, 56, 56), "residual", "silu"),
    ((8, 3, 32, 32), "residual with norm", "hardswish"),
)
# And whether a norm is applied on load.
CONVOLUTIONS = (
    (conv((256, 256, 14, 14), 1024, 1, act="none"), True),
    (conv((256, 256, 56, 56), 64, 1, act="none"), False),
    (conv((256, 128, 28, 28), 128, 3, act="none"), False),
    (conv((256, 3, 224, 224), 64, 7, stride=2, act="none"), False),
    (conv((256, 128, 56, 56), 128, 3, groups=32, act="none"), False),
    (conv((8, 17, 32, 32), 31, 1, act="none"), True),
)


def _of_training(mode: str, capability) -> Iterator[Shipped]:
    dtype, tf32 = MODES[mode]
    for shape, added, act in NORMS:
        for launch in _norm_launches(meta(shape, dtype), added, act):
            # What reads partials or vectors alone does so in fp32.
            if mode == "bf16" or launch.args[0].dim() == 4:
                text = " ".join(filter(None, ("x".join(map(str, shape)), added, act)))
                yield _row("batch_norm", text, mode, capability, launch)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=tf32):
        for problem, normed in CONVOLUTIONS:
            problem = problem._replace(dtype=dtype)
            family, config, on_load = in_training(problem, capability, normed)
            also = {"partials": Partials.empty(family.tiles(problem, config), problem.weight[0], "meta")}
            if on_load:
                also["on_load"] = (*[meta(problem.x[1:2], torch.float32)] * 3, "relu")
            launch = _launches(family, problem, config, **also)[-1]
            row = launch.kernel.__name__, family.name, str(config), mode, f"training {problem}", capability, launch
            yield Shipped(*row)


def _norm_launches(x: Tensor, added: str, act: str) -> Iterator[Launch]:
    vector = meta(x.shape[1:2], torch.float32)
    norm = Norm(*[vector] * 4, 1e-5)
    own = norm if added == "residual with norm" else None
    partials, first = moments_launch(x)
    yield from (first, merge_launch(partials, x.numel() // x.shape[1], vector, vector))
    inputs = (x, norm, x if added else None, own, act)
    yield training.norm_act_launch(*inputs, x)
    yield training.norm_scale_launch(norm, vector)
    sums = (vector, vector, None if own is None else vector)
    y = x if added else None
    yield from training.norm_act_reduce_launches(x, *inputs, y, x, *sums)
    yield training.norm_act_input_grad_launch(x, *inputs, y, *sums, 1e5, x, None if own is None else x)
