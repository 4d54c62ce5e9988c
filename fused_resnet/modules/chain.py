"""Convolutions in a row, each with batch norm and activation, and what is added or pooled at their end."""

from collections.abc import Sequence

from torch import Tensor, nn

from fused_resnet.modules import unit
from fused_resnet.modules.again import again
from fused_resnet.modules.batch_norm import uses_batch_statistics
from fused_resnet.modules.max_pool import HALVING, max_pool, pool_geometry
from fused_resnet.modules.prepared import prepared
from fused_resnet.modules.unit import Layer


def chain(
    layers: Sequence[Layer],
    x: Tensor,
    *,
    residual: Tensor | None = None,
    projection: Layer | None = None,
    add_input: bool = False,
    pool: nn.Module | None = None,
    lean: bool = False,
    given: bool = False,
) -> Tensor:
    """Return `pool(layers[-1](... layers[0](x)))`: as one operator in training, one for each layer elsewhere.

    Args:
        residual, projection, add_input: as in `ops.residual_block`.
        pool: a max pooling.
        lean: in training, keep less for the backward pass.
        given: in inference, `x` may be overwritten.
    """
    window = None if pool is None else pool_geometry(pool)
    poolable = pool is None or (window is not None and x.dim() == 4)
    everything = [*layers, projection] if projection is not None else layers
    if poolable and unit.trainable(everything):
        return unit.train(
            layers, x, residual=residual, projection=projection, add_input=add_input, max_pool=window or (), lean=lean
        )
    modules = (module for layer in everything for module in (layer.conv, layer.bn))
    return again(lambda x: _one_by_one(layers, x, residual, projection, add_input, pool, given), x, lean, modules)


def _one_by_one(layers, x, residual, projection, add_input, pool, given) -> Tensor:
    ours = False  # whether nobody else can see what is added
    if projection is not None:
        conv, bn, act = projection
        residual, ours = unit.conv_bn_act(conv, bn, x, act=act), unit.fusible(conv, bn)
    elif add_input:
        residual, ours = x, given and unit.fusible(layers[0].conv, layers[0].bn)
    *before, last = layers
    for layer in before:
        x = unit.conv_bn_act(layer.conv, layer.bn, x, act=layer.act)
    if pool is None:
        return unit.conv_bn_act(last.conv, last.bn, x, residual, last.act, overwrite=ours)
    return _pooled(last, x, pool)


def _pooled(layer: Layer, x: Tensor, pool: nn.Module) -> Tensor:
    """`pool(layer(x))` in inference: one kernel, if there is one."""
    conv, bn, act = layer
    if pool_geometry(pool) == HALVING and unit.fusible(conv, bn):
        unit.forget_sharded(conv, bn)
        run = None if uses_batch_statistics(bn) else prepared(conv, bn, x, None, act, max_pool=True)
        if run is not None:
            return run(x, None, None)
    return max_pool(pool, unit.conv_bn_act(conv, bn, x, act=act))
