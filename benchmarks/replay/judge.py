"""Play one method on one pool: the outer loop of RL without a language model, and the measures of the result.

    draw a batch -> (judge the scanned prompts) -> rollout -> learn -> train        one step

Predictions are compared with the true pass rates at decision time, on all prompts scanned from step JUDGED_FROM on.
Suffixes: B = prompts of one scan or of all scans of a run.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay import texts
from benchmarks.replay.methods import METHODS, Setup
from benchmarks.replay.world import Policy, Pool, build_pool, signal_chance
from depo_plugin.estimator.metrics import auc, spearman

KEYS = (
    "pool",
    "method",
    "group_size",
    "seed",
    "rollouts_per_effective_group",
    "effective_ratio",
    "oracle_share",
    "coverage",
    "zero_auc",
    "mae_true",
    "brier",
    "ece",
    "spearman",
    "final_ability",
    "estimator_seconds",
)
BINS = 15  # of p̂ in [0, 1], for the calibration error
JUDGED_FROM = 20  # first step that counts, for every method, however long its own warm-up is
LEARNABLE = 0.5  # a prompt counts as learnable if u(p) is at least this
DRAWS_MAX = 20  # most batches that dynamic sampling rolls out for one training batch


@dataclass
class Played:
    """One run: its row, and the data for the plots."""

    row: dict[str, Any]  # KEYS -> value, None if it is undefined
    keep_rate: float  # kept / scanned
    series: dict[str, list[float]]  # per step: effective ratio, mean p̂ and mean p of the scanned prompts
    calibration: np.ndarray | None  # calibration_sums(), None if the method predicts no pass rates


@dataclass
class Tally:
    """The sums and scans of the steps that count."""

    rolled: int = 0  # groups rolled out
    effective: int = 0  # groups with a signal
    scans: list[tuple] = field(default_factory=list)  # index_B, p̂_B or None, V_B or None, kept_B, p_B, signal_B
    windows: list[tuple] = field(default_factory=list)  # one per step: learnable indices met, indices trained


# ── The loop ──


def play(pool: Pool, factory, group_size: int, seed: int, **setup) -> Played:
    """Run a factory's method and return its results. The row's oracle_share is None: it needs other methods' rows.

    setup: the fields of methods.Setup other than policy and seed.
    """
    policy = Policy(pool, group_size, seed)
    method = factory(Setup(policy, seed, **setup))
    tally = Tally()
    series = {"effective": [], "predicted": [], "true": []}
    for step in range(pool.steps):
        policy.begin_step()
        drawn = method.draw(pool.batch)
        scans = [_true_side(policy, scan) for scan in method.scanned()]
        at_rollout, effective, trained = _train(policy, method, drawn)
        scans = at_rollout if method.resample else scans
        rolled = sum(len(scan[0]) for scan in at_rollout)
        for name, value in zip(series, (effective / rolled, *_means(scans)), strict=True):
            series[name].append(value)
        if step >= JUDGED_FROM:
            tally.rolled, tally.effective = tally.rolled + rolled, tally.effective + effective
            tally.scans += scans
            met = [scan[0][signal_chance(scan[4], group_size) >= LEARNABLE] for scan in scans]
            tally.windows.append((np.concatenate(met) if met else drawn[:0], trained))
    if pool.fresh and method.streams and (passes := method.passes()) > 1:
        say(f"{pool.name}: prompts were met again, {passes:.2f} passes: the pool is too small for this run.")
    return _judge(tally, series, method, policy)


def _true_side(policy: Policy, scan: tuple) -> tuple:
    """Return the scan with the current true pass rates, and whether a simulated group of each prompt has a signal."""
    return (*scan, policy.rates(scan[0]), policy.probe(scan[0]))


def _train(policy: Policy, method, drawn: np.ndarray) -> tuple[list[tuple], int, np.ndarray]:
    """Roll out a batch, let the method learn from it, and train the policy.

    Return the rollouts, as scans whose "kept" means "trained on"; the number of effective groups; the trained indices.
    """
    rolled, labels = [], []
    missing = len(drawn)
    while True:
        groups = policy.rollout(drawn)
        used_B = groups.signal_B if method.resample else np.ones(len(drawn), bool)
        rolled.append((drawn, None, None, used_B, policy.rates(drawn), groups.signal_B))
        labels += policy.labels(groups)
        missing -= int(used_B.sum())
        if not missing or len(rolled) >= DRAWS_MAX:
            break
        drawn = method.draw(missing)
    method.learn(labels)
    effective = sum(int(scan[5].sum()) for scan in rolled)
    trained = np.concatenate([scan[0][scan[3]] for scan in rolled])
    policy.train(effective, len(trained) - effective)
    return rolled, effective, trained


def _means(scans: list[tuple]) -> tuple[float, float]:
    """Return the mean p̂ (NaN if there are no predictions) and the mean p of the prompts scanned in a step."""
    if not scans:
        return float("nan"), float("nan")
    predicted = [scan[1] for scan in scans if scan[1] is not None and not np.isnan(scan[1]).any()]
    true = float(np.concatenate([scan[4] for scan in scans]).mean())
    return (float(np.concatenate(predicted).mean()) if predicted else float("nan")), true


# ── The measures ──


def _judge(tally: Tally, series: dict, method, policy: Policy) -> Played:
    kept_B, p_B, signal_B = (np.concatenate([scan[i] for scan in tally.scans]) for i in (3, 4, 5))
    ratio = tally.effective / tally.rolled
    row = dict.fromkeys(KEYS) | {
        "group_size": policy.group_size,
        "rollouts_per_effective_group": policy.group_size / ratio if ratio else None,
        "effective_ratio": ratio,
        "final_ability": policy.ability,
    }
    if method.streams:
        learnable_B = signal_chance(p_B, policy.group_size) >= LEARNABLE
        row["coverage"] = float(kept_B[learnable_B].mean()) if learnable_B.any() else None
    else:
        row["coverage"] = window_coverage(tally.windows, len(policy.pool.prompts) // policy.pool.batch)
    calibration = None
    if tally.scans[0][2] is not None:
        row["zero_auc"] = auc(1 - np.concatenate([scan[2] for scan in tally.scans]), ~signal_B)
        row["estimator_seconds"] = method.seconds
    if tally.scans[0][1] is not None:
        predicted_B = np.concatenate([scan[1] for scan in tally.scans])
        row |= rate_metrics(predicted_B, p_B)
        calibration = calibration_sums(predicted_B, p_B)
    return Played(row, float(kept_B.mean()), series, calibration)


def rate_metrics(predicted_B: np.ndarray, p_B: np.ndarray) -> dict[str, float | None]:
    """Return mae_true, brier, ece and spearman of predictions against the true pass rates.

    brier = E[(p̂ − y)²] over a single response y ~ Bernoulli(p) = (p̂ − p)² + p(1 − p); ece = Σ over bins of
    share·|mean p̂ − mean p|.
    """
    error_B = predicted_B - p_B
    sum_predicted, sum_true, _ = calibration_sums(predicted_B, p_B)
    return {
        "mae_true": float(np.abs(error_B).mean()),
        "brier": float((error_B**2 + p_B * (1 - p_B)).mean()),
        "ece": float(np.abs(sum_predicted - sum_true).sum() / len(p_B)),
        "spearman": spearman(predicted_B, p_B),
    }


def calibration_sums(predicted_B: np.ndarray, p_B: np.ndarray) -> np.ndarray:
    """Return the sum of p̂, the sum of p and the count in each of BINS equal bins of p̂, float64 (3, BINS)."""
    bin_B = np.minimum((predicted_B * BINS).astype(int), BINS - 1)
    return np.stack([np.bincount(bin_B, weights, BINS) for weights in (predicted_B, p_B, np.ones(len(p_B)))])


def window_coverage(windows: list[tuple], length: int) -> float | None:
    """Return the share of learnable prompts met in a window of `length` steps that were trained in the same window.

    windows: (learnable indices met, trained indices) of each step. Only whole windows count; None if there is none.
    """
    met_all = trained_all = 0
    for start in range(0, len(windows) - length + 1, max(length, 1)):
        steps = windows[start : start + length]
        met = np.unique(np.concatenate([met for met, _ in steps]))
        trained = np.unique(np.concatenate([trained for _, trained in steps]))
        met_all += len(met)
        trained_all += len(np.intersect1d(met, trained, assume_unique=True))
    return trained_all / met_all if met_all else None


# ── Runs that are compared ──


class Bench:
    """The runs on one pool, group size and seed. Each method is played at most once."""

    def __init__(self, pool: Pool, group_size: int, seed: int, overrides=None, cache: Path | None = None):
        """overrides: settings of depo alone ("history.discount": 1.0); cache: folder of texts and embeddings."""
        self.pool, self.group_size, self.seed = pool, group_size, seed
        self._setup = {"overrides": overrides or {}, "cache": cache}
        self._played: dict[str, Played] = {}

    def run(self, method: str) -> Played:
        """Play a method and those it is compared with, and return its results."""
        played = self._play(method)
        row = played.row
        if row["oracle_share"] is None:
            least, most = (self._play(name).row["effective_ratio"] for name in ("grpo", "oracle"))
            row["oracle_share"] = (row["effective_ratio"] - least) / (most - least) if most > least else None
        return played

    def _play(self, method: str) -> Played:
        if method not in self._played:
            rate = self._play("depo").keep_rate if method == "random" else None
            setup = self._setup | {"keep_rate": rate}
            variants = [play(self.pool, f, self.group_size, self.seed, **setup) for f in METHODS[method]]
            best = max(variants, key=lambda one: one.row["effective_ratio"])
            best.row |= {"pool": self.pool.name, "method": method, "seed": self.seed}
            self._played[method] = best
        return self._played[method]


@functools.lru_cache(maxsize=4)
def _pool(name: str, seed: int, cache: Path) -> Pool:
    return build_pool(name, seed, cache)


def run(
    world_name: str,
    method: str,
    group_size: int = 8,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Return the row of one method on a default pool.

    overrides: changes of depo's settings, such as {"history.discount": 1.0}; other methods keep the defaults.
    """
    cache = cache or texts.default_cache()
    return Bench(_pool(world_name, seed, cache), group_size, seed, overrides, cache).run(method).row


def say(text: str) -> None:
    """Print one line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)
