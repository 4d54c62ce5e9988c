"""cuDNN's own fusion: convolution, scale, shift, residual and activation as one operation graph."""

import functools
import re

import torch

from bench.networks import Layer
from bench.systems.base import System
from bench.systems.units import every_unit
from bench.timing import graphed
from fused_resnet.modules.batch_norm import folded

TUNING_CALLS = 20  # of every plan in one CUDA graph: the host is slower than a small layer
TUNING_REPLAYS = 3

# The clips of cuDNN's ReLU for each activation; None: no node.
ACTIVATIONS = {"none": None, "relu": {"lower_clip": 0.0}, "relu6": {"lower_clip": 0.0, "upper_clip": 6.0}}


class CuDNNFrontend(System):
    """The cuDNN frontend's graph API, each layer with the fastest of the plans that cuDNN proposes.

    Only the inference form: `genstats` would give a training step's sums, but not the batch norm that follows them.
    """

    name = "cudnn-frontend"
    devices = ("cuda",)
    tasks = ("layer", "network")
    packages = {"cudnn": "nvidia-cudnn-frontend"}

    def build(self, layer: Layer, tensors):
        """What runs `layer` as `run(x, residual)`."""
        return FusedConvolution(layer, tensors)

    def layer(self, layer, tensors):
        run = self.build(layer, tensors)
        x, residual = tensors[0], tensors[-1]
        return lambda: run(x, residual)

    def network(self, model, x):
        """Every convolution with its batch norm (folded in fp32) in a graph, the rest by torch, all in a CUDA graph."""
        runs = {}

        def run(conv, bn, x, residual, act):
            x, residual = (t if t is None else t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
            if (conv, x.shape) not in runs:
                geometry = (tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation), conv.groups)
                layer = Layer(tuple(x.shape), tuple(conv.weight.shape), *geometry, residual is not None, act)
                runs[conv, x.shape] = self.build(layer, (x, conv.weight, *folded(bn, conv.bias), residual))
            return runs[conv, x.shape](x, residual)

        def call():
            with torch.no_grad(), every_unit(run):
                return model(x)

        call()  # plans are built and chosen outside of the capture
        return graphed(call)


class FusedConvolution:
    """One layer with its weight, scale and shift: `run(x, residual)` -> a fresh output, channels_last."""

    def __init__(self, layer: Layer, tensors):
        x, weight, scale, shift, residual = tensors
        self.layer, self.dtype = layer, x.dtype
        with torch.cuda.device(x.device):
            self.handle = _handle(x.device)
            self.graph, self.operands = operation_graph(layer, x.dtype, handle=self.handle)
            # Kept: the graph takes bare addresses, which every version of the package does.
            self.held = {
                "weight": weight.detach().contiguous(memory_format=torch.channels_last),
                "scale": scale.detach().float().contiguous(),
                "shift": shift.detach().float().contiguous(),
            }
            self._choose_plan(x, residual)

    def __call__(self, x, residual):
        output = self._empty(x)
        self._execute(x, residual, output, self.plan, self.workspace)
        return output

    def _empty(self, x):
        return torch.empty(self.layer.output, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def _execute(self, x, residual, output, plan: int, workspace) -> None:
        import cudnn

        given = {"x": x, "residual": residual, "output": output, **self.held}
        pack = {operand: given[name].data_ptr() for name, operand in self.operands.items()}
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph.execute_plan_at_index(pack, workspace.data_ptr(), plan, handle=self.handle)

    def _choose_plan(self, x, residual) -> None:
        """Build every plan that cuDNN proposes, time it and keep the fastest; plans that cannot be built drop out."""
        import cudnn

        fastest, reason = float("inf"), "no plan was proposed"
        try:
            count = propose_plans(self.graph, x.dtype)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise self._unsupported(error) from error
        for plan in range(count):
            try:
                self.graph.build_plan_at_index(plan)
                size = self.graph.get_workspace_size_plan_at_index(plan)
                workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
                seconds = self._seconds(x, residual, plan, workspace)
            except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
                reason = error
                continue
            if seconds < fastest:
                fastest, self.plan, self.workspace = seconds, plan, workspace
        if fastest == float("inf"):
            raise self._unsupported(reason)

    def _seconds(self, x, residual, plan: int, workspace) -> float:
        output = self._empty(x)

        def calls():
            for _ in range(TUNING_CALLS):
                self._execute(x, residual, output, plan, workspace)

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
        return RuntimeError(f"cuDNN has no fused kernel for {self.layer.label} in {dtype}: {shortened(str(reason))}")


@functools.cache
def _handle(device: torch.device):
    import cudnn

    return cudnn.create_handle()  # of the current device


def nhwc(shape) -> list[int]:
    """The strides of [N, C, H, W] in channels_last; torch's are another's where C or H and W are 1."""
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


def operation_graph(layer: Layer, dtype: torch.dtype, **options):
    """The graph of `layer` without plans, and its operands by name; fp32 between the nodes."""
    import cudnn

    if layer.act not in ACTIVATIONS:
        raise RuntimeError(f"no cuDNN graph for the activation {layer.act!r}, only for {', '.join(ACTIVATIONS)}")
    kinds = cudnn.data_type
    io = {torch.float16: kinds.HALF, torch.bfloat16: kinds.BFLOAT16, torch.float32: kinds.FLOAT}[dtype]
    float_types = {"intermediate_data_type": kinds.FLOAT, "compute_data_type": kinds.FLOAT}
    graph = cudnn.pygraph(io_data_type=io, **float_types, **options)

    def operand(name, shape, kind=io):
        return graph.tensor(name=name, dim=list(shape), stride=nhwc(shape), data_type=kind)

    channel = (1, layer.weight[0], 1, 1)
    operands = {"x": operand("x", layer.x), "weight": operand("weight", layer.weight)}
    operands |= {name: operand(name, channel, kinds.FLOAT) for name in ("scale", "shift")}
    geometry = {name: list(layer.geometry[name]) for name in ("padding", "stride", "dilation")}
    # The number of groups is that of the channels of x to those of the weight.
    y = graph.conv_fprop(image=operands["x"], weight=operands["weight"], **geometry)
    y = graph.mul(a=y, b=operands["scale"])
    y = graph.add(a=y, b=operands["shift"])
    if layer.residual:
        operands["residual"] = operand("residual", layer.output)
        y = graph.add(a=y, b=operands["residual"])
    if ACTIVATIONS[layer.act] is not None:
        y = graph.relu(input=y, **ACTIVATIONS[layer.act])
    y.set_output(True).set_data_type(io).set_dim(list(layer.output)).set_stride(nhwc(layer.output))
    operands["output"] = y
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
