"""Published methods that choose from the whole pool and not from a stream: MoPPS and DPS.

Suffixes: N = prompts of the pool, C = candidates, B = prompts chosen, S = the states "none, some, all solved".
"""

import time

import numpy as np

from benchmarks.replay.world import Policy, Stream
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label


class Bandit:
    """Chooses each batch from candidates of the pool, and keeps its scans for the judge."""

    resample = False
    streams = False

    def __init__(self, policy: Policy, seed: int):
        """Start without evidence."""
        self.pool, self.group_size = policy.pool, policy.group_size
        self.seconds = 0.0
        self._rng = np.random.default_rng([seed, Stream.SELECT])
        self._left_N = np.ones(len(self.pool.prompts), bool)  # false in a fresh pool if the prompt was met
        self._scanned: list[tuple] = []

    def draw(self, count: int) -> np.ndarray:
        """Return the indices of the next batch's prompts."""
        start = time.perf_counter()
        index_C = self._rng.permutation(self._candidates(count))
        chosen_B, p_C, v_C = self._choose(index_C, count)
        self._scanned.append((index_C, p_C, v_C, np.isin(index_C, chosen_B)))
        if self.pool.fresh:
            self._left_N[chosen_B] = False
        self.seconds += time.perf_counter() - start
        return chosen_B

    def learn(self, labels: list[Label]) -> None:
        """Learn from one step's groups."""
        start = time.perf_counter()
        index_B = np.array([self.pool.index[label.prompt] for label in labels])
        n_B = np.array([label.n for label in labels], np.float64)
        self._update(index_B, np.array([label.y for label in labels]) * n_B, n_B)
        self.seconds += time.perf_counter() - start

    def scanned(self) -> list[tuple]:
        """Return (index_C, p_C or None, v_C, kept_C) of each scan since the last call."""
        found, self._scanned = self._scanned, []
        return found

    def _candidates(self, count: int) -> np.ndarray:
        return np.flatnonzero(self._left_N)


class Mopps(Bandit):
    """Model predictive prompt selection (arXiv 2507.04632).

    Each prompt has a Beta(a, b), at first (1, 1). After a group with k of n right: a ← λa + (1−λ) + k,
    b ← λb + (1−λ) + n − k. From CANDIDATES · batch random prompts, take those whose draw is nearest to TARGET.
    """

    CANDIDATES = 16
    TARGET = 0.5

    def __init__(self, policy: Policy, seed: int, decay: float):
        """Start with Beta(1, 1) for each prompt. decay: λ."""
        super().__init__(policy, seed)
        self.decay = decay
        self.a_N, self.b_N = np.ones(len(self.pool.prompts)), np.ones(len(self.pool.prompts))

    def _candidates(self, count):
        left = super()._candidates(count)
        return self._rng.choice(left, size=min(len(left), self.CANDIDATES * count), replace=False)

    def _choose(self, index_C, count):
        a_C, b_C = self.a_N[index_C], self.b_N[index_C]
        distance_C = np.abs(self._rng.beta(a_C, b_C) - self.TARGET)
        chosen = np.argsort(distance_C, kind="stable")[:count]
        return index_C[chosen], a_C / (a_C + b_C), signal_probability(a_C, b_C, self.group_size)

    def _update(self, index_B, successes_B, samples_B):
        kept = self.decay
        self.a_N[index_B] = kept * self.a_N[index_B] + (1 - kept) + successes_B
        self.b_N[index_B] = kept * self.b_N[index_B] + (1 - kept) + samples_B - successes_B


class Dps(Bandit):
    """Dynamics-predictive sampling (arXiv 2603.10887).

    Each prompt has a hidden Markov model with the states none, some and all solved. A rollout shows the state. With
    μ the belief of the step before, A = E[Dirichlet(c)] by rows, and μ' the belief of this step (the state that a
    rollout showed, or the predicted belief):
        c ← λc + (1−λ)c₀ + ξ,  ξ(s, s') ∝ μ(s) A(s, s') μ'(s') if rolled out, else 0;   next belief: μ' A(c).
    c₀ = 1, first belief uniform. The batch is the prompts of the whole pool with the highest predicted P(some).
    """

    DECAY = 0.7

    def __init__(self, policy: Policy, seed: int):
        """Start with uniform beliefs."""
        super().__init__(policy, seed)
        size = len(self.pool.prompts)
        self.counts_NSS = np.ones((size, 3, 3))
        self.before_NS = np.full((size, 3), 1 / 3)  # belief of the step before
        self.predicted_NS = np.full((size, 3), 1 / 3)  # belief of the next step

    def _choose(self, index_C, count):
        some_C = self.predicted_NS[index_C, 1]
        return index_C[np.argsort(-some_C, kind="stable")[:count]], None, some_C

    def _update(self, index_B, successes_B, samples_B):
        state_B = np.where(successes_B <= 0, 0, np.where(successes_B >= samples_B, 2, 1))
        now_NS = self.predicted_NS.copy()
        now_NS[index_B] = np.eye(3)[state_B]
        seen_NSS = np.zeros_like(self.counts_NSS)
        joint_BSS = self.before_NS[index_B, :, None] * _rows(self.counts_NSS[index_B]) * now_NS[index_B, None, :]
        seen_NSS[index_B] = joint_BSS / joint_BSS.sum((1, 2), keepdims=True)
        self.counts_NSS = self.DECAY * self.counts_NSS + (1 - self.DECAY) + seen_NSS
        self.before_NS = now_NS
        self.predicted_NS = np.einsum("ns,nst->nt", now_NS, _rows(self.counts_NSS))


def _rows(counts_NSS):
    return counts_NSS / counts_NSS.sum(-1, keepdims=True)
