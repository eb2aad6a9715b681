"""The ledger of decisions: what the loader kept and why, until the kept prompts' groups come back.

From it come each group's importance weight, the prediction that it is judged by, and what the unfiltered stream would
have given. Plain numbers, no torch. Suffix: B = groups of one step.
"""

import logging
from collections import deque
from typing import NamedTuple

import numpy as np

from depo_plugin.messages import Label, Reason, Record, prompt_key

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

FORGET_AFTER = 100  # planned batches after which a kept prompt that never came back is given up
SOURCES = 32  # data sources with metrics of their own
RATE_KEPT = 0.9  # per step: what is estimated of the unfiltered stream follows about the last ten steps
RATE_MIN = 0.01  # an estimate at or below 0 (few explored groups) must not divide
NOTHING = (0, 0.0, 0.0, 0, 0)  # sums over no candidate: scanned, sum_p, sum_v, easy, hard
COUNTED = (Reason.EXPLORED, Reason.FORCED, Reason.UNSCORED)  # reasons that are metrics


class Kept(NamedTuple):
    """What is remembered of a kept prompt until its group comes back.

    plan: number of the planned batch.
    p, v: p̂ and V when it was decided, None without a usable score.
    q: keep probability.
    share: kept/scanned for its importance weight.
    reason: why it was kept, the value of a Reason.
    source: its data source.
    scanned, sum_p, sum_v: its part of all that its batch scanned, and of their p̂ and V: the batch's sums divided by
        the number it kept. So a batch whose groups come back in several steps is spread over them.
    easy, hard: its part of the candidates that its batch rejected, with p̂ >= 0.5 and p̂ < 0.5.
    """

    plan: int
    p: float | None
    v: float | None
    q: float
    share: float
    reason: str
    source: str
    scanned: float
    sum_p: float
    sum_v: float
    easy: float
    hard: float

    @property
    def chance(self) -> float:
        """The probability with which it was kept: q. In shadow mode 1, because q is then only what the rule says."""
        return 1.0 if self.reason == Reason.SHADOW.value else self.q


class Ledger:
    """Decisions by prompt key, oldest first, and running sums over them."""

    def __init__(self):
        """Start without decisions."""
        self._kept: dict[int, deque[Kept]] = {}
        self._plan = 0  # number of the batch that was planned last
        self._unkept = list(NOTHING)  # sums of planned batches that kept nothing
        self._sources: dict[str, list[int]] = {}  # data source -> kept, rejected since the last step
        # Of the unfiltered stream, faded: sum of pass rates, expected groups with a signal, and prompts scanned.
        self._passes, self._signals, self._scanned = 0.0, 0.0, 0.0
        self.rollouts_saved = 0.0  # total, see metrics.NAMES
        # Of shadow mode, totals: groups, groups with a signal, and both weighted by the rule's q.
        self._shadow = [0.0, 0.0, 0.0, 0.0]
        # Of the last batches the plan, key and text of one kept prompt each: what the warning below shows.
        self._examples: deque[tuple[int, int, tuple[str, str]]] = deque(maxlen=4)
        # Whether to warn of groups without a decision. None: it was said already.
        self._watching: bool | None = True

    def record(self, records: list[Record]) -> None:
        """Take one planned batch: its kept prompts one by one, all that it scanned as sums."""
        for one in records:
            counts = self._sources.setdefault(self._source(one.datasource), [0, 0])
            counts[not one.keep] += 1
        self._plan += 1
        kept = [one for one in records if one.keep]
        rejected = [one.p for one in records if not one.keep and one.p is not None]  # all of them have a p̂
        easy = sum(p >= 0.5 for p in rejected)
        sums = (len(records), sum(one.p or 0.0 for one in records), sum(one.v or 0.0 for one in records))
        sums = [new + old for new, old in zip((*sums, easy, len(rejected) - easy), self._unkept, strict=True)]
        self._unkept = list(NOTHING) if kept else sums
        parts = [total / max(1, len(kept)) for total in sums]
        self._examples.extend((self._plan, one.key, one.text) for one in kept[:1])
        for one in kept:
            source = self._source(one.datasource)
            entry = Kept(self._plan, one.p, one.v, one.q, one.share, one.reason.value, source, *parts)
            self._kept.setdefault(one.key, deque()).append(entry)
        oldest = self._plan - FORGET_AFTER
        recent = {key: deque(e for e in entries if e.plan > oldest) for key, entries in self._kept.items()}
        self._kept = {key: entries for key, entries in recent.items() if entries}

    def keep_weights(self, prompts: list[str], labels: list[str]) -> tuple[list[float], list[float]]:
        """Return q_B and share_B of kept prompts, for advantage.weights(); (1, 1) for one that is not on record.

        If a prompt occurs twice, its oldest decision comes first. To be asked before take(), which removes them.
        """
        found: list[tuple[float, float]] = []
        taken: dict[int, int] = {}
        for prompt, label in zip(prompts, labels, strict=True):
            key = prompt_key(prompt, label)
            entries, place = self._kept.get(key, ()), taken.get(key, 0)
            taken[key] = place + 1
            found.append((entries[place].q, entries[place].share) if place < len(entries) else (1.0, 1.0))
        return [q for q, _ in found], [share for _, share in found]

    def take(self, labels: list[Label], *, warn: bool) -> list[Kept | None]:
        """Remove and return the oldest decision on record for each group; None if there is none.

        warn: log one warning, once, if most groups find no decision although earlier decisions wait for theirs.
        """
        found: list[Kept | None] = []
        for label in labels:
            key = label.key
            entries = self._kept.get(key)
            found.append(entries.popleft() if entries else None)
            if entries is not None and not entries:
                del self._kept[key]
        self._watch(labels, found, warn)
        return found

    def expect_unmatched(self) -> None:
        """Do not warn until most groups find their decision: after a restart, recent decisions are lost."""
        self._watching = False

    def _watch(self, labels: list[Label], found: list[Kept | None], warn: bool) -> None:
        unmatched = [label for label, entry in zip(labels, found, strict=True) if entry is None]
        if 2 * len(unmatched) <= len(labels):
            self._watching = self._watching is not None
            return
        late = [text for plan, key, text in self._examples if key in self._kept and plan <= self._plan - 2]
        if not (self._watching and late and warn):
            return
        self._watching = None
        logger.warning(
            "DEPO: %d of %d groups came back with another prompt or label than they were sent with, so they find "
            "neither their decision nor their history, and nothing is learned of the prompts that were kept. Sent, "
            "for example: prompt ...%r, label %r. Came back: prompt ...%r, label %r. Look for code that changes them: "
            "the agent, the reward function.",
            *(len(unmatched), len(labels), *late[0], unmatched[0].prompt[-200:], unmatched[0].label[:200]),
        )

    # ── What the decisions say ──

    def metrics(self, kept: list[Kept | None], y_B, signal_B, group_size: int) -> dict[str, float]:
        """Return what the unfiltered stream would have given, and counts by reason and by data source.

        kept: from take(). A control variate: (Σ scanned p̂ + Σ kept (y − p̂)/q) / scanned, and the same with V and
        whether there was a signal for the effective ratio; both are faded over steps. Forced prompts were not drawn by
        chance, so their outcomes are outside both corrections.
        """
        groups = zip(kept, y_B.tolist(), signal_B.tolist(), strict=True)
        known = [(e, y, signal) for e, y, signal in groups if e is not None]
        reasons = [e.reason for e, _, _ in known]
        metrics: dict[str, float] = {"kept": len(known), "unmatched": len(kept) - len(known)}
        metrics |= {reason.value: reasons.count(reason.value) for reason in COUNTED}
        scanned = sum(e.scanned for e, _, _ in known)
        if scanned:
            drawn = [(e, y, signal) for e, y, signal in known if e.reason != Reason.FORCED.value]
            reward = sum(e.sum_p for e, _, _ in known) + sum((y - (e.p or 0.0)) / e.chance for e, y, _ in drawn)
            signals = sum(e.sum_v for e, _, _ in known) + sum((s - (e.v or 0.0)) / e.chance for e, _, s in drawn)
            metrics |= {"scanned": scanned, "keep_rate": len(known) / scanned}
            easy, hard = sum(e.easy for e, _, _ in known), sum(e.hard for e, _, _ in known)
            if easy + hard:
                metrics |= {"too_easy": easy / (easy + hard), "too_hard": hard / (easy + hard)}
            self._passes = RATE_KEPT * self._passes + reward
            self._signals = RATE_KEPT * self._signals + signals
            self._scanned = RATE_KEPT * self._scanned + scanned
        if self._scanned:
            rate = min(max(self._signals / self._scanned, RATE_MIN), 1.0)
            metrics["reward_unfiltered"] = self._passes / self._scanned
            metrics["effective_gain"] = float(signal_B.mean()) / rate
            self.rollouts_saved += group_size * (float(signal_B.sum()) / rate - len(kept))
        for entry, _, signal in known:
            if entry.reason == Reason.SHADOW.value:
                values = (1.0, signal, entry.q, entry.q * signal)
                self._shadow = [total + value for total, value in zip(self._shadow, values, strict=True)]
        metrics |= self.shadow_metrics() | self._source_metrics(known)
        return {name: float(value) for name, value in metrics.items()}

    def shadow_metrics(self) -> dict[str, float]:
        """Return what the filter would have kept so far, and what share of that had a signal; {} without shadow mode.

        Each group counts by the probability q with which the rule would have kept it.
        """
        groups, signals, kept, kept_signals = self._shadow
        if not kept:
            return {}
        return {
            "shadow_keep_rate": kept / groups,
            "shadow_effective_ratio": kept_signals / kept,
            "shadow_unfiltered_ratio": signals / groups,
        }

    def _source_metrics(self, known: list[tuple[Kept, float, bool]]) -> dict[str, float]:
        """Return what was kept and rejected since the last step, and this step's pass rate, by data source."""
        if len(self._sources) < 2:
            return {}  # nothing to tell apart
        metrics: dict[str, float] = {}
        for source, counts in self._sources.items():
            metrics |= {f"kept/{source}": float(counts[0]), f"rejected/{source}": float(counts[1])}
            counts[:] = 0, 0
            if rates := [y for e, y, _ in known if e.source == source]:
                metrics[f"pass_rate/{source}"] = float(np.mean(rates))
        return metrics

    def _source(self, name: str) -> str:
        """Return the data source as metrics name it. Beyond SOURCES of them, the name is "others"."""
        name = str(name).replace("/", "_")
        return name if name in self._sources or len(self._sources) < SOURCES else "others"

    # ── State ──

    def state_dict(self) -> dict:
        """Return decisions and sums, as copies."""
        return {
            "kept": [[key, *entry] for key, entries in self._kept.items() for entry in entries],
            "plan": self._plan,
            "unkept": list(self._unkept),
            "sources": {source: list(counts) for source, counts in self._sources.items()},
            "unfiltered": [self._passes, self._signals, self._scanned],
            "rollouts_saved": self.rollouts_saved,
            "shadow": list(self._shadow),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict()."""
        self._kept = {}
        for key, *entry in state["kept"]:
            self._kept.setdefault(key, deque()).append(Kept(*entry))
        self._plan, self._unkept = state["plan"], list(state["unkept"])
        self._sources = {source: list(counts) for source, counts in state["sources"].items()}
        self._passes, self._signals, self._scanned = state["unfiltered"]
        self.rollouts_saved = state["rollouts_saved"]
        self._shadow = list(state["shadow"])
