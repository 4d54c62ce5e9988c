"""What a module or a function is, for those who look for things to fuse."""

import dis
import functools
import operator
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fused_resnet.modules import unit
from fused_resnet.modules.batch_norm import foreign_norm
from fused_resnet.modules.bn_act import NormAct
from fused_resnet.modules.max_pool import pool_geometry

_ACT_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
_ACT_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
}
_ACT_METHODS = {"relu": "relu", "relu_": "relu"}
_ADDS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
IN_PLACE_OPERATORS = [
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
]

# Hooks by which the older tools of torch.nn.utils compute a weight before each forward.
_WEIGHT_HOOKS = {WeightNorm: "weight norm", SpectralNorm: "spectral norm", prune.BasePruningMethod: "pruning"}

# Functions and modules whose result is memory of its own.
_FRESH_FUNCTIONS = (
    *(operator.add, operator.mul, operator.sub, torch.add, torch.cat),
    *(F.relu, torch.relu, F.avg_pool2d, F.group_norm),
)
_FRESH_MODULES = (_ConvNd, _BatchNorm, nn.Linear, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid)


# --- modules ----------------------------------------------------------------------------------------------------------


def is_ours(module: nn.Module) -> bool:
    """Whether the module runs fused by itself."""
    return isinstance(module, (unit.FusedModule, NormAct))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation of a trace."""
    if is_ours(module) or isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return True
    if isinstance(module, (nn.Sequential, nn.Identity)):
        return False
    torchs_own = type(module).__module__.startswith(("torch.nn", "torch.ao", "torch._dynamo"))
    return torchs_own or is_candidate(module)


def returns_a_tensor(module: nn.Module) -> bool:
    """Whether an operation's module is known to return one tensor."""
    several = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    if isinstance(module, several) or getattr(module, "return_indices", False):
        return False
    return type(module).__module__.startswith("torch.nn.modules") or is_candidate(module)


def is_candidate(module: nn.Module) -> bool:
    """Whether it is a convolution or a batch norm, of any kind: the report says what became of it."""
    return isinstance(module, _ConvNd) or is_norm_module(module)


def is_norm_module(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or foreign_norm(type(module)) is not None


def contains_candidate(module: nn.Module) -> bool:
    return any(is_candidate(child) or is_act(child) for child in module.modules())


def is_act(module: nn.Module) -> bool:
    return type(module) in _ACT_MODULES


def convolution_problem(conv: nn.Module) -> str | None:
    """Why a convolution cannot be fused by itself; None: it can."""
    if isinstance(conv, _ConvTransposeNd):
        return "transposed convolution"
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not 2-d"
    if parametrize.is_parametrized(conv):
        return f"its {' and '.join(conv.parametrizations)} is parametrized (weight norm, spectral norm, pruning)"
    for hook in conv._forward_pre_hooks.values():
        for kind, name in _WEIGHT_HOOKS.items():
            if isinstance(hook, kind):
                return f"{name} computes its weight before each forward"
    if "quantized" in type(conv).__module__ or "ao.nn" in type(conv).__module__:
        return "quantised"
    if conv.weight.is_complex():
        return "complex"
    if unit.hooked(conv):
        return "a hook on it"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if not unit.plain_convolution(conv):
        return f"{type(conv).__name__} has a forward of its own"
    return None


def norm_problem(bn: nn.Module) -> str | None:
    """Why a batch norm cannot be fused by itself; None: it can."""
    if isinstance(bn, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return f"{type(bn).__name__} is not 2-d"
    if bn._parameters.get("weight") is not None and bn._parameters["weight"].is_complex():
        return "complex"
    if unit.hooked(bn):
        return "a hook on it"
    if bn.running_mean is None:
        return "it has no running statistics"
    if parametrize.is_parametrized(bn):
        return "it is parametrized"
    if foreign_norm(type(bn)) == "norm+act":
        return None
    if not unit.plain_batch_norm(bn):
        return f"{type(bn).__name__} has a forward of its own"
    return None


def _own_functions(cls: type) -> list[FunctionType]:
    """The methods of a class of modules, without those of torch's classes."""
    classes = [c for c in cls.__mro__ if not c.__module__.startswith("torch.nn")]
    return [f for c in classes for f in vars(c).values() if isinstance(f, FunctionType)]


@functools.cache
def asks_for_a_view(cls: type) -> bool:
    """Whether a forward may ask its argument for a view, which one in channels_last cannot give."""
    return any("view" in function.__code__.co_names for function in _own_functions(cls))


@functools.cache
def asks_modes_of_children(cls: type) -> bool:
    """Whether a method reads `training` of another module than its own."""
    for function in _own_functions(cls):
        before = None
        for instruction in dis.get_instructions(function):
            if instruction.opname == "LOAD_ATTR" and instruction.argval == "training" and before.argval != "self":
                return True
            before = instruction
    return False


# --- operations of a trace --------------------------------------------------------------------------------------------


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that the operation calls."""
    return node.meta.get("module")


def is_convolution(node: fx.Node) -> bool:
    return isinstance(module_of(node), _ConvNd)


def is_norm(node: fx.Node) -> bool:
    module = module_of(node)
    return module is not None and is_norm_module(module)


def act_of(node: fx.Node) -> str | None:
    """The activation that the operation is; None: it is another."""
    module = module_of(node)
    if module is not None:
        limits = type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6)
        return None if unit.hooked(module) else "relu6" if limits else _ACT_MODULES.get(type(module))
    if set(node.kwargs) - {"inplace"} or (len(node.args) > 1 and node.op == "call_method"):
        return None
    if node.op == "call_function":
        return _ACT_FUNCTIONS.get(node.target)
    return _ACT_METHODS.get(node.target) if node.op == "call_method" else None


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that the operation adds; None: it is another."""
    adds = node.op == "call_function" and node.target in _ADDS
    adds = adds or (node.op == "call_method" and node.target in _ADD_METHODS)
    if not adds or node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    return node.args if node.args[0] is not node.args[1] else None


def adds_in_place(node: fx.Node) -> bool:
    """Whether a sum is written over the first of what it adds."""
    return node.target in (operator.iadd, "add_")


def views(node: fx.Node) -> bool:
    """Whether the operation asks a tensor for a view."""
    module = module_of(node)
    return asks_for_a_view(type(module)) if module is not None else node.op == "call_method" and node.target == "view"


def changed_in_place(node: fx.Node) -> list[fx.Node]:
    """The tensors whose memory the operation may write to."""
    tensors = node.all_input_nodes
    module = module_of(node)
    if module is not None:
        known = type(module).__module__.startswith("torch.nn") or foreign_norm(type(module)) is not None
        known = known or type(module).forward in (nn.Conv2d.forward, nn.BatchNorm2d.forward)
        return tensors[:1] if getattr(module, "inplace", False) else [] if known else tensors
    if "out" in node.kwargs:
        return [node.kwargs["out"]]
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    writes = writes or node.kwargs.get("inplace") is True or True in node.args[1:]
    writes = writes or (node.op == "call_function" and node.target in IN_PLACE_OPERATORS)
    return tensors[:1] if writes else []


def is_fresh(node: fx.Node) -> bool:
    """Whether the result is memory that the operation allocated, or wrote over memory that is."""
    module = module_of(node)
    if changed_in_place(node):
        return isinstance(node.args[0], fx.Node) and is_fresh(node.args[0])
    if module is not None:
        return isinstance(module, _FRESH_MODULES) or foreign_norm(type(module)) is not None
    return node.op == "call_function" and node.target in _FRESH_FUNCTIONS


def is_plain_pool(node: fx.Node) -> bool:
    """Whether the operation is a max pooling that an operator can take behind batch norm."""
    pool = module_of(node)
    return pool is not None and len(node.all_input_nodes) == 1 and pool_geometry(pool) is not None
