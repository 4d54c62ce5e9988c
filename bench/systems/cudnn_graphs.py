"""Operation graphs for cuDNN, and the fastest of the plans that it proposes for one."""

import functools
import re

import torch

from bench.networks import Layer
from bench.timing import graphed

TUNING_CALLS = 20  # of every plan in one CUDA graph: the host is slower than a small layer
TUNING_REPLAYS = 3

# The clips of cuDNN's ReLU for each activation; None: no node.
ACTIVATIONS = {"none": None, "relu": {"lower_clip": 0.0}, "relu6": {"lower_clip": 0.0, "upper_clip": 6.0}}


class Planned:
    """A graph with the fastest of its plans: called with the tensors of its operands, by name, it writes its outputs.

    The tensors are passed by their bare addresses, which every version of the package takes.
    """

    def __init__(self, label: str, build, given: dict[str, torch.Tensor]):
        """`build(handle=...)` returns a graph and its operands; `given`: tensors like those it will be called with."""
        x = given["x"]
        self.label, self.dtype, self.device = label, x.dtype, x.device
        with torch.cuda.device(x.device):
            self.handle = _handle(x.device)
            self.graph, self.operands = build(handle=self.handle)
            self._choose_plan(given)

    def __call__(self, given: dict[str, torch.Tensor]) -> None:
        self._execute(given, self.plan, self.workspace)

    def _execute(self, given, plan: int, workspace) -> None:
        import cudnn

        pack = {operand: given[name].data_ptr() for name, operand in self.operands.items()}
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph.execute_plan_at_index(pack, workspace.data_ptr(), plan, handle=self.handle)

    def _choose_plan(self, given) -> None:
        """Build every plan that cuDNN proposes, time it and keep the fastest; plans that cannot be built drop out."""
        import cudnn

        fastest, reason = float("inf"), "no plan was proposed"
        try:
            count = propose_plans(self.graph, self.dtype)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise self._unsupported(error) from error
        for plan in range(count):
            try:
                self.graph.build_plan_at_index(plan)
                size = self.graph.get_workspace_size_plan_at_index(plan)
                workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
                seconds = self._seconds(given, plan, workspace)
            except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
                reason = error
                continue
            if seconds < fastest:
                fastest, self.plan, self.workspace = seconds, plan, workspace
        if fastest == float("inf"):
            raise self._unsupported(reason)

    def _seconds(self, given, plan: int, workspace) -> float:
        def calls():
            for _ in range(TUNING_CALLS):
                self._execute(given, plan, workspace)

        replay = graphed(calls)
        seconds = []
        for _ in range(TUNING_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) * 1e-3 / TUNING_CALLS)
        return min(seconds)

    def _unsupported(self, reason) -> RuntimeError:
        dtype = str(self.dtype).removeprefix("torch.")
        return RuntimeError(f"cuDNN has no fused kernel for {self.label} in {dtype}: {shortened(str(reason))}")


@functools.cache
def _handle(device: torch.device):
    import cudnn

    return cudnn.create_handle()  # of the current device


def nhwc(shape) -> list[int]:
    """The strides of [N, C, H, W] in channels_last; torch's are another's where C or H and W are 1."""
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


def convolution_graph(layer: Layer, dtype: torch.dtype, **options):
    """The graph of `layer`'s convolution alone, fp32 between its nodes: graph, x and weight by name, the output's node,
    and a function that adds an operand.
    """
    import cudnn

    kinds = cudnn.data_type
    io = {torch.float16: kinds.HALF, torch.bfloat16: kinds.BFLOAT16, torch.float32: kinds.FLOAT}[dtype]
    float_types = {"intermediate_data_type": kinds.FLOAT, "compute_data_type": kinds.FLOAT}
    graph = cudnn.pygraph(io_data_type=io, **float_types, **options)

    def operand(name, shape, kind=io):
        return graph.tensor(name=name, dim=list(shape), stride=nhwc(shape), data_type=kind)

    def output(node, shape, kind=io):
        return node.set_output(True).set_data_type(kind).set_dim(list(shape)).set_stride(nhwc(shape))

    operands = {"x": operand("x", layer.x), "weight": operand("weight", layer.weight)}
    geometry = {name: list(layer.geometry[name]) for name in ("padding", "stride", "dilation")}
    # The number of groups is that of the channels of x to those of the weight.
    y = graph.conv_fprop(image=operands["x"], weight=operands["weight"], **geometry)
    return graph, operands, y, operand, output


def operation_graph(layer: Layer, dtype: torch.dtype, **options):
    """The graph of `layer` without plans, and its operands by name."""
    import cudnn

    if layer.act not in ACTIVATIONS:
        raise RuntimeError(f"no cuDNN graph for the activation {layer.act!r}, only for {', '.join(ACTIVATIONS)}")
    graph, operands, y, operand, output = convolution_graph(layer, dtype, **options)
    channel = (1, layer.weight[0], 1, 1)
    operands |= {name: operand(name, channel, cudnn.data_type.FLOAT) for name in ("scale", "shift")}
    y = graph.mul(a=y, b=operands["scale"])
    y = graph.add(a=y, b=operands["shift"])
    if layer.residual:
        operands["residual"] = operand("residual", layer.output)
        y = graph.add(a=y, b=operands["residual"])
    if ACTIVATIONS[layer.act] is not None:
        y = graph.relu(input=y, **ACTIVATIONS[layer.act])
    operands["output"] = output(y, layer.output)
    return graph, operands


def statistics_graph(layer: Layer, dtype: torch.dtype, **options):
    """The graph of `layer`'s convolution that also sums its output and the output's square over each channel."""
    import cudnn

    kind = cudnn.data_type.FLOAT
    graph, operands, y, _, output = convolution_graph(layer, dtype, **options)
    operands["output"] = output(y, layer.output)
    sums = graph.genstats(input=y, compute_data_type=kind)
    channel = (1, layer.weight[0], 1, 1)
    operands |= {name: output(node, channel, kind) for name, node in zip(("sum", "square_sum"), sums, strict=True)}
    return graph, operands


def propose_plans(graph, dtype: torch.dtype) -> int:
    """Have cuDNN rank its plans for the graph; their number. In fp32 those with TF32 only where torch's may use it."""
    import cudnn

    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        notes = cudnn.numerical_note
        graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS])
    return graph.get_execution_plan_count()


def shortened(text: str) -> str:
    """The first reason of each engine, of cuDNN's trace of all of them; other messages as they are."""
    reasons = re.findall(r'"engineId":(\d+)[^\n]*\n\w+: \w+; Reason: ([^\n]*)', text)
    if not reasons:
        return text.strip()
    return "; ".join(dict.fromkeys(f"engine {number}: {reason}" for number, reason in reasons))
