"""Predict each step's groups, then reveal them; what the predictions were worth.

Suffixes: N = groups of the log in order, P = prompts.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from depo_plugin.backtest.logs import Group
from depo_plugin.backtest.predictors import Predictor
from depo_plugin.estimator.metrics import auc, spearman
from depo_plugin.filter import signal_probability
from depo_plugin.rules import Beliefs, Rule

BINS = 10  # of equally many groups, for calibration errors
NEAR = 1e-6  # predictions are at least so far from 0 and 1


class Truth(NamedTuple):
    """The groups of a log: prompt number, step number, successes, responses, and the data source."""

    prompt_N: np.ndarray
    step_N: np.ndarray
    k_N: np.ndarray
    n_N: np.ndarray
    source_N: np.ndarray

    @property
    def y_N(self) -> np.ndarray:
        """Pass rates."""
        return self.k_N / self.n_N

    @property
    def signal_N(self) -> np.ndarray:
        """Whether the group's rewards differ."""
        return (self.k_N > 0) & (self.k_N < self.n_N)

    @property
    def quarter_N(self) -> np.ndarray:
        """Which quarter of the groups each one is in, 0 to 3."""
        return np.arange(len(self.k_N)) * 4 // len(self.k_N)


class Predicted(NamedTuple):
    """Predictions about a log's groups: Beta(a, b), and V for each group's own size. kept_N: what the rule kept."""

    p_N: np.ndarray
    v_N: np.ndarray
    kept_N: np.ndarray


def truth_of(steps: Sequence[Sequence[Group]]) -> Truth:
    """Return the groups as arrays."""
    index: dict[tuple[str, str], int] = {}
    flat = [(group, at) for at, step in enumerate(steps) for group in step]
    prompt_N = np.array([index.setdefault((group.prompt, group.label), len(index)) for group, _ in flat])
    k_N, n_N = (np.array([getattr(group, name) for group, _ in flat], np.float64) for name in "kn")
    source_N = np.array([group.source for group, _ in flat], object)
    return Truth(prompt_N, np.array([at for _, at in flat]), k_N, n_N, source_N)


def play(
    steps: Sequence[Sequence[Group]],
    predictor: Predictor,
    rule: Rule,
    *,
    epsilon: float,
    warmup: int,
    closed: bool,
    seed: int,
    tick: Callable[[], None],
) -> Predicted:
    """Predict and reveal the whole log.

    rule: keeps by beliefs, from step `warmup` on; epsilon: chance that a rejected group is kept anyway; closed:
    whether only kept groups are learned from, as in a run with the filter; tick: called after each step.
    """
    rng = np.random.default_rng(seed)
    found: list[Predicted] = []
    visits: dict[tuple[str, str], int] = {}
    for step, groups in enumerate(steps):
        a_B, b_B = (np.asarray(x, np.float64) for x in predictor.predict(groups))
        n_B = np.array([group.n for group in groups])
        v_B = np.empty(len(groups))
        for n in np.unique(n_B):
            same = n_B == n
            v_B[same] = signal_probability(a_B[same], b_B[same], int(n))
        keys = [(group.prompt, group.label) for group in groups]
        visit_B = np.array([visits.get(key, 0) for key in keys], np.float64)
        source_B = np.array([group.source for group in groups], object)
        p_B = a_B / (a_B + b_B)
        kept_B = rng.random(len(groups)) < 1.0
        if step >= warmup:
            beliefs = Beliefs(p_B, v_B, a_B, b_B, visit_B, source_B, step, int(np.median(n_B)))
            kept_B = rng.random(len(groups)) < np.maximum(rule(beliefs), epsilon)
        learned = [group for group, kept in zip(groups, kept_B, strict=True) if kept or not closed]
        if learned:
            predictor.learn(learned)
        for group in learned:
            visits[group.prompt, group.label] = visits.get((group.prompt, group.label), 0) + 1
        found.append(Predicted(p_B, v_B, kept_B))
        tick()
    return Predicted(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def log_loss(p_N, k_N, n_N) -> np.ndarray:
    """Return each group's mean negative log-likelihood per response, in nats."""
    p_N = np.clip(p_N, NEAR, 1 - NEAR)
    return -(k_N * np.log(p_N) + (n_N - k_N) * np.log1p(-p_N)) / n_N


def squared_error(p_N, k_N, n_N) -> np.ndarray:
    """Return each group's Brier score per response: the mean of (p − r)² over its rewards r in {0, 1}."""
    y_N = k_N / n_N
    return (p_N - y_N) ** 2 + y_N * (1 - y_N)


def calibration_error(predicted_N, observed_N) -> float:
    """Return the mean |predicted − observed| over BINS bins of equally many groups; NaN with fewer groups."""
    if len(predicted_N) < BINS:
        return math.nan
    parts = np.array_split(np.argsort(predicted_N, kind="stable"), BINS)
    gaps = [abs(float(np.mean(predicted_N[part]) - np.mean(observed_N[part]))) for part in parts]
    return float(np.average(gaps, weights=[len(part) for part in parts]))


def scores(truth: Truth, found: Predicted, chosen_N: np.ndarray) -> dict[str, float]:
    """Return what some of the predictions were worth; NaN for what is undefined. chosen_N: bool."""
    k, n, y, signal = (x[chosen_N] for x in (truth.k_N, truth.n_N, truth.y_N, truth.signal_N))
    p, v, kept = (x[chosen_N] for x in found)
    rank, area = spearman(p, y), auc(v, signal)
    return {
        "log_loss": float(log_loss(p, k, n).mean()),
        "brier": float(squared_error(p, k, n).mean()),
        "auc_v": math.nan if area is None else area,
        "calibration_p": calibration_error(p, y),
        "calibration_v": calibration_error(v, signal),
        "spearman": math.nan if rank is None else rank,
        "keep_rate": float(kept.mean()),
        "signal_kept": float(signal[kept].mean()) if kept.any() else math.nan,
        "signal_all": float(signal.mean()),
        "signal_found": float((signal & kept).sum() / signal.sum()) if signal.any() else math.nan,
    }


def paired(truth: Truth, one: Predicted, other: Predicted, chosen_N: np.ndarray) -> tuple[float, float]:
    """Return the mean difference of log loss, one − other, and its standard error over prompts.

    The groups of one prompt are not independent, so they count as one: the error is that of a mean of clusters.
    """
    k, n = truth.k_N[chosen_N], truth.n_N[chosen_N]
    difference = log_loss(one.p_N[chosen_N], k, n) - log_loss(other.p_N[chosen_N], k, n)
    _, at = np.unique(truth.prompt_N[chosen_N], return_inverse=True)
    mean = float(difference.mean())
    residual_P = np.bincount(at, difference - mean)
    count = len(residual_P)
    if count < 2:
        return mean, math.nan
    return mean, float(math.sqrt((residual_P**2).sum() * count / (count - 1)) / len(difference))
