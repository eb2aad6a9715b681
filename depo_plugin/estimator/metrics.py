"""The metrics of each step: names and units, how well predictions matched outcomes, the files, the console's line.

Suffix: B = groups of one step.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

# Every metric that the estimator returns, without its prefix "depo/". A metric that is undefined in a step (no prompt
# was scanned, only one class occurred) is left out of that step, so that no logger gets a NaN.
NAMES = {
    "scanned": "prompts scored to plan the batches that this step's groups come from",
    "kept": "groups of this step that were planned by the filter",
    "explored": "of these, kept although the rule rejected them (exploration)",
    "forced": "of these, taken to fill the batch up",
    "unscored": "of these, kept because the estimator gave no score",
    "keep_rate": "kept / scanned",
    "too_easy": "of the candidates rejected for these batches, the share with a predicted pass rate >= 0.5",
    "too_hard": "of the candidates rejected for these batches, the share with a predicted pass rate < 0.5",
    "effective_ratio": "groups with non-zero advantage / groups",
    "all_right": "groups without a signal and with an observed pass rate >= 0.5 / groups",
    "all_wrong": "groups without a signal and with an observed pass rate < 0.5 / groups",
    "effective_gain": "effective_ratio / estimated effective ratio of the unfiltered stream",
    "shadow_keep_rate": "shadow mode: share of all groups so far that the filter would have kept",
    "shadow_effective_ratio": "shadow mode: share of those that had a signal",
    "shadow_unfiltered_ratio": "shadow mode: share of all groups so far that had a signal",
    "rollouts_saved": "total of responses that dynamic sampling would have paid more for the same effective groups",
    "distinct": "total of distinct prompts trained",
    "reward_unfiltered": "estimated mean pass rate of the unfiltered stream, over about the last ten steps, in [0, 1]",
    "kappa": "samples that the text's prediction is worth",
    "ability": "the policy's ability, a logit; 0 before the first step",
    "pred_mean": "mean predicted pass rate when the decision was made",
    "target_mean": "mean observed pass rate",
    "mae": "mean |predicted - observed| pass rate",
    "brier": "mean (predicted - observed)^2",
    "zero_auc": "AUC of (1 - V) for groups without any signal",
    "spearman": "rank correlation of predicted and observed pass rate",
    "loss": "estimator's loss in the last finished update, summed with its weights",
    "loss_score": "BCE of predicted and observed pass rate",
    "loss_distill": "BCE of predicted and observed confidence of the policy",
    "loss_rank": "pairwise ranking loss",
    "grad_norm": "norm of the estimator's gradient before clipping",
    "updates": "total of steps the estimator had learned from before this one",
    "empty_steps": "total of steps without a label to learn from",
    "labels_dropped": "total of groups that are not learned from, because a score is NaN or infinite",
    "unmatched": "groups of this step whose decision was not on record (weight 1)",
    "kept/SOURCE": "prompts of that data source kept since the last step; these three with two or more data sources",
    "rejected/SOURCE": "prompts of that data source rejected since the last step",
    "pass_rate/SOURCE": "mean observed pass rate of that data source",
    "read_rate": "new prompts of this step's lengths that the encoder reads a second; not in mode finetune",
    "time_score": "seconds spent scoring since the last step",
    "time_update": "seconds the last finished update took",
    "time_blocked": "seconds that training waited for the estimator",
    "time_step": "seconds since the last step's metrics; not in the first step of a process",
}


class Judgement(NamedTuple):
    """What the estimator says of one step's groups.

    metrics: by name (NAMES), without the prefix depo/.
    groups: for each group its line of groups.jsonl, without the step.
    """

    metrics: dict[str, float]
    groups: list[dict[str, Any]]


def _ranks(x_B: np.ndarray) -> np.ndarray:
    """Return the ranks 1..B of x_B. Equal values get their mean rank."""
    _, inverse, counts = np.unique(x_B, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def auc(score_B: np.ndarray, positive_B: np.ndarray) -> float | None:
    """Return P(score of a positive > score of a negative), ties counting half. Return None if a class is empty.

    Source: the Mann-Whitney U statistic, U = R₊ − n₊(n₊ + 1)/2, AUC = U / (n₊·n₋), R₊ the positives' rank sum.
    """
    positive_B = np.asarray(positive_B, bool)
    n_positive = int(positive_B.sum())
    n_negative = positive_B.size - n_positive
    if not n_positive or not n_negative:
        return None
    rank_sum = _ranks(np.asarray(score_B, np.float64))[positive_B].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def brier(p_B: np.ndarray, y_B: np.ndarray) -> float:
    """Return the mean of (p − y)²; p, y in [0, 1], B ≥ 1."""
    return float(np.mean((np.asarray(p_B, np.float64) - np.asarray(y_B, np.float64)) ** 2))


def spearman(x_B: np.ndarray, y_B: np.ndarray) -> float | None:
    """Return the rank correlation in [-1, 1], or None if x or y is constant."""
    middle = (len(x_B) + 1) / 2
    x, y = (_ranks(np.asarray(v, np.float64)) - middle for v in (x_B, y_B))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else None


def prediction_metrics(p_B: np.ndarray, v_B: np.ndarray, y_B: np.ndarray, signal_B: np.ndarray) -> dict[str, float]:
    """Return the metrics that compare predictions made before learning with outcomes; undefined ones are left out.

    p_B: predicted pass rates; v_B: predicted chances of any signal, both in [0, 1], or NaN if nothing was predicted;
    y_B: observed pass rates in [0, 1]; signal_B: whether the group's rewards differ. B ≥ 1.
    """
    signal_B = np.asarray(signal_B, bool)
    known_B = np.isfinite(p_B)
    found: dict[str, float | None] = {}
    if known_B.any():
        p, v, y, signal = p_B[known_B], v_B[known_B], y_B[known_B], signal_B[known_B]
        found = {
            "pred_mean": float(np.mean(p)),
            "mae": float(np.mean(np.abs(p - y))),
            "brier": brier(p, y),
            "zero_auc": auc(1 - v, ~signal),
            "spearman": spearman(p, y),
        }
    found |= {
        "target_mean": float(np.mean(y_B)),
        "effective_ratio": float(np.mean(signal_B)),
        "all_right": float(np.mean(~signal_B & (y_B >= 0.5))),
        "all_wrong": float(np.mean(~signal_B & (y_B < 0.5))),
    }
    return {name: value for name, value in found.items() if value is not None}


def shadow_line(metrics: Mapping[str, float]) -> str | None:
    """Return what the filter would have done so far, in one sentence; None without the metrics of shadow mode."""
    if "shadow_keep_rate" not in metrics:
        return None
    kept, ratio, unfiltered = (metrics[f"shadow_{x}"] for x in ("keep_rate", "effective_ratio", "unfiltered_ratio"))
    return (
        f"so far the filter would have kept {kept:.0%} of the groups; {ratio:.0%} of those had a signal, "
        f"{unfiltered:.0%} of all groups"
    )


def said(step: int, rows: Sequence[Mapping[str, float]]) -> str:
    """Return the console's line of a step: means over the last steps. What no step has is left out.

    rows: the metrics of each of these steps, by name without the prefix depo/; at least one step.
    """

    def known(name: str) -> list[float]:
        return [row[name] for row in rows if name in row]

    parts, ratios = [], known("effective_ratio")
    if shadow := next((line for row in reversed(rows) if (line := shadow_line(row))), None):
        parts.append(shadow)
    else:
        if scanned := sum(known("scanned")):
            parts.append(f"rolled out {sum(known('kept')) / scanned:.0%} of the prompts it looked at")
        if ratios:
            unfiltered = [row["effective_ratio"] / row["effective_gain"] for row in rows if row.get("effective_gain")]
            beside = f" (about {fmean(unfiltered):.0%} without the filter)" if unfiltered else ""
            parts.append(f"{fmean(ratios):.0%} of the groups had a signal{beside}")
    if ratios:
        if predicted := known("pred_mean"):  # none if the prompts were kept without a score
            parts.append(f"predicted pass rate {fmean(predicted):.2f}, observed {fmean(known('target_mean')):.2f}")
    else:
        parts.append("the estimator has judged no group")
    if waited := known("time_blocked"):
        parts.append(f"waited {fmean(waited):.1f} s a step for the estimator")
    return f"DEPO: step {step}: {'; '.join(parts)}"


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Append data to an unbuffered file. Raise OSError, with nothing appended, if the disk is full."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)
        raise


class MetricsFile:
    """A file with one JSON object per line. An append writes whole lines before it returns, or nothing."""

    def __init__(self, path: Path):
        """Take the path. The first append creates folder and file."""
        self.path = Path(path)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add one line for each row. Values that are not finite become null, because JSON has no NaN.

        Raise OSError, with nothing added, if not all lines can be written.
        """
        if not rows:
            return
        lines = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows
        ]
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            append_whole(file, data)
