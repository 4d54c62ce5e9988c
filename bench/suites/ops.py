"""The operators around the convolutions, forward and forward + backward, in bytes a second beside a measured copy:
batch norm (+ residual) + ReLU in training, residual + ReLU, depthwise convolution, max pooling; and convolution + batch
norm + ReLU in training, where a convolution may sum its own output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from bench import floors
from bench.networks import Layer
from bench.suites.common import Ready, image, operator_limit, relative_error, system_for
from bench.suites.layers import tensors
from bench.systems import is_ours
from bench.systems.eager import EPS

TASKS = {None: "op", "statistics": "statistics"}
MAPS = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
QUICK_MAPS = ((64, 112), (256, 56), (1024, 14))
DEPTHWISE = ((32, 112, 1), (96, 112, 2), (144, 56, 1), (192, 28, 1), (384, 14, 1), (576, 14, 2), (960, 7, 1))
QUICK_DEPTHWISE = ((32, 112, 1), (384, 14, 1))
KINK_MARGIN = 2.0**-5  # of the largest pre-activation: bf16's eight bits and three roundings
CONVOLUTIONS = ((64, 64, 3, 56), (256, 64, 1, 56), (256, 256, 3, 14), (256, 1024, 1, 14))  # C, K, R = S, H = W
QUICK_CONVOLUTIONS = CONVOLUTIONS[:1]
DIRECTIONS = ("forward", "forward+backward")
BATCHES = {"cpu": (16,), "cuda": (256,)}
WINDOWS = {"cpu": 0.15, "cuda": 0.02}


def cases(options):
    for dtype in options.dtypes:
        for batch in options.batches:
            for op, plane, more in _problems(options.quick):
                for direction in DIRECTIONS:
                    case = {
                        "device": options.device,
                        "dtype": dtype,
                        "batch": batch,
                        "op": op,
                        "shape": [batch, *plane],
                    }
                    mode = {"mode": "statistics"} if op.startswith("conv") and direction == "forward" else {}
                    yield {**case, "direction": direction, **more, **mode}


def _problems(quick: bool):
    """Operator, [C, H, W] and what else the case has."""
    maps, depthwise = (QUICK_MAPS, QUICK_DEPTHWISE) if quick else (MAPS, DEPTHWISE)
    for op in ("bn+add+relu", "bn+relu", "add+relu"):
        for channels, size in maps:
            yield op, (channels, size, size), {}
    yield "max_pool", (64, 112, 112), {}
    for channels, size, stride in depthwise:
        yield f"depthwise 3x3{' /2' if stride == 2 else ''}", (channels, size, size), {}
    for channels, out, kernel, size in QUICK_CONVOLUTIONS if quick else CONVOLUTIONS:
        more = {"channels": out, "kernel": kernel}
        yield f"conv {kernel}x{kernel} {channels}->{out} +bn+relu", (channels, size, size), more


def title(case) -> str:
    return f"{case['op']} {case['direction']}  {'x'.join(map(str, case['shape']))} {case['dtype']}"


def _convolution(case) -> Layer:
    """Of a case with batch norm in training."""
    k, r = case["channels"], case["kernel"]
    return Layer(tuple(case["shape"]), (k, case["shape"][1], r, r), padding=(r // 2, r // 2))


def _depthwise(case) -> Layer:
    _, channels, height, width = case["shape"]
    stride = (2, 2) if case["op"].endswith("/2") else (1, 1)
    x = (case["shape"][0], channels, height, width)
    return Layer(x, (channels, 1, 3, 3), stride, (1, 1), groups=channels, act="relu6")


def _inputs(case) -> list[Tensor]:
    dtype, device, shape = case["dtype"], case["device"], case["shape"]
    if case["op"].startswith(("depthwise", "conv")):
        layer = _depthwise(case) if case["op"].startswith("depthwise") else _convolution(case)
        return list(tensors(layer, dtype, device)[:4])
    x = image(shape, dtype, device)
    vectors = [(torch.rand(shape[1]) + 0.5).to(device), torch.randn(shape[1]).to(device)]
    residual = image(shape, dtype, device)
    return {"bn+add+relu": [x, *vectors, residual], "bn+relu": [x, *vectors], "add+relu": [x, residual]}.get(
        case["op"], [x]
    )


def _ours(case):
    def bn_act(x, weight, bias, residual=None):
        return fr.ops.bn_act(x, weight, bias, None, None, residual=residual, training=True)

    def depthwise(x, weight, scale, shift):
        return fr.ops.conv_scale_act(x, weight, scale, shift, act="relu6", **_depthwise(case).geometry)

    def convolution(x, weight, bn_weight, bn_bias):
        geometry = _convolution(case).geometry
        return fr.ops.conv_bn_act(x, weight, bn_weight, bn_bias, None, None, training=True, eps=EPS, **geometry)

    if case["op"].startswith(("depthwise", "conv")):
        return depthwise if case["op"].startswith("depthwise") else convolution
    pool = lambda x: fr.ops.max_pool2d(x, 3, 2, 1)  # noqa: E731
    return {"add+relu": fr.ops.add_act, "max_pool": pool}.get(case["op"], bn_act)


def _eager(case, act: bool = True):
    """The same of aten's operators, in place where a network works in place; `act`: with the activation."""
    relu, relu6 = (F.relu_, lambda y: F.relu6(y, inplace=True)) if act else (lambda y: y, lambda y: y)

    def bn_act(x, weight, bias, residual=None):
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        return relu(y if residual is None else y.add_(residual))

    def depthwise(x, weight, scale, shift):
        mean, var = torch.zeros_like(scale), torch.ones_like(scale) - EPS
        y = F.conv2d(x, weight, **_depthwise(case).geometry)
        return relu6(F.batch_norm(y, mean, var, scale, shift, eps=EPS))

    def convolution(x, weight, bn_weight, bn_bias):
        return bn_act(F.conv2d(x, weight, **_convolution(case).geometry), bn_weight, bn_bias)

    if case["op"].startswith(("depthwise", "conv")):
        return depthwise if case["op"].startswith("depthwise") else convolution
    pool = lambda x: F.max_pool2d(x, 3, 2, 1)  # noqa: E731
    return {"add+relu": lambda x, r: relu(x + r), "max_pool": pool}.get(case["op"], bn_act)


def _gradient(case, inputs: list[Tensor]) -> Tensor:
    """A random gradient of the output, 0 where rounding may put the pre-activation on the other side of a kink."""
    with torch.no_grad():
        pre = _eager(case, act=False)(*(t.double() for t in inputs))
    margin = KINK_MARGIN * pre.abs().max()
    keep = (pre.abs() > margin) & ((pre - 6).abs() > margin) | (case["op"] == "max_pool")
    return image(pre.shape, case["dtype"], case["device"]) * keep


def _call(function, inputs: list[Tensor], gradient: Tensor | None):
    """The function, or the function and its gradients, which are returned and not accumulated."""
    if gradient is None:
        return lambda: [function(*inputs)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def _function(case, subject, inputs: list[Tensor]):
    """What `subject` calls with the inputs."""
    if is_ours(subject.name):
        ours = _ours(case)

        def fused(*args):
            with subject.around():
                return ours(*args)

        return fused
    if subject.name == "eager":
        return _eager(case)
    run = subject.statistics(_convolution(case), inputs, EPS)
    return lambda *args: run()


def prepare(case, system) -> Ready:
    subject, inputs = system_for(system, case["device"]), _inputs(case)
    backward = case["direction"] == "forward+backward"
    gradient = _gradient(case, inputs) if backward else None
    exact = [t.double() for t in inputs]
    truth = _call(_eager(case), exact, None if gradient is None else gradient.double())()
    errors = {}
    for name, function in {"eager": _eager(case), system: _function(case, subject, inputs)}.items():
        call = _call(function, inputs, gradient)
        with torch.set_grad_enabled(backward):
            errors[name] = max(relative_error(y, t) for y, t in zip(call(), truth, strict=True))
    numbers = {"eager_error": errors["eager"]}
    limit = operator_limit(errors["eager"], case["dtype"])
    return Ready(call, case["device"], gradients=backward, error=errors[system], limit=limit, numbers=numbers)


def cost(case) -> floors.Cost:
    op, shape, dtype = case["op"], tuple(case["shape"]), case["dtype"]
    if op.startswith("depthwise"):
        forward, backward = floors.conv_forward(_depthwise(case), dtype), floors.conv_backward(_depthwise(case), dtype)
    elif op.startswith("conv"):
        forward = floors.conv_bn_act_forward(_convolution(case), dtype)
        backward = floors.conv_bn_act_backward(_convolution(case), dtype)
    elif op == "max_pool":
        out = (*shape[:2], shape[2] // 2, shape[3] // 2)
        forward = backward = floors.max_pool_forward(shape, out, dtype)
    elif op == "add+relu":
        forward, backward = floors.add_act_forward(shape, dtype), floors.add_act_backward(shape, dtype)
    else:
        residual = op == "bn+add+relu"
        forward = floors.bn_act_forward(shape, dtype, residual=residual)
        backward = floors.bn_act_backward(shape, dtype, residual=residual)
    return forward if case["direction"] == "forward" else forward + backward
