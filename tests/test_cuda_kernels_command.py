"""`fused-resnet kernels --library`: what nvcc made of the kernels, read from the compiled library."""

import json
import shutil
from pathlib import Path

import pytest

from fused_resnet import cli, kernels
from fused_resnet.backends import cuda, sass
from fused_resnet.backends.cuda import compiled

SASS = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

	code for sm_80
		Function : _ZN12fused_resnet4cuda12_GLOBAL__N_118add_act_fwd_kernelIN3c108BFloat16ELi8ELi1EEEvPKT_S6_PS4_l
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/                   @P0 LDG.E.128.CONSTANT R8, [R2.64] ;
        /*0020*/                   LDG.E.64 R8, [R2.64] ;
        /*0030*/                   STG.E.128 [R2.64], R4 ;

Fatbin elf code:
================
arch = sm_90a

		Function : conv
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0020*/                   STL [R1], R4 ;
"""
USAGE = """
arch = sm_80
 Function _ZN12fused_resnet4cuda12_GLOBAL__N_118add_act_fwd_kernelIN3c108BFloat16ELi8ELi1EEEvPKT_S6_PS4_l:
  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function conv:
  REG:255 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
FITS = {"architecture": "sm_80", "kernel": "add_act_fwd_kernel<bf16, 8, 1>", "registers": 40, "wide_loads": 2}
SPILLS = {"architecture": "sm_90a", "kernel": "conv", "spill_bytes": 24, "shared_bytes": 1024, "mma": 1, "cp_async": 1}


@pytest.fixture
def library(monkeypatch):
    """A library of two kernels, of which one spills."""
    monkeypatch.setattr(sass, "cuobjdump", lambda option, path: USAGE if option == "-res-usage" else SASS)
    monkeypatch.setattr(sass, "tool", lambda name: name)
    monkeypatch.setattr(kernels, "extension_missing", lambda: "")
    monkeypatch.setattr(cuda, "architectures", lambda: "8.0+PTX;9.0a")
    monkeypatch.setattr(cuda, "library", lambda: Path("_C.abi3.so"))


def test_library_table_and_summary(library, capsys):
    assert cli.main(["kernels", "--library"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["architecture", "kernel", "registers", "spills"]
    assert lines[2].split()[:5] == ["sm_80", "add_act_fwd_kernel<bf16,", "8,", "1>", "40"]
    assert lines[3].endswith("SPILLS 24 bytes")
    assert lines[-1] == "library: sm_80: 1 of 1 kernels fit, sm_90a: 0 of 1 kernels fit"


def test_library_json_and_architecture(library, capsys):
    assert cli.main(["kernels", "--library", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["fit"], found["library"]["missing"], "kernels" in found) == (False, "", False)
    first, second = found["library"]["kernels"]
    assert first.items() >= FITS.items()
    assert first["spill_bytes"] == 0  # a stack that no instruction uses
    assert second.items() >= SPILLS.items()
    for arch, count in (("sm_90", 1), ("sm_90a", 1), ("sm_80", 1), ("sm_100", 0)):
        code = cli.main(["kernels", "--library", "--json", "--arch", arch])
        found = json.loads(capsys.readouterr().out)
        assert len(found["library"]["kernels"]) == count
        assert code == (1 if arch.startswith("sm_90") else 0)
    assert cli.main(["kernels", "--library", "--arch", "sm_100"]) == 0
    assert capsys.readouterr().out == "library: no kernels for sm_100\n"


def test_both_are_listed(library, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_check_triton", lambda: None)
    monkeypatch.setattr(kernels, "compile_all", lambda wanted: [])
    monkeypatch.setattr(kernels, "_wanted", lambda args: [])
    assert cli.main(["kernels", "--json"]) == 1
    assert set(json.loads(capsys.readouterr().out)) == {"fit", "seconds", "kernels", "library"}
    for only in ("--triton", "--family=conv1x1"):
        assert cli.main(["kernels", "--json", only]) == 0
        assert set(json.loads(capsys.readouterr().out)) == {"fit", "seconds", "kernels"}


def test_library_without_cuda_kernels_is_said_to_be_so(library, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "architectures", lambda: "")
    assert cli.main(["kernels", "--library"]) == 2
    assert "the compiled extension has no CUDA kernels; install where nvcc is" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "_check_triton", lambda: None)
    monkeypatch.setattr(kernels, "compile_all", lambda wanted: [])
    monkeypatch.setattr(kernels, "_wanted", lambda args: [])
    assert cli.main(["kernels"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("library: the compiled extension has no CUDA kernels")


def test_bad_usage_exits_with_2(library, monkeypatch, capsys):
    assert cli.main(["kernels", "--library", "--family", "conv1x1"]) == 2
    assert "--library excludes --triton and --family" in capsys.readouterr().err
    monkeypatch.setattr(sass, "tool", lambda name: "")
    assert cli.main(["kernels", "--library"]) == 2
    assert "neither Triton nor a CUDA toolkit has cuobjdump" in capsys.readouterr().err


NAMES = {
    "conv": "conv",
    "_ZN12fused_resnet4cuda12_GLOBAL__N_118add_act_fwd_kernelIN3c108BFloat16ELi8ELi1EEEvPKT_S6_PS4_l": (
        "add_act_fwd_kernel<bf16, 8, 1>"
    ),
    "_ZN12fused_resnet4cuda6kernelIfLNS0_8ProductsE2ELb1EEEvT_": "kernel<fp32, 2, true>",
}


@pytest.mark.skipif(not shutil.which("c++filt"), reason="no c++filt is here: names stay as they are")
def test_names_are_readable():
    assert compiled.readable(list(NAMES)) == list(NAMES.values())


def test_names_without_a_demangler_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiled.readable(list(NAMES)) == list(NAMES)
