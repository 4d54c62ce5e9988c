"""The compiled kernels for every instruction set below this processor's: each a run of the operators' tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet.backends.cpu import extension_missing

SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
FILES = (
    "test_add_act", "test_bn_act", "test_conv_scale_act", "test_conv_bn_act", "test_conv_wgrad", "test_inference",
    "test_max_pool2d", "test_norm_act", "test_norm_act_max_pool2d",
)  # fmt: skip
CHOSEN = "two_times or exact or inference or max_pool2d"
HERE = Path(__file__).parent


@pytest.mark.skipif(bool(extension_missing()), reason=extension_missing() or "it is there")
@pytest.mark.parametrize("name", SETS)
def test_instruction_set(name):
    best = torch.ops.fused_resnet_C.cpu_capability()
    if SETS.index(name) >= SETS.index(best):
        pytest.skip(f"this processor's best, which all other tests use, is {best}")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN,
         *[str(HERE / f"{file}.py") for file in FILES]],
        env=os.environ | {"FUSED_RESNET_CPU_ISA": name, "TRITON_INTERPRET": "0", "FUSED_RESNET_EMULATOR": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:]
    assert " passed" in found.stdout
