"""`fuse`: any network of convolutions, batch norms, sums and activations, run by fused operators; and back.

A module in whose forward something can be fused becomes an instance of a subclass of its own class, which differs in
nothing but its forward. Children, parameters, buffers and keys are untouched. Wherever something is not as it was seen
(a hook, a changed attribute, other arguments), the module's own forward runs.
"""

import copy
import copyreg
import dataclasses
import functools
import sys
import types
import warnings
from typing import Any

import torch
from torch import fx, nn

from fused_resnet.fusion.analysis import Analysis, Filter, analyse
from fused_resnet.fusion.attributes import STATE
from fused_resnet.fusion.programs import Program, State, own_class, program_of
from fused_resnet.fusion.report import FusionReport
from fused_resnet.fusion.saved import saved_bytes
from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import foreign_norm


class FusedForward:
    """Base of the classes of modules that run fused; `own_class` is the class that a module had before."""

    own_class: type[nn.Module]

    def train(self, *args, **kwargs):
        for module in self.modules():
            unit.forget(module)
        return super().train(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        made, args, *rest = super().__reduce_ex__(protocol)
        if made is copyreg.__newobj__:  # the class is made again: it cannot be imported
            made, args = _new, (self.own_class, *args[1:])
        return (made, args, *rest)


def _new(cls: type[nn.Module], *args) -> nn.Module:
    made = fused_class(cls)
    return made.__new__(made, *args)


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` with a fused forward. It has the name of `cls`, by which some libraries know a model."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        program = _program(self)
        tensors = None if program is None else program.arguments(args, kwargs)
        return cls.forward(self, *args, **kwargs) if tensors is None else program.function(self, *tensors)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "own_class": cls, "forward": forward, "taken_apart": foreign_norm(cls) == "norm+act"}
    return types.new_class(cls.__name__, (FusedForward, cls), {}, lambda namespace: namespace.update(body))


def _program(module: nn.Module) -> Program | None:
    """The program that may run now."""
    program = program_of(module)
    if program is None or unit.is_unfused() or unit.hooked_everywhere() or not program.holds(module):
        return None
    return program


def fuse(model: nn.Module, *, filter_fn: Filter | None = None, inplace: bool = False, lean: bool = False) -> nn.Module:
    """Make a network run by fused operators, in inference and in training.

    It finds convolution (+ batch norm) (+ residual) (+ activation), batch norm (+ residual) + activation, and sum +
    activation, in any network whose forwards `torch.fx` can trace, whole or in parts. `isinstance`, signature,
    attributes, parameters, keys and hooks stay. What is not fused is in `fusion_report(model)`, with the reason.

    Args:
        filter_fn: called with every convolution and batch norm and its path; where it is false, they are left alone.
        inplace: change `model` itself, whose parameters stay the same objects; by default a deep copy is changed.
        lean: in training keep less for the backward pass, and compute each block's last convolution again.

    Returns:
        The fused network; `unfuse` makes it what it was. One that is fused already is returned as it is.

    Raises:
        TypeError: not a module, or a scripted, traced or compiled one.
    """
    _check(model)
    if is_fused(model):
        warnings.warn("fuse: the model is fused already, and was left as it is; unfuse it first", stacklevel=2)
        return model
    model = model if inplace else copy.deepcopy(model)
    _convert(model, analyse(model, filter_fn, lean))
    return model


def fusion_report(model: nn.Module, example: Any = None) -> FusionReport:
    """What `fuse` did to the model; of one that is not fused, what it would do.

    Args:
        example: an input, or a tuple of inputs, for the estimate of the bytes saved; by default one image of 224x224.

    Raises:
        TypeError: as `fuse`.
    """
    _check(model)
    report = getattr(vars(model).get(STATE), "report", None) or analyse(model).report
    saved, size = saved_bytes(model, report.fused, example)
    return dataclasses.replace(report, saved=saved, size=size)


def _check(model: Any) -> None:
    if isinstance(model, type) or not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"fuse: expected a torch.nn.Module, got {kind}")
    dynamo = sys.modules.get("torch._dynamo")  # seconds to import, and without it nothing is compiled
    if isinstance(model, torch.jit.ScriptModule) or (dynamo and isinstance(model, dynamo.OptimizedModule)):
        raise TypeError("fuse: the model is scripted, traced or compiled; fuse the original, then compile that")
    if isinstance(model, fx.GraphModule):
        raise TypeError("fuse: the model is an fx.GraphModule; fuse the model that it was traced from")


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has changed the model or a part of it."""
    return any(STATE in vars(module) for module in model.modules())


def _convert(model: nn.Module, found: Analysis) -> None:
    # A "norm+act" is marked as such also where it has no program: others call its norm without the activation.
    apart = {module: {} for module in model.modules() if foreign_norm(type(module)) == "norm+act"}
    changed = {**apart, **{module: programs for module, programs in found.programs.items() if programs}}
    classes = {module: fused_class(type(module)) for module in changed}  # what fails does so before anything is changed
    for module, programs in changed.items():
        vars(module)[STATE] = State(programs)
        object.__setattr__(module, "__class__", classes[module])
    state = vars(model).setdefault(STATE, State({}))
    state.report = found.report


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place; return the model. One that is not fused is left as it is.

    Raises:
        RuntimeError: a module whose class was changed again since, as by FSDP2 or a parametrization; nothing is undone.
    """
    for name, module in model.named_modules():
        if isinstance(module, FusedForward) and type(module) is not fused_class(module.own_class):
            raise RuntimeError(
                f"unfuse: {name or 'the model'} was changed after fuse, by another library; undo that first"
            )
    for module in model.modules():
        vars(module).pop(STATE, None)
        if isinstance(module, FusedForward):
            unit.forget(module)
            module.__class__ = own_class(module)
    return model
