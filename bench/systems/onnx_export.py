"""The plain network as an ONNX model."""

import warnings

import torch

from bench.systems.units import without_batch_norm
from fused_resnet.modules.unit import unfused

OPSET = 22  # the first with a bfloat16 convolution
INPUT, OUTPUT = "x", "y"
PACKAGES = {"onnx": "onnx", "onnxscript": "onnxscript"}


def export(model, x) -> bytes:
    """The plain network for inputs of x's size and dtype, with batch norm folded.

    Folded before, because the exporter's folding leaves a float32 bias beside a bfloat16 weight, which is no model.
    """
    plain = without_batch_norm(model, x)
    names = {"input_names": [INPUT], "output_names": [OUTPUT]}
    with torch.no_grad(), unfused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch.export itself
        program = torch.onnx.export(plain, (x,), dynamo=True, opset_version=OPSET, verbose=False, **names)
    return program.model_proto.SerializeToString()
