"""The backward passes of `fused_resnet::block`, from the last activation to the block's input."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.norm import Norm
from fused_resnet.ops import synchronise
from fused_resnet.ops.block_passes import Form, Inputs, Kept, Passes, values
from fused_resnet.ops.library import empty_channels_last, select


def _zeros(norm: Norm, count: int) -> list[Tensor]:
    """Sums over no images."""
    return [torch.zeros_like(norm.mean) for _ in range(count)]


class Needs(NamedTuple):
    """Which gradients are wanted, in the order of `Inputs`."""

    x: bool
    residual: bool
    weights: list[bool]
    conv_biases: list[bool]
    bn_weights: list[bool]
    bn_biases: list[bool]


class Backward(Passes):
    """The gradients of a block: `run` returns them as `Inputs`, None where they are not needed."""

    def __init__(self, inputs: Inputs, form: Form, kept: Kept, y: Tensor | None, needs: Needs):
        super().__init__(inputs, form)
        self.needs, self.y, self.told, self.z = needs, y, kept.told, list(kept.z)
        self.totals = list(kept.totals)
        self.norms = [
            Norm(*vectors)
            for vectors in zip(kept.mean, kept.var, inputs.bn_weights, inputs.bn_biases, form.eps, strict=True)
        ]
        self.found = Inputs(None, None, *([None] * len(tensors) for tensors in inputs[2:]))
        depth = form.depth
        if form.lean:  # the same convolutions as in the forward pass
            self.z.extend(self._again(i) for i in range(max(depth - 1, 0), len(form.convs)))
        # Whether anybody needs the gradient of what convolution i reads, and of what it writes.
        self.reads, self.writes = [needs.x], []
        for i in range(depth):
            self.writes.append(self.reads[-1] or needs.weights[i] or needs.conv_biases[i])
            self.reads.append(self.writes[-1] or needs.bn_weights[i] or needs.bn_biases[i])

    def _again(self, i: int) -> Tensor:
        of = self.before(i, self.inputs.x, self.z) if i < self.form.depth else (self.inputs.x, None, "none")
        return self.convolution(i, *of, moments=False)[0]

    def run(self, grad: Tensor) -> Inputs:
        form, needs, found, x = self.form, self.needs, self.found, self.inputs.x
        d_z, arriving = self._behind_end(reference.channels_last(grad))
        if form.shortcut == "given":  # behind no activation it is `grad`, which the caller has
            found = found._replace(residual=arriving if needs.residual and form.acts[-1] != "none" else None)
            arriving = None
        elif form.shortcut == "projected" and arriving is not None:
            needed = any(self._needs_projection())
            arriving = self._convolution(form.depth, arriving, x, None, "none", needs.x, None) if needed else None
        if form.depth == 0:
            return found._replace(x=d_z if needs.x else None)
        for i in reversed(range(form.depth)):
            if not self.writes[i]:
                break
            reads = self.before(i, x, self.z)
            d_y = self._convolution(i, d_z, *reads, self.reads[i], arriving if i == 0 else None)
            del self.z[i:]
            if i == 0:
                found = found._replace(x=d_y)
            elif self.reads[i]:
                source = (None, None, form.acts[i - 1], None, None)
                _, d_z, _ = self._behind_norm(i - 1, d_y, self.z[i - 1], source, self.writes[i - 1])
        return found

    def _convolution(self, i, grad, x, norm, act, needs_x, residual) -> Tensor | None:
        """The gradient of what convolution i reads; those of its parameters are noted."""
        inputs, args, found = self.inputs, self.form.convs[i], self.found
        weight, bias = inputs.weights[i], inputs.conv_biases[i]
        needs = (needs_x, self.needs.weights[i], self.needs.conv_biases[i])
        if x.numel() == 0:
            d_y = empty_channels_last(x, x.shape) if needs_x else None
            found.weights[i] = torch.zeros_like(weight) if needs[1] else None
            found.conv_biases[i] = torch.zeros_like(bias) if needs[2] else None
            return d_y
        backend = select("conv_bn_act", self.form.backend, x, weight, args)
        d_y, found.weights[i], d_bias = backend.convolution_backward(grad, x, norm, act, weight, args, needs, residual)
        found.conv_biases[i] = None if d_bias is None else d_bias.to(bias.dtype)
        return d_y

    def _note(self, i: int, d_weight: Tensor, d_bias: Tensor) -> None:
        """Keep the gradients of batch norm i, in the dtype of its parameters, where they are needed."""
        for sums, parameters, needs, found in (
            (d_weight, self.inputs.bn_weights, self.needs.bn_weights, self.found.bn_weights),
            (d_bias, self.inputs.bn_biases, self.needs.bn_biases, self.found.bn_biases),
        ):
            found[i] = sums.to(parameters[i].dtype) if needs[i] else None

    def _over_all(self, i: int, x: Tensor, *sums: Tensor | None) -> list[Tensor | None]:
        """The sums of batch norm i, of x, over all processes, scaled for a division by this one's values."""
        if not self.form.group:
            return list(sums)
        present = [t for t in sums if t is not None]
        found = synchronise.summed(present, values(x), self.totals[i], self.form.group)
        return [*found, *sums[len(present) :]]

    def _behind_end(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the last convolution's output, and of what is added to it, or of the projection's."""
        form, inputs, i = self.form, self.inputs, max(self.form.depth, 1) - 1
        x = self.z[i] if form.depth else inputs.x
        needed = self.writes[-1] if form.depth else self.needs.x
        if form.pool:
            return self._behind_pool(i, grad, x, needed), None
        mask = self.told if self.told.numel() else None
        if form.shortcut == "projected":
            source = (self.z[-1], self.norms[-1], form.acts[-1], self.y, mask)
            _, d_z, d_residual = self._behind_norm(i, grad, x, source, needed or any(self._needs_projection()))
            return d_z, d_residual
        given = form.shortcut == "given"
        needs_residual = bool(form.shortcut) and (self.needs.residual if given else self.needs.x)
        source = (inputs.residual if given else inputs.x if form.shortcut else None, None, form.acts[-1], self.y, mask)
        g, d_z, _ = self._behind_norm(i, grad, x, source, needed, write=needs_residual and form.acts[-1] != "none")
        return d_z, g if needs_residual else None

    def _needs_projection(self) -> tuple[bool, bool, bool]:
        return self.needs.x, self.needs.weights[-1], self.needs.conv_biases[-1]

    def _behind_norm(
        self, i: int, grad: Tensor, x: Tensor, source: tuple, needed: bool, *, write: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Behind the activation and batch norm i of x; `source` is what the activation's slope is told from.

        Returns:
            the gradient behind the activation, where it is to be written; the gradient of x, and of a residual that has
            a norm, where they are needed. Elsewhere `grad`, which nobody reads.
        """
        norm, residual_norm = self.norms[i], source[1]
        if x.numel() == 0:
            sums = [*_zeros(norm, 2), None if residual_norm is None else _zeros(norm, 1)[0]]
        else:
            g, *sums = self.norm_backend(x).norm_act_reduce(grad, x, norm, *source, write)
            if write:
                grad, source = g, (None, None, "none", None, None)
        self._note(i, *sums[:2])
        if residual_norm is not None:
            self._note(-1, sums[2], sums[1].clone())  # an operator's outputs have memory of their own
        sums = self._over_all(i, x, *sums)
        if not needed or x.numel() == 0:
            return grad, grad, grad
        return grad, *self.norm_backend(x).norm_act_input_grad(grad, x, norm, *source, *sums, float(values(x)))

    def _behind_pool(self, i: int, grad: Tensor, x: Tensor, needed: bool) -> Tensor:
        """The gradient of x behind the pooling, the activation and batch norm i."""
        pool = (self.told, x, self.norms[i], self.form.acts[i], *self.form.pool)
        g, sums = None, _zeros(self.norms[i], 2)
        if x.numel():
            g, *sums = self.norm_backend(x).norm_act_max_pool2d_reduce(grad, *pool)
        self._note(i, *sums)
        sums = self._over_all(i, x, *sums)
        if not needed or x.numel() == 0:
            return x
        return self.norm_backend(x).norm_act_max_pool2d_input_grad(grad, *pool, g, *sums, float(values(x)))
