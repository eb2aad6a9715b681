"""Logs of real runs, whatever wrote them, as steps of groups.

Formats, one JSON object a line, plain or .gz:
    event log       {"step", "prompt", "label"?, "k", "n", "source"?}      k of n responses were right
    groups.jsonl    DEPO's own log of a run (docs/metrics.md)
    rollouts.jsonl  {"prompt", "label"?, "reward"} a response, as the quickstart writes it
    pool            {"prompt", "pass_rate", "n"?}                          met in random order; groups are drawn
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depo_plugin.json_lines import LineError, fields
from depo_plugin.json_lines import read as read_lines

logger = logging.getLogger(__name__)


class Group(NamedTuple):
    """One group of responses. k: how many were right, may be fractional; n: how many there were."""

    prompt: str
    label: str
    source: str
    k: float
    n: int


def read(path: Path, *, group_size: int, batch: int, passes: int, seed: int) -> list[list[Group]]:
    """Return the groups of a log by step, in order.

    group_size: responses of a group, if the log does not say (pools, rollouts.jsonl); batch: groups of a step, if the
    log has no steps; passes: over a pool; seed: of a pool's order and draws. Raises LineError.
    """
    rows = list(read_lines(path))
    if not rows:
        raise LineError(f"{path}: no line. Give a log with one JSON object a line.")
    number, first = rows[0]
    if "pass_rate" in first:
        return _chunks(_pool(path, rows, group_size, passes, seed), batch)
    if "reward" in first:
        return _chunks(_rollouts(path, rows, group_size), batch)
    if "step" in first and ({"k", "n"} <= set(first) or {"y", "n", "key"} <= set(first)):
        if steps := _steps(path, rows):
            return steps
        raise LineError(f"{path}: no group's prompt is in the file.")
    raise LineError(
        f"{path}, line {number}: none of the known formats. A line needs step, prompt, k and n (an event log or "
        "groups.jsonl), or prompt and reward (rollouts.jsonl), or prompt and pass_rate (a pool)."
    )


def _steps(path: Path, rows: list[tuple[int, dict]]) -> list[list[Group]]:
    """Return the steps of an event log or of groups.jsonl.

    In groups.jsonl a prompt's text stands in one line of its key; groups whose text is missing are left out, with a
    warning. A resumed run writes steps again: the last line of a step and key counts, and later steps are forgotten.
    """
    with_text = ((row["key"], row) for _, row in rows if "key" in row and "prompt" in row)
    texts = {str(key): (str(row["prompt"]), str(row.get("label", ""))) for key, row in with_text}
    steps: dict[int, dict[Any, Group]] = defaultdict(dict)
    missing, newest = 0, -1
    for number, row in rows:
        key = None if row.get("key") is None else str(row["key"])
        with fields(path, number):
            n = int(row["n"])
            k = float(row["k"] if "k" in row else row["y"] * n)
            step = int(row["step"])
            if not (n >= 1 and 0 <= k <= n):
                raise ValueError(f"k {k:g} of n {n}: k must be from 0 to n, and n at least 1")
            text = texts.get(key) if key is not None else (str(row["prompt"]), str(row.get("label", "")))
        if key is not None and step < newest:
            steps = defaultdict(dict, {at: groups for at, groups in steps.items() if at < step})
        newest = step
        if text is None:
            missing += 1
        else:
            steps[step][number if key is None else key] = Group(*text, str(row.get("source", "")), k, n)
    if missing:
        logger.warning("%s: %d groups are left out: no line has the prompt of their key.", path, missing)
    return [list(steps[step].values()) for step in sorted(steps)]


def _rollouts(path: Path, rows: Iterable[tuple[int, dict]], group_size: int) -> list[Group]:
    """Return the groups of single responses in the order in which they were completed."""
    open_groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    groups = []
    for number, row in rows:
        with fields(path, number):
            key, reward = (str(row["prompt"]), str(row.get("label", ""))), float(row["reward"])
            if not math.isfinite(reward):
                raise ValueError(f"reward {reward} is no number")
        open_groups[key].append(min(max(reward, 0.0), 1.0))
        if len(open_groups[key]) == group_size:
            groups.append(Group(*key, "", sum(open_groups.pop(key)), group_size))
    if not groups:
        most = max(map(len, open_groups.values()))
        text = f"no prompt has {group_size} responses, the most is {most}. Give their number with --group-size."
        raise LineError(f"{path}: {text}")
    if open_groups:
        text = "%s: %d responses are left out: their prompts have fewer than --group-size %d."
        logger.warning(text, path, sum(map(len, open_groups.values())), group_size)
    return groups


def _pool(path: Path, rows: Iterable[tuple[int, dict]], group_size: int, passes: int, seed: int) -> list[Group]:
    """Return groups drawn from a pool's pass rates, pass after pass in a new order.

    The first n of a prompt says how exact its rate is; a drawn group has group_size responses.
    """
    pool = []
    for number, row in rows:
        with fields(path, number):
            prompt, rate = str(row["prompt"]), float(row["pass_rate"])
            if not 0 <= rate <= 1:
                raise ValueError(f"pass_rate {rate:g} must be from 0 to 1")
        pool.append((prompt, str(row.get("label", "")), str(row.get("source", "")), rate))
    rng = np.random.default_rng(seed)
    order = [pool[i] for _ in range(passes) for i in rng.permutation(len(pool))]
    return [
        Group(p, label, source, float(rng.binomial(group_size, rate)), group_size) for p, label, source, rate in order
    ]


def _chunks(groups: list[Group], size: int) -> list[list[Group]]:
    return [groups[i : i + size] for i in range(0, len(groups), size)]
