"""setup.py: what it builds, what it says when it cannot, and an install without the compiled extension."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet.backends import cpu
from fused_resnet.backends.cpu import extension

ROOT = Path(__file__).parent.parent
WARNING = "*** fused_resnet: the compiled extension is not built: "

MODULE = """
#include <Python.h>
#include "module.h"
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a checkout, not beside an install")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build reads, without a compiled extension and without CUDA sources."""
    path = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.cu", "*.cuh")
    for name in ("fused_resnet", "csrc"):
        shutil.copytree(ROOT / name, path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, path)
    return path


def python(*args, cwd, **variables):
    """Run Python with these environment variables and none of the build's own."""
    build = ("FUSED_RESNET_", "CXX", "CC", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "DEBUG")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(build)}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )


def build(checkout, tmp_path, **variables):
    out = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    found = python("setup.py", "build_ext", *out, cwd=checkout, **variables)
    return found, [path.name for path in tmp_path.rglob("*.so")]


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120


def test_build_without_extension(checkout, tmp_path):
    """FUSED_RESNET_NO_EXT=1: one warning, no library, exit code 0."""
    found, libraries = build(checkout, tmp_path, FUSED_RESNET_NO_EXT="1")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count(WARNING) == 1
    assert "FUSED_RESNET_NO_EXT is set" in found.stderr
    assert "Every operator works without it" in found.stderr
    assert libraries == []


def test_build_with_a_broken_compiler(checkout, tmp_path):
    found, libraries = build(checkout, tmp_path, CXX="/bin/false")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count(WARNING) == 1
    assert "no C++ compiler was found (install one, or point CXX at it)" in found.stderr
    assert libraries == []


@pytest.mark.slow
def test_build_with_a_compiler_that_fails_later(checkout, tmp_path):
    """It answers --version and cannot compile: the same warning, once, and exit code 0."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-c\\ *) echo "out of memory" >&2; exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to pretend to be")
    found, libraries = build(checkout, tmp_path, CXX=str(compiler))
    assert found.returncode == 0, found.stderr
    assert found.stderr.count(WARNING) == 1
    assert "the build failed" in found.stderr
    assert libraries == []


def small_checkout(checkout, tmp_path):
    """A checkout of one C++ and one CUDA source, which include one header."""
    small = tmp_path / "small"
    (small / "csrc" / "cuda").mkdir(parents=True)
    (small / "csrc" / "module.h").write_text("")
    (small / "csrc" / "module.cpp").write_text(MODULE)
    (small / "csrc" / "cuda" / "kernels.cu").write_text('#include "module.h"\n')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_resnet"):
        (small / name).symlink_to(checkout / name)
    return small


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc is here")
def test_build_compiles_what_has_changed(checkout, tmp_path):
    small = small_checkout(checkout, tmp_path)

    def compiled():
        found, _ = build(small, tmp_path, TORCH_CUDA_ARCH_LIST="8.0", FUSED_RESNET_FORCE_CUDA="1")
        assert found.returncode == 0, found.stderr
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "temp").rglob("*.o")}

    first = compiled()
    assert set(first) == {"module.o", "kernels.o"}
    assert compiled() == first
    (small / "csrc" / "module.h").write_text("// changed\n")
    changed = compiled()
    assert all(changed[name] > first[name] for name in first)


def test_build_with_an_nvcc_that_fails(checkout, tmp_path):
    """An old one, say: the kernels for the CPU are built all the same, unless CUDA was asked for."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is here")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "Unsupported gpu architecture" >&2\nexit 1\n')
    nvcc.chmod(0o755)
    small = small_checkout(checkout, tmp_path)
    found, libraries = build(small, tmp_path, CUDA_HOME=str(nvcc.parent.parent), TORCH_CUDA_ARCH_LIST="8.0")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("fused_resnet: no CUDA kernels in this build: the build failed (") == 1
    assert WARNING not in found.stderr
    assert libraries == ["_C.abi3.so"]
    found, _ = build(small, tmp_path, CUDA_HOME=str(nvcc.parent.parent), FUSED_RESNET_FORCE_CUDA="1")
    assert found.returncode != 0


def test_build_force_cuda_without_nvcc_is_an_error(checkout, tmp_path):
    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("nvcc lies beside the system's own programs")
    variables = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path)}
    found, libraries = build(checkout, tmp_path, FUSED_RESNET_FORCE_CUDA="1", **variables)
    assert found.returncode != 0
    assert "FUSED_RESNET_FORCE_CUDA is set, but nvcc was not found (set CUDA_HOME)" in found.stderr
    assert libraries == []


def test_build_force_cuda_without_sources_is_an_error(checkout, tmp_path):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    found, _ = build(checkout, tmp_path, FUSED_RESNET_FORCE_CUDA="1", CUDA_HOME=str(tmp_path / "cuda"))
    assert found.returncode != 0
    assert "fused_resnet: FUSED_RESNET_FORCE_CUDA is set, but csrc/cuda holds no sources" in found.stderr


EVERY_OPERATOR = """
import sys
import warnings
# An editable install finds the library where the copy has none.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
warnings.simplefilter("error")
import torch
import fused_resnet as fr
from fused_resnet.backends import backend_report

assert "compiled extension" in fr.backends.cpu.extension_missing(), "the extension is not hidden"
x, w, r = (torch.randn(s, requires_grad=True) for s in ((2, 3, 6, 6), (4, 3, 3, 3), (2, 4, 6, 6)))
a, b, c, d = (torch.rand(4, requires_grad=True) for _ in range(4))
mean, var = torch.zeros(4), torch.ones(4)
outputs = {
    "conv_scale_act": fr.ops.conv_scale_act(x, w, a, b, residual=r, padding=1),
    "conv_bn_act": fr.ops.conv_bn_act(x, w, a, b, mean, var, residual=r, padding=1, training=True),
    "conv_bn_act eval": fr.ops.conv_bn_act(x, w, a, b, mean, var, padding=1),
    "bn_act": fr.ops.bn_act(r, a, b, mean, var, training=True, act="silu"),
    "bn_act eval": fr.ops.bn_act(r, a, b, mean, var, act="hardswish"),
    "scale_act": fr.ops.scale_act(r, a, b, residual=r, act="relu6"),
    "add_act": fr.ops.add_act(r, r),
}
for name, y in outputs.items():
    y.square().sum().backward()
    assert y.isfinite().all() and r.grad.isfinite().all(), name
with torch.no_grad():
    fr.ops.conv_scale_act(x, w, a, b), fr.ops.conv_scale_act(x.bfloat16(), w.bfloat16(), a, b)
model = fr.resnet18(num_classes=3)
model(torch.randn(2, 3, 32, 32)).sum().backward()
assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
if "cpu" in fr.available_backends():
    try:
        fr.ops.add_act(r, r, backend="cpu")
        raise SystemExit("the cpu backend ran without its kernels")
    except RuntimeError as error:
        assert "pip install" in str(error), error
print(fr.available_backends())
"""


def test_install_without_extension_has_every_operator(checkout, tmp_path):
    """Every public operator and a whole network, forward and backward, from a copy without the library."""
    assert not list(checkout.rglob("*.so"))
    found = python("-c", EVERY_OPERATOR, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert found.returncode == 0, found.stderr
    assert "reference" in found.stdout


def test_interface_number_is_the_same_in_both_languages():
    text = (ROOT / "csrc" / "ops.cpp").read_text()
    number = int(re.search(r"interface_number\(\) \{\n  return (\d+);", text)[1])
    assert number == extension.INTERFACE
    schemas = "".join(re.findall(r"m\.def\((.*?)\);", text, re.DOTALL))
    digest = hashlib.sha256(re.sub(r'["\s]', "", schemas).encode()).hexdigest()[:8]
    assert (number, digest) == (6, "57674c07"), "raise the number in csrc/ops.cpp and backends/cpu/extension.py"


def test_extension_is_built_where_a_compiler_is():
    """Else the tests of the compiled kernels would all be skipped, and nobody would notice."""
    if shutil.which("c++") is None or os.environ.get("FUSED_RESNET_NO_EXT", "0") not in ("", "0"):
        pytest.skip("no C++ compiler, or the extension was not wanted")
    assert not cpu.extension_missing()


def test_extension_of_another_checkout_is_not_used(monkeypatch):
    monkeypatch.setattr(extension, "INTERFACE", extension.INTERFACE + 1)
    cpu.extension_missing.cache_clear()
    try:
        reason = cpu.extension_missing()
    finally:
        monkeypatch.undo()
        cpu.extension_missing.cache_clear()
    assert "built from other sources (interface" in reason or "not installed" in reason
