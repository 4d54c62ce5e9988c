"""When a kernel may be called straight away, without the dispatcher and what hangs on it."""

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func transforms what runs now (grad, vmap, jvp), or derivatives are taken in forward mode."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def followed() -> bool:
    """Whether somebody follows the operators themselves: autocast, torch.compile, tracers, modes, transforms."""
    return torch.compiler.is_compiling() or (
        torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or transformed()
        or torch._C._get_tracing_state() is not None
    )


def may_call_directly(*tensors: Tensor | None) -> bool:
    """Whether autograd does not follow either, and the tensors are dense channels_last in memory."""
    if torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and not (
            type(x) is Tensor and (x.is_cpu or x.is_cuda) and x.is_contiguous(memory_format=torch.channels_last)
        ):
            return False
    return not followed()
