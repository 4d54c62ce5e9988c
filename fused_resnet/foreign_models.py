"""Networks of other libraries, and of a user's own file, by name; with random weights, and without any download."""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from torch import nn

from fused_resnet.options import UsageError

FORMS = "torchvision:NAME, timm:NAME, transformers:ID or FILE.py:FACTORY"

# What the configurations of these ids hold, beside transformers' defaults: the kind of block, and the blocks a stage.
RESNETS = {
    "microsoft/resnet-18": ("basic", [2, 2, 2, 2]),
    "microsoft/resnet-26": ("bottleneck", [2, 2, 2, 2]),
    "microsoft/resnet-34": ("basic", [3, 4, 6, 3]),
    "microsoft/resnet-50": ("bottleneck", [3, 4, 6, 3]),
    "microsoft/resnet-101": ("bottleneck", [3, 4, 23, 3]),
    "microsoft/resnet-152": ("bottleneck", [3, 8, 36, 3]),
}
HIDDEN_SIZES = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}


def is_foreign(name: str) -> bool:
    """Whether the name of a network says where it comes from."""
    return ":" in name


def from_library(name: str) -> bool:
    """Whether a foreign network is a library's, and so has random weights."""
    return name.partition(":")[0] in _LIBRARIES


def build_foreign(name: str, num_classes: int | None = None) -> nn.Module:
    """The network that `name`, one of `FORMS`, stands for.

    Raises:
        UsageError: an unknown name, a library that is not installed, a file or a factory that does not give a network.
    """
    source, _, rest = name.partition(":")
    if from_library(name):
        module = library(source, f"--model {name}")
        with _explained(f"--model {name}"):
            return _LIBRARIES[source](module, rest, num_classes)
    path, _, factory = name.rpartition(":")
    if not path.endswith(".py"):
        raise UsageError(f"--model {name}: expected a name of this library, or {FORMS}")
    if num_classes is not None:
        raise UsageError(f"--num-classes: the classes of {name} are its factory's")
    return _from_file(Path(path).expanduser(), factory)


def library(name: str, option: str) -> ModuleType:
    """The package `name`, which the option asks for."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise UsageError(f"{option}: {name} cannot be imported: {one_line(error)}") from error
        raise UsageError(f"{option}: {name} is not installed; pip install {name}") from error
    except Exception as error:  # its compiled part may not fit this torch, in several ways
        message = (
            f"{option}: {name} cannot be imported: {one_line(error)}; install one that fits torch: pip install {name}"
        )
        raise UsageError(message) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Code of others runs inside: whatever it raises is a UsageError about `what`."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what}: {type(error).__name__}: {one_line(error)}") from error


def _from_torchvision(torchvision: ModuleType, name: str, num_classes: int | None) -> nn.Module:
    _check_known("torchvision", name, torchvision.models.list_models())
    options = {} if num_classes is None else {"num_classes": num_classes}
    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:  # by default those would be downloaded
        options["weights_backbone"] = None
    return builder(weights=None, **options)


def _from_timm(timm: ModuleType, name: str, num_classes: int | None) -> nn.Module:
    if not timm.is_model(name):
        _check_known("timm", name, timm.list_models())
    options = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=False, **options)


def _from_transformers(transformers: ModuleType, name: str, num_classes: int | None) -> nn.Module:
    labels = {} if num_classes is None else {"num_labels": num_classes}
    if name in RESNETS:
        kind, depths = RESNETS[name]
        shape = {"layer_type": kind, "depths": depths, "hidden_sizes": HIDDEN_SIZES[kind]}
        config = transformers.ResNetConfig(**shape, **{"num_labels": 1000, **labels})
        return transformers.ResNetForImageClassification(config)
    if not Path(name).exists():
        raise UsageError(f"there is no folder or file {name!r}; ids that are known here: {', '.join(RESNETS)}")
    ours = {"local_files_only": True, "trust_remote_code": False}  # nothing is fetched, and no code beside it is run
    config = transformers.AutoConfig.from_pretrained(name, **ours, **labels)
    return transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)


_LIBRARIES: dict[str, Callable[[ModuleType, str, int | None], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
}


def _check_known(source: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known)
        raise UsageError(f"{source} has no model {name!r}" + (f"; it has {', '.join(close)}" if close else ""))


def _from_file(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise UsageError(f"--model: there is no file {str(path)!r}")
    specification = importlib.util.spec_from_file_location(f"verified_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # copies and dataclasses look for their class there
    sys.path.insert(0, str(path.parent.resolve()))  # for what it imports from beside it, now and in its factory
    try:
        with _explained(f"--model: {path} cannot be imported"):
            specification.loader.exec_module(module)
        build = getattr(module, factory, None)
        if not callable(build):
            raise UsageError(f"--model: {path} has no function {factory!r}")
        with _explained(f"--model: {factory}() of {path} failed"):
            model = build()
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model: {factory}() of {path} must return an nn.Module, got {type(model).__name__}")
    return model
