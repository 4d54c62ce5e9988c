"""Builds fused_resnet._C: C++ always, CUDA when nvcc is there, and nothing at all when there is no compiler.

Variables: FUSED_RESNET_NO_EXT=1 (build no extension), FUSED_RESNET_NO_CUDA=1 (C++ only), FUSED_RESNET_FORCE_CUDA=1
(an error when CUDA sources cannot be built), TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a"; none below 8.0), MAX_JOBS, DEBUG=1.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ABI = "0x020b000000000000"  # LibTorch Stable ABI of torch 2.11: one library for it and everything later
ARCHS = (os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a").replace(" ", ";")  # "a" has no PTX for later GPUs


def files(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


def switch(name):
    return os.environ.get(name, "0") not in ("", "0")


def give_up(reason):
    """No extension: say so once, and let the install succeed on the operators in Python."""
    what = "Every operator works without it, through the slower reference backend"
    print(f"\n*** fused_resnet: the compiled extension is not built: {reason}.\n*** {what}.\n", file=sys.stderr)
    return {}


def cuda_home():
    """The CUDA toolkit's folder: torch looks for it only when it was built for CUDA itself, a CPU build will do."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and shutil.which("nvcc"):  # nvcc may be a script or a link: it is asked where its toolkit lies
        asked = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        home = next((line.partition("TOP=")[2].strip() for line in asked.stderr.splitlines() if "TOP=" in line), None)
    return os.path.realpath(home) if home and Path(home, "bin", "nvcc").exists() else None


def cuda_sources():
    """The CUDA sources to build, and the reason when there are none."""
    reason = "" if cuda_home() else "nvcc was not found (set CUDA_HOME)"
    reason = reason or ("" if files("cuda/*.cu") else "csrc/cuda holds no sources")
    reason = "FUSED_RESNET_NO_CUDA is set" if switch("FUSED_RESNET_NO_CUDA") else reason
    if reason and switch("FUSED_RESNET_FORCE_CUDA"):
        raise SystemExit(f"fused_resnet: FUSED_RESNET_FORCE_CUDA is set, but {reason}")
    return [] if reason else files("cuda/*.cu"), reason


def module(cpp_extension, cuda):
    """The extension with these CUDA sources; with none it is for the CPU alone."""
    optimise = ["-O0", "-g"] if switch("DEBUG") else ["-O3", "-DNDEBUG"]
    common = [*optimise, "-std=c++20", f"-DTORCH_TARGET_VERSION={ABI}"]
    host = [*common, "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(a for a in ARCHS.split(";") if a[:1] not in "34567")
        host.append(f'-DFUSED_RESNET_CUDA="{os.environ["TORCH_CUDA_ARCH_LIST"]}"')
        cpp_extension.CUDA_HOME = cuda_home()
    ext = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "fused_resnet._C",
        files("**/*.cpp") + cuda,
        depends=files("**/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": host, "nvcc": [*common, "-DUSE_CUDA", "--expt-relaxed-constexpr"]},
        py_limited_api=True,  # Python 3.10: one library for it and everything later
    )
    # A CPU build of torch has neither c10_cuda nor torch_cuda. The CUDA runtime is linked in, to load beside any torch.
    ext.libraries = [name for name in ext.libraries if name not in ("c10_cuda", "torch_cuda", "cudart")]
    ext.libraries += ["cudart_static", "dl", "rt", "pthread"] if cuda else []
    ext.library_dirs += [f"{cuda_home()}/{lib}" for lib in ("lib64", "lib") if cuda]
    ext.extra_link_args = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]  # it has what launch.h declares weak
    return ext


def extension():
    """The arguments of setup() that build the extension; empty when it cannot be built."""
    if switch("FUSED_RESNET_NO_EXT"):
        return give_up("FUSED_RESNET_NO_EXT is set")
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return give_up("torch is not importable while building (install torch first, then use --no-build-isolation)")
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if not compiler or subprocess.run([compiler, "--version"], capture_output=True, check=False).returncode:
        return give_up("no C++ compiler was found (install one, or point CXX at it)")
    cuda, reason = cuda_sources()
    if reason:
        print(f"fused_resnet: no CUDA kernels in this build: {reason}", file=sys.stderr)

    class Build(cpp_extension.BuildExtension):
        def run(self):
            """A compiler that fails costs the user the fast path, not the install, unless CUDA was asked for."""
            newest = max(map(os.path.getmtime, files("**/*.h")))  # a torch without CUDA follows no headers of .cu files
            for path in filter(lambda path: path.stat().st_mtime < newest, Path(self.build_temp).glob("csrc/cuda/*.o")):
                path.unlink()
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if switch("FUSED_RESNET_FORCE_CUDA"):
                    raise
                reason = f"the build failed ({(str(error).strip() or repr(error)).splitlines()[-1]})"
                if not cuda:
                    self.extensions = []  # nothing to copy or to list
                    return give_up(reason)
                print(f"fused_resnet: no CUDA kernels in this build: {reason}", file=sys.stderr)
                cuda.clear()
                vars(self.extensions[0]).update(vars(module(cpp_extension, cuda)))
                self.compiler = None  # what it was resolved to
                self.run()

    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [module(cpp_extension, cuda)], "cmdclass": {"build_ext": Build}, "options": options}


setup(**extension())
