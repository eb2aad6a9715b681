"""One prompt's x: from x to a pass rate, from groups to what is believed of x, and from that to a Beta distribution.

    p = F(x),  F(x) = σ(x)²                       gradual prompts
    p = F(h + 6·(x − h)),  F(h) = 1/2             steep prompts

The square: a response is right only if two things go right, so a hard prompt is nearer to hopeless than its odds say,
and after a group that is all wrong the next one is too, more often than with σ(x).
Steep: of many prompts a policy gets nearly all responses right or nearly all wrong. Which of the two it will be is as
unsure as for other prompts, but its first group tells. How many are steep is fitted (belief.py).
Real logs show both (RESULTS.md). Source: two discriminations of the two-parameter model (Birnbaum 1968).

Pure functions. Suffixes: B = prompts of one call, V = visits, K = kinds of prompts (gradual, steep), Q = quadrature
nodes, first all of gradual prompts, then all of steep ones.
"""

import math

import numpy as np

from depo_plugin.estimator.history import VISITS, Evidence

NODES = np.linspace(-6.0, 6.0, 41)  # of the quadrature, in the posterior's standard deviations
FIRST_NODES = np.linspace(-6.0, 6.0, 121)  # of the quadrature over the x of new prompts, in standard deviations
SLOPES_K = np.array([1.0, 6.0])
GRADUAL_K = np.array([1.0, 0.0])  # all prompts are gradual
MIDDLE = -math.log(math.sqrt(2) - 1)  # h, the x of p = 1/2
KAPPA_RANGE = (1e-6, 200.0)  # of τ² for a fixed kappa
PRECISION_MIN = 1e-4
CLOSE = 1e-6  # a mode is found if Newton's step is so short, in the posterior's standard deviations
FLAT = 40.0  # so far from h the likelihood of any group changes no more
LEAST_WEIGHT = 1e-300  # so that no logarithm is infinite


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(−x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def pass_rate(x: np.ndarray) -> np.ndarray:
    """Return F(x) = σ(x)², the pass rate of a gradual prompt whose ability less difficulty is x."""
    return sigmoid(x) ** 2


def steeper(x: np.ndarray, slope: np.ndarray | float) -> np.ndarray:
    """Return the argument of F for prompts of this slope."""
    return MIDDLE + slope * (x - MIDDLE)


def by_kind(x_BQ: np.ndarray) -> np.ndarray:
    """Return the arguments of F for nodes of posterior() to which an ability was added; x may be (..., B, Q)."""
    return steeper(x_BQ, np.repeat(SLOPES_K, len(NODES)))


def log_odds(p: np.ndarray | float) -> np.ndarray:
    """Return the x of a pass rate: the inverse of pass_rate(). p in (0, 1)."""
    root = np.sqrt(p)
    return np.log(root) - np.log1p(-root)


def kappa_of(spread: float, mix_K: np.ndarray = GRADUAL_K) -> float:
    """Return κ for τ²: a + b of the Beta distribution with the pass rate's mean and variance, x ~ N(h, τ²).

    mix_K: shares of the kinds of prompts.
    """
    weights_KQ = mix_K[:, None] * np.exp(-0.5 * NODES**2)
    p_KQ = pass_rate(MIDDLE + math.sqrt(spread) * SLOPES_K[:, None] * NODES)
    mean = np.average(p_KQ, weights=weights_KQ)
    return float(mean * (1 - mean) / np.average((p_KQ - mean) ** 2, weights=weights_KQ) - 1)


def spread_of(kappa: float) -> float:
    """Return the τ² for which kappa_of() is `kappa` if all prompts are gradual, by bisection within KAPPA_RANGE."""
    low, high = KAPPA_RANGE
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kappa_of(middle) > kappa else (low, middle)
    return middle


def log_likelihood(x: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> np.ndarray:
    """Return successes·log p + failures·log(1 − p), p = F(x). Counts may be fractional; all broadcast."""
    right = -2 * np.logaddexp(0.0, -x)
    return successes * right + failures * (np.log1p(sigmoid(x)) - np.logaddexp(0.0, x))


def slopes(x: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first derivative of log_likelihood() by x, and minus the second, which is never negative."""
    s = sigmoid(x)
    slope = 2 * successes * (1 - s) - 2 * failures * s**2 / (1 + s)
    return slope, s * (1 - s) * (2 * successes + failures * (4 * s + 2 * s**2) / (1 + s) ** 2)


def posterior(mean_B, variance_B, evidence: Evidence, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes x_BQ and weights_BQ (rows sum to 1) of each prompt's x, given N(mean, variance) and its evidence.

    mix: shares of the kinds of prompts before the evidence, (K,) or (B, K).
    """
    parts = [_nodes(mean_B, variance_B, evidence, slope) for slope in SLOPES_K]
    x_BQ, log_BQ = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
    weights_BQ = np.exp(log_BQ - log_BQ.max(1, keepdims=True)) * np.repeat(np.atleast_2d(mix), len(NODES), axis=1)
    return x_BQ, weights_BQ / weights_BQ.sum(1, keepdims=True)


def _nodes(mean_B, variance_B, evidence: Evidence, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Return one kind's nodes x_BQ and the logs of their densities times the distance of nodes.

    The density is log-concave. The nodes cover six standard deviations on each side of its mode, which is found by
    Newton's method. A step that leaves the interval around the mode, or is not half as long as the one before, is
    replaced by halving the interval (Press et al., Numerical Recipes, rtsafe). A mode that is found stays, so that it
    does not depend on the other prompts of the call.
    """
    precision_B = 1 / variance_B
    failures_BV = evidence.samples - evidence.successes

    def derivatives(x_B):
        first_BV, second_BV = slopes(steeper(x_B[:, None] + evidence.ability, slope), evidence.successes, failures_BV)
        return slope * first_BV.sum(1), slope**2 * second_BV.sum(1)

    middle_BV = MIDDLE - evidence.ability
    low_B = np.minimum(mean_B, middle_BV.min(1) - FLAT / slope)
    high_B = np.maximum(mean_B, middle_BV.max(1) + FLAT / slope)
    mode_B, step_B, found_B = mean_B, high_B - low_B, np.zeros(len(mean_B), bool)
    for _ in range(40):
        slope_B, curvature_B = derivatives(mode_B)
        slope_B, curvature_B = slope_B - (mode_B - mean_B) * precision_B, curvature_B + precision_B
        newton_B = slope_B / curvature_B
        found_B |= newton_B**2 * curvature_B < CLOSE**2
        if found_B.all():
            break
        low_B, high_B = np.where(slope_B > 0, mode_B, low_B), np.where(slope_B < 0, mode_B, high_B)
        good_B = (mode_B + newton_B >= low_B) & (mode_B + newton_B <= high_B) & (abs(newton_B) <= 0.5 * abs(step_B))
        step_B = np.where(good_B, newton_B, 0.5 * (low_B + high_B) - mode_B)
        mode_B = np.where(found_B, mode_B, mode_B + step_B)
    width_B = 1 / np.sqrt(curvature_B)
    x_BQ = mode_B[:, None] + width_B[:, None] * NODES
    log_BQ = np.log(width_B)[:, None] - 0.5 * precision_B[:, None] * (x_BQ - mean_B[:, None]) ** 2
    for visit in range(VISITS):
        successes, samples, ability = (x[:, visit, None] for x in evidence[:3])
        log_BQ += log_likelihood(steeper(x_BQ + ability, slope), successes, samples - successes)
    return x_BQ, log_BQ


def kinds(weights_BQ: np.ndarray) -> np.ndarray:
    """Return how likely a prompt is of each kind, (B, K)."""
    return weights_BQ.reshape(len(weights_BQ), len(SLOPES_K), -1).sum(-1)


def moments(x_BQ: np.ndarray, weights_BQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean_B and variance_B of weighted nodes."""
    mean_B = (weights_BQ * x_BQ).sum(1)
    return mean_B, (weights_BQ * (x_BQ - mean_B[:, None]) ** 2).sum(1)


def site(mean_B, variance_B, evidence: Evidence, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean_B and precision_B of the normal factor over x nearest to the evidence, if x is N(mean, variance).

    mix: as in posterior().
    """
    found_B, left_B = moments(*posterior(mean_B, variance_B, evidence, mix))
    precision_B = np.maximum(1 / left_B - 1 / variance_B, PRECISION_MIN)
    return (found_B / left_B - mean_B / variance_B) / precision_B, precision_B


def predictive(x_BQ, weights_BQ, successes_B, samples_B) -> np.ndarray:
    """Return the log-likelihood of each prompt's group, by nodes and weights of posterior(); x may be (D, B, Q)."""
    return _mean_likelihood(by_kind(x_BQ), weights_BQ, successes_B, samples_B)


def predictive_by_kind(x_BQ, weights_BQ, successes_B, samples_B) -> np.ndarray:
    """Return the log-likelihood of each prompt's group if it is of each kind, (K, B). Inputs: as predictive()'s."""
    parts = (array.reshape(len(array), len(SLOPES_K), -1) for array in (by_kind(x_BQ), weights_BQ))
    x_KBQ, weights_KBQ = (part.swapaxes(0, 1) for part in parts)
    weights_KBQ = weights_KBQ / np.maximum(weights_KBQ.sum(-1, keepdims=True), LEAST_WEIGHT)
    return _mean_likelihood(x_KBQ, weights_KBQ, successes_B, samples_B)


def first_groups(mean_B, variance_B, successes_B, samples_B) -> np.ndarray:
    """Return log ∫ N(x; mean, variance) p^k (1 − p)^(n−k) dx by kind, (K, B); or (K, T, B) if variance_B is (T, B)."""
    weights_Q = np.exp(-0.5 * FIRST_NODES**2)
    weights_Q /= weights_Q.sum()
    x_BQ = mean_B[..., None] + np.sqrt(variance_B)[..., None] * FIRST_NODES
    return np.stack([_mean_likelihood(steeper(x_BQ, slope), weights_Q, successes_B, samples_B) for slope in SLOPES_K])


def _mean_likelihood(x_BQ, weights_BQ, successes_B, samples_B) -> np.ndarray:
    """Return log Σ_Q weights p^k (1 − p)^(n−k), p = F(x)."""
    log_BQ = log_likelihood(x_BQ, successes_B[:, None], (samples_B - successes_B)[:, None])
    log_BQ += np.log(np.maximum(weights_BQ, LEAST_WEIGHT))
    top_B = log_BQ.max(-1)
    return top_B + np.log(np.exp(log_BQ - top_B[..., None]).sum(-1))


def mixed(log_KB: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Return log Σ_K mix exp(log_KB) over the first axis. mix: (K,), or (S, K) for a result of (S, ...)."""
    top_B = log_KB.max(0)
    return top_B + np.log(np.maximum(np.tensordot(mix, np.exp(log_KB - top_B), 1), LEAST_WEIGHT))


def beta_of(p_BQ: np.ndarray, weights_BQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a_B, b_B of the Beta distributions with the mean and variance of the weighted pass rates p_BQ."""
    mean_B, variance_B = moments(p_BQ, weights_BQ)
    total_B = np.clip(mean_B * (1 - mean_B) / np.maximum(variance_B, 1e-12) - 1, 1e-3, 1e6)
    return mean_B * total_B, (1 - mean_B) * total_B


def shares(log_K: np.ndarray) -> np.ndarray:
    """Return weights in proportion to exp(log_K), with the sum 1."""
    weights_K = np.exp(log_K - log_K.max())
    return weights_K / weights_K.sum()


def likeliest(candidates_K: np.ndarray, log_K: np.ndarray) -> float:
    """Return the candidates' geometric mean, weighed by their likelihoods; log_K may have any offset."""
    return float(np.exp(shares(log_K) @ np.log(candidates_K)))
