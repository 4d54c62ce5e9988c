"""What `bench.systems.cudnn` uses of the cudnn package, computed on the CPU in fp32 from the same bare addresses."""

import ctypes
import types

import torch
import torch.nn.functional as F


class NotSupported(Exception):
    """cudnn's own error is no RuntimeError either."""


class Tensor:
    def __init__(self, compute=None, dim=None, stride=None):
        self.compute, self.dim, self.stride = compute, dim, stride

    def set_output(self, value):
        return self

    def set_data_type(self, kind):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def view(self, address):
        count = 1 + sum((size - 1) * step for size, step in zip(self.dim, self.stride, strict=True))
        memory = torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
        return memory.as_strided(self.dim, self.stride)


class Graph:
    """Its plans differ in nothing, but those in `broken` cannot be built."""

    plans, broken, reason = 3, (1,), ""

    def __init__(self, **options):
        self.built, self.executed, self.deselected = [], [], []

    def tensor(self, name, dim, stride, data_type):
        return Tensor(dim=dim, stride=stride)

    def _node(self, compute):
        return Tensor(compute)

    def genstats(self, input, compute_data_type):
        def over(power):
            return self._node(lambda at: (at(input) ** power).sum((0, 2, 3), keepdim=True))

        return [over(1), over(2)]

    def conv_fprop(self, image, weight, padding, stride, dilation):
        groups = image.dim[1] // weight.dim[1]
        return self._node(
            lambda at: F.conv2d(at(image), at(weight), None, stride, padding, dilation=dilation, groups=groups)
        )

    def mul(self, a, b):
        return self._node(lambda at: at(a) * at(b))

    def add(self, a, b):
        return self._node(lambda at: at(a) + at(b))

    def relu(self, input, lower_clip, upper_clip=float("inf")):
        return self._node(lambda at: at(input).clamp(lower_clip, upper_clip))

    def validate(self):
        pass

    build_operation_graph = validate

    def create_execution_plans(self, modes):
        if self.reason:
            raise NotSupported(self.reason)

    def deselect_numeric_notes(self, notes):
        self.deselected += notes

    def get_execution_plan_count(self):
        return self.plans

    def build_plan_at_index(self, plan):
        if plan in self.broken:
            raise NotSupported("this plan cannot be built")
        self.built.append(plan)

    def get_workspace_size_plan_at_index(self, plan):
        return 0

    def execute_plan_at_index(self, pack, workspace, plan, handle):
        assert plan in self.built
        self.executed.append(plan)

        def at(tensor):
            return tensor.compute(at) if tensor.compute else tensor.view(pack[tensor])

        for tensor in pack:
            if tensor.compute:
                tensor.view(pack[tensor]).copy_(at(tensor))


def module(graph=Graph):
    names = types.SimpleNamespace
    return names(
        pygraph=graph,
        cudnnGraphNotSupportedError=NotSupported,
        data_type=names(HALF="half", BFLOAT16="bfloat16", FLOAT="float"),
        heur_mode=names(A="A", FALLBACK="FALLBACK"),
        numerical_note=names(TENSOR_CORE="tensor core", DOWN_CONVERT_INPUTS="down convert"),
        create_handle=object,
        set_stream=lambda handle, stream: None,
    )
