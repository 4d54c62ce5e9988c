"""`fused-resnet export`: a trained network as a program, an ONNX model, or weights alone."""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from fused_resnet.export import export
from fused_resnet.files import write_atomically
from fused_resnet.foreign_models import one_line
from fused_resnet.modules.unit import unfused
from fused_resnet.options import UsageError, positive
from fused_resnet.parity import table
from fused_resnet.training.trained import described, load_trained

KNOWN = ("model", "model_options", "classes", "val_size", "val_resize", "mean", "std")
BUILD = "fused_resnet.create_model({model!r}, weights={name!r}, **{options})"


class Format(NamedTuple):
    """A kind of file: what is in it, how to load it, and what makes it."""

    what: str
    load: str
    make: Callable[[nn.Module, dict, argparse.Namespace], bytes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-resnet export`."""
    parser.description += " The suffix of --output says as what: " + _formats() + "."
    parser.add_argument("trained", metavar="run_or_checkpoint", help="a run's folder (its best network), or a file")
    parser.add_argument("--output", required=True, help="the file to write, whole or not at all")
    parser.add_argument("--decompose", action="store_true", help=".pt2: without this package's operators")
    parser.add_argument("--opset", type=positive, help=".onnx: the operator set (default: torch's choice)")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, where averages are kept too")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _formats() -> str:
    return ", ".join(f"{suffix} ({made.what})" for suffix, made in FORMATS.items())


def run(args: argparse.Namespace) -> int:
    """`fused-resnet export`; return the exit code."""
    output = Path(args.output).expanduser()
    _check(args, output)
    model, about = load_trained(args.trained, ema=not args.no_ema)
    content = FORMATS[output.suffix].make(model, about, args)
    try:
        write_atomically(output, content)
    except OSError as error:
        raise UsageError(f"--output {output}: {error}") from error
    found = _report(output, content, about, args)
    print(json.dumps(found, indent=2) if args.json else _table(found))
    return 0


def _check(args: argparse.Namespace, output: Path) -> None:
    if output.suffix not in FORMATS:
        raise UsageError(f"--output {output}: its suffix must say what to write: {_formats()}")
    if args.decompose and output.suffix != ".pt2":
        raise UsageError(f"--decompose is for .pt2; a {output.suffix} file never holds this package's operators")
    if args.opset and output.suffix != ".onnx":
        raise UsageError(f"--opset is for .onnx, not for {output.suffix}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")


# --- what is written --------------------------------------------------------------------------------------------------


def known(about: dict) -> dict:
    """What somebody who uses the network has to know of it."""
    return {name: about[name] for name in KNOWN}


def _images(about: dict) -> Tensor:
    """Two, as a batch of one would be taken as fixed; [2, C, H, W]."""
    size = about["val_size"]
    return torch.zeros(2, about["model_options"]["in_channels"], size, size)


def _program(model: nn.Module, about: dict, args: argparse.Namespace) -> bytes:
    program = export(model, _images(about), decompose=args.decompose, dynamic_shapes=({0: Dim("n")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"about.json": json.dumps(known(about))})
    return file.getvalue()


def _onnx(model: nn.Module, about: dict, args: argparse.Namespace) -> bytes:
    try:
        import onnx
        import onnxscript  # noqa: F401 - what torch.onnx.export works with
    except ImportError as error:
        raise UsageError(f"--output {args.output}: {error}; pip install onnx onnxscript") from error
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: Dim("n")},)}
    with torch.no_grad(), unfused(), _quiet():
        try:
            program = torch.onnx.export(
                model, (_images(about),), dynamo=True, opset_version=args.opset, verbose=False, **names
            )
        except Exception as error:  # of many kinds, for an operator set that is not known
            raise UsageError(f"--output {args.output}: torch.onnx.export: {one_line(error)}") from error
    found = program.model_proto
    opset = next(entry.version for entry in found.opset_import if entry.domain == "")
    if args.opset not in (None, opset):
        raise UsageError(f"--opset {args.opset}: the network cannot be written for it; without --opset: {opset}")
    for name, value in known(about).items():
        found.metadata_props.add(key=name, value=json.dumps(value))
    onnx.checker.check_model(found, full_check=True)
    return found.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without deprecations within torch.export, and the logs of conversions whose end is told in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().contiguous() for key, value in model.state_dict().items()}


def _state_dict(model: nn.Module, about: dict, args: argparse.Namespace) -> bytes:
    file = io.BytesIO()
    torch.save(_weights(model), file)
    return file.getvalue()


def _safetensors(model: nn.Module, about: dict, args: argparse.Namespace) -> bytes:
    from safetensors.torch import save

    return save(_weights(model), {name: json.dumps(value) for name, value in known(about).items()})


FORMATS = {
    ".pt2": Format("a program of torch.export", "torch.export.load({name!r}).module()", _program),
    ".onnx": Format("an ONNX model", "onnxruntime.InferenceSession({name!r})", _onnx),
    ".pth": Format("a state dict under torchvision's names", BUILD, _state_dict),
    ".safetensors": Format("the same in safetensors", BUILD, _safetensors),
}


# --- what is said of it -----------------------------------------------------------------------------------------------


def _report(output: Path, content: bytes, about: dict, args: argparse.Namespace) -> dict:
    load = FORMATS[output.suffix].load.format(name=str(output), model=about["model"], options=about["model_options"])
    if not args.decompose and output.suffix == ".pt2":
        load = f"import fused_resnet; {load}"
    return {
        "file": str(output),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "load": load,
        "source": about["source"],
        **known(about),
    }


def _table(found: dict) -> str:
    size, channels = found["val_size"], found["model_options"]["in_channels"]
    rows = [
        ("file", found["file"]),
        ("bytes", f"{found['bytes']:,}"),
        ("SHA-256", found["sha256"]),
        ("load it with", found["load"]),
        ("network", f"{found['model']}, {found['model_options']['num_classes']} classes"),
        ("from", described(found["source"])),
        ("images", f"[n, {channels}, {size}, {size}], of 0 to 1 minus {found['mean']}, divided by {found['std']}"),
    ]
    return "\n".join(table(("", "exported"), rows))
