"""Summarise a quickstart run in five lines, from steps.jsonl and rollouts.jsonl in its folder, and as a page."""

import json
import subprocess
import sys
from collections import defaultdict
from math import isnan, nan
from pathlib import Path
from statistics import fmean, median


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def eval_pass_rate(metrics: dict) -> float:
    """Return the mean pass@1 over OpenRLHF's evaluation levels (eval_<datasource>_pass1)."""
    return fmean(value for name, value in metrics.items() if name.endswith("_pass1"))


def problem_of(prompt: str) -> str:
    """Return the problem in a prompt: its last line. A template puts examples before it."""
    return prompt.rpartition("\n")[2]


def training_groups(out: Path, group_size: int) -> list[list[float]]:
    """Return the rewards of every group that was rolled out for training, in order of completion."""
    held_out = {row["input"] for row in read_rows(out / "data" / "eval.jsonl")}
    open_groups, groups = defaultdict(list), []
    for row in read_rows(out / "rollouts.jsonl"):
        problem = problem_of(row["prompt"])
        if problem in held_out:
            continue
        open_groups[problem].append(row["reward"])
        if len(open_groups[problem]) == group_size:
            groups.append(open_groups.pop(problem))
    return groups


def has_signal(rewards: list[float]) -> bool:
    """Return whether a group's rewards differ."""
    return max(rewards) > min(rewards)


def column(rows: list[dict], name: str) -> list[float]:
    """Return a metric of each row; NaN for a row without it, for example a step whose estimator did not answer."""
    return [row.get(name, nan) for row in rows]


def unfiltered_ratio(rows: list[dict]) -> list[float]:
    """Return the estimated share of groups with signal without the filter, one per row.

    The share is ratio / gain. It is NaN if a row lacks these metrics, or if no group had a signal: then both are 0.
    """
    pairs = zip(column(rows, "depo/effective_ratio"), column(rows, "depo/effective_gain"), strict=True)
    return [ratio / gain if gain else nan for ratio, gain in pairs]


def _known(values) -> list[float]:
    return [value for value in values if not isnan(value)]


def _mean(values, form: str = ".0%") -> str:
    known = _known(values)
    return f"{fmean(known):{form}}" if known else "-"


def lines(out: Path, method: str, warmup_steps: int, group_size: int) -> list[str]:
    """Return the five lines of the summary."""
    rows = read_rows(out / "steps.jsonl")
    steps = [row for row in rows if "eval" not in row]
    evals = [eval_pass_rate(row["eval"]) for row in rows if "eval" in row]
    groups = training_groups(out, group_size)
    ratio = _mean(map(has_signal, groups))
    if method == "depo":
        # Scores are asked for one batch earlier, so the step after the warm-up still keeps every prompt.
        before, after = steps[: warmup_steps + 1], steps[warmup_steps + 1 :]
        kept = f"{_mean(column(before, 'depo/keep_rate'))} in warm-up, {_mean(column(after, 'depo/keep_rate'))} after"
        ratio = f"{_mean(column(after, 'depo/effective_ratio'))} with the filter, " + (
            f"{_mean(unfiltered_ratio(after))} without (estimated on the same stream)"
        )
        saved = _known(column(steps, "depo/rollouts_saved"))[-1:]  # a running total
        more = f"{_mean(saved, '.0f')} beside the {len(groups) * group_size} made"
        rates = _known(column(steps, "depo/reward_unfiltered"))
    else:
        kept = "100% (no filter before the rollout)"
        trained = sum(row["rollout/num_samples"] for row in steps)
        more = f"{len(groups) * group_size - trained:.0f} thrown away after they were made, {trained:.0f} trained on"
        rates = [row["rollout/reward_mean"] for row in steps]
    ends = max(1, len(rates) // 8)
    held_out = f"; held-out problems {evals[0]:.3f} -> {evals[-1]:.3f}" if evals else ""
    seconds = median(row["timing/step_total"] for row in steps)
    return [
        f"steps                  {len(steps)}, median {seconds:.1f} s",
        f"keep rate              {kept}",
        f"groups with signal     {ratio}",
        f"{'dynamic would pay more' if method == 'depo' else 'rollouts              '} {more}",
        f"pass rate, first/last  {_mean(rates[:ends], '.3f')} -> {_mean(rates[-ends:], '.3f')} in training{held_out}",
    ]


def report(out: Path, method: str, warmup_steps: int, group_size: int) -> None:
    """Print the five lines; with DEPO also write the page of `depo report`, and print its summary and path."""
    print()
    print("\n".join(lines(out, method, warmup_steps, group_size)))
    if method in ("depo", "shadow"):
        print(flush=True)
        subprocess.run([sys.executable, "-m", "depo_plugin.commands.cli", "report", str(out)], check=False)
