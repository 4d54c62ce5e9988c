"""Options from a file: `fused-resnet train --config FILE`, a .toml file or the name of a shipped recipe."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from fused_resnet.options import UsageError
from fused_resnet.training.options import make_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"


def recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def with_config(argv: list[str]) -> list[str]:
    """`argv` with the entries of its `--config` file as options in front of all others, which override them.

    Args:
        argv: what follows the program's name; other commands than `train` are left alone.

    Raises:
        UsageError: a file, a key or a value that is no good; the message names the file and the key.
    """
    if argv[:1] != ["train"]:
        return argv
    rest, named = _without_config(argv[1:])
    if len(named) > 1:
        raise UsageError(f"--config is given {len(named)} times, and may be given once")
    if not named:
        return argv
    options = _options(named[0])
    # --config ends the list of a last option: a stray word behind it must not become one of its values
    return ["train", *options, f"--config={named[0]}", *rest]


def given(argv: list[str]) -> dict[str, Any]:
    """The options that `argv`, after `with_config`, holds, without those that are left to their defaults."""
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv[1:]))


def _without_config(tokens: list[str]) -> tuple[list[str], list[str]]:
    """The tokens without `--config F` and `--config=F`, and each F; one without F stays, for argparse to refuse."""
    rest, named = [], []
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            return [*rest, token, *tokens], named
        if token.startswith("--config="):
            named.append(token.removeprefix("--config="))
        elif token == "--config" and tokens and not tokens[0].startswith("-"):
            named.append(tokens.pop(0))
        else:
            rest.append(token)
    return rest, named


# --- the file ---------------------------------------------------------------------------------------------------------


def _options(name: str) -> list[str]:
    """The options that a file holds, as of a command line."""
    actions = {action.dest: action for action in make_parser()._actions}
    tokens, seen = [], set()
    for key, value in _read(name).items():
        place = f"--config {name}: {key}"
        dest = key.replace("-", "_")
        if dest == "config":
            raise UsageError(f"{place}: a config cannot name another")
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, n=1, cutoff=0)
            raise UsageError(f"{place}: no such option; the nearest is {near[0]}")
        if dest in seen:
            raise UsageError(f"{place}: given twice, with - and with _")
        seen.add(dest)
        tokens += _tokens(actions[dest], value, place)
    return tokens


def _read(name: str) -> dict[str, Any]:
    path = RECIPES / f"{name}.toml" if name in recipes() else Path(name)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        known = ", ".join(recipes())
        raise UsageError(f"--config {name}: no such file, and no such recipe; the recipes are {known}") from None
    except OSError as error:
        raise UsageError(f"--config {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {name}: not a text file in UTF-8") from error
    except ValueError as error:  # TOML's own, and Python's for a number of too many digits
        raise UsageError(f"--config {name}: not TOML: {error}") from error


def _tokens(action: argparse.Action, value: Any, place: str) -> list[str]:
    """One entry as of a command line."""
    option = action.option_strings[0]
    if isinstance(value, dict):
        raise UsageError(f"{place}: a table; options stand in no table")
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"{place}: expected true or false, got {value!r}")
        return action.option_strings[:1] if value else action.option_strings[1:]
    if action.nargs == "?" and isinstance(value, bool):  # the option without a value, or not at all
        return [option] if value else []
    if action.nargs != "*":
        if isinstance(value, list):
            raise UsageError(f"{place}: expected one value, got a list")
        return [f"{option}={_text(action, value, place)}"]
    values = value if isinstance(value, list) else [value]
    return [option, *(_listed(action, one, place) for one in values)]


def _listed(action: argparse.Action, value: Any, place: str) -> str:
    text = _text(action, value, place)
    if text.startswith("-"):
        raise UsageError(f"{place}: {text!r} begins with a -, and would be taken for an option")
    return text


def _text(action: argparse.Action, value: Any, place: str) -> str:
    """The value as of a command line, once the option has taken it: what is wrong is the file's fault."""
    kinds = str if action.type is None else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UsageError(f"{place}: expected {'text' if kinds is str else 'a number or text'}, got {value!r}")
    text = str(value)
    try:
        checked = text if action.type is None else action.type(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"{place}: {error}") from error
    if action.choices is not None and checked not in action.choices:
        raise UsageError(f"{place}: expected one of {', '.join(action.choices)}, got {text!r}")
    return text
