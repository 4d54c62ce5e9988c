"""Kernels compiled ahead of time, without a GPU: what the compiler made of a launch."""

import tempfile
from typing import NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends import sass
from fused_resnet.backends.triton.launch import Launch, shared_memory

NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


class Compiled(NamedTuple):
    """Registers a thread, bytes a block, and instructions of the whole kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    tma: int
    cp_async: int
    wide_loads: int  # of 16 bytes, from global memory
    wide_stores: int

    def fits(self, capability: tuple[int, int]) -> bool:
        """Whether a block fits the device, with all in registers."""
        return self.spill_bytes == 0 and self.shared_bytes <= shared_memory(capability)


def _type(value) -> str:
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_type(value.base)[1:]}[{block}]>"
    if isinstance(value, Tensor):
        return f"*{NAMES[str(value.dtype).removeprefix('torch.')]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 1 << 31 else "i64"


def _signature(launch: Launch) -> tuple[dict, dict, dict]:
    """As a launch specialises them: types, constants (an argument of 1 may be one), and what is a multiple of 16."""
    constants, types, attributes = dict(launch.constants), {}, {}
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        special = isinstance(value, int) and not parameter.do_not_specialize
        if value is None or (special and value == 1):
            constants[parameter.name] = value
            continue
        types[parameter.name] = _type(value)
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return {name: types.get(name, "constexpr") for name in launch.kernel.arg_names}, constants, attributes


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Compiled:
    """Compile the kernel of `launch`, whose tensors may be on the meta device, for a compute capability.

    Raises:
        RuntimeError: Triton's interpreter is on, so that there is nothing to compile.
    """
    if not hasattr(launch.kernel, "cache_key"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and cannot be compiled")
    types, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return _inspect(triton.compile(source, target=target, options=options))


def _inspect(kernel) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        found = sass.numbers(*(sass.cuobjdump(option, file.name) for option in ("-res-usage", "-sass")))
    return Compiled(**found | {"shared_bytes": kernel.metadata.shared})
