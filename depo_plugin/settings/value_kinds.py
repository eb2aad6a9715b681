"""The kinds of values that a setting may have. Each kind has a text and a function that reads a YAML or flag value."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """The values that a setting may have."""

    allowed: str  # these values in words, to follow "must be"
    read: Callable[[Any], Any]  # given value -> stored value; raises ValueError or OverflowError if it is not allowed
    metavar: str | tuple[str, ...]  # what --help shows in place of a value
    choices: tuple[str, ...] = ()  # the values that are words


def _check(ok: bool) -> None:
    if not ok:
        raise ValueError


def number(allowed: str, accept: Callable[[float], bool]) -> Kind:
    """Return the kind of a finite number that `accept` allows. A bool is refused, although Python's bool is an int."""

    def read(value: Any) -> float:
        _check(isinstance(value, int | float) and not isinstance(value, bool))
        _check(math.isfinite(value) and accept(value))
        return float(value)

    return Kind(allowed, read, "X")


def integer(minimum: int) -> Kind:
    """Return the kind of a whole number of at least `minimum`."""

    def read(value: Any) -> int:
        _check(isinstance(value, int) and not isinstance(value, bool) and value >= minimum)
        return value

    return Kind(f"a whole number of at least {minimum}", read, "N")


def choice(*words: str) -> Kind:
    """Return the kind of one of these words."""

    def read(value: Any) -> str:
        _check(isinstance(value, str) and value in words)
        return value

    return Kind(f"one of {', '.join(words)}", read, "{" + ",".join(words) + "}", words)


def choice_or_file(suffix: str, *words: str) -> Kind:
    """Return the kind of one of these words, or of a file's path, which is made absolute: workers run elsewhere."""

    def read(value: Any) -> str:
        _check(isinstance(value, str) and (value in words or value.endswith(suffix)))
        return value if value in words else os.path.abspath(value)

    listed = ", ".join(words)
    return Kind(f"one of {listed}, or a FILE{suffix}", read, "{" + ",".join([*words, f"FILE{suffix}"]) + "}", words)


def or_none(kind: Kind) -> Kind:
    """Return the kind that also allows None: null in YAML, none on the command line."""

    def read(value: Any) -> Any:
        return None if value is None or value in ("none", "null") else kind.read(value)

    return Kind(f"{kind.allowed}, or none", read, kind.metavar, ("none",))


def _read_switch(value: Any) -> bool:
    _check(isinstance(value, bool))
    return value


def _read_text(value: Any) -> str:
    _check(isinstance(value, str) and bool(value.strip()))
    return value


def _read_range(value: Any) -> tuple[float, float]:
    _check(isinstance(value, list | tuple) and len(value) == 2)
    low, high = (_FINITE.read(bound) for bound in value)
    _check(low < high)
    return low, high


def _read_kappa(value: Any) -> float | str:
    if value in ("fit", "inf"):
        return value
    return "inf" if value == math.inf else POSITIVE.read(value)  # YAML's own spelling is .inf


_FINITE = number("a number", lambda x: True)
FRACTION = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
SHARE = number("a number above 0, up to 1", lambda x: 0 < x <= 1)
POSITIVE = number("a number above 0", lambda x: x > 0)
NOT_NEGATIVE = number("a number of at least 0", lambda x: x >= 0)
SWITCH = Kind("true or false", _read_switch, "true|false")
TEXT = Kind("a path or a hub name", _read_text, "PATH")
FILE = Kind(
    "a path", lambda value: os.path.abspath(os.path.expanduser(_read_text(value))), "FILE"
)  # absolute: workers run elsewhere
RANGE = Kind("two numbers LO HI, LO below HI", _read_range, ("LO", "HI"))
DISCOUNT = Kind(
    "fit, or a number above 0, up to 1",
    lambda value: value if value == "fit" else SHARE.read(value),
    "{fit,X}",
    ("fit",),
)
KAPPA = Kind("fit, inf, or a number above 0", _read_kappa, "{fit,inf,X}", ("fit", "inf"))
