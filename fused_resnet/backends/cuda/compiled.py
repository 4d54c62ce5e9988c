"""The kernels in the compiled library, without a GPU: what nvcc made of each, for each architecture."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from fused_resnet.backends import sass

SECTION = re.compile(r"^arch = (\S+)", re.MULTILINE)
FUNCTION = re.compile(r"^\s*Function\s*:?\s*([\w$.]+):?\s*$", re.MULTILINE)

# What makes a demangled name readable; the numbers of an enumeration stay without its name.
SHORT = {
    r"\(anonymous namespace\)::|fused_resnet::cuda::|c10::|torch::headeronly::": "",
    r"\((?:bool|int|long|\w*Products|\w*Slope)\)": "",
    r"(?m)^void ": "",
    r"\bBFloat16\b": "bf16",
    r"\bHalf\b": "fp16",
    r"\bfloat\b": "fp32",
}


def kernels(library: Path) -> list[dict[str, Any]]:
    """A row for each kernel and architecture, in the order of the architectures and names."""
    usage, code = (_functions(sass.cuobjdump(option, library)) for option in ("-res-usage", "-sass"))
    rows, names = [], readable([name for _, name in code])
    for (where, text), name in zip(code.items(), names, strict=True):
        row = {"architecture": where[0], "kernel": name, **sass.numbers(usage[where], text)}
        rows.append(row | {"fits": row["spill_bytes"] == 0})
    return sorted(rows, key=lambda row: (row["architecture"], row["kernel"]))


def _functions(text: str) -> dict[tuple[str, str], str]:
    """What `cuobjdump` says of each function, by architecture and name."""
    found = {}
    for architecture, section in _parts(SECTION, text):
        for name, body in _parts(FUNCTION, section):
            found[architecture, name] = body
    return found


def _parts(heading: re.Pattern, text: str) -> list[tuple[str, str]]:
    """What each heading says, with the text up to the next one."""
    _, *pieces = heading.split(text)
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def readable(names: list[str]) -> list[str]:
    """Such as "add_act_fwd_kernel<bf16, 8, 1>": C++ names without namespaces and parameters, where a program is there
    that demangles them.
    """
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if not filt:
        return names
    text = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for found, short in SHORT.items():
        text = re.sub(found, short, text)
    return [line.partition("(")[0].strip() for line in text.splitlines()]
