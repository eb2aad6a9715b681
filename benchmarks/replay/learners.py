"""Simple learners that replace the estimator behind the project's own loader: score, record, judge, learn.

Suffixes: N = prompts of the pool, B = prompts of one call, K = points of the grid.
"""

import numpy as np

from benchmarks.replay.texts import ridge_predictions
from benchmarks.replay.world import Policy, sigmoid, signal_chance
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label, Record, Scores

GRID = np.linspace(-5.0, 5.0, 241)  # grid points of the item noise and the walk, in the noise's standard deviations


def make_scores(p_B: np.ndarray, v_B: np.ndarray, updates: int, group_size: int) -> Scores:
    """Return the Beta beliefs with mean p_B and signal probability v_B, by bisection on a + b."""
    p_B = np.clip(p_B, 1e-6, 1 - 1e-6)
    low_B, high_B = np.full(len(p_B), -6.0), np.full(len(p_B), 6.0)
    for _ in range(50):
        middle_B = (low_B + high_B) / 2
        total_B = 10**middle_B
        less_B = signal_probability(p_B * total_B, (1 - p_B) * total_B, group_size) < v_B
        low_B, high_B = np.where(less_B, middle_B, low_B), np.where(less_B, high_B, middle_B)
    return Scores(p_B * 10**low_B, (1 - p_B) * 10**low_B, np.zeros(len(p_B)), updates)


class Learner:
    """A learner without beliefs: the loader keeps every prompt."""

    def __init__(self, policy: Policy):
        """Start without updates. policy: the policy in training; each subclass says which truth about it it reads."""
        self.policy, self.pool, self.group_size = policy, policy.pool, policy.group_size
        self.updates = 0

    def score(self, prompts: list[str], labels: list[str]) -> Scores | None:
        """Return beliefs, or None for "keep them all"."""
        return None

    def record(self, records: list[Record]) -> None:
        """Take the loader's decisions; this learner ignores them."""

    def judge(self, labels: list[Label]) -> None:
        """Do nothing: the replay's own judge compares predictions with the truth."""

    def learn(self, labels: list[Label]) -> None:
        """Learn from one step's groups."""
        self.updates += 1

    def _indices(self, prompts: list[str]) -> np.ndarray:
        return np.array([self.pool.index[prompt] for prompt in prompts], int)

    def _scores(self, p_B, v_B) -> Scores:
        return make_scores(p_B, v_B, self.updates, self.group_size)


class Nothing(Learner):
    """Rejects every prompt, so that the loader keeps only the random share ε that exploration keeps."""

    def score(self, prompts: list[str], labels: list[str]) -> Scores:
        """Return beliefs with V = 0."""
        return self._scores(np.full(len(prompts), 0.5), np.zeros(len(prompts)))


class Oracle(Learner):
    """Knows the true pass rates."""

    def score(self, prompts: list[str], labels: list[str]) -> Scores:
        """Return beliefs with the true p and V = u(p)."""
        p_B = self.policy.rates(self._indices(prompts))
        return self._scores(p_B, signal_chance(p_B, self.group_size))


def walk_matrix(size: float) -> np.ndarray:
    """Return the chances (from, to) with which a step of a walk moves between the points of GRID, float64 (K, K).

    size: the step's standard deviation, in the item noise's. The walk is that of neighbours on the grid with the same
    variance, taken in as many moves as it needs; at both ends it stays inside.
    """
    variance = (size / (GRID[1] - GRID[0])) ** 2
    moves = max(int(np.ceil(variance)), 1)
    half = variance / moves / 2
    move_KK = half * (np.eye(len(GRID), k=1) + np.eye(len(GRID), k=-1))
    return np.linalg.matrix_power(move_KK + np.diag(1 - move_KK.sum(1)), moves)


class Ideal(Learner):
    """The exact posterior of each prompt: the best that a learner can reach.

    It knows the text's part of each logit, the spread of the item noise, the current ability, each family's pace and
    the size of the walk, but neither the pass rates nor the walk's path. The posterior over logit = text + noise +
    walk is on a grid. A group with k of n right at ability A multiplies it by p^k (1−p)^(n−k), p = σ(logit + pace·A).
    Each step spreads it by the walk's variance. p̂ = E[p] and V = E[u(p)].
    """

    def __init__(self, policy: Policy):
        """Start with the prior: a normal distribution around the text's part of each logit."""
        super().__init__(policy)
        self._text_N, self._noise = self.pool.text_N, self.pool.noise
        self._weight_NK = np.tile(np.exp(-0.5 * GRID**2), (len(self.pool.prompts), 1))
        self._walk_KK = walk_matrix(self.pool.walk / self._noise)

    def _rates(self, index_B: np.ndarray) -> np.ndarray:
        logit_BK = self._text_N[index_B, None] + self._noise * GRID
        return sigmoid(logit_BK + np.reshape(self.policy.gained(index_B), (-1, 1)))

    def score(self, prompts: list[str], labels: list[str]) -> Scores:
        """Return beliefs with the posterior's E[p] and E[u(p)] at the current ability."""
        return self._scores(*self._beliefs(self._indices(prompts)))

    def _beliefs(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return E[p] and E[u(p)]."""
        p_BK = self._rates(index_B)
        weight_BK = self._weight_NK[index_B]
        weight_BK = weight_BK / weight_BK.sum(1, keepdims=True)
        u_BK = signal_chance(p_BK, self.group_size)
        return (weight_BK * p_BK).sum(1), (weight_BK * u_BK).sum(1)

    def learn(self, labels: list[Label]) -> None:
        """Multiply the posterior by each group's likelihood, then spread it. Call it at the ability of the rollout."""
        index_B = self._indices([label.prompt for label in labels])
        p_BK = np.clip(self._rates(index_B), 1e-12, 1 - 1e-12)
        n_B1 = np.array([label.n for label in labels])[:, None]
        k_B1 = np.array([label.y for label in labels])[:, None] * n_B1
        log_BK = k_B1 * np.log(p_BK) + (n_B1 - k_B1) * np.log1p(-p_BK)
        # multiply.at, because a prompt is in a batch twice if a pass ends within the batch.
        np.multiply.at(self._weight_NK, index_B, np.exp(log_BK - log_BK.max(1, keepdims=True)))
        self._weight_NK @= self._walk_KK
        self._weight_NK /= self._weight_NK.sum(1, keepdims=True)
        super().learn(labels)


class Ridge(Ideal):
    """Ideal, but the text's part comes from a ridge regression that learns the true logits of the prompts met.

    True logits tell more than outcomes, and the penalty is the best one in hindsight. So the distance to ideal is the
    part that a linear model cannot learn from these embeddings and this number of prompts. Use it only on fresh pools:
    for a prompt that is met again, it would know the true logit.
    """

    PENALTIES = (1.0, 3.0, 10.0)

    def __init__(self, policy: Policy, embedding_NE: np.ndarray):
        """Start with the mean logit of the pool. embedding_NE: the prompts' embeddings."""
        super().__init__(policy)
        self._x_NE = embedding_NE / np.linalg.norm(embedding_NE, axis=1, keepdims=True)
        self._met = np.zeros(len(self._x_NE), bool)
        self._predict(np.full(len(self._x_NE), self.pool.logit_N.mean()))

    def _predict(self, text_N: np.ndarray) -> None:
        self._text_N = text_N
        self._noise = float(np.hypot(self.pool.noise, np.std(text_N - self.pool.text_N)))

    def learn(self, labels: list[Label]) -> None:
        """Fit the regression again, with these prompts' true logits."""
        self._met[self._indices([label.prompt for label in labels])] = True
        told = self._x_NE[self._met], self.pool.logit_N[self._met]
        found = ridge_predictions(*told, self._x_NE, self.PENALTIES)
        self._predict(min(found, key=lambda text_N: float(np.std(text_N - self.pool.text_N))))
        super().learn(labels)


class HistoryOnly(Learner):
    """A bandit: each prompt's own groups, and the running mean pass rate m in place of the text.

    Beta(κ·m + S, κ·(1 − m) + N − S); S and N fade with the updates since the prompt was last seen. κ is the value in
    KAPPAS that predicts the groups of about the last 50 updates best, by the Beta-binomial log-likelihood
    Σ_{i<k} log(a + i) + Σ_{i<n−k} log(b + i) − Σ_{i<n} log(a + b + i).
    """

    DISCOUNT = 0.98  # per update
    LIKELIHOOD_KEPT = 0.98
    KAPPAS = np.geomspace(0.25, 256.0, 41)

    def __init__(self, policy: Policy):
        """Start without groups."""
        super().__init__(policy)
        size = len(self.pool.prompts)
        self._successes_N, self._samples_N, self._seen_N = np.zeros(size), np.zeros(size), np.zeros(size, int)
        self._sum, self._count = 0.5, 1.0
        self._likelihood_K = np.zeros(len(self.KAPPAS))

    @property
    def kappa(self) -> float:
        """κ, the number of samples that the mean m counts as."""
        return float(self.KAPPAS[self._likelihood_K.argmax()])

    def _belief(self, index_B, kappa):
        """Return a_B, b_B for one κ, or a_BK, b_BK for an array of them."""
        fade_B = self.DISCOUNT ** (self.updates - self._seen_N[index_B])
        successes_B, samples_B = fade_B * self._successes_N[index_B], fade_B * self._samples_N[index_B]
        prior = np.multiply(kappa, self._sum / self._count), np.multiply(kappa, 1 - self._sum / self._count)
        return np.add.outer(successes_B, prior[0]), np.add.outer(samples_B - successes_B, prior[1])

    def score(self, prompts: list[str], labels: list[str]) -> Scores:
        """Return the Beta posteriors' means and signal probabilities V."""
        a_B, b_B = self._belief(self._indices(prompts), self.kappa)
        return self._scores(a_B / (a_B + b_B), signal_probability(a_B, b_B, self.group_size))

    def learn(self, labels: list[Label]) -> None:
        """Update the likelihood of each κ, then add the groups to the prompts and to the mean."""
        index_B = self._indices([label.prompt for label in labels])
        n_B = np.array([label.n for label in labels], int)
        k_B = np.rint(np.array([label.y for label in labels]) * n_B).astype(int)
        a_BK, b_BK = self._belief(index_B, self.KAPPAS)
        gained_BK = _log_rising(a_BK, k_B) + _log_rising(b_BK, n_B - k_B) - _log_rising(a_BK + b_BK, n_B)
        self._likelihood_K = self.LIKELIHOOD_KEPT * self._likelihood_K + gained_BK.sum(0)
        for index, k, n in zip(index_B, k_B, n_B, strict=True):
            fade = self.DISCOUNT ** (self.updates - self._seen_N[index])
            self._successes_N[index] = fade * self._successes_N[index] + k
            self._samples_N[index] = fade * self._samples_N[index] + n
            self._seen_N[index] = self.updates
        self._sum, self._count = self._sum + float((k_B / n_B).sum()), self._count + len(labels)
        super().learn(labels)


def _log_rising(x_BK: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """Return Σ_{i < count} log(x + i)."""
    i = np.arange(int(count_B.max(initial=0)))
    terms = np.log(x_BK[..., None] + i)
    return np.where(i < count_B[:, None, None], terms, 0.0).sum(-1)
