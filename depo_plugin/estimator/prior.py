"""Known pass rates to start from: another run's scores (`depo score`), or rates measured before the run.

One JSON object a line: {"prompt", "label"?, "pass_rate", "n"?}. The prompt as the policy sees it; n: responses that
the rate was measured on (default 8).
"""

import json
from pathlib import Path
from typing import NamedTuple

DEFAULT_N = 8


class PriorError(ValueError):
    """The file cannot be used; the text names the line and what is wrong there."""


class KnownRate(NamedTuple):
    """A prompt's pass rate in [0, 1], known from n > 0 responses."""

    prompt: str
    label: str
    pass_rate: float
    n: float


def read(path: str) -> list[KnownRate]:
    """Return the rates of a file. Raises PriorError."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # not UTF-8, or no path at all
        raise PriorError(f"cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            known = KnownRate(
                str(row["prompt"]), str(row.get("label", "")), float(row["pass_rate"]), float(row.get("n", DEFAULT_N))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PriorError(f"line {number}: {type(error).__name__}: {error}") from None
        if not (0 <= known.pass_rate <= 1 and 0 < known.n < float("inf")):
            text = f"pass_rate {known.pass_rate:g} must be from 0 to 1, and n {known.n:g} above 0"
            raise PriorError(f"line {number}: {text}")
        found.append(known)
    if not found:
        raise PriorError("has no line")
    return found
