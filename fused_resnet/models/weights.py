"""Weights from a file, by name or from a torchvision enum; nothing that is loaded here can run code.

Pickles are read with `weights_only=True` and never again without. A download is used only after its full SHA-256 has
been compared; the eight digits in torchvision's file names are too few to be a check.
"""

import argparse
import hashlib
import os
import pickle
import re
import uuid
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from torch import Tensor, nn

# torchvision publishes eight digits. These full digests stand in two or more public repositories each and begin with
# those eight; they were not computed here. A wrong entry can only refuse the right file, never let another one through.
KNOWN_SHA256 = {
    "mobilenet_v2-7ebf99e0.pth": "7ebf99e03e254b273379b23edca7ec0da9f48273b23a332b93c1c99d49e86e8f",
    "mobilenet_v2-b0353104.pth": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    "resnet34-b627a593.pth": "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
    "resnet50-0676ba61.pth": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    "resnet50-11ad3fa6.pth": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    "resnet101-63fe2227.pth": "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a",
    "resnet101-cd907fc2.pth": "cd907fc2a0de2292b2ba2b27d2216bc672d84632d1cf20058d01c0c03b5e020e",
    "resnet152-394f9c45.pth": "394f9c45966e3651a89bbb78a48410a6755854ce4a5ab64927cf1c7247f85e58",
    "wide_resnet50_2-95faca4d.pth": "95faca4d11227dddf8633dbb5ff6c8a9003c1aa5b8945c73834b8007b10950b8",
}
FILE_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
NESTED_UNDER = ("state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
CHUNK = 1 << 20
TIMEOUT_S = 30
SHOWN = 5


def load_weights(model: nn.Module, weights: Any, *, name: str = "", progress: bool = True) -> nn.Module:
    """Load `weights` into `model`, in place; return `model`.

    Args:
        weights: a path of a `.pth`, `.pt` or `.safetensors` file; a member of a torchvision weights enum or its name
            ("IMAGENET1K_V2", "DEFAULT", "ResNet50_Weights.IMAGENET1K_V2"); an https URL. To a string,
            "@sha256:<64 digits>" adds the digest that the file must have; a URL needs it, and so do the torchvision
            weights whose digest is not known here.
        name: the model's name, for weights by name.
        progress: show the progress of a download.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, no digest for a download, a file that holds no state dict.
        RuntimeError: keys or shapes that are not the model's, a file that has not the digest; the model is unchanged.
        pickle.UnpicklingError: a pickle that holds more than tensors; nothing of it is run.
    """
    path = find_weights(weights, name=name, progress=progress)
    state = read_state_dict(path)
    check_state_dict(model, state, path)
    model.load_state_dict(state)
    return model


# --- from what the user says to a file ------------------------------------------------------------------------------


def find_weights(weights: Any, *, name: str = "", progress: bool = True) -> Path:
    """The file that `weights` (as in `load_weights`) stands for, downloaded where it has to be."""
    text, digest = "", ""
    if isinstance(weights, (str, os.PathLike)):
        text, mark, digest = os.fspath(weights).partition("@sha256:")
        digest = digest.lower()
        if mark and not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"weights: after '@sha256:' there must be 64 hexadecimal digits, got {digest!r}")
    if "://" in text:
        return _downloaded(text, digest, f"weights={text!r}", progress)
    if isinstance(weights, os.PathLike) or text.endswith(FILE_SUFFIXES) or "/" in text or os.sep in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"weights: there is no file {str(path)!r}")
        if digest:
            _check_digest(path, digest)
        return path
    member = _member(text, name) if text else weights
    url = getattr(getattr(member, "value", None), "url", None)
    if not isinstance(member, Enum) or url is None:
        raise ValueError(
            f"weights must be a file's path, a name such as 'DEFAULT' or a torchvision weights enum, got {weights!r}"
        )
    return _downloaded(url, digest or KNOWN_SHA256.get(_file_name(url), ""), f"weights={str(member)!r}", progress)


def _member(text: str, name: str) -> Enum:
    """The torchvision enum member `text` of the model `name`."""
    try:
        import torchvision.models
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ValueError(
            f"weights={text!r} is not a file, and names are looked up in torchvision, which cannot be imported "
            f"({error}); give a .pth or .safetensors file, or pip install torchvision"
        ) from error
    try:
        members = torchvision.models.get_model_weights(name).__members__
    except ValueError as error:
        raise ValueError(
            f"weights={text!r}: {name or 'this model'} has no weights known by name; give a .pth or .safetensors file"
        ) from error
    enum = type(next(iter(members.values()))).__name__
    key = text.removeprefix(f"{enum}.")
    if key not in members:
        raise ValueError(f"weights={text!r} is neither a file nor one of {enum}: {', '.join(members)}")
    return members[key]


def _downloaded(url: str, digest: str, what: str, progress: bool) -> Path:
    if digest:
        return download(url, digest, progress=progress)
    file = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url)
    way_out = f"download {url} yourself and give its path, or add its digest: '...@sha256:<64 digits>'"
    if file.is_file():
        way_out = (
            f"{file} is there already and has {sha256_of(file)}: give its path, or that digest as '...@sha256:<64 "
            "digits>', if you trust it"
        )
    raise ValueError(
        f"{what}: the full SHA-256 of {_file_name(url)} is not known here, and an unchecked download is never used; "
        f"{way_out}"
    )


# --- download ---------------------------------------------------------------------------------------------------------


class _CheckedRedirects(HTTPRedirectHandler):
    def __init__(self, schemes):
        self.schemes = schemes

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_scheme(newurl, self.schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    sha256: str,
    directory: str | os.PathLike | None = None,
    *,
    progress: bool = True,
    _schemes: tuple[str, ...] = ("https",),
) -> Path:
    """The file of `url` in `directory` (torch.hub's checkpoints by default), fetched unless it is there already.

    Either way its SHA-256 is compared before its path is returned. The file appears whole or not at all.

    Raises:
        ValueError: a URL that is not https, or whose file name is not a plain one.
        RuntimeError: the digest differs; a file that was there stays, nothing of a download does.
        OSError: the network or the disk fails.
    """
    _check_scheme(url, _schemes)
    directory = Path(directory or Path(torch.hub.get_dir()) / "checkpoints")
    target = directory / _file_name(url)
    if target.exists():
        _check_digest(target, sha256)
        return target
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".{target.name}.{uuid.uuid4().hex}.part"
    try:
        _fetch(url, part, progress, _schemes)
        _check_digest(part, sha256, url)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _fetch(url: str, part: Path, progress: bool, schemes: tuple[str, ...]) -> None:
    from tqdm import tqdm

    opener = build_opener(_CheckedRedirects(schemes))
    request = Request(url, headers={"User-Agent": "fused_resnet"})
    with opener.open(request, timeout=TIMEOUT_S) as response, part.open("xb") as file:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        with tqdm(total=total, desc=_file_name(url), unit="B", unit_scale=True, disable=not progress) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
        if total is not None and file.tell() != total:
            raise RuntimeError(f"{url}: the download broke off after {file.tell()} of {total} bytes; try again")


def _check_scheme(url: str, schemes: tuple[str, ...]) -> None:
    if urlsplit(url).scheme not in schemes:
        raise ValueError(f"weights are downloaded over {' or '.join(schemes)} only, got {url!r}")


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not re.fullmatch(r"\w[\w.+-]*\.(pth|pt|safetensors)", name, re.ASCII):
        raise ValueError(f"{url!r} must end in a plain file name in .pth, .pt or .safetensors, got {name!r}")
    return name


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_digest(path: Path, expected: str, source: str = "") -> None:
    found = sha256_of(path)
    if found == expected.lower():
        return
    kept = "nothing was kept" if source else "it is not loaded; delete it to have it fetched again"
    raise RuntimeError(f"{source or path}: expected SHA-256 {expected}, got {found}; {kept}")


# --- from a file to a state dict that fits ----------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a PyTorch checkpoint, on the CPU.

    In a checkpoint it may stand under "state_dict" or "model"; the prefixes of DistributedDataParallel and
    `torch.compile` are taken off.

    Raises:
        ValueError: the file holds no state dict.
        pickle.UnpicklingError: it holds more than tensors and plain containers; nothing of it is run.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _unwrapped(load_file(path))
    try:
        found = load_plain(path)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{error}. Ask for a .safetensors file, or for one written with torch.save(model.state_dict(), ...)"
        ) from error
    for key in NESTED_UNDER:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict, neither as a whole nor under {' or '.join(NESTED_UNDER)}")
    return _unwrapped(found)


def load_plain(path: Path, *, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU, if that is tensors and plain containers.

    Args:
        mmap: read no tensor before it is used; the file has to stay as it is while there are any.

    Raises:
        pickle.UnpicklingError: it is more than that; nothing of it is run.
    """
    try:
        # torchvision's training script keeps its arguments, a plain record, in every checkpoint.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{path} is damaged, or holds Python objects other than tensors, which could run code when loaded; it is "
            "not loaded"
        ) from error


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes of wrappers, as a plain dict.

    A plain dict has no version record, so that batch norm takes one without `num_batches_tracked` as an old one.
    """
    for _ in WRAPPER_PREFIXES:  # each may be around the other
        for prefix in WRAPPER_PREFIXES:
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def check_state_dict(model: nn.Module, state: Mapping[str, Tensor], source: Any = "state dict") -> None:
    """Raise a RuntimeError that says what of `state` does not fit `model`, and what to do about it."""
    own = model.state_dict()
    absent = {name for name, child in model._modules.items() if child is None}  # left out by a feature extractor
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own and key.partition(".")[0] not in absent]
    mismatched = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unexpected or mismatched):
        return
    lines = [f"{source} does not fit {type(model).__name__}:"]
    shapes = [f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in mismatched]
    for what, found in (("missing", missing), ("unexpected", unexpected), ("shape", shapes)):
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            lines.append(f"  {what}: {'; '.join(found[:SHOWN])}{more}")
    if not missing and not unexpected:
        lines.append(f"  {_way_out(model, state, mismatched)}")
    raise RuntimeError("\n".join(lines))


def _way_out(model: nn.Module, state: Mapping[str, Tensor], mismatched: list[str]) -> str:
    heads = [key for key in mismatched if state[key].dim() <= 2 and key.rpartition(".")[0] == last_linear(model)]
    first = next((key for key in mismatched if state[key].dim() == 4), None)
    if mismatched == heads:
        classes = state[heads[0]].shape[0]
        return f"build the model with num_classes={classes}, load, and then replace its layer {last_linear(model)}"
    if mismatched == [first]:
        return f"build the model with in_channels={state[first].shape[1]}"
    return "these are the weights of a network of other widths"


def last_linear(model: nn.Module) -> str:
    return next((name for name, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), "")
