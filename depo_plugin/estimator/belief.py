"""What is believed of pass rates: an item-response model, learned online by quadrature and linear algebra.

    logit p_i(t) = θ(t) + w·φ_i + r_i

θ: the policy's ability, shared by all prompts, a random walk that may jump (the drift of DESIGN). φ_i: what the text
says: the model's score logit and, where evidence is shared between similar prompts, the text's embedding; w: how much
each of it counts, a Bayesian linear regression. r_i ~ N(0, τ²): what the text does not tell, known from the prompt's
own groups alone. τ is fitted; as a number of samples it is κ.

A group of k of n at ability θ multiplies a prompt's belief by σ(x + θ)^k · σ(−x − θ)^(n−k), x = w·φ + r, so evidence
follows the policy as it improves. Handed on is the Beta distribution of the same mean and variance.
Sources: item-response (Rasch) model; assumed-density filtering (Opper 1998) with the sites of expectation propagation
(Minka 2001); τ² by Fisher scoring, the weights' prior by expectation maximisation.

Suffixes: B = prompts of one call, F = features, V = visits, Q = quadrature nodes, D = candidate shifts of the ability.
"""

import math

import numpy as np

from depo_plugin.estimator.history import SITE, VISITS, Evidence, PromptHistory, no_evidence
from depo_plugin.settings.config import HistoryConfig

NODES = np.linspace(-6.0, 6.0, 41)  # of a posterior, in its own standard deviations
SPREAD_START = 2.5  # τ², worth 20 groups whose own error is 2 (see _fit_spread)
SPREAD_WEIGHT = 20 / (SPREAD_START + 2.0) ** 2
SPREAD_RANGE = (1e-6, 25.0)
SPREAD_KEPT = 0.9997  # per new prompt: τ² follows about the last 3000
ABILITY_START = 4.0  # variance of the ability before the first group
ABILITY_STEP = 0.05**2  # variance of its random walk, per update
JUMP_CHANCE, JUMP = 0.01, 1.5**2  # of a jump per update, and its variance
SCALE = 0.5**2  # prior variance of the score logit's weight, around 1
BIAS = 1.0  # prior variance of the constant's weight
WEIGHT_START = 1.5**2  # prior variance of the embedding's weights, fitted
WEIGHT_RANGE = (0.05, 50.0)
WEIGHT_RATE = 0.3  # of the way the prior variance moves towards its estimate, per update
TEXT_KEPT = 0.998  # of the evidence about w per batch of new prompts
PRECISION_MIN = 1e-4
CAVITY_MIN = 1e-4  # a share of a variance that rounding must not make negative


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(−x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def kappa_of(spread: float) -> float:
    """Return κ of τ²: the a + b of the Beta distribution with the variance of σ(τz), z ~ N(0, 1)."""
    weights = np.exp(-0.5 * NODES**2)
    p = sigmoid(math.sqrt(spread) * NODES)
    return float(0.25 / np.average((p - 0.5) ** 2, weights=weights) - 1)


def spread_of(kappa: float) -> float:
    """Return the τ² with that κ, by bisection within SPREAD_RANGE."""
    low, high = SPREAD_RANGE
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kappa_of(middle) > kappa else (low, middle)
    return middle


def log_likelihood(logit: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> np.ndarray:
    """Return successes·log σ(logit) + failures·log σ(−logit); holds for fractional ones as well. All broadcast."""
    return -successes * np.logaddexp(0.0, -logit) - failures * np.logaddexp(0.0, logit)


def posterior(mean_B, variance_B, evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes x_BQ and weights_BQ (rows sum to 1) of each prompt's x given N(mean, variance) and its evidence.

    The density is log-concave: Newton finds its mode, the nodes cover six standard deviations to each side.
    """
    precision_B = 1 / variance_B
    samples_BV = evidence.samples
    mode_B = mean_B.copy()
    for _ in range(25):  # of at most 2 each: from any score logit to any mode
        p_BV = sigmoid(mode_B[:, None] + evidence.ability)
        slope_B = (evidence.successes - samples_BV * p_BV).sum(1) - (mode_B - mean_B) * precision_B
        curvature_B = (samples_BV * p_BV * (1 - p_BV)).sum(1) + precision_B
        mode_B = mode_B + np.clip(slope_B / curvature_B, -2.0, 2.0)
    p_BV = sigmoid(mode_B[:, None] + evidence.ability)
    width_B = 1 / np.sqrt((samples_BV * p_BV * (1 - p_BV)).sum(1) + precision_B)
    x_BQ = mode_B[:, None] + width_B[:, None] * NODES
    log_BQ = -0.5 * precision_B[:, None] * (x_BQ - mean_B[:, None]) ** 2
    for visit in range(VISITS):
        successes, samples, ability = (x[:, visit, None] for x in evidence[:3])
        log_BQ += log_likelihood(x_BQ + ability, successes, samples - successes)
    weights_BQ = np.exp(log_BQ - log_BQ.max(1, keepdims=True))
    return x_BQ, weights_BQ / weights_BQ.sum(1, keepdims=True)


def moments(x_BQ: np.ndarray, weights_BQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean_B and variance_B of weighted nodes."""
    mean_B = (weights_BQ * x_BQ).sum(1)
    return mean_B, (weights_BQ * (x_BQ - mean_B[:, None]) ** 2).sum(1)


def beta_of(p_BQ: np.ndarray, weights_BQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a_B, b_B of the Beta distributions with the mean and variance of weighted pass rates."""
    mean_B, variance_B = moments(p_BQ, weights_BQ)
    total_B = np.clip(mean_B * (1 - mean_B) / np.maximum(variance_B, 1e-12) - 1, 1e-3, 1e6)
    return mean_B * total_B, (1 - mean_B) * total_B


def _with_score(features_BF, score_B):
    """Return a copy of the features with other score logits."""
    return np.c_[score_B, features_BF[:, 1:]]


class Belief:
    """Ability, text weights, spread and the prompts' own evidence, behind predict() and update()."""

    def __init__(self, cfg: HistoryConfig, features: int):
        """Start knowing nothing. features: columns of the texts' embeddings, 0 where they are not shared."""
        self._cfg = cfg
        self._history = PromptHistory(cfg.discount)
        self.ability, self._ability_variance = 0.0, ABILITY_START
        fixed = None if cfg.kappa == "fit" else spread_of(min(float(cfg.kappa), 1e6))
        # The spread of what the text says is fitted wherever it is needed to learn w.
        self._fixed_spread = None if cfg.kappa == "inf" and cfg.share else fixed
        self._spread_sum, self._spread_weight = SPREAD_START * SPREAD_WEIGHT, SPREAD_WEIGHT
        # Columns: the score logit, a constant, the embedding. Only with cfg.share are their weights learned.
        self._center_F = np.r_[1.0, 0.0, np.zeros(features)]
        self._weight_variance = WEIGHT_START
        self._information_FF = np.zeros((features + 2, features + 2))
        self._vector_F = np.zeros(features + 2)
        self._text_clock = 0.0  # batches of new prompts so far
        self._solve()

    def __len__(self) -> int:
        return len(self._history)

    @property
    def features(self) -> int:
        """Columns of the embedding that text_BF must have."""
        return len(self._center_F) - 2

    def narrowed(self, logit):
        """Return what a shift of the mean logit is to the logit of a mean pass rate (see _features)."""
        return logit / math.sqrt(1 + math.pi * self.spread / 8)

    @property
    def spread(self) -> float:
        """τ², the variance of what the text does not tell of a prompt's logit."""
        if self._fixed_spread is not None:
            return self._fixed_spread
        return float(np.clip(self._spread_sum / self._spread_weight, *SPREAD_RANGE))

    @property
    def kappa(self) -> float:
        """Samples that the text's prediction is worth."""
        return kappa_of(self.spread)

    def predict(self, keys: list[int], s_B: np.ndarray, text_BF: np.ndarray, now: int):
        """Return a_B, b_B float64: Beta beliefs about the pass rates at the ability now.

        keys: prompt keys; s_B: score logits; text_BF: embeddings of unit length, (B, 0) without; now: updates so far.
        """
        known = self._history.evidence(np.asarray(keys, np.uint64), now)
        mean_B, variance_B = self._text(self._features(s_B, text_BF), known)
        x_BQ, weights_BQ = posterior(mean_B, variance_B + self.spread, self._own(known))
        return beta_of(sigmoid(x_BQ + self.ability), weights_BQ)

    def update(self, keys: list[int], s_B, text_BF, successes_B, samples_B, now: int) -> None:
        """Learn from one step's groups: the ability, then these prompts, then what their text says of others.

        successes_B: y·n, not always whole; samples_B: n; a prompt may occur twice; the rest as in predict().
        """
        if self._cfg.kappa == "inf" and not (self._cfg.share or self._cfg.drift):
            return  # the paper: the text alone
        keys_B, first_B, group_B = np.unique(np.asarray(keys, np.uint64), return_index=True, return_inverse=True)
        features_BF = self._features(s_B, text_BF)[first_B]
        successes_B, samples_B = np.bincount(group_B, successes_B), np.bincount(group_B, samples_B)
        before = self._history.evidence(keys_B, now)
        mean_B, variance_B = self._text(features_BF, before)
        if self._cfg.drift:
            believed = posterior(mean_B, variance_B + self.spread, self._own(before))
            self._follow(*believed, successes_B, samples_B)
        after = before.with_visit(successes_B, samples_B, self.ability)
        site_mean_B, site_precision_B = self._sites(mean_B, variance_B, after)
        new_B = before.samples.sum(1) == 0
        self._fit_spread(mean_B, variance_B, site_mean_B, site_precision_B, new_B)
        if self._cfg.share and new_B.any():
            precision_B = 1 / (1 / site_precision_B + self.spread)
            self._learn_text(features_BF[new_B], site_mean_B[new_B], precision_B[new_B], float(new_B.mean()))
            site = site_mean_B, precision_B, features_BF[:, 0], np.full(len(keys_B), self._text_clock)
            kept = {name: np.where(new_B, x_B, getattr(before, name)) for name, x_B in zip(SITE, site, strict=True)}
            after = after._replace(**kept)
        self._history.put(keys_B, after, now)

    # ── The text ──

    def _features(self, s_B, text_BF):
        """Return [score logit, 1, embedding]; the logit of a mean pass rate is widened to one of the mean logit.

        E[σ(x)] of x ~ N(m, τ²) is about σ(m / √(1 + πτ²/8)) (MacKay 1992).
        """
        widened_B = np.asarray(s_B, np.float64) / self.narrowed(1.0)
        return np.c_[widened_B, np.ones(len(widened_B)), np.asarray(text_BF, np.float64)]

    def _text(self, features_BF, known: Evidence):
        """Return mean_B and variance_B of w·φ, as all prompts but the one itself have taught it.

        A known prompt's own site is taken out of the regression again (its cavity distribution), or its groups would
        count twice: once as its own, once by way of the text. It is taken out as it was put in, with the score logit
        of then: with the one of now, more of a weight could be taken than was ever there.
        """
        if not self._cfg.share:
            return features_BF[:, 0].copy(), np.zeros(len(features_BF))
        mean_B = features_BF @ self._weights_F
        variance_B = np.einsum("bf,bf->b", features_BF @ self._covariance_FF, features_BF)
        site_B = known.site_precision * TEXT_KEPT ** (self._text_clock - known.site_at)
        then_BF = _with_score(features_BF, known.site_score)
        side_BF = then_BF @ self._covariance_FF
        shared_B = np.einsum("bf,bf->b", side_BF, features_BF)
        left_B = np.maximum(1 - site_B * np.einsum("bf,bf->b", side_BF, then_BF), CAVITY_MIN)
        error_B = known.site_mean - then_BF @ self._weights_F
        return mean_B - site_B * shared_B * error_B / left_B, variance_B + site_B * shared_B**2 / left_B

    def _learn_text(self, features_BF, mean_B, precision_B, share: float):
        """Put the sites of new prompts into the regression; what they replace fades. share: of new ones in the batch.

        A prompt that is met again teaches its text nothing more: the filter kept it for what came of it before, and so
        it says little of prompts that were never met. With all groups, the text's R² fell from 0.6 to 0.2 in a replay.
        """
        if features_BF.shape[1] > 2:
            estimate = np.mean(self._weights_F[2:] ** 2 + np.diag(self._covariance_FF)[2:])
            moved = self._weight_variance + WEIGHT_RATE * (estimate - self._weight_variance)
            self._weight_variance = float(np.clip(moved, *WEIGHT_RANGE))
        self._text_clock += share
        self._information_FF *= TEXT_KEPT**share
        self._vector_F *= TEXT_KEPT**share
        self._information_FF += (features_BF * precision_B[:, None]).T @ features_BF
        self._vector_F += features_BF.T @ (precision_B * mean_B)
        self._solve()

    def _solve(self):
        """Compute the weights' mean and covariance from what the sites have said."""
        prior_F = np.full(len(self._center_F), 1 / self._weight_variance)
        prior_F[:2] = 1 / SCALE, 1 / BIAS
        self._covariance_FF = np.linalg.inv(self._information_FF + np.diag(prior_F))
        self._weights_F = self._covariance_FF @ (self._vector_F + prior_F * self._center_F)

    # ── The prompts ──

    def _own(self, known: Evidence) -> Evidence:
        """Return the prompts' own evidence, none where the text alone is to count."""
        return no_evidence(len(known.site_at)) if self._cfg.kappa == "inf" else known

    def _sites(self, mean_B, variance_B, evidence: Evidence):
        """Return mean_B and precision_B of the normal that stands for what the evidence says of x."""
        prior_B = variance_B + self.spread
        found_B, left_B = moments(*posterior(mean_B, prior_B, evidence))
        precision_B = np.maximum(1 / left_B - 1 / prior_B, PRECISION_MIN)
        return (found_B / left_B - mean_B / prior_B) / precision_B, precision_B

    def _fit_spread(self, mean_B, variance_B, site_mean_B, site_precision_B, new_B):
        """One step of Fisher scoring of τ², from the sites of new prompts.

        A site's mean has the variance τ² + e around what the text says, e = 1/precision + the text's own variance;
        τ² ← Σ w·((site − mean)² − e) / Σ w with w = 1/(τ² + e)², faded. Met again are those that the filter kept for
        what it knew of their r: they would make the spread too small.
        """
        error_B = (1 / site_precision_B + variance_B)[new_B]
        weight_B = 1 / (self.spread + error_B) ** 2
        excess_B = (site_mean_B - mean_B)[new_B] ** 2 - error_B
        fade = SPREAD_KEPT ** new_B.sum()
        self._spread_sum = fade * self._spread_sum + float(weight_B @ excess_B)
        self._spread_weight = fade * self._spread_weight + float(weight_B.sum())

    # ── The ability ──

    def _follow(self, x_BQ, weights_BQ, successes_B, samples_B):
        """Move the ability to its posterior mean, from how these groups differ from what was believed of them."""
        failures_B = samples_B - successes_B

        def log_posterior(shift_D):
            logit = x_BQ + self.ability + shift_D[:, None, None]
            log = log_likelihood(logit, successes_B[:, None], failures_B[:, None])
            top = log.max(-1)
            log_D = (top + np.log((weights_BQ * np.exp(log - top[..., None])).sum(-1))).sum(-1)
            small = self._ability_variance + ABILITY_STEP
            wide = small + JUMP
            walk_D = math.log((1 - JUMP_CHANCE) / math.sqrt(small)) - 0.5 * shift_D**2 / small
            jump_D = math.log(JUMP_CHANCE / math.sqrt(wide)) - 0.5 * shift_D**2 / wide
            return log_D + np.logaddexp(walk_D, jump_D)

        shift_D = np.linspace(-4.0, 4.0, 33)
        for _ in range(2):  # coarse, then fine around what the coarse pass found
            log_D = log_posterior(shift_D)
            weights_D = np.exp(log_D - log_D.max())
            weights_D /= weights_D.sum()
            mean = float(weights_D @ shift_D)
            variance = float(weights_D @ (shift_D - mean) ** 2)
            shift_D = mean + max(0.3, 4 * math.sqrt(variance)) * np.linspace(-1.0, 1.0, 33)
        self.ability += mean
        self._ability_variance = variance

    # ── State ──

    def state_dict(self) -> dict:
        """Return all that can change a later belief, as copies."""
        return {
            "ability": [self.ability, self._ability_variance],
            "spread": [self._spread_sum, self._spread_weight],
            "weight_variance": self._weight_variance,
            "information": self._information_FF.copy(),
            "vector": self._vector_F.copy(),
            "text_clock": self._text_clock,
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(); ValueError naming missing or unexpected fields, or where the features are others."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"belief: fields {sorted(set(state) ^ expected)} are missing or unexpected.")
        if state["information"].shape != self._information_FF.shape:
            raise ValueError(
                f"belief: it was learned with {len(state['vector']) - 2} text features, here are "
                f"{len(self._vector_F) - 2}. Resume with the same --depo.estimator.mode and --depo.history.share."
            )
        self._history.load_state_dict(state["history"])
        self.ability, self._ability_variance = state["ability"]
        self._spread_sum, self._spread_weight = state["spread"]
        self._weight_variance = state["weight_variance"]
        self._information_FF, self._vector_F = np.array(state["information"]), np.array(state["vector"])
        self._text_clock = state["text_clock"]
        self._solve()
