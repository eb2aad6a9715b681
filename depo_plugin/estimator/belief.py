"""Beliefs about pass rates: an item-response model, learned online by quadrature and linear algebra.

    p_i(t) = F(x),   x = θ(t) + v(t)·φ_i + w·φ_i + r_i

F: a gradual prompt's, or a steep one's (item_response.py). The share of steep prompts is fitted with τ².
θ: the policy's ability, shared by all prompts: a random walk that may jump. v: how it differs by text (drift.py).
φ_i: the text's features: the model's score logit and, if similar prompts share evidence, the text's embedding.
w: the weights of the features, from a Bayesian linear regression.
r_i ~ N(0, τ²): the part that only the prompt's own groups reveal. τ² is fitted; κ expresses it as a number of samples.

A group with k of n right responses multiplies a prompt's belief by p^k (1 − p)^(n−k) at the x of its own time, so old
evidence follows the policy as it improves. predict() returns Beta distributions of equal moments.
Sources: item-response (Rasch) model; assumed-density filtering (Opper 1998) with the sites of expectation propagation
(Minka 2001); τ² by its marginal likelihood, and so the weights' prior, on grids.

Suffixes: B = prompts of one call, F = features, Q = quadrature nodes, D = candidate shifts of the ability, K = kinds
of prompts, or candidates for a constant, S and T = candidates for the share of steep prompts and for τ².
"""

import math

import numpy as np

from depo_plugin.estimator.drift import TextDrift
from depo_plugin.estimator.history import SITE, Evidence, PromptHistory, no_evidence
from depo_plugin.estimator.item_response import (
    GRADUAL_K,
    LEAST_WEIGHT,
    beta_of,
    by_kind,
    first_groups,
    kappa_of,
    kinds,
    likeliest,
    log_odds,
    mixed,
    moments,
    pass_rate,
    posterior,
    predictive,
    predictive_by_kind,
    shares,
    sigmoid,
    site,
    spread_of,
)
from depo_plugin.settings.config import HistoryConfig

SPREADS_T = np.geomspace(0.02, 200.0, 25)  # candidates for τ²
SPREAD_START, SPREAD_DOUBT = 2.5, 1.5  # before the first group: the mean of log τ², as τ², and its standard deviation
STEEP_S = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 0.9])  # candidates for the share of steep prompts
STEEP_PRIOR_S = np.array([5, 3, 2, 1, 1, 1]) / 13
MIX_SK = np.c_[1 - STEEP_S, STEEP_S]
GROUPS_KEPT = 0.9997  # share of the candidates' log-likelihood kept per group: the last 3000 count
ABILITY_START = 4.0  # variance of the ability before the first group
ABILITY_STEP = 0.05**2  # variance of its random walk, per update
JUMP_CHANCE, JUMP = 0.01, 1.5**2  # chance of a jump per update, and the jump's variance
SCALE = 0.5**2  # prior variance of the score logit's weight; its prior mean is 1
BIAS = 1.0  # prior variance of the constant's weight
WEIGHTS_K = np.array([0.5, 2.0, 8.0, 32.0])  # candidates for the prior variance of the embedding's weights
TEXT_KEPT = 0.998  # share of the evidence about w kept per batch of new prompts
KEEPS_K = np.array([1.0, 0.998, 0.995, 0.99, 0.98])  # candidates for the share of a prompt's evidence kept per update
KEEP_PRIOR_K = np.array([3, 4, 2, 1, 1]) / 11
KEEP_KEPT = 0.98  # share of their log-likelihood kept per update
LOGIT_END = 27.0  # largest logit of a mean pass rate: above 37 σ is 1 in float64, and log_odds(1) is infinite
CAVITY_MIN = 1e-4  # smallest share of a variance that may remain: rounding must not make it negative


def _with_score(features_BF, score_B):
    """Return a copy of features_BF with score_B as its score logits."""
    return np.c_[score_B, features_BF[:, 1:]]


class Belief:
    """The ability, the text weights, the spread τ² and the prompts' own evidence."""

    def __init__(self, cfg: HistoryConfig, features: int):
        """Start without evidence. features: columns of the text embeddings, 0 if prompts share no evidence."""
        self._cfg = cfg
        self._history = PromptHistory()
        self.ability, self._ability_variance = 0.0, ABILITY_START
        fixed = None if cfg.kappa == "fit" else spread_of(min(float(cfg.kappa), 1e6))
        # Learning w needs a fitted spread, even if kappa is inf.
        self._fixed_spread = None if cfg.kappa == "inf" and cfg.share else fixed
        # Log-likelihood of each pair of candidates for the share of steep prompts and for τ².
        self._spread_log_ST = np.zeros((len(STEEP_S), len(SPREADS_T)))
        self._keep_log_K = np.zeros(len(KEEPS_K))  # log-likelihood of each candidate for keep
        # Columns: the score logit, a constant, the embedding. Only with cfg.share are their weights learned.
        self._center_F = np.r_[1.0, 0.0, np.zeros(features)]
        self._weight_log_K = np.zeros(len(WEIGHTS_K))  # log-likelihood of each candidate for the weights' variance
        self._information_FF = np.zeros((features + 2, features + 2))
        self._vector_F = np.zeros(features + 2)
        self._text_clock = 0.0  # batches of new prompts so far
        self._drift = TextDrift(features)
        self._solve()

    def __len__(self) -> int:
        return len(self._history)

    @property
    def features(self) -> int:
        """Number of columns that text_BF must have."""
        return len(self._center_F) - 2

    def narrowed(self, x):
        """Return about what a shift of x is as a shift of the mean pass rate's logit (see _features).

        For a gradual prompt: with the larger slope of steep ones in it, predictions were no better, or worse. The
        square is left out: it would double the shift of hard prompts. Tried, it changed nothing (tiny_log).
        """
        return x / math.sqrt(1 + math.pi * self.spread / 8)

    @property
    def spread(self) -> float:
        """τ², the variance of the part of a prompt's x that the text does not predict."""
        if self._fixed_spread is not None:
            return self._fixed_spread
        return float(np.exp(self._pairs_ST().sum(0) @ np.log(SPREADS_T)))

    @property
    def mix_K(self) -> np.ndarray:
        """The shares of gradual and of steep prompts."""
        return GRADUAL_K if self._fixed_spread is not None else self._pairs_ST().sum(1) @ MIX_SK

    def _pairs_ST(self) -> np.ndarray:
        """Return how likely each pair of candidates for the share of steep prompts and for τ² is."""
        doubt_T = np.log(SPREADS_T / SPREAD_START) / SPREAD_DOUBT
        log_ST = self._spread_log_ST + np.log(STEEP_PRIOR_S)[:, None] - 0.5 * doubt_T**2
        return shares(log_ST.ravel()).reshape(log_ST.shape)

    @property
    def keep(self) -> float:
        """The share of a prompt's evidence that is left per update since it was last seen."""
        if self._cfg.discount != "fit":
            return float(self._cfg.discount)
        return likeliest(KEEPS_K, self._keep_log_K + np.log(KEEP_PRIOR_K))

    @property
    def kappa(self) -> float:
        """κ, the number of samples that the text's prediction counts as."""
        return kappa_of(self.spread, self.mix_K)

    def predict(self, keys: list[int], s_B: np.ndarray, text_BF: np.ndarray, now: int):
        """Return a_B, b_B float64: Beta beliefs about the pass rates at the current ability.

        keys: prompt keys; s_B: score logits; text_BF: unit embeddings, (B, 0) if not shared; now: updates so far.
        """
        known = self._history.evidence(np.asarray(keys, np.uint64), now, self.keep)
        mean_B, variance_B = self._text(self._features(s_B, text_BF), known)
        x_BQ, weights_BQ = posterior(mean_B, variance_B + self.spread, self._own(known), self.mix_K)
        ability_B = self.ability + self._drift.shift(np.asarray(text_BF, np.float64))
        return beta_of(pass_rate(by_kind(x_BQ + ability_B[:, None])), weights_BQ)

    def visits(self, keys: list[int], now: int) -> np.ndarray:
        """Return visits_B float64: in how many updates each prompt was learned from."""
        return self._history.evidence(np.asarray(keys, np.uint64), now, 1.0).visits

    def update(
        self, keys: list[int], s_B, text_BF, successes_B, samples_B, now: int, prior: float | None = None
    ) -> None:
        """Learn from one step's groups: first the ability, then these prompts' own evidence, then the text weights.

        successes_B: y·n, may be fractional; samples_B: n. A prompt may occur twice. prior: None for groups of this
        run; for another run's, the share of their responses that counts as evidence. Those are no visits, and a
        prompt's first groups of this run teach the text in their place. Other arguments as in predict().
        """
        keys_B, first_B, group_B = np.unique(np.asarray(keys, np.uint64), return_index=True, return_inverse=True)
        features_BF = self._features(s_B, text_BF)[first_B]
        counts_BC = np.c_[np.bincount(group_B, successes_B), np.bincount(group_B, samples_B)]
        successes_B, samples_B = ((1.0 if prior is None else prior) * counts_BC).T
        before = self._history.evidence(keys_B, now, self.keep)
        if self._cfg.kappa == "inf" and not (self._cfg.share or self._cfg.drift):  # as in the paper: only text counts
            self._history.put(keys_B, before._replace(visits=before.visits + (prior is None)), now)
            return
        new_B = before.samples.sum(1) == 0
        known_B = self._own(before).samples.sum(1) > 0  # none if kappa is inf
        mean_B, variance_B = self._text(features_BF, before)
        text_BF = features_BF[:, 2:]
        x_BQ, weights_BQ = posterior(mean_B, variance_B + self.spread, self._own(before), self.mix_K)
        if self._cfg.drift:
            self._follow(x_BQ + self._drift.shift(text_BF)[:, None], weights_BQ, successes_B, samples_B)
            self._drift.walk()
            if known_B.any() and self.features:
                parts = (part[known_B] for part in (text_BF, x_BQ, weights_BQ, successes_B, samples_B))
                self._turn(*parts)
        ability_B = self.ability + self._drift.shift(text_BF)
        if self._fixed_spread is None and known_B.any():
            parts = (x_BQ + ability_B[:, None], weights_BQ, successes_B, samples_B)
            self._fit_steep(*(part[known_B] for part in parts))
        if self._cfg.discount == "fit" and known_B.any():
            told = (keys_B, mean_B, variance_B, ability_B, successes_B, samples_B)
            self._fit_keep(now, *(part[known_B] for part in told))
        after = before.with_visit(successes_B, samples_B, ability_B)._replace(visits=before.visits + (prior is None))
        site_mean_B, site_precision_B = site(mean_B, variance_B + self.spread, after, self.mix_K)
        if new_B.any():  # with all counts of another run: fractions of a response would say that all prompts are alike
            self._fit_spread((mean_B + ability_B)[new_B], variance_B[new_B], *counts_BC[new_B].T)
            if self._cfg.share and self.features:
                self._fit_weights(features_BF[new_B], ability_B[new_B], *counts_BC[new_B].T)
        taught_B = before.visits == 0
        if self._cfg.share and taught_B.any():
            precision_B = 1 / (1 / site_precision_B + self.spread)
            site_B = site_mean_B[taught_B], precision_B[taught_B]
            self._learn_text(features_BF[taught_B], *site_B, before.of(taught_B), float(taught_B.mean()))
            values = site_mean_B, precision_B, features_BF[:, 0], np.full(len(keys_B), self._text_clock)
            added = dict(zip(SITE, values, strict=True))
            # These prompts take up the site that was added for them; the others keep theirs.
            after = after._replace(**{name: np.where(taught_B, added[name], getattr(before, name)) for name in SITE})
        self._history.put(keys_B, after, now)

    # ── The text ──

    def _features(self, s_B, text_BF):
        """Return the features [score, 1, embedding], with the score as the mean of x.

        A score is the logit of a mean pass rate. Widened by √(1 + πτ²/8) it is about the logit of the median one:
        E[σ(z)] of z ~ N(m, τ²) is about σ(m / √(1 + πτ²/8)) (MacKay 1992).
        """
        widened_B = np.asarray(s_B, np.float64) / self.narrowed(1.0)
        center_B = log_odds(sigmoid(widened_B.clip(-LOGIT_END, LOGIT_END)))
        return np.c_[center_B, np.ones(len(center_B)), np.asarray(text_BF, np.float64)]

    def _text(self, features_BF, known: Evidence):
        """Return mean_B and variance_B of w·φ, learned from all prompts except the prompt itself.

        A known prompt's own site is removed from the regression (cavity distribution), so that its groups do not count
        twice. The site is removed with the score logit it was added with: the current logit could remove more weight
        than was added.
        """
        if not self._cfg.share:
            return features_BF[:, 0].copy(), np.zeros(len(features_BF))
        mean_B = features_BF @ self._weights_F
        variance_B = np.einsum("bf,bf->b", features_BF @ self._covariance_FF, features_BF)
        then_BF, site_B = self._site_left(features_BF, known)
        side_BF = then_BF @ self._covariance_FF
        shared_B = np.einsum("bf,bf->b", side_BF, features_BF)
        left_B = np.maximum(1 - site_B * np.einsum("bf,bf->b", side_BF, then_BF), CAVITY_MIN)
        error_B = known.site_mean - then_BF @ self._weights_F
        return mean_B - site_B * shared_B * error_B / left_B, variance_B + site_B * shared_B**2 / left_B

    def _site_left(self, features_BF, known: Evidence) -> tuple[np.ndarray, np.ndarray]:
        """Return the features that prompts' sites were added with, and what is left of the sites' precisions, (B,)."""
        left_B = known.site_precision * TEXT_KEPT ** (self._text_clock - known.site_at)
        return _with_score(features_BF, known.site_score), left_B

    def _learn_text(self, features_BF, mean_B, precision_B, before: Evidence, share: float):
        """Add the sites of prompts' first groups to the regression; older evidence fades.

        before: what was known of these prompts. A site that another run's rates left is removed: it is in the new one.
        share: such prompts / all in the batch.
        A prompt that is met again adds nothing. The filter kept it because of its earlier groups, so it says little
        about prompts that were never met. When all groups counted, the text's R² fell from 0.6 to 0.2 in a replay.
        """
        self._text_clock += share
        self._information_FF *= TEXT_KEPT**share
        self._vector_F *= TEXT_KEPT**share
        then_BF, old_B = self._site_left(features_BF, before)
        self._add_sites(then_BF, before.site_mean, -old_B)
        self._add_sites(features_BF, mean_B, precision_B)
        self._solve()

    def _add_sites(self, features_BF, mean_B, precision_B):
        self._information_FF += (features_BF * precision_B[:, None]).T @ features_BF
        self._vector_F += features_BF.T @ (precision_B * mean_B)

    def _solve(self):
        """Compute the weights' mean and covariance from their prior and the sites added so far."""
        self._weights_F, self._covariance_FF = self._weights(self.weight_variance)

    def _weights(self, variance: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights' mean and covariance if the prior variance of the embedding's weights is this."""
        prior_F = np.full(len(self._center_F), 1 / variance)
        prior_F[:2] = 1 / SCALE, 1 / BIAS
        covariance_FF = np.linalg.inv(self._information_FF + np.diag(prior_F))
        return covariance_FF @ (self._vector_F + prior_F * self._center_F), covariance_FF

    @property
    def weight_variance(self) -> float:
        """The prior variance of the embedding's weights."""
        return likeliest(WEIGHTS_K, self._weight_log_K)

    def _fit_weights(self, features_BF, ability_B, successes_B, samples_B):
        """Add the likelihood of new prompts' first groups under each candidate for the weights' variance."""
        self._weight_log_K *= GROUPS_KEPT ** len(features_BF)
        for k, variance in enumerate(WEIGHTS_K):
            weights_F, covariance_FF = self._weights(variance)
            variance_B = np.einsum("bf,bf->b", features_BF @ covariance_FF, features_BF) + self.spread
            mean_B = features_BF @ weights_F + ability_B
            log_KB = first_groups(mean_B, variance_B, successes_B, samples_B)
            self._weight_log_K[k] += mixed(log_KB, self.mix_K).sum()

    # ── The prompts ──

    def _own(self, known: Evidence) -> Evidence:
        """Return the prompts' own evidence; empty evidence if kappa is inf, because then only the text counts."""
        return no_evidence(len(known.site_at)) if self._cfg.kappa == "inf" else known

    def _fit_spread(self, mean_B, variance_B, successes_B, samples_B):
        """Add the likelihood of new prompts' first groups under each pair of candidates, given the text's prediction.

        mean_B includes the ability. Prompts that are met again are left out: the filter kept them because of what it
        knew about their r.
        """
        log_KTB = first_groups(mean_B, variance_B + SPREADS_T[:, None], successes_B, samples_B)
        self._spread_log_ST *= GROUPS_KEPT ** len(mean_B)
        self._spread_log_ST += mixed(log_KTB, MIX_SK).sum(-1)

    def _fit_steep(self, x_BQ, weights_BQ, successes_B, samples_B):
        """Weigh the candidates for the share of steep prompts by how likely they make these groups of known prompts.

        x_BQ, weights_BQ: what was believed of x, x_BQ with the ability of now. A prompt's earlier groups are given.
        They are all that the filter knew of it, so the filter's choice of prompts does not bias the share.
        """
        # How likely each kind made the earlier groups, up to a factor that is the same for all candidates.
        log_KB = np.log(np.maximum(kinds(weights_BQ) / self.mix_K, LEAST_WEIGHT)).T
        log_SB = mixed(log_KB + predictive_by_kind(x_BQ, weights_BQ, successes_B, samples_B), MIX_SK)
        self._spread_log_ST *= GROUPS_KEPT ** len(successes_B)
        self._spread_log_ST += (log_SB - mixed(log_KB, MIX_SK)).sum(1)[:, None]

    def _fit_keep(self, now, keys_B, mean_B, variance_B, ability_B, successes_B, samples_B):
        """Weigh the candidates for keep by how likely they make these groups, given the prompts' earlier ones."""
        self._keep_log_K *= KEEP_KEPT
        for k, keep in enumerate(KEEPS_K):
            known = self._history.evidence(keys_B, now, keep)
            x_BQ, weights_BQ = posterior(mean_B, variance_B + self.spread, known, self.mix_K)
            log_B = predictive(x_BQ + ability_B[:, None], weights_BQ, successes_B, samples_B)
            self._keep_log_K[k] += log_B.sum()

    # ── The ability ──

    def _follow(self, x_BQ, weights_BQ, successes_B, samples_B):
        """Move the ability to its posterior mean, given these groups and what was predicted for their prompts."""

        def log_posterior(shift_D):
            x_DBQ = x_BQ + self.ability + shift_D[:, None, None]
            log_D = predictive(x_DBQ, weights_BQ, successes_B, samples_B).sum(-1)
            small = self._ability_variance + ABILITY_STEP
            wide = small + JUMP
            walk_D = math.log((1 - JUMP_CHANCE) / math.sqrt(small)) - 0.5 * shift_D**2 / small
            jump_D = math.log(JUMP_CHANCE / math.sqrt(wide)) - 0.5 * shift_D**2 / wide
            return log_D + np.logaddexp(walk_D, jump_D)

        shift_D = np.linspace(-4.0, 4.0, 33)
        for _ in range(2):  # first coarse, then fine around the coarse result
            weights_D = shares(log_posterior(shift_D))
            mean = float(weights_D @ shift_D)
            variance = float(weights_D @ (shift_D - mean) ** 2)
            shift_D = mean + max(0.3, 4 * math.sqrt(variance)) * np.linspace(-1.0, 1.0, 33)
        self.ability += mean
        self._ability_variance = variance

    def _turn(self, text_BF, x_BQ, weights_BQ, successes_B, samples_B):
        """Tell the drift what changed for prompts met before. x_BQ, weights_BQ: what was believed of them."""
        ability_KB = self.ability + self._drift.shifts(text_BF)
        log_K = predictive(x_BQ + ability_KB[..., None], weights_BQ, successes_B, samples_B).sum(1)
        mean_B, variance_B = moments(x_BQ, weights_BQ)
        ability_B = self.ability + self._drift.shift(text_BF)
        group = no_evidence(len(mean_B)).with_visit(successes_B, samples_B, ability_B)
        site_mean_B, site_precision_B = site(
            mean_B, variance_B + self._drift.variance(text_BF), group, kinds(weights_BQ)
        )
        change_B = site_mean_B + ability_B - self.ability - mean_B
        self._drift.learn(text_BF, change_B, 1 / site_precision_B + variance_B, log_K)

    # ── State ──

    def state_dict(self) -> dict:
        """Return copies of everything that can change a later belief."""
        return {
            "ability": [self.ability, self._ability_variance],
            "spread": self._spread_log_ST.copy(),
            "keep": self._keep_log_K.copy(),
            "weight_variance": self._weight_log_K.copy(),
            "information": self._information_FF.copy(),
            "vector": self._vector_F.copy(),
            "text_clock": self._text_clock,
            "drift": self._drift.state_dict(),
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a state_dict(). Raise ValueError if its fields or its number of text features differ."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"belief: fields {sorted(set(state) ^ expected)} are missing or unexpected.")
        if state["information"].shape != self._information_FF.shape:
            raise ValueError(
                f"belief: it was learned with {len(state['vector']) - 2} text features, here are "
                f"{len(self._vector_F) - 2}. Resume with the same --depo.estimator.mode and --depo.history.share."
            )
        for name, here in (
            ("spread", self._spread_log_ST),
            ("keep", self._keep_log_K),
            ("weight_variance", self._weight_log_K),
        ):
            if np.shape(state[name]) != here.shape:
                raise ValueError(f"belief: {name} has the shape {np.shape(state[name])}, here it is {here.shape}.")
        self._history.load_state_dict(state["history"])
        self.ability, self._ability_variance = state["ability"]
        self._spread_log_ST, self._keep_log_K = np.array(state["spread"]), np.array(state["keep"])
        self._weight_log_K = np.array(state["weight_variance"])
        self._information_FF, self._vector_F = np.array(state["information"]), np.array(state["vector"])
        self._text_clock = state["text_clock"]
        self._drift.load_state_dict(state["drift"])
        self._solve()
