"""Arguments that every operator of csrc/cuda takes, by name."""

import pytest
import torch
from cuda_kernels import DEVICE

NAN = float("nan")


def image(*size, dtype=torch.float32, value=None):
    t = torch.randn(size, device=DEVICE) if value is None else torch.full(size, value, device=DEVICE)
    return t.to(dtype).contiguous(memory_format=torch.channels_last)


def vector(*size, value=1.0):
    return torch.full(size, value, device=DEVICE)


def out(*size):
    return image(*size, value=NAN)


def to_fill(*size):
    return vector(*size, value=NAN)


def taps(*size):
    return image(*size, value=4).to(torch.uint8)


def add_act_fwd():
    return {"x": image(2, 16, 5, 3), "residual": image(2, 16, 5, 3), "act": 1, "y": out(2, 16, 5, 3)}


def add_act_bwd():
    inputs = {name: image(2, 16, 5, 3) for name in ("dy", "y", "x", "residual")}
    return inputs | {"act": 4, "dx": out(2, 16, 5, 3)}


def conv():
    images = {"x": image(2, 16, 6, 5), "weight": image(24, 144, 1, 1).view(24, 144), "residual": image(2, 24, 6, 5)}
    vectors = {"scale": vector(24), "shift": vector(24), "partials": to_fill(1, 3, 24)}
    numbers = {"geometry": (3, 3, 1, 1, 1, 1, 1, 1, 1), "act": 1, "tf32": False, "tile_m": 64, "tile_n": 64}
    return images | vectors | numbers | {"out": out(2, 24, 6, 5), "sums": None}


def conv_split():
    return conv() | {"partials": None, "sums": to_fill(2, 60, 24)}


WINDOW = (3, 3, 1, 1, 1, 1, 1, 1)


def depthwise_fwd():
    images = {"x": image(2, 16, 6, 5), "weight": vector(9, 16), "residual": image(2, 16, 6, 5)}
    numbers = {"geometry": WINDOW, "tile": (4, 4, 4), "act": 1}
    return images | {"scale": vector(16), "shift": vector(16)} | numbers | {"out": out(2, 16, 6, 5)}


def depthwise_dgrad():
    numbers = {"geometry": (3, 3, 2, 2, 1, 1, 1, 1), "tile": (4, 4, 4)}
    return {"grad": image(2, 16, 3, 3), "weight": vector(9, 16)} | numbers | {"dx": out(2, 16, 6, 5)}


def depthwise_wgrad():
    images = {"grad": image(2, 16, 6, 5), "x": image(2, 16, 6, 5), "geometry": WINDOW}
    return images | {"workspace": to_fill(2, 9, 16), "dweight": to_fill(16, 1, 3, 3)}


def stem():
    numbers = {"geometry": WINDOW, "tile": (2, 5, 2, 32), "tf32": False, "act": 1}
    vectors = {"weight": vector(1, 6 * 32 * 8), "scale": vector(24), "shift": vector(24)}
    return {"x": image(2, 3, 6, 5), "residual": image(2, 24, 6, 5)} | vectors | numbers | {"out": out(2, 24, 6, 5)}


def bn_stats():
    return {"x": image(2, 16, 5, 3), "tile_rows": 16, "partials": to_fill(2, 3, 16)}


def bn_finalize():
    return {"partials": vector(2, 3, 16), "rows": 30, "tile_rows": 16, "mean": to_fill(16), "var": to_fill(16)}


NORM = ("mean", "var", "weight", "bias")


def norm():
    return {name: vector(16) for name in NORM} | {"eps": 1e-5, "act": 1}


def mask():
    return torch.zeros(2 * 5 * 3 * 4, dtype=torch.uint8, device=DEVICE)


def residual():
    vectors = {f"residual_{name}": vector(16) for name in NORM}
    return {"residual": image(2, 16, 5, 3)} | vectors | {"residual_eps": 1e-3}


def bn_apply():
    return norm() | residual() | {"x": image(2, 16, 5, 3), "y": out(2, 16, 5, 3), "mask": mask()}


def bn_gradient():
    return norm() | residual() | {name: image(2, 16, 5, 3) for name in ("dy", "x", "y")} | {"mask": mask()}


def without_norm(args):
    """Of the residual, which is then added as it is."""
    return args | {name: None for name in args if name.startswith("residual_") and name != "residual_eps"}


def bn_reduce():
    return bn_gradient() | {"tile_rows": 16, "partials": to_fill(2, 3, 16), "g": out(2, 16, 5, 3)}


def bn_reduce_added():
    return without_norm(bn_reduce()) | {"partials": to_fill(2, 2, 16)}


def bn_reduce_finalize():
    filled = {name: to_fill(16) for name in ("dweight", "dbias", "dresidual_weight")}
    variances = {"var": vector(16), "eps": 1e-5, "residual_var": vector(16), "residual_eps": 1e-3}
    return {"partials": vector(2, 3, 16)} | variances | filled


def bn_reduce_finalize_added():
    return bn_reduce_finalize() | {"partials": vector(2, 2, 16), "residual_var": None, "dresidual_weight": None}


def bn_input_grad():
    sums = {name: vector(16) for name in ("dweight", "dbias", "dresidual_weight")} | {"count": 30.0}
    return bn_gradient() | sums | {"dx": out(2, 16, 5, 3), "dresidual": out(2, 16, 5, 3)}


def bn_input_grad_added():
    return without_norm(bn_input_grad()) | {"dresidual_weight": None, "dresidual": None}


def scale_act():
    vectors = {"scale": vector(16), "shift": vector(16), "act": 1}
    return {"x": image(2, 16, 5, 3), "residual": image(2, 16, 5, 3)} | vectors | {"out": out(2, 16, 5, 3)}


POOL = (3, 3, 2, 2, 1, 1)


def max_pool():
    return {"x": image(2, 16, 6, 5), "geometry": POOL, "out": out(2, 16, 3, 3), "argmax": taps(2, 16, 3, 3)}


def max_pool_bwd():
    return {"dy": image(2, 16, 3, 3), "argmax": taps(2, 16, 3, 3), "geometry": POOL, "dx": out(2, 16, 6, 5)}


def bn_max_pool():
    return norm() | max_pool()


def bn_max_pool_gradient():
    return norm() | {name: t for name, t in max_pool_bwd().items() if name != "dx"} | {"x": image(2, 16, 6, 5)}


def bn_max_pool_reduce():
    return bn_max_pool_gradient() | {"tile_rows": 32, "partials": to_fill(2, 2, 16)}


def bn_max_pool_input_grad():
    sums = {"dweight": vector(16), "dbias": vector(16), "count": 60.0}
    return bn_max_pool_gradient() | sums | {"dx": out(2, 16, 6, 5)}


# Good arguments of every operator, in this file's order.
GOOD = (
    add_act_fwd, add_act_bwd, conv, conv_split, depthwise_fwd, depthwise_dgrad, depthwise_wgrad, stem, bn_stats,
    bn_finalize, bn_apply, bn_reduce, bn_reduce_added, bn_reduce_finalize, bn_reduce_finalize_added, bn_input_grad,
    bn_input_grad_added, scale_act, max_pool, max_pool_bwd, bn_max_pool, bn_max_pool_reduce, bn_max_pool_input_grad,
)  # fmt: skip
goods = pytest.mark.parametrize("good", GOOD, ids=lambda good: good.__name__)


def name_of(good):
    return good.__name__.removesuffix("_split").removesuffix("_added")


def operator(good):
    return getattr(torch.ops.fused_resnet_C, f"cuda_{name_of(good)}").default


def written(good, args):
    """Those of the arguments that the operator fills, by name."""
    schema = operator(good)._schema.arguments
    filled = {arg.name: args[arg.name] for arg in schema if arg.alias_info is not None and arg.alias_info.is_write}
    return {name: t for name, t in filled.items() if t is not None}
