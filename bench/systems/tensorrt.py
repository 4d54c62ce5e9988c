"""TensorRT, from ONNX and from PyTorch; networks are strongly typed, so that x's dtype is that of every layer."""

import torch

from bench.systems import onnx_export
from bench.systems.base import System
from bench.timing import graphed
from fused_resnet.modules.unit import unfused


class TensorRT(System):
    """The exported plain network as a TensorRT engine, captured in a CUDA graph (the default stream would wait)."""

    name = "tensorrt"
    devices = ("cuda",)
    tasks = ("network",)
    packages = {"tensorrt": "tensorrt", **onnx_export.PACKAGES}

    def network(self, model, x):
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(engine_plan(trt, logger, onnx_export.export(model, x)))
        context = engine.create_execution_context()
        image = x.contiguous()
        output = torch.empty(tuple(engine.get_tensor_shape(onnx_export.OUTPUT)), dtype=x.dtype, device=x.device)
        context.set_tensor_address(onnx_export.INPUT, image.data_ptr())
        context.set_tensor_address(onnx_export.OUTPUT, output.data_ptr())

        def call():
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("TensorRT: the engine could not be executed")
            return output

        replay = graphed(call)
        replay.held = (image, engine, runtime, logger)  # what the context does not hold itself
        return replay


def engine_plan(trt, logger, model: bytes):
    """The engine that TensorRT builds of an ONNX model, serialised."""
    builder = trt.Builder(logger)
    # From TensorRT 11 on there is nothing else than strong typing.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT cannot read the network: {errors}")
    config = builder.create_builder_config()
    if not torch.backends.cudnn.allow_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT could not build an engine")
    return plan


class TorchTensorRT(System):
    """The plain network compiled by Torch-TensorRT."""

    name = "torch-tensorrt"
    devices = ("cuda",)
    tasks = ("network",)
    packages = {"torch_tensorrt": "torch-tensorrt"}

    def network(self, model, x):
        import torch_tensorrt

        image = x.contiguous()
        options = {"disable_tf32": not torch.backends.cudnn.allow_tf32, "min_block_size": 1}
        with torch.no_grad(), unfused():
            compiled = torch_tensorrt.compile(model, ir="dynamo", inputs=[image], **options)

        def call():
            with torch.no_grad():
                return compiled(image)

        return call
