"""A run's files, read line by line: what is in them so far, also while the run still writes.

    find(RUN) -> folder;   RunFiles(folder).update() -> what is new;   .steps, .rows, .groups, .settings

docs/metrics.md explains the files. Suffix N: one entry per group.
"""

import json
import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

METRICS, GROUPS, SETTINGS = "metrics.jsonl", "groups.jsonl", "settings.json"
REASONS = (None, "warmup", "passed", "explored", "forced", "unscored", "rejected", "shadow")
_REASON_NUMBERS = {reason: number for number, reason in enumerate(REASONS)}


class NoRunError(Exception):
    """A folder holds no run; the text says what was looked for."""


class SeveralRunsError(NoRunError):
    """A folder holds several runs; the text names them."""


def find(run: Path) -> Path:
    """Return the folder with the run's files: RUN/depo, the only such folder below RUN at any depth, or RUN itself.

    Raise NoRunError if there is none, SeveralRunsError if there are more.
    """
    looked = f"looked for depo/{METRICS} in this folder and in every folder below it"
    if not run.is_dir():
        raise NoRunError(f"{run}: there is no such folder ({looked}).")
    for folder in (run / "depo", run):
        if _holds(folder) and folder.name == "depo":
            return folder
    found = sorted(Path(folder) / "depo" for folder, names, _ in os.walk(run) if "depo" in names)
    found = [folder for folder in found if _holds(folder)]
    if len(found) > 1:
        listed = ", ".join(str(folder.parent) for folder in found[:5])
        raise SeveralRunsError(f"{run}: {len(found)} runs are below it; name one of them: {listed}.")
    if not found:
        raise NoRunError(f"{run}: no data of a DEPO run ({looked}).")
    return found[0]


def _holds(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS, GROUPS, SETTINGS))


def printable(text: Any) -> str:
    """Return a name on one line, without control characters: a data source is the user's own text."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in words)


class Lines:
    """The whole lines of a file of JSON objects; each is given out once. A last line without its end is left."""

    def __init__(self, path: Path):
        """Take the path; the file may not exist yet."""
        self.path = path
        self.bad = 0  # lines that are no JSON object with a step
        self._offset = 0
        self._inode: int | None = None

    def replaced(self) -> bool:
        """Return whether the file that was read is gone: removed, or another or a shorter one is in its place."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return self._offset > 0
        known, self._inode = self._inode, found.st_ino
        return known not in (None, found.st_ino) or found.st_size < self._offset

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the lines that were written since the last call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:  # a line that a kill cut off, and what was appended to it
                    row = None
                if isinstance(row, dict) and type(row.get("step")) is int:
                    yield row
                else:
                    self.bad += 1


class Groups:
    """The groups of a run as columns. Steps never fall: after a resume, what was read of later steps is forgotten."""

    NUMBERS = ("p", "v", "q", "y", "n", "tokens")
    NAMES = ("step", "reason", "source", "signal", "rejected", *NUMBERS)

    def __init__(self):
        """Start without groups."""
        self.sources: list[str] = []  # by number, in order of appearance
        self._source_numbers: dict[str, int] = {}
        self._columns: tuple[array, ...] = tuple(array(kind) for kind in "qbhbb" + "d" * len(self.NUMBERS))
        self._of_step: dict[Any, int] = {}  # key -> place, of the newest step only

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column, (N,). `source` is a place in sources, or -1; `reason` a place in REASONS; NaN: unknown."""
        return np.array(self._columns[self.NAMES.index(name)])

    def add(self, row: dict[str, Any]) -> None:
        """Take one line of groups.jsonl."""
        steps, step = self._columns[0], row["step"]
        if not steps or step != steps[-1]:
            keep = bisect_left(steps, step)
            for column in self._columns:
                del column[keep:]
            self._of_step = {}
        numbers = [_number(row.get(name)) for name in self.NUMBERS]
        signal, reason = row.get("signal"), row.get("reason")
        if not isinstance(signal, bool):
            signal = 0 < numbers[3] < 1
        known = _REASON_NUMBERS.get(reason, 0) if isinstance(reason, str) else 0
        values = (step, known, self._source(row.get("source")), signal, row.get("rejected") is True, *numbers)
        place = self._of_step.setdefault(str(row.get("key", len(steps))), len(steps))
        if place == len(steps):
            for column, value in zip(self._columns, values, strict=True):
                column.append(value)
        else:
            for column, value in zip(self._columns, values, strict=True):
                column[place] = value

    def _source(self, name: Any) -> int:
        if name is None:
            return -1
        name = str(name)
        if name not in self._source_numbers and len(self.sources) < 2**15 - 1:
            self._source_numbers[name] = len(self.sources)
            self.sources.append(name)
        return self._source_numbers.get(name, -1)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


class RunFiles:
    """What is known of a run so far.

    rows: the metrics of each step, without its number; steps: their steps, rising.
    groups: see Groups; empty if groups.jsonl is missing.
    settings: the content of settings.json, {} if it is missing or no JSON object.
    """

    def __init__(self, folder: Path):
        """Take the folder that find() returned. Nothing is read before update()."""
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self.steps: list[int] = []
        self.rows: list[dict[str, float]] = []
        self.groups = Groups()
        self.settings: dict[str, Any] = {}
        self._metrics, self._groups = Lines(self.folder / METRICS), Lines(self.folder / GROUPS)

    @property
    def bad_lines(self) -> int:
        """Return how many whole lines could not be used."""
        return self._metrics.bad + self._groups.bad

    def update(self) -> bool:
        """Read what is new. Return whether there are new steps. A run that was started anew is read from its start."""
        if self._metrics.replaced() or self._groups.replaced():
            self._forget()
        new = False
        for row in self._metrics.new():
            step = row.pop("step")
            place = bisect_left(self.steps, step)
            del self.steps[place:], self.rows[place:]
            self.steps.append(step)
            self.rows.append({str(name): value for name, value in row.items() if isinstance(value, int | float)})
            new = True
        for row in self._groups.new():
            self.groups.add(row)
        if not self.settings:
            try:
                found = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
                self.settings = found if isinstance(found, dict) else {}
            except (OSError, ValueError):
                pass
        return new

    def setting(self, *names: str) -> Any:
        """Return a value of settings.json, None if it is not there. names: for example "depo", "filter", "rule"."""
        value: Any = self.settings
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def names_of(runs: list[Path]) -> list[str]:
    """Return a name for each run: its folder's, with as many parents as it takes to tell all apart."""
    parts = [path.resolve().parts for path in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [printable("/".join(one[-depth:])) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]
