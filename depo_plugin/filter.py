"""Which prompts are rolled out: from the estimator's scores to beliefs, and from a rule's q to decisions.

Suffix B: one entry per candidate. A belief is Beta(a, b) over the pass rate p; p̂ = a / (a + b) is its mean.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from depo_plugin.messages import Reason, Record, Scores, prompt_key
from depo_plugin.rules import Beliefs, RuleError, rule_of

if TYPE_CHECKING:  # the settings read the rules
    from depo_plugin.settings.config import FilterConfig

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format


@dataclass(frozen=True)
class Decision:
    """Whether one candidate is rolled out, and why.

    q: the probability that a candidate with this belief is kept; in (0, 1] if `keep` is true.
    """

    keep: bool
    q: float
    reason: Reason


class Judged(NamedTuple):
    """A candidate's p̂ and V, both None without a usable score, and the decision on it."""

    p: float | None
    v: float | None
    decision: Decision


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


def beliefs_of(scores: Scores, datasources: list[str], group_size: int) -> tuple[np.ndarray, Beliefs]:
    """Return usable_B (bool), and the Beliefs about the usable candidates only.

    A belief that is not a Beta distribution (NaN, negative) is a fault of the estimator: it is not usable.
    """
    a_B, b_B = np.asarray(scores.a, np.float64), np.asarray(scores.b, np.float64)
    usable_B = _valid(a_B, b_B)
    a_B, b_B, visits_B = a_B[usable_B], b_B[usable_B], np.asarray(scores.visits, np.float64)[usable_B]
    source_B = np.asarray(datasources, object)[usable_B]
    v_B = signal_probability(a_B, b_B, group_size)
    return usable_B, Beliefs(a_B / (a_B + b_B), v_B, a_B, b_B, visits_B, source_B, scores.updates, group_size)


def decide(q_B: np.ndarray, epsilon: float, uniform_B: np.ndarray) -> list[Decision]:
    """Return one Decision per candidate: kept with probability max(q, epsilon).

    q_B in [0, 1]: from the rule; uniform_B: each candidate's own draw from [0, 1). A candidate is kept if its draw is
    below its probability, so its chance does not depend on the other candidates.
    """
    floored_B = np.maximum(q_B, epsilon)
    rows = zip(floored_B.tolist(), (uniform_B < floored_B).tolist(), (q_B < epsilon).tolist(), strict=True)
    return [
        Decision(keep, q, (Reason.EXPLORED if unwanted else Reason.PASSED) if keep else Reason.REJECTED)
        for q, keep, unwanted in rows
    ]


class PromptFilter:
    """The rule of the settings, applied to scores."""

    def __init__(self, cfg: "FilterConfig", group_size: int):
        """Take the settings. Raises RuleError if cfg.rule is a file that cannot be used here."""
        self._cfg, self._group_size = cfg, group_size
        self._rule = rule_of(cfg)
        self._failed = False  # whether a failure of the rule was said

    def judge(self, scores: Scores | None, datasources: list[str], uniform_B: np.ndarray | None) -> list[Judged]:
        """Return p̂, V and decision of each candidate.

        scores: None if the estimator could not give them; then, and without a usable belief, a prompt is kept.
        uniform_B: draws from [0, 1); None in shadow mode: then every prompt is kept, and q is the rule's.
        """
        found = [Judged(None, None, _UNSCORED)] * len(datasources)
        if scores is None:
            return found
        usable_B, beliefs = beliefs_of(scores, datasources, self._group_size)
        places = np.flatnonzero(usable_B)
        if scores.updates < self._cfg.warmup_steps:
            found = [Judged(None, None, _WARMUP)] * len(datasources)
            decisions = [_WARMUP] * len(places)
        elif (q_B := self._keep_probability(beliefs)) is None:
            decisions = [_UNSCORED] * len(places)
        elif uniform_B is None:
            decisions = [Decision(True, q, Reason.SHADOW) for q in np.maximum(q_B, self._cfg.epsilon).tolist()]
        else:
            decisions = decide(q_B, self._cfg.epsilon, uniform_B[places])
        rows = zip(places.tolist(), beliefs.p.tolist(), beliefs.v.tolist(), decisions, strict=True)
        for place, p, v, decision in rows:
            found[place] = Judged(p, v, decision)
        return found

    def _keep_probability(self, beliefs: Beliefs) -> np.ndarray | None:
        """Return the rule's q_B; None, and one warning, if a rule of the user's own fails: then prompts are kept."""
        try:
            return self._rule(beliefs)
        except RuleError as error:
            if not self._failed:
                logger.warning(
                    "DEPO: --depo.filter.rule %s: %s. Prompts are kept while it fails; correct it and resume.",
                    *(self._cfg.rule, error),
                )
            self._failed = True
            return None


def fill_up(judged: list[Judged], missing: int) -> list[Judged]:
    """Return the candidates, of which the `missing` rejected ones with the highest V become FORCED, q = 1.

    If values are equal, the first is taken.
    """
    filled = list(judged)
    rejected = np.array([i for i, one in enumerate(judged) if not one.decision.keep], int)
    value = np.array([judged[i].v for i in rejected], np.float64)
    for i in rejected[np.argsort(-value, kind="stable")][:missing]:
        filled[i] = judged[i]._replace(decision=_FORCED)
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


def record_of(datasource: str, prompt: str, label: str, judged: Judged, share: float) -> Record:
    """Return the decision on a prompt as it is sent to the estimator. share: keep_share of its batch."""
    decision = judged.decision
    return Record(
        key=prompt_key(prompt, label),
        text=(prompt[-200:], label[:200]),
        p=judged.p,
        v=judged.v,
        q=decision.q,
        keep=decision.keep,
        reason=decision.reason,
        datasource=datasource,
        share=1.0 if decision.reason is Reason.FORCED else share,
    )
