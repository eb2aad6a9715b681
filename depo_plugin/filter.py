"""Which prompts are worth a rollout: pure functions from a belief about each pass rate to a decision.

Suffix B: one entry per candidate. A belief is Beta(a, b) over the pass rate p; p̂ = a / (a + b) is its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from depo_plugin.messages import Reason

if TYPE_CHECKING:  # the settings read RULES
    from depo_plugin.settings.config import FilterConfig


@dataclass(frozen=True)
class Decision:
    """Whether one candidate is rolled out, and why.

    q: the probability that a candidate with this belief is kept; in (0, 1] if `keep` is true.
    """

    keep: bool
    q: float
    reason: Reason


_PASSED = Decision(True, 1.0, Reason.PASSED)
_FORCED = Decision(True, 1.0, Reason.FORCED)
_UNSCORED = Decision(True, 1.0, Reason.UNSCORED)
_WARMUP = Decision(True, 1.0, Reason.WARMUP)


def signal_probability(a_B: np.ndarray, b_B: np.ndarray, group_size: int) -> np.ndarray:
    """Return V_B in [0, 1]: the chance that a group of `group_size` responses is not all wrong and not all right.

    V(a, b) = 1 − Π_{i<G} (a+i)/(a+b+i) − Π_{i<G} (b+i)/(a+b+i), the expectation of u(p) = 1 − p^G − (1−p)^G over
    Beta(a, b). a, b >= 0 and a + b > 0, float64; NaN for any other.
    """
    a_B, b_B = np.broadcast_arrays(np.asarray(a_B, np.float64), np.asarray(b_B, np.float64))
    valid_B = _valid(a_B, b_B)
    large_B1 = np.where(valid_B, np.maximum(a_B, b_B), 1.0)[..., None]
    small_B1 = np.where(valid_B, np.minimum(a_B, b_B), 1.0)[..., None]
    i_G = np.arange(group_size)
    total_BG = large_B1 + small_B1 + i_G
    # The likelier of the two extremes can be near 1; 1 minus it is computed from logarithms, to lose no digits.
    not_all_likely_B = 0.0 - np.expm1(np.log1p(-small_B1 / total_BG).sum(-1))
    all_unlikely_B = ((small_B1 + i_G) / total_BG).prod(-1)
    return np.where(valid_B, np.clip(not_all_likely_B - all_unlikely_B, 0.0, 1.0), np.nan)


def _valid(a_B, b_B):
    return np.isfinite(a_B) & np.isfinite(b_B) & (a_B >= 0) & (b_B >= 0) & (a_B + b_B > 0)


def keep_window(a_B: np.ndarray, b_B: np.ndarray, cfg: FilterConfig, group_size: int) -> np.ndarray:
    """Return bool (B,): low <= p̂ <= high (the paper's rule)."""
    mean_B = a_B / (a_B + b_B)
    return (cfg.low <= mean_B) & (mean_B <= cfg.high)


def keep_utility(a_B: np.ndarray, b_B: np.ndarray, cfg: FilterConfig, group_size: int) -> np.ndarray:
    """Return bool (B,): V >= min_utility."""
    return signal_probability(a_B, b_B, group_size) >= cfg.min_utility


RULES = {"window": keep_window, "utility": keep_utility}


def decide(
    a_B: np.ndarray, b_B: np.ndarray, cfg: FilterConfig, group_size: int, uniform_B: np.ndarray
) -> list[Decision]:
    """Return one Decision per candidate: kept by cfg.rule with q = 1, else kept by chance with q = cfg.epsilon.

    uniform_B: each candidate's own draw from [0, 1), used only if the rule says no. So a candidate's chance does not
    depend on the scores of the others. A belief that is not a Beta distribution (NaN, negative) is a fault of the
    estimator, so that candidate is kept as UNSCORED. Raise ValueError if the lengths differ.
    """
    a_B, b_B = np.asarray(a_B, np.float64), np.asarray(b_B, np.float64)
    if not a_B.shape == b_B.shape == uniform_B.shape:
        raise ValueError(f"decide: a {a_B.shape}, b {b_B.shape} and uniform {uniform_B.shape} must be of one length.")
    valid_B = _valid(a_B, b_B)
    passed_B = RULES[cfg.rule](np.where(valid_B, a_B, 1.0), np.where(valid_B, b_B, 1.0), cfg, group_size)
    explored_B = uniform_B < cfg.epsilon
    explored = Decision(True, cfg.epsilon, Reason.EXPLORED)
    rejected = Decision(False, cfg.epsilon, Reason.REJECTED)
    return [
        _UNSCORED if not valid else _PASSED if passed else explored if lucky else rejected
        for valid, passed, lucky in zip(valid_B.tolist(), passed_B.tolist(), explored_B.tolist(), strict=True)
    ]


def keep_all(count: int, reason: Reason) -> list[Decision]:
    """Return `count` decisions to keep with q = 1. reason: WARMUP, or UNSCORED if there are no scores to decide by."""
    return [{Reason.WARMUP: _WARMUP, Reason.UNSCORED: _UNSCORED}[reason]] * count


def fill_up(decisions: list[Decision], value_B: np.ndarray, missing: int) -> list[Decision]:
    """Return the decisions, in which the `missing` rejected candidates with the highest V become FORCED, q = 1.

    value_B: V of each candidate; only values of rejected ones are read. If values are equal, the first is taken.
    """
    filled = list(decisions)
    rejected = np.array([i for i, decision in enumerate(decisions) if not decision.keep], int)
    best = rejected[np.argsort(-np.asarray(value_B, np.float64)[rejected], kind="stable")]
    for i in best[:missing]:
        filled[i] = _FORCED
    return filled


def keep_share(kept: int, scanned: int, stopped: bool) -> float:
    """Return the estimate of kept/scanned that makes importance weights unbiased; 1 if all were kept.

    stopped: whether the scan ended because a candidate was kept. If so, the last candidate is certain to be kept and
    is not counted: (kept − 1)/(scanned − 1), Haldane's unbiased estimate under inverse sampling. kept/scanned would be
    too large by about 1/kept; it is used for a batch of one, which has no unbiased estimate.
    """
    if stopped and kept > 1:
        return (kept - 1) / (scanned - 1)
    return kept / scanned
