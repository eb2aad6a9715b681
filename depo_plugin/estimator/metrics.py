"""The metrics of each step: their names and units, how well predictions matched outcomes, and the JSON-lines file.

Suffix: B = groups of one step.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

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
    "effective_ratio": "groups with non-zero advantage / groups",
    "effective_gain": "effective_ratio / estimated effective ratio of the unfiltered stream",
    "rollouts_saved": "total of responses that dynamic sampling would have paid more for the same effective groups",
    "distinct": "total of distinct prompts trained",
    "reward_unfiltered": "estimated mean pass rate of the unfiltered stream, in [0, 1]",
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
    "time_score": "seconds spent scoring since the last step",
    "time_update": "seconds the last finished update took",
    "time_blocked": "seconds that training waited for the estimator",
}


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

    p_B: predicted pass rates; v_B: predicted chances of any signal; y_B: observed pass rates, all in [0, 1];
    signal_B: whether the group's rewards differ. B ≥ 1.
    """
    found = {
        "pred_mean": float(np.mean(p_B)),
        "target_mean": float(np.mean(y_B)),
        "mae": float(np.mean(np.abs(p_B - y_B))),
        "brier": brier(p_B, y_B),
        "zero_auc": auc(1 - v_B, ~np.asarray(signal_B, bool)),
        "spearman": spearman(p_B, y_B),
        "effective_ratio": float(np.mean(signal_B)),
    }
    return {name: value for name, value in found.items() if value is not None}


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
    """A file with one JSON object per line. An append writes the whole line before it returns, or nothing."""

    def __init__(self, path: Path):
        """Take the path. The first append creates folder and file."""
        self.path = Path(path)

    def append(self, row: Mapping[str, float]) -> None:
        """Add one line. Values that are not finite become null, because JSON has no NaN.

        Raise OSError if the whole line cannot be written.
        """
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            append_whole(file, line)
