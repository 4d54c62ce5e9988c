"""Types of argparse: what a value of an option may be, with a message that says so."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def count(text: str) -> int:
    """A whole number of 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """What torch's generators take on every platform."""
    value = count(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**63, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A number of 0 or more."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value


def above_zero(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def share_above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def share_below_one(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 and below 1, got {text!r}")
    return value


def one_of(*names: str) -> Callable[[str], str]:
    """One of `names`, where argparse's `choices` cannot say it: behind `or_none`."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected {', '.join(names)} or none, got {text!r}")
        return text

    return check


def or_none(check: Callable[[str], T]) -> Callable[[str], T | None]:
    """`check`, or the word `none`, by which a command line takes back what a recipe has set."""
    return lambda text: None if text == "none" else check(text)


def _number(text: str) -> float:
    """A finite number or a quotient such as 1/3; NaN for anything else, which fits no bound."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        return math.nan
    return value if math.isfinite(value) else math.nan
