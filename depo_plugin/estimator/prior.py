"""Known pass rates to start from: another run's scores (`depo score`), or rates measured before the run.

One JSON object a line: {"prompt", "label"?, "pass_rate", "n"?}. The prompt as the policy sees it; n: responses that
the rate was measured on (default 8).
"""

from pathlib import Path
from typing import NamedTuple

from depo_plugin import json_lines

DEFAULT_N = 8


class KnownRate(NamedTuple):
    """A prompt's pass rate in [0, 1], known from n > 0 responses."""

    prompt: str
    label: str
    pass_rate: float
    n: float


def read(path: str) -> list[KnownRate]:
    """Return the rates of a file. Raises LineError, and OSError if it cannot be opened."""
    found = []
    for number, row in json_lines.read(Path(path)):
        with json_lines.fields(Path(path), number):
            prompt, label = json_lines.text(row, "prompt"), str(row.get("label", ""))
            rate, n = float(row["pass_rate"]), float(row.get("n", DEFAULT_N))
            if not (0 <= rate <= 1 and 0 < n < float("inf")):
                raise ValueError(f"pass_rate {rate:g} must be from 0 to 1, and n {n:g} above 0")
        found.append(KnownRate(prompt, label, rate, n))
    if not found:
        raise json_lines.LineError(f"{path}, no line")
    return found
