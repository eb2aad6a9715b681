"""The numbers of one run that the report and the live view show. Plain numpy.

Suffixes: S = steps, N = groups. A figure "with the filter" is what was rolled out, "without" what a random prompt of
the same stream would give. In a shadow run nothing was filtered: there, "with" is a mean weighted with q.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from depo_plugin.report.runs import REASONS, RunFiles

WARMUP, FORCED, UNKNOWN = REASONS.index("warmup"), REASONS.index("forced"), REASONS.index(None)
UNSCORED, SHADOW = REASONS.index("unscored"), REASONS.index("shadow")
MIN_COVERED = 0.5  # a weighted estimate must stand for at least this share of the prompts that were looked at


class Ratio(NamedTuple):
    """A quantity per step that is a ratio of sums, so that means over steps weigh each step by what is in it.

    top, bottom: (S,); NaN in either: the step does not say.
    """

    top: np.ndarray
    bottom: np.ndarray

    def raw(self) -> np.ndarray:
        """Return top / bottom of each step, NaN if unknown."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.bottom > 0, self.top / self.bottom, np.nan)

    def smooth(self, window: int) -> np.ndarray:
        """Return the ratio over the `window` steps (odd) around each step."""
        top, bottom = self._known()
        kernel, half = np.ones(window), window // 2
        sums = (np.convolve(x, kernel)[half : half + len(x)] for x in (top, bottom))
        return Ratio(*sums).raw()

    def over(self, mask: np.ndarray | slice = slice(None)) -> float:
        """Return the ratio over some steps together, NaN if none of them says."""
        top, bottom = self._known()
        total = bottom[mask].sum()
        return float(top[mask].sum() / total) if total > 0 else np.nan

    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(self.top) & np.isfinite(self.bottom)
        return np.where(known, self.top, 0.0), np.where(known, self.bottom, 0.0)

    def or_else(self, other: "Ratio") -> "Ratio":
        """Return this ratio if any step knows it, else the other one: the two may weigh steps differently."""
        return self if np.isfinite(self.raw()).any() else other


class Bins(NamedTuple):
    """Groups in order of their prediction, cut into bins of equal size: means, and the outcome's spread and error."""

    predicted: np.ndarray
    observed: np.ndarray
    spread: np.ndarray
    error: np.ndarray  # standard error of observed
    size: np.ndarray  # number of groups

    def off(self) -> float:
        """Return the mean distance of predicted and observed over groups (expected calibration error)."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.size))

    def by_chance(self) -> float:
        """Return about what off() would be if the predictions were right: E|noise| = √(2/π)·standard error."""
        return float(np.average(np.sqrt(2 / np.pi) * self.error, weights=self.size))


def bins(predicted_N: np.ndarray, outcome_N: np.ndarray, most: int = 10, least: int = 20) -> Bins | None:
    """Return at most `most` bins with at least `least` groups each; None if there are fewer groups than that."""
    known = np.isfinite(predicted_N) & np.isfinite(outcome_N)
    predicted_N, outcome_N = predicted_N[known], np.asarray(outcome_N, np.float64)[known]
    if len(predicted_N) < least:
        return None
    parts = np.array_split(np.argsort(predicted_N, kind="stable"), min(most, len(predicted_N) // least))
    size = np.array([len(part) for part in parts])
    spread = np.array([outcome_N[part].std() for part in parts])
    predicted, observed = (np.array([x[part].mean() for part in parts]) for x in (predicted_N, outcome_N))
    return Bins(predicted, observed, spread, spread / np.sqrt(size), size)


class Estimate(NamedTuple):
    """A weighted mean: value, standard error, and the number of equally weighted groups that would be as good."""

    value: float
    error: float
    size: float


def weighted_mean(y_N: np.ndarray, weight_N: np.ndarray) -> Estimate | None:
    """Return the mean of y with weights, None without any weight."""
    total = weight_N.sum()
    if not total > 0:
        return None
    mean = float(weight_N @ y_N / total)
    error = float(np.sqrt((weight_N**2) @ (y_N - mean) ** 2) / total)
    return Estimate(mean, error, float(total**2 / (weight_N @ weight_N)))


@dataclass
class Source:
    """One data source.

    name: as metrics name it.
    groups: groups on record.
    keep_rate: share of its prompts that was kept, NaN if unknown.
    first, last: its pass rate over all its prompts, kept or not, in the first and last quarter; None: not known.
    signal: share of its groups with a signal.
    """

    name: str
    groups: int
    keep_rate: float
    first: Estimate | None
    last: Estimate | None
    signal: float

    def change(self) -> float | None:
        """Return the change of its pass rate if it is more than chance (two standard errors), else None."""
        if not (self.first and self.last) or min(self.first.size, self.last.size) < 10:
            return None
        change = self.last.value - self.first.value
        return change if abs(change) > 2 * np.hypot(self.first.error, self.last.error) else None


class Numbers:
    """The numbers of one run. Ratios over steps are attributes; see __init__ for their meaning."""

    def __init__(self, files: RunFiles, name: str):
        """Compute everything that figures share. files: at least one step."""
        self.files, self.name = files, name
        groups = files.groups
        self.has_groups = len(groups) > 0
        self.step_N = groups["step"]
        self.steps = np.union1d(np.array(files.steps, np.int64), self.step_N)
        self._at_N = np.searchsorted(self.steps, self.step_N)
        self._row_at_S = {step: row for step, row in zip(files.steps, files.rows, strict=True)}
        self.p_N, self.v_N, self.y_N, self.n_N = (groups[name] for name in ("p", "v", "y", "n"))
        self.signal_N, self.reason_N = groups["signal"].astype(bool), groups["reason"]
        self.rejected_N = groups["rejected"].astype(bool)
        self.shadow = files.setting("depo", "shadow") is True or bool((self.reason_N == SHADOW).any())
        q_N = groups["q"]
        self.q_N = np.where(np.isfinite(q_N) & (q_N > 0), q_N, 1.0)
        # Weight of a group in an estimate for all prompts: forced and unknown ones were not drawn.
        drawn_N = (self.reason_N != FORCED) & (self.reason_N != UNKNOWN)
        self.weight_N = np.ones(len(groups)) if self.shadow else np.where(drawn_N, 1 / self.q_N, 0.0)
        size = files.setting("launch", "rollout", "n_samples_per_prompt")
        self.group_size = (
            float(size) if isinstance(size, int) else float(np.median(self.n_N)) if len(groups) else np.nan
        )
        self.warm_S = self._warmup()

        count_S = self.metric("kept") + np.nan_to_num(self.metric("unmatched"))
        count_S = np.where(np.isfinite(count_S), count_S, self._sum(np.ones(len(groups))))
        seen = self._by_step(self.signal_N, np.ones(len(groups)))
        judged = self._of(self.metric("effective_ratio"), count_S).or_else(seen)
        gain = self.metric("effective_gain")
        with np.errstate(invalid="ignore", divide="ignore"):
            plain_S = np.where(gain > 0, self.metric("effective_ratio") / gain, np.nan)
        # Share of the prompts that were looked at and rolled out.
        self.keep = Ratio(self.metric("kept"), self.metric("scanned"))
        # Share of the groups with a signal, with and without the filter.
        self.signal = judged
        self.signal_without = self._of(plain_S, count_S).or_else(self._by_step(self.signal_N, self.weight_N))
        # Pass rate of what was rolled out, and of all prompts.
        self.reward = self._of(self.metric("target_mean"), count_S).or_else(
            self._by_step(self.y_N, np.ones(len(groups)))
        )
        self.reward_all = self._of(self.metric("reward_unfiltered"), np.ones(len(self.steps)))
        self.reward_all = self.reward_all.or_else(self._by_step(self.y_N, self.weight_N))
        if self.shadow:
            self.reward_all, self.signal_without = self.reward, judged
            self.keep = self._by_step(self.q_N, np.ones(len(groups)))
            self.signal = self._by_step(self.signal_N, self.q_N)
            self.reward = self._by_step(self.y_N, self.q_N)
        # Responses and response tokens that were paid for each group with a signal.
        share_N = self.q_N if self.shadow else np.ones(len(groups))
        self.rollouts = Ratio(self._sum(share_N * self.n_N), self._sum(share_N * self.signal_N))
        if not self.has_groups:
            self.rollouts = Ratio(self.group_size * self.signal.bottom, self.signal.top)
        self.rollouts_without = Ratio(self.group_size * self.signal_without.bottom, self.signal_without.top)
        tokens_N = groups["tokens"]
        known_N = share_N * np.isfinite(tokens_N)
        self.tokens = Ratio(self._sum(known_N * np.nan_to_num(tokens_N)), self._sum(known_N * self.signal_N))
        self.time_S = self._time()

    # ── Parts of the run ──

    @property
    def ready_S(self) -> np.ndarray:
        """Return which steps a summary is over: those after the warm-up, or all if the run ended before."""
        return ~self.warm_S if (~self.warm_S).any() else np.ones(len(self.steps), bool)

    @property
    def window(self) -> int:
        """Return the odd number of steps that smoothed lines are means over; 1 for a short run."""
        return 1 if len(self.steps) < 10 else max(5, len(self.steps) // 20) | 1

    def quarters(self) -> list[slice]:
        """Return the quarters of the steps; fewer parts if there are fewer than eight steps."""
        parts = np.array_split(np.arange(len(self.steps)), 4 if len(self.steps) >= 8 else 1)
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]

    def in_steps(self, mask: np.ndarray | slice) -> np.ndarray:
        """Return which groups belong to some steps, (N,) bool."""
        chosen = np.zeros(len(self.steps), bool)
        chosen[mask] = True
        return chosen[self._at_N]

    def _warmup(self) -> np.ndarray:
        """Return which steps have groups from the warm-up, in which every prompt is kept; (S,) bool."""
        if self.has_groups:
            return self._sum(self.reason_N == WARMUP) > 0
        count = self.files.setting("depo", "filter", "warmup_steps")
        first = self.steps[0] == 1  # else the beginning is missing
        return np.arange(len(self.steps)) < (count if isinstance(count, int) and first else 0)

    # ── Per step ──

    def metric(self, name: str, prefix: str = "depo/") -> np.ndarray:
        """Return a metric of each step, NaN if the step does not have it."""
        rows = (self._row_at_S.get(step, {}) for step in self.steps.tolist())
        return np.array([row.get(prefix + name, np.nan) for row in rows], np.float64)

    def total(self, name: str, mask: np.ndarray | slice = slice(None)) -> float:
        """Return the sum of a metric over steps; unknown steps count as 0."""
        return float(np.nansum(self.metric(name)[mask]))

    def share(self, name: str, mask: np.ndarray | slice = slice(None)) -> float:
        """Return the share of the kept groups that a counting metric counts, NaN if unknown."""
        return Ratio(self.metric(name), self.metric("kept") + np.nan_to_num(self.metric("unmatched"))).over(mask)

    def _sum(self, value_N: np.ndarray) -> np.ndarray:
        if not self.has_groups:
            return np.full(len(self.steps), np.nan)
        return np.bincount(self._at_N, np.nan_to_num(np.asarray(value_N, np.float64)), len(self.steps))

    def _by_step(self, value_N: np.ndarray, weight_N: np.ndarray) -> Ratio:
        return Ratio(self._sum(value_N * weight_N), self._sum(weight_N))

    @staticmethod
    def _of(value_S: np.ndarray, weight_S: np.ndarray) -> Ratio:
        return Ratio(value_S * weight_S, np.where(np.isfinite(value_S), weight_S, np.nan))

    def _time(self) -> dict[str, np.ndarray]:
        """Return seconds of each step by what they went to; a part that no step knows is left out.

        The rollout is the rest of a step: what the trainer waited for it, and evaluations and saves.
        """
        timing = {name: self.metric(name, "timing/") for name in ("make_experience", "ppo_train", "broadcast")}
        parts = {"training": sum(np.nan_to_num(x) for x in timing.values()), "blocked": self.metric("time_blocked")}
        if not any(np.isfinite(x).any() for x in timing.values()):
            del parts["training"]
        total = self.metric("time_step")
        if "training" in parts and np.isfinite(total).any():
            parts["rollout"] = np.maximum(total - parts["training"] - np.nan_to_num(parts["blocked"]), 0)
        return {name: x for name, x in parts.items() if np.isfinite(x).any()}

    def blocked_share(self, mask: np.ndarray | slice = slice(None)) -> float:
        """Return the share of the time that training waited for the estimator, NaN if the total is unknown."""
        return Ratio(self.metric("time_blocked"), self.metric("time_step")).over(mask)

    # ── Over groups ──

    def calibration(self, mask: np.ndarray | slice = slice(None)) -> tuple[Bins | None, Bins | None]:
        """Return bins of p̂ with pass rates, and of V with whether there was a signal; None if there are too few."""
        chosen = self.in_steps(mask)
        return bins(self.p_N[chosen], self.y_N[chosen]), bins(self.v_N[chosen], self.signal_N[chosen])

    def sources(self) -> list[Source]:
        """Return the data sources, those with most groups first."""
        names = self.files.groups.sources
        of_N = self.files.groups["source"]
        found = []
        for number, name in enumerate(names):
            chosen_N = of_N == number
            if not chosen_N.any():
                continue
            ends = (self.quarters()[0], self.quarters()[-1])
            first, last = (self._source_rate(name, chosen_N, part) for part in ends)
            kept, rejected = self.total(f"kept/{name}"), self.total(f"rejected/{name}")
            rate = kept / (kept + rejected) if kept + rejected else np.nan
            if self.shadow:
                rate = float(self.q_N[chosen_N].mean())
            found.append(Source(name, int(chosen_N.sum()), rate, first, last, float(self.signal_N[chosen_N].mean())))
        return sorted(found, key=lambda source: -source.groups)

    def _source_rate(self, name: str, chosen_N: np.ndarray, part: slice) -> Estimate | None:
        here_N = chosen_N & self.in_steps(part) & np.isfinite(self.y_N)
        estimate = weighted_mean(self.y_N[here_N], self.weight_N[here_N])
        scanned = self.total(f"kept/{name}", part) + self.total(f"rejected/{name}", part)
        if estimate and not self.shadow and self.weight_N[here_N].sum() < MIN_COVERED * scanned:
            return None  # hardly any of its rejected prompts was explored, so the rest says little about all of them
        return estimate

    def source_rates(self, number: int) -> Ratio:
        """Return the pass rate of a source's groups by step, weighted so that it stands for all its prompts."""
        weight_N = self.weight_N * (self.files.groups["source"] == number)
        return self._by_step(self.y_N, weight_N)
