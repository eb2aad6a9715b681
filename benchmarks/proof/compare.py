"""From rows to what is claimed: final scores, paired differences with their errors, rollouts to the same score, goals.

A score is a held-out pass rate, the mean over levels: of one group of levels ("easy", "learnable"), or of "all".
Suffixes: S = seeds, E = evaluations.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

SCORES = ("learnable", "easy", "all")
LAST = 2  # evaluations whose mean is a run's final score
COST_GOAL = 0.65  # rollouts to GRPO's final score on learnable levels, as a share of GRPO's
LEVEL_GOAL = 0.01  # most that a level may lose against GRPO, beyond two standard errors


class Difference(NamedTuple):
    """A mean of paired differences, and its standard error; NaN with one seed."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


def score(rates: dict[str, float], groups: dict[str, str], name: str) -> float:
    """Return one score from the pass rates by level. groups: level -> its group; name: one of SCORES, or a level."""
    if name in rates:
        return rates[name]
    return float(np.mean([rate for level, rate in rates.items() if name in ("all", groups[level])]))


def final(row: dict, groups: dict[str, str], name: str) -> float:
    """Return a run's final score: the mean of its last LAST evaluations."""
    return float(np.mean([score(found["levels"], groups, name) for found in row["evals"][-LAST:]]))


def mean_error(values: Sequence[float]) -> Difference:
    """Return the mean and its standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(float(np.mean(values)), float(error))


def paired(rows: dict[int, dict], base: dict[int, dict], value: Callable[[dict], float]) -> Difference:
    """Return value(row) − value(base row), over the seeds that both have. rows, base: seed -> row."""
    return mean_error([value(rows[seed]) - value(base[seed]) for seed in sorted(set(rows) & set(base))])


def curve(rows: Sequence[dict], groups: dict[str, str], name: str, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Return cost_E and score_SE of runs; cost_E is the mean over seeds, which evaluate at the same steps."""
    count = min(len(row["evals"]) for row in rows)
    cost_SE = np.array([[found[cost] for found in row["evals"][:count]] for row in rows])
    score_SE = np.array([[score(found["levels"], groups, name) for found in row["evals"][:count]] for row in rows])
    return cost_SE.mean(0), score_SE


def cost_to_reach(cost_E: np.ndarray, score_E: np.ndarray, target: float) -> float:
    """Return the cost at which a curve first reaches the target, by linear interpolation; NaN if it never does."""
    reached = np.flatnonzero(score_E >= target)
    if not len(reached):
        return math.nan
    i = reached[0]
    if i == 0:
        return float(cost_E[0])
    share = (target - score_E[i - 1]) / (score_E[i] - score_E[i - 1])
    return float(cost_E[i - 1] + share * (cost_E[i] - cost_E[i - 1]))


def cost_ratio(
    rows: dict[int, dict], base: dict[int, dict], groups: dict[str, str], name: str, cost: str
) -> Difference:
    """Return the cost to the base's final score as a share of the base's whole cost, with its jackknife error.

    Of the seeds' mean curves, because a single one is too noisy to say when it crosses a line. Before averaging, a
    curve is smoothed over neighbouring evaluations as a final score is (a mean of LAST), and the base's cost is that
    of its own smoothed end.
    """
    seeds = sorted(set(rows) & set(base))

    def smoothed(runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        cost_E, score_SE = curve(runs, groups, name, cost)
        kernel = np.full(LAST, 1 / LAST)
        return np.convolve(cost_E, kernel, "valid"), np.convolve(score_SE.mean(0), kernel, "valid")

    def ratio(chosen: list[int]) -> float:
        base_cost_E, base_score_E = smoothed([base[seed] for seed in chosen])
        return cost_to_reach(*smoothed([rows[seed] for seed in chosen]), base_score_E[-1]) / base_cost_E[-1]

    left_out = [ratio([other for other in seeds if other != seed]) for seed in seeds] if len(seeds) > 1 else []
    error = math.sqrt((len(seeds) - 1) * np.var(left_out)) if left_out else math.nan
    return Difference(ratio(seeds), error)


def signal_share(row: dict) -> float:
    """Return the share of the groups that were rolled out which had a signal."""
    return sum(row["steps"]["signal"]) / sum(row["steps"]["groups"])


def table(rows: dict[str, dict[int, dict]], groups: dict[str, str], labels: dict[str, str]) -> list[str]:
    """Return the table of one batch size as Markdown. rows: method -> seed -> row; the first method is the base."""
    base = rows[next(iter(rows))]
    lines = [
        "| method | seeds | groups with a signal | learnable levels | easy levels | all levels | rollouts to GRPO's "
        "final learnable score |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in rows.items():
        cells = [labels[method], str(len(runs)), f"{np.mean([signal_share(row) for row in runs.values()]):.2f}"]
        for name in SCORES:
            found = np.mean([final(row, groups, name) for row in runs.values()])
            against = "" if runs is base else f" ({paired(runs, base, lambda row, n=name: final(row, groups, n))})"
            cells.append(f"{found:.3f}{against}")
        ratio = cost_ratio(runs, base, groups, "learnable", "rollouts")
        cells.append("not reached" if math.isnan(ratio.mean) else f"{ratio.mean:.2f}x" + _spread(ratio))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(found: Difference) -> str:
    return "" if math.isnan(found.error) else f" ± {found.error:.2f}"


def goals(rows: dict[str, dict[int, dict]], groups: dict[str, str], method: str) -> list[tuple[bool, str]]:
    """Return whether each goal of a method is met, and a line that says so with its figures."""
    runs, base = rows[method], rows["grpo"]
    ratio = cost_ratio(runs, base, groups, "learnable", "rollouts")
    found = [
        (ratio.mean <= COST_GOAL, f"GRPO's final learnable score with {ratio.mean:.2f}x its rollouts{_spread(ratio)}")
    ]
    by_level = {level: paired(runs, base, lambda row, n=level: final(row, groups, n)) for level in groups}
    behind = {level: d for level, d in by_level.items() if d.mean + 2 * np.nan_to_num(d.error) < -LEVEL_GOAL}
    worst = min(by_level, key=lambda level: by_level[level].mean)
    found.append((not behind, f"no level behind by more than a point: worst is {worst} with {by_level[worst]}"))
    ahead = paired(runs, base, lambda row: final(row, groups, "all"))
    found.append((ahead.mean > 0, f"all levels against GRPO: {ahead}"))
    if "dynamic" in rows:
        ahead = paired(runs, rows["dynamic"], lambda row: final(row, groups, "all"))
        found.append((ahead.mean > 0, f"all levels against dynamic sampling: {ahead}"))
    return found
