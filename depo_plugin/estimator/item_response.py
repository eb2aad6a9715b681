"""One prompt's x: from x to a pass rate, from groups to what is believed of x, and from that to a Beta distribution.

    p = σ(x)²

The square: a response is right only if two things go right, so a hard prompt is nearer to hopeless than its odds say,
and after a group that is all wrong the next one is too, more often than with σ(x). Real logs show it (RESULTS.md).

Pure functions. Suffixes: B = prompts of one call, V = visits, Q = quadrature nodes, K = candidates.
"""

import math

import numpy as np

from depo_plugin.estimator.history import VISITS, Evidence

NODES = np.linspace(-6.0, 6.0, 41)  # of the quadrature, in the posterior's standard deviations
FIRST_NODES = np.linspace(-6.0, 6.0, 121)  # of the quadrature over the x of new prompts, in standard deviations
KAPPA_RANGE = (1e-6, 200.0)  # of τ² for a fixed kappa
PRECISION_MIN = 1e-4


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(−x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def pass_rate(x: np.ndarray) -> np.ndarray:
    """Return the pass rate σ(x)² of a prompt whose ability less difficulty is x."""
    return sigmoid(x) ** 2


def log_odds(p: np.ndarray | float) -> np.ndarray:
    """Return the x of a pass rate: the inverse of pass_rate(). p in (0, 1)."""
    root = np.sqrt(p)
    return np.log(root) - np.log1p(-root)


def kappa_of(spread: float) -> float:
    """Return κ for τ²: a + b of the Beta distribution with the pass rate's mean and variance, x ~ N(x(1/2), τ²)."""
    weights = np.exp(-0.5 * NODES**2)
    p = pass_rate(log_odds(0.5) + math.sqrt(spread) * NODES)
    mean = np.average(p, weights=weights)
    return float(mean * (1 - mean) / np.average((p - mean) ** 2, weights=weights) - 1)


def spread_of(kappa: float) -> float:
    """Return the τ² for which kappa_of() is `kappa`, by bisection within KAPPA_RANGE."""
    low, high = KAPPA_RANGE
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kappa_of(middle) > kappa else (low, middle)
    return middle


def log_likelihood(x: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> np.ndarray:
    """Return successes·log p + failures·log(1 − p), p = pass_rate(x). Counts may be fractional; all broadcast."""
    right = -2 * np.logaddexp(0.0, -x)
    return successes * right + failures * (np.log1p(sigmoid(x)) - np.logaddexp(0.0, x))


def slopes(x: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first derivative of log_likelihood() by x, and minus the second, which is never negative."""
    s = sigmoid(x)
    slope = 2 * successes * (1 - s) - 2 * failures * s**2 / (1 + s)
    return slope, s * (1 - s) * (2 * successes + failures * (4 * s + 2 * s**2) / (1 + s) ** 2)


def posterior(mean_B, variance_B, evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes x_BQ and weights_BQ (rows sum to 1) of each prompt's x, given N(mean, variance) and its evidence.

    The density is log-concave: Newton's method finds its mode. The nodes cover six standard deviations on each side.
    """
    precision_B = 1 / variance_B
    failures_BV = evidence.samples - evidence.successes
    mode_B = mean_B.copy()
    for _ in range(25):  # enough steps of at most 2 to get from any score logit to any mode
        slope_BV, curvature_BV = slopes(mode_B[:, None] + evidence.ability, evidence.successes, failures_BV)
        slope_B = slope_BV.sum(1) - (mode_B - mean_B) * precision_B
        mode_B = mode_B + np.clip(slope_B / (curvature_BV.sum(1) + precision_B), -2.0, 2.0)
    curvature_BV = slopes(mode_B[:, None] + evidence.ability, evidence.successes, failures_BV)[1]
    width_B = 1 / np.sqrt(curvature_BV.sum(1) + precision_B)
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


def site(mean_B, variance_B, evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return mean_B and precision_B of the normal factor over x nearest to the evidence, if x is N(mean, variance)."""
    found_B, left_B = moments(*posterior(mean_B, variance_B, evidence))
    precision_B = np.maximum(1 / left_B - 1 / variance_B, PRECISION_MIN)
    return (found_B / left_B - mean_B / variance_B) / precision_B, precision_B


def predictive(x_BQ, weights_BQ, successes_B, samples_B) -> np.ndarray:
    """Return log Σ_Q weights p^k (1 − p)^(n−k), the log-likelihood of each prompt's group; x_BQ may be (K, B, Q)."""
    log_BQ = log_likelihood(x_BQ, successes_B[:, None], (samples_B - successes_B)[:, None])
    top_B = log_BQ.max(-1)
    return top_B + np.log((weights_BQ * np.exp(log_BQ - top_B[..., None])).sum(-1))


def first_groups(mean_B, variance_B, successes_B, samples_B) -> np.ndarray:
    """Return log ∫ N(x; mean, variance) p^k (1 − p)^(n−k) dx, p = pass_rate(x); variance_B may be (T, B)."""
    weights_Q = np.exp(-0.5 * FIRST_NODES**2)
    x_BQ = mean_B[..., None] + np.sqrt(variance_B)[..., None] * FIRST_NODES
    return predictive(x_BQ, weights_Q / weights_Q.sum(), successes_B, samples_B)


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
