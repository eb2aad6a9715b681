"""What is compared: DEPO's estimator, the same without one of its parts, and simple baselines.

A predictor says Beta(a, b) for each group of a step before it is revealed, and then learns from it.
Suffixes: B = groups of one step, N = prompts of the log, C = combinations of a grid.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from depo_plugin.backtest.logs import Group
from depo_plugin.messages import Label, prompt_key
from depo_plugin.settings.config import DepoConfig, HistoryConfig, load_config

Beliefs = tuple[np.ndarray, np.ndarray]  # a_B, b_B, float64
MEAN_KEPT = 0.98  # per step: a pool's mean pass rate follows about the last 50 steps


class Predictor(Protocol):
    """One way to predict."""

    def predict(self, groups: Sequence[Group]) -> Beliefs:
        """Return the belief about each group's pass rate."""

    def learn(self, groups: Sequence[Group]) -> None:
        """Learn from groups that were revealed."""


class Depo:
    """The package's own estimator."""

    def __init__(self, cfg: DepoConfig, group_size: int, seed: int, cache: Path):
        """Start without experience. cache: folder of embeddings, which several of them share."""
        from depo_plugin.estimator.estimator import DifficultyEstimator

        self._estimator = DifficultyEstimator(cfg, group_size, seed, cache_dir=cache)

    def predict(self, groups):
        """Return the estimator's scores."""
        scores = self._estimator.score([group.prompt for group in groups], [group.label for group in groups])
        return scores.a, scores.b

    def learn(self, groups):
        """Have the estimator learn from these groups as from one step."""
        self._estimator.learn([Label(g.prompt, g.label, g.k / g.n, None, g.n, 0 < g.k < g.n, None) for g in groups])


class HistoryOnly:
    """The estimator's belief without any text: the ability, and each prompt's own groups."""

    def __init__(self, cfg: HistoryConfig):
        """Start without experience."""
        from depo_plugin.estimator.belief import Belief

        self._belief, self._updates = Belief(cfg, 0), 0

    def _told(self, groups):
        keys = [prompt_key(group.prompt, group.label) for group in groups]
        return keys, np.zeros(len(groups)), np.empty((len(groups), 0))

    def predict(self, groups):
        """Return the beliefs."""
        keys, s_B, text_BF = self._told(groups)
        return self._belief.predict(keys, s_B, text_BF, self._updates)

    def learn(self, groups):
        """Update the belief."""
        k_B, n_B = np.array([g.k for g in groups]), np.array([g.n for g in groups], np.float64)
        keys, s_B, text_BF = self._told(groups)
        self._belief.update(keys, s_B, text_BF, k_B, n_B, self._updates)
        self._updates += 1


class Counted:
    """Baselines that count each prompt's successes: evidence fades by `decay` at each visit.

    Before the first group a prompt is Beta(κm, κ(1 − m)), m the mean pass rate of recent groups, or 1/2 with `flat`.
    With one decay and weight these are the bandits' beliefs (MoPPS, arXiv 2507.04632); with several, the pair whose
    Beta-binomial likelihood of the groups so far is highest predicts: a fitted Beta-binomial.
    """

    def __init__(
        self, index: dict[tuple[str, str], int], decays: Sequence[float], kappas: Sequence[float], *, flat: bool
    ):
        """Take the log's prompts, (prompt, label) -> number, and the grid."""
        grid = [(decay, kappa) for decay in decays for kappa in kappas]
        self._index, self._flat = index, flat
        self._decay_C, self._kappa_C = (np.array(part, np.float64)[:, None] for part in zip(*grid, strict=True))
        self._k_CN, self._n_CN = np.zeros((len(grid), len(index))), np.zeros((len(grid), len(index)))
        self._likelihood_C = np.zeros(len(grid))
        self._mean = RunningMean()

    def _beliefs(self, at_B):
        mean = 0.5 if self._flat else self._mean.value
        a_CB = self._kappa_C * mean + self._k_CN[:, at_B]
        return a_CB, self._kappa_C * (1 - mean) + self._n_CN[:, at_B] - self._k_CN[:, at_B]

    def predict(self, groups):
        """Return the beliefs of the likeliest pair of decay and weight."""
        a_CB, b_CB = self._beliefs(self._at(groups))
        best = int(self._likelihood_C.argmax())
        return a_CB[best], b_CB[best]

    def learn(self, groups):
        """Count, and see how likely each pair made these groups."""
        at_B = self._at(groups)
        k_B, n_B = np.array([g.k for g in groups]), np.array([g.n for g in groups], np.float64)
        a_CB, b_CB = self._beliefs(at_B)
        self._likelihood_C += beta_binomial(a_CB, b_CB, k_B, n_B).sum(1)
        for at, k, n in zip(at_B, k_B, n_B, strict=True):  # a prompt may occur twice in a step
            self._k_CN[:, at] = self._decay_C[:, 0] * self._k_CN[:, at] + k
            self._n_CN[:, at] = self._decay_C[:, 0] * self._n_CN[:, at] + n
        self._mean.learn(groups)

    def _at(self, groups):
        return np.array([self._index[group.prompt, group.label] for group in groups])


class RunningMean:
    """The mean pass rate of recent groups, the same for every prompt, with the weight of two samples."""

    def __init__(self):
        """Start at 1/2."""
        self._sum, self._weight = 1.0, 2.0

    @property
    def value(self) -> float:
        """The mean pass rate."""
        return self._sum / self._weight

    def predict(self, groups):
        """Return the same belief for each group."""
        mean_B = np.full(len(groups), self.value)
        return 2 * mean_B, 2 - 2 * mean_B

    def learn(self, groups):
        """Follow the mean."""
        self._sum = MEAN_KEPT * self._sum + sum(group.k / group.n for group in groups)
        self._weight = MEAN_KEPT * self._weight + len(groups)


def beta_binomial(a_B, b_B, k_B, n_B) -> np.ndarray:
    """Return log P(k of n) under Beta(a, b), without the binomial coefficient, which is the same for all beliefs."""
    import torch

    def betaln(a, b):
        return sum(sign * torch.lgamma(torch.as_tensor(x)) for sign, x in ((1, a), (1, b), (-1, a + b)))

    return (betaln(a_B + k_B, b_B + n_B - k_B) - betaln(a_B, b_B)).numpy()


class Hindsight:
    """What a prompt's own other groups tell, up to NEAR visits before and after: no learner can know more of it."""

    NEAR = 4

    def __init__(self, steps: Sequence[Sequence[Group]]):
        """Read the whole log."""
        self._groups: dict[tuple[str, str], list[Group]] = {}
        self._visit: dict[tuple[str, str], int] = {}
        for group in (group for step in steps for group in step):
            self._groups.setdefault((group.prompt, group.label), []).append(group)
        rates = [group.k / group.n for groups in self._groups.values() for group in groups]
        self._mean = float(np.clip(np.mean(rates), 0.01, 0.99))
        known = [self._around(key, i) for key, groups in self._groups.items() for i in range(len(groups))]
        told = [(group.k, group.n) for groups in self._groups.values() for group in groups]
        (k_B, n_B), (around_k_B, around_n_B) = np.array(told).T, np.array(known).T

        def likelihood(kappa: float) -> float:
            a_B = kappa * self._mean + around_k_B
            return float(beta_binomial(a_B, kappa * (1 - self._mean) + around_n_B - around_k_B, k_B, n_B).sum())

        self._kappa = max(KAPPAS, key=likelihood)

    def _around(self, key, visit: int) -> tuple[float, float]:
        groups = self._groups[key]
        near = groups[max(0, visit - self.NEAR) : visit] + groups[visit + 1 : visit + 1 + self.NEAR]
        return sum(group.k for group in near), float(sum(group.n for group in near))

    def predict(self, groups):
        """Return the beliefs; the next call is about the next visits."""
        a_B, b_B = np.empty(len(groups)), np.empty(len(groups))
        for i, group in enumerate(groups):
            key = group.prompt, group.label
            visit = self._visit.get(key, 0)
            self._visit[key] = visit + 1
            k, n = self._around(key, visit)
            a_B[i], b_B[i] = self._kappa * self._mean + k, self._kappa * (1 - self._mean) + n - k
        return a_B, b_B

    def learn(self, groups):
        """Learn nothing: it knows."""


KAPPAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
DECAYS = (1.0, 0.9, 0.7, 0.5)


def predictors(
    steps: Sequence[Sequence[Group]], cfg_of: Callable[[dict], DepoConfig], group_size: int, seed: int, cache: Path
) -> dict[str, Callable[[], Predictor]]:
    """Return name -> factory, DEPO first. cfg_of: the settings with some changed (key -> value)."""
    index: dict[tuple[str, str], int] = {}
    for group in (group for step in steps for group in step):
        index.setdefault((group.prompt, group.label), len(index))

    def depo(changes: dict) -> Callable[[], Predictor]:
        return lambda: Depo(cfg_of(changes), group_size, seed, cache)

    return {
        "depo": depo({}),
        "share=false": depo({"history.share": False}),
        "drift=false": depo({"history.drift": False}),
        "text only": depo({"history.kappa": "inf"}),
        "history only": lambda: HistoryOnly(cfg_of({}).history),
        "Beta-binomial, fitted": lambda: Counted(index, DECAYS, KAPPAS, flat=False),
        "Beta(1,1)": lambda: Counted(index, [1.0], [2.0], flat=True),
        "Beta(1,1), decay .5": lambda: Counted(index, [0.5], [2.0], flat=True),
        "last group": lambda: Counted(index, [0.0], [1.0], flat=False),
        "running mean": RunningMean,
        "hindsight": lambda: Hindsight(steps),
    }


def default_config(changes: dict) -> DepoConfig:
    """Return the default settings with these changes."""
    return load_config(None, changes)
