"""How the ability moves with the text: the Kalman filter against plain linear algebra, and families of prompts."""

import numpy as np
import pytest

from depo_plugin.estimator import drift
from depo_plugin.estimator.belief import Belief
from depo_plugin.estimator.drift import WALKS_K, TextDrift
from depo_plugin.estimator.history import no_evidence
from depo_plugin.estimator.item_response import posterior
from depo_plugin.settings.config import HistoryConfig


def test_the_filter_is_the_regression_of_all_it_was_told(monkeypatch):
    """Two updates of a walk: against the joint normal distribution of both, solved at once."""
    monkeypatch.setattr(drift, "WALKS_K", np.array([0.3]))
    rng, made = np.random.default_rng(0), TextDrift(3)
    texts, changes, noises = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 4)), rng.uniform(0.5, 2, (2, 4))
    for told in zip(texts, changes, noises, strict=True):
        made.walk()
        made.learn(*told, np.zeros(1))
    # v at the first and the second update: variances 0.3 and 0.6, covariance 0.3.
    walk = np.kron([[0.3, 0.3], [0.3, 0.6]], np.eye(3))
    rows = np.zeros((8, 6))
    rows[:4, :3], rows[4:, 3:] = texts
    gain = np.linalg.solve(rows @ walk @ rows.T + np.diag(noises.ravel()), rows @ walk).T
    asked = rng.normal(size=(5, 3))
    assert made.shift(asked) == pytest.approx(asked @ (gain @ changes.ravel())[3:])
    left = (walk - gain @ rows @ walk)[3:, 3:]
    assert made.variance(asked) == pytest.approx(np.einsum("bf,fg,bg->b", asked, left, asked))


def test_the_candidates_are_weighed_by_their_likelihood():
    made, text = TextDrift(1), np.ones((4, 1))
    for _ in range(5):
        made.walk()
        made.learn(text, np.ones(4), np.full(4, 2.0), np.array([0.0, 0.0, 30.0]))
    slow, _, fast = made.shifts(text[:1])[:, 0]
    assert 0 < slow < 0.05
    assert fast > 0.5
    assert made.shift(text[:1]) == pytest.approx(fast, abs=1e-6)


@pytest.mark.parametrize(("mix", "slope"), [((1.0, 0.0), 1), ((0.0, 1.0), 6)])
def test_a_change_is_read_by_the_kind_that_the_prompt_has_shown(monkeypatch, mix, slope):
    """A prompt that is surely gradual, or surely steep, has 6 of 8: against the exact posterior on a grid."""
    belief, told, mean, variance = Belief(HistoryConfig(), 1), [], 0.2, 2.0
    monkeypatch.setattr(belief._drift, "learn", lambda *inputs: told.extend(inputs))
    x_BQ, weights_BQ = posterior(np.array([mean]), np.array([variance]), no_evidence(1), np.array(mix))
    belief._turn(np.ones((1, 1)), x_BQ, weights_BQ, np.array([6.0]), np.array([8.0]))
    x, middle = np.linspace(-15, 15, 30001), -np.log(np.sqrt(2) - 1)
    p = 1 / (1 + np.exp(-middle - slope * (x - middle))) ** 2
    weights = np.exp(-((x - mean) ** 2) / (2 * variance)) * p**6 * (1 - p) ** 2
    found = np.average(x, weights=weights)
    left = np.average((x - found) ** 2, weights=weights)
    precision = 1 / left - 1 / variance
    _, change, noise, _ = told
    assert change == pytest.approx((found / left - mean / variance) / precision - mean, abs=1e-3)
    assert noise == pytest.approx(1 / precision + variance, rel=1e-3)


def families(settings, later, seed=0, steps=60):
    """Two families of 200 prompts whose pass rates are σ(x)²; from step 30 on the second one's x is `later` higher.

    Returns the mean p̂ − p of each family in the last five steps, before the groups are revealed.
    """
    rng, belief, errors = np.random.default_rng(seed), Belief(HistoryConfig(**settings), 16), []
    family = np.repeat([0, 1], 200)
    text = rng.normal(size=(2, 16))[family] + 0.3 * rng.normal(size=(400, 16))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    x = 1.5 * rng.normal(size=400)
    for now in range(steps):
        part = rng.permutation(400)[:80]
        p = 1 / (1 + np.exp(-x[part] - later * (now >= 30) * family[part])) ** 2
        told = list(part), np.zeros(80), text[part]
        a, b = belief.predict(*told, now)
        errors.append([(a / (a + b) - p)[family[part] == one].mean() for one in (0, 1)])
        belief.update(*told, rng.binomial(8, p).astype(float), np.full(80, 8.0), now)
    return np.mean(errors[-5:], axis=0)


@pytest.mark.slow
def test_a_family_that_gets_better_takes_its_prompts_along():
    """Without the drift by text both families would move together, halfway."""
    assert np.abs(families({}, later=2.0)).max() < 0.05
    assert families({"drift": False}, later=2.0)[1] < -0.05


@pytest.mark.slow
def test_in_a_world_that_stands_still_it_costs_nothing():
    assert np.abs(families({}, later=0.0)).max() < 0.04


def test_a_state_of_another_width_is_refused():
    with pytest.raises(ValueError, match="text drift: fields or shapes differ"):
        TextDrift(3).load_state_dict(TextDrift(4).state_dict())
    assert len(TextDrift(4).state_dict()["log"]) == len(WALKS_K)
