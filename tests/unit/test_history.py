"""The prompt history: beliefs worked by hand, κ against data of a known κ, state across a save."""

import math
from fractions import Fraction

import numpy as np
import pytest

from depo_plugin.config import HistoryConfig
from depo_plugin.history import KAPPA_RANGE, PromptHistory, beta_binomial_log_likelihood, prompt_key


def history(kappa=8.0, discount=1.0):
    return PromptHistory(HistoryConfig(kappa=kappa, discount=discount))


def posterior(h, key, prior, now=0):
    a, b = h.posterior([key], np.array([prior]), now)
    return float(a[0]), float(b[0])


def add(h, groups, now=0):
    """groups: (key, prior, successes, samples)."""
    keys, prior, successes, samples = zip(*groups, strict=True)
    h.update(list(keys), np.array(prior), np.array(successes), np.array(samples), now)


def test_prompt_key_is_the_same_number_for_ever():
    """As `printf '1 + 1 =\\0002' | b2sum -l 64` says; checkpoints written today must find their prompts in years."""
    assert prompt_key("1 + 1 =", "2") == 0x8F520A8ECBB0A622
    assert prompt_key("1 + 1 =", "2") != prompt_key("1 + 1 =", "3")
    assert prompt_key("ab", "c") != prompt_key("a", "bc")
    assert 0 <= prompt_key("\ud800 half a surrogate", "") < 2**64


def test_posterior_by_hand():
    """κ = 8, σ = 0.5: a = 4, b = 4 without evidence; after 3 of 8: a = 4 + 3, b = 4 + 5."""
    h = history()
    assert posterior(h, 7, 0.5) == (4.0, 4.0)
    add(h, [(7, 0.5, 3, 8)])
    assert posterior(h, 7, 0.5) == (7.0, 9.0)
    assert posterior(h, 7, 0.25) == (2.0 + 3, 6.0 + 5)
    assert posterior(h, 8, 0.5) == (4.0, 4.0)


def test_evidence_fades_by_the_updates_since_the_prompt_was_seen():
    """Discount 0.5: 8 samples seen at update 2 are worth 2 at update 4, and a new group is added to those."""
    h = history(discount=0.5)
    add(h, [(7, 0.5, 4, 8)], now=2)
    assert posterior(h, 7, 0.5, now=4) == (4 + 1.0, 4 + 1.0)
    add(h, [(7, 0.5, 8, 8)], now=4)
    assert posterior(h, 7, 0.5, now=4) == (4 + 1.0 + 8, 4 + 1.0)


def test_a_prompt_twice_in_one_step_counts_twice_and_order_of_keys_does_not_matter():
    h = history()
    add(h, [(9, 0.5, 1, 8), (2**63 + 5, 0.5, 2, 4), (9, 0.5, 3, 8), (0, 0.5, 0.5, 2)])
    add(h, [(4, 0.5, 8, 8)])
    assert len(h) == 4
    a, b = h.posterior([0, 2**63 + 5, 4, 9, 5], np.full(5, 0.5), 0)
    np.testing.assert_array_equal(a, [4 + 0.5, 4 + 2, 4 + 8, 4 + 4, 4])
    np.testing.assert_array_equal(b, [4 + 1.5, 4 + 2, 4 + 0, 4 + 12, 4])


def test_inf_is_the_text_alone():
    h = history("inf")
    add(h, [(7, 0.5, 0, 8)] * 3)
    a, b = posterior(h, 7, 0.3)
    assert a / (a + b) == pytest.approx(0.3, abs=1e-12)
    assert a + b >= 1e6
    assert len(h) == 0


def test_beta_binomial_equals_the_exact_product():
    """Γ(a+k)/Γ(a) = a(a+1)…(a+k−1), in fractions."""
    for a, b, k, n in [(0.5, 2.0, 0, 8), (3.0, 0.25, 8, 8), (40.0, 60.0, 3, 16)]:
        rising = [math.prod(Fraction(x) + i for i in range(m)) for x, m in ((a, k), (b, n - k), (a + b, n))]
        exact = math.log(rising[0] * rising[1] / rising[2])
        assert beta_binomial_log_likelihood(a, b, k, n) == pytest.approx(exact, rel=1e-12)


def beta_binomial_groups(kappa, updates, groups, rng):
    """Groups of 8 whose true pass rate scatters around the text's σ as Beta(κσ, κ(1−σ)); every prompt is new."""
    for update in range(updates):
        prior = rng.uniform(0.05, 0.95, groups)
        rate = rng.beta(kappa * prior, kappa * (1 - prior))
        keys = range(update * groups, (update + 1) * groups)
        yield update, [(k, s, rng.binomial(8, p), 8) for k, s, p in zip(keys, prior, rate, strict=True)]


@pytest.mark.parametrize("kappa", [2.0, 10.0, 50.0])
def test_fit_finds_the_kappa_that_made_the_data(kappa):
    h = history("fit")
    found = []
    for update, groups in beta_binomial_groups(kappa, 120, 32, np.random.default_rng(0)):
        add(h, groups, now=update)
        found.append(h.kappa)
    # About 20 updates of 32 groups are remembered; log κ is then known to about ±0.15 (κ = 50: ±0.3).
    assert np.median(found[40:]) == pytest.approx(kappa, rel=0.25)
    assert max(found[40:]) / min(found[40:]) < 4


def test_fit_judges_by_the_belief_before_the_groups_are_added():
    """A prompt that was right 80 times is now wrong 8 times. From its text alone (σ = ½) that is an extreme outcome,
    which speaks for a smaller κ; against 80 successes, a text that says ½ deserves more weight: a larger κ.
    """
    h = history("fit")
    add(h, [(1, 0.5, 80, 80)])
    known = h.kappa
    add(h, [(1, 0.5, 0, 8)])
    assert h.kappa > known
    fresh = history("fit")
    add(fresh, [(1, 0.5, 80, 80)])
    add(fresh, [(2, 0.5, 0, 8)])
    assert fresh.kappa < known


def test_fit_stays_inside_its_range_and_finite():
    exact = history("fit")  # every outcome exactly as the text said: κ has no upper bound
    for update in range(200):
        add(exact, [(update * 8 + i, 0.5, 4, 8) for i in range(8)], now=update)
    assert 1e4 < exact.kappa <= KAPPA_RANGE[1]
    alone = history("fit")
    add(alone, [(1, 0.5, 1, 1)])  # one sample says nothing of scatter
    assert alone.kappa == 8.0


def test_a_set_kappa_is_not_fitted():
    h = history(3.0)
    for update, groups in beta_binomial_groups(50.0, 5, 32, np.random.default_rng(0)):
        add(h, groups, now=update)
    assert h.kappa == 3.0


def test_state_goes_on_bit_for_bit_after_learning():
    stream = list(beta_binomial_groups(5.0, 12, 16, np.random.default_rng(3)))
    whole = history("fit", 0.9)
    for update, groups in stream[:6]:
        add(whole, groups, now=update)
    state = whole.state_dict()
    resumed = history("fit", 0.9)
    resumed.load_state_dict(state)
    for update, groups in stream[6:]:
        add(whole, groups, now=update)
        add(resumed, groups, now=update)
    keys = [group[0] for _, groups in stream for group in groups]
    assert len(keys) == 192
    for mine, theirs in zip(
        whole.posterior(keys, np.full(192, 0.4), 12), resumed.posterior(keys, np.full(192, 0.4), 12), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert len(state["keys"]) == 96, "the saved state is a copy"


def test_load_names_missing_and_unexpected_fields():
    state = history().state_dict()
    state["extra"] = state.pop("seen")
    with pytest.raises(ValueError, match=r"'extra', 'seen'"):
        history().load_state_dict(state)


def test_a_prompt_costs_less_than_100_bytes():
    h = history()
    h.update(list(range(1000)), np.full(1000, 0.5), np.full(1000, 4.0), np.full(1000, 8.0), 0)
    assert sum(value.nbytes for value in h.state_dict().values() if isinstance(value, np.ndarray)) < 100 * 1000
