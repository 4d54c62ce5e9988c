"""The kernels in the compiled library, without a GPU: what nvcc made of each, for each architecture."""

import re
from pathlib import Path
from typing import Any

from fused_resnet.backends import sass

SECTION = re.compile(r"^arch = (\S+)", re.MULTILINE)
FUNCTION = re.compile(r"^\s*Function\s*:?\s*([\w$.]+):?\s*$", re.MULTILINE)

# As the tables of kernels call them.
TYPES = {"float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


def kernels(library: Path) -> list[dict[str, Any]]:
    """A row for each kernel and architecture, in the order of the architectures and names."""
    usage, code = (_functions(sass.cuobjdump(option, library)) for option in ("-res-usage", "-sass"))
    rows = []
    for (architecture, name), text in code.items():
        row = {"architecture": architecture, "kernel": demangled(name), **sass.numbers(usage[architecture, name], text)}
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


def demangled(name: str) -> str:
    """Such as "add_act_fwd_kernel<fp16, 8, 1>", without namespaces and parameters; another name stays as it is."""
    try:
        return _Mangled(name).function()
    except (ValueError, IndexError, KeyError):
        return name


class _Mangled:
    """A reader of C++ names (Itanium ABI, 5.1), as far as kernels have them."""

    BUILTIN = {
        "f": "float", "d": "double", "b": "bool", "c": "char", "a": "signed char", "h": "uint8", "s": "int16",
        "t": "uint16", "i": "int", "j": "uint", "l": "long", "m": "ulong", "x": "int64", "y": "uint64", "v": "void",
    }  # fmt: skip
    AROUND = {"P": "{}*", "R": "{}&", "O": "{}&&", "K": "const {}", "V": "volatile {}"}

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.seen: list[str] = []  # what S_, S0_, ... stand for

    def function(self) -> str:
        if not self.take("_Z"):
            raise ValueError("not a C++ name")
        return self.name()

    def take(self, text: str) -> bool:
        found = self.text.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def match(self, pattern: str) -> str:
        found = re.compile(pattern).match(self.text, self.at)
        if found is None:
            raise ValueError(f"unexpected {self.text[self.at :]!r}")
        self.at = found.end()
        return found[0]

    def note(self, name: str) -> str:
        self.seen.append(name)
        return name

    def name(self) -> str:
        """The last part of a name, with its template arguments."""
        nested, found, known = self.take("N"), "", True
        while not (nested and self.take("E")):
            if not known:
                self.note(found)  # which another part follows
            self.take("L")  # of internal linkage
            known = self.text.startswith("S", self.at)
            if known:
                found = self.substitution()
            elif self.text.startswith("I", self.at):
                found += self.arguments()
            else:
                length = int(self.match(r"\d+"))
                found, self.at = self.text[self.at : self.at + length], self.at + length
            if not nested and not self.text.startswith("I", self.at):
                break
        return TYPES.get(found, found)

    def substitution(self) -> str:
        if self.take("St"):
            return "std"
        digits = self.match(r"S[0-9A-Z]*_")[1:-1]
        return self.seen[int(digits, 36) + 1 if digits else 0]

    def arguments(self) -> str:
        return f"<{', '.join(self.listed('I'))}>"

    def listed(self, opening: str) -> list[str]:
        found = []
        self.match(opening)
        while not self.take("E"):
            found += self.listed("J") if self.text.startswith("J", self.at) else [self.argument()]
        return found

    def argument(self) -> str:
        if not self.take("L"):
            return self.type()
        kind = self.type()
        value = self.match(r"n?\d+").replace("n", "-")
        self.match("E")
        return {"0": "false", "1": "true"}[value] if kind == "bool" else value

    def type(self) -> str:
        letter = self.text[self.at]
        if letter in self.BUILTIN:
            self.at += 1
            found = self.BUILTIN[letter]
            return TYPES.get(found, found)
        if letter in self.AROUND:
            self.at += 1
            return self.note(self.AROUND[letter].format(self.type()))
        if letter == "S" and not self.text.startswith("St", self.at):
            found = self.substitution()
            return self.note(found + self.arguments()) if self.text.startswith("I", self.at) else found
        return self.note(self.name())
