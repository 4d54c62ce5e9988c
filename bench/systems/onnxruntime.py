"""ONNX Runtime, on the CPU with torch's number of threads, and on a GPU where the build has CUDA."""

import torch

from bench.systems import onnx_export
from bench.systems.base import System


class ONNXRuntime(System):
    """The exported plain network with all graph optimisations."""

    name = "onnxruntime"
    tasks = ("network",)
    packages = {"onnxruntime": "onnxruntime", **onnx_export.PACKAGES}

    def missing(self, device: str) -> str:
        lacking = super().missing(device)
        if lacking or device == "cpu":
            return lacking
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            return "this build of onnxruntime has no CUDA provider (pip install onnxruntime-gpu)"
        return ""

    def network(self, model, x):
        session = self._session(onnx_export.export(model, x), x.device)
        image = x.contiguous()
        if x.is_cuda:
            return self._bound(session, image)
        feed = {onnx_export.INPUT: image.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    def _session(self, model: bytes, device: torch.device):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        provider: str | tuple = "CPUExecutionProvider"
        if device.type == "cuda":
            settings = {"device_id": device.index or 0, "use_tf32": int(torch.backends.cudnn.allow_tf32)}
            provider = ("CUDAExecutionProvider", settings)
        try:
            return ort.InferenceSession(model, options, providers=[provider])
        except Exception as error:  # ONNX Runtime's errors have no common base of their own
            raise RuntimeError(f"ONNX Runtime: {str(error).strip()}") from error

    def _bound(self, session, image):
        """Input and output stay in torch's memory on the GPU."""
        from onnx import TensorProto

        kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
        kind = {**kinds, torch.bfloat16: TensorProto.BFLOAT16}[image.dtype]
        shape = session.get_outputs()[0].shape
        output = torch.empty(shape, dtype=image.dtype, device=image.device)
        binding, where = session.io_binding(), (image.device.type, image.device.index or 0, kind)
        binding.bind_input(onnx_export.INPUT, *where, list(image.shape), image.data_ptr())
        binding.bind_output(onnx_export.OUTPUT, *where, list(shape), output.data_ptr())
        torch.cuda.synchronize(image.device)  # ONNX Runtime has a stream of its own

        def call():
            session.run_with_iobinding(binding)
            return output

        return call
