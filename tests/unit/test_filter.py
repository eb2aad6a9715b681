"""The filter's pure functions, against exact fractions, simulation and hand-made cases."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depo_plugin.filter import (
    Decision,
    Judged,
    PromptFilter,
    beliefs_of,
    decide,
    fill_up,
    keep_share,
    signal_probability,
)
from depo_plugin.messages import Reason, Scores
from depo_plugin.rules import rule_of
from depo_plugin.settings.config import FilterConfig

WINDOW = FilterConfig(rule="window", low=0.25, high=0.75, epsilon=0.1)


def exact_signal_probability(a: float, b: float, group_size: int) -> Fraction:
    """1 − Π (a+i)/(a+b+i) − Π (b+i)/(a+b+i) without rounding."""
    a, b = Fraction(a), Fraction(b)
    right, wrong = Fraction(1), Fraction(1)
    for i in range(group_size):
        right *= (a + i) / (a + b + i)
        wrong *= (b + i) / (a + b + i)
    return 1 - right - wrong


def u(p, group_size):
    """The chance of a mixed group where the pass rate is known to be p."""
    return 1 - p**group_size - (1 - p) ** group_size


def beliefs(*p, strength=8.0):
    p = np.array(p)
    return strength * p, strength * (1 - p)


def decided(a, b, cfg, uniform, group_size=8):
    """The decisions of a rule on these beliefs, all of them usable."""
    scores = Scores(np.asarray(a), np.asarray(b), np.zeros(len(a)), 99)
    usable, known = beliefs_of(scores, ["source"] * len(a), group_size)
    assert usable.all()
    return decide(rule_of(cfg)(known), cfg.epsilon, np.asarray(uniform))


evidence = st.one_of(st.floats(1e-6, 1e6), st.floats(0.01, 50), st.just(0.0))


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(a=evidence, b=evidence.filter(lambda x: x > 0), group_size=st.integers(2, 128))
def test_signal_probability_equals_the_exact_product(a, b, group_size):
    exact = float(exact_signal_probability(a, b, group_size))
    assert signal_probability(a, b, group_size) == pytest.approx(exact, rel=1e-9, abs=1e-14)
    assert signal_probability(b, a, group_size) == pytest.approx(exact, rel=1e-9, abs=1e-14)


def test_signal_probability_keeps_its_digits_where_nearly_all_groups_are_alike():
    """To first order in b, V = b · Σ_{i<G} 1/(a+i): here 8e-12, where 1 − P − Q in float64 would be off by 1e-16."""
    assert signal_probability(1e6, 1e-6, 8) == pytest.approx(float(exact_signal_probability(1e6, 1e-6, 8)), rel=1e-10)
    assert signal_probability(1e6, 1e-6, 8) == pytest.approx(8e-12, rel=1e-4)


def test_signal_probability_is_the_rate_of_mixed_groups_in_simulation():
    rng = np.random.default_rng(0)
    for a, b, group_size in [(0.4, 0.4, 8), (3.0, 1.0, 4), (20.0, 2.0, 16)]:
        successes = rng.binomial(group_size, rng.beta(a, b, 200_000))
        mixed = np.mean((successes > 0) & (successes < group_size))
        assert signal_probability(a, b, group_size) == pytest.approx(mixed, abs=4 * 0.5 / np.sqrt(200_000))


@pytest.mark.parametrize("group_size", [2, 8, 128])
def test_with_much_evidence_it_becomes_u_of_the_pass_rate(group_size):
    """V(κp, κ(1−p)) → u(p) with κ; the gap is of order G²/κ."""
    p = np.linspace(0, 1, 21)
    for kappa in (1e6, 1e9):
        v = signal_probability(kappa * p, kappa * (1 - p), group_size)
        np.testing.assert_allclose(v, u(p, group_size), atol=group_size**2 / kappa)


def test_after_one_group_all_correct_u_of_the_mean_is_too_hopeful():
    """A U-shaped pool, Beta(0.36, 0.36), and one group of 8, all correct."""
    rng = np.random.default_rng(0)
    pool = rng.beta(0.36, 0.36, 400_000)
    first, second = (rng.binomial(8, pool) for _ in range(2))
    truth = np.mean((second[first == 8] > 0) & (second[first == 8] < 8))
    assert truth == pytest.approx(0.22, abs=0.01)
    assert signal_probability(8.36, 0.36, 8) == pytest.approx(truth, abs=0.005)
    assert u(9 / 10, 8) == pytest.approx(0.57, abs=0.005)  # p̂ with a flat prior


def test_beliefs_that_are_no_distribution_have_no_value():
    v = signal_probability([1.0, np.nan, np.inf, -1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 2.0, 0.0, 3.0], 8)
    assert np.isnan(v).tolist() == [False, True, True, True, True, False]
    assert v[5] == 0  # no evidence of any success: all wrong for certain


def test_one_response_never_has_a_signal():
    assert signal_probability(3.0, 4.0, 1) == 0


def test_window_keeps_its_bounds():
    a, b = beliefs(0.0, 0.24, 0.25, 0.5, 0.75, 0.76, 1.0)
    decisions = decided(a, b, WINDOW, np.full(7, 0.99))
    assert [d.keep for d in decisions] == [False, False, True, True, True, False, False]
    assert {(d.q, d.reason) for d in decisions if d.keep} == {(1.0, Reason.PASSED)}
    assert {(d.q, d.reason) for d in decisions if not d.keep} == {(0.1, Reason.REJECTED)}


def test_utility_asks_for_the_expected_signal_not_for_the_mean():
    """p̂ = 0.9 twice: with little evidence a group of 8 is more often all right than with much.

    V(0.9, 0.1) = 1 − Π (0.9+i)/(1+i) − Π (0.1+i)/(1+i) = 0.228, V(900, 100) ≈ u(0.9) = 0.57.
    """
    cfg = FilterConfig(rule="utility", min_utility=0.5, low=0.0, high=0.0, epsilon=0.0)
    decisions = decided([0.9, 900.0], [0.1, 100.0], cfg, np.zeros(2))
    assert float(exact_signal_probability(0.9, 0.1, 8)) == pytest.approx(0.228, abs=1e-3)
    assert [d.keep for d in decisions] == [False, True]


def test_soft_keeps_by_the_root_of_the_expected_signal():
    """V(0.9, 0.1) = 0.228: q = √(0.228 / 0.75) = 0.551; from V = 0.75 on every prompt is kept."""
    cfg = FilterConfig(rule="soft", soft_utility=0.75)
    a, b = [0.9, 0.9, 4.0, 4.0], [0.1, 0.1, 4.0, 4.0]
    assert signal_probability(4.0, 4.0, 8) > 0.75
    decisions = decided(a, b, cfg, [0.55, 0.552, 0.0, 0.999])
    assert [d.keep for d in decisions] == [True, False, True, True]
    assert [d.reason for d in decisions[:2]] == [Reason.PASSED, Reason.REJECTED]
    assert [d.q for d in decisions] == pytest.approx([0.551, 0.551, 1.0, 1.0], abs=1e-3)


def test_exploration_keeps_what_the_draw_says_with_that_probability():
    a, b = beliefs(0.1, 0.1, 0.1, 0.5)
    decisions = decided(a, b, WINDOW, [0.0, 0.0999, 0.1, 0.0])
    explored = Decision(True, 0.1, Reason.EXPLORED)
    assert decisions == [explored, explored, Decision(False, 0.1, Reason.REJECTED), Decision(True, 1.0, Reason.PASSED)]


def test_a_rule_that_says_perhaps_has_its_own_reason_and_exploration_is_the_floor():
    decisions = decide(np.array([0.3, 0.3, 0.05, 0.05]), 0.1, np.array([0.29, 0.31, 0.09, 0.11]))
    assert [d.reason.value for d in decisions] == ["passed", "rejected", "explored", "rejected"]
    assert [d.q for d in decisions] == [0.3, 0.3, 0.1, 0.1]


def test_without_epsilon_nothing_is_explored():
    assert [d.keep for d in decided(*beliefs(0.1), FilterConfig(epsilon=0.0), np.zeros(1))] == [False]


@pytest.mark.slow
def test_a_share_of_draws_equal_to_q_is_kept():
    q, n = np.repeat([0.2, 0.7], 20_000), 20_000
    kept = np.array([d.keep for d in decide(q, 0.02, np.random.default_rng(0).random(2 * n))])
    assert kept[:n].mean() == pytest.approx(0.2, abs=0.012)
    assert kept[n:].mean() == pytest.approx(0.7, abs=0.013)


def test_beliefs_are_those_of_the_usable_scores():
    scores = Scores(np.array([np.nan, 2.0, 0.0, 6.0]), np.array([1.0, 6.0, 0.0, 2.0]), np.arange(4.0), 7)
    usable, known = beliefs_of(scores, ["a", "b", "c", "d"], 8)
    assert usable.tolist() == [False, True, False, True]
    assert (known.p.tolist(), known.a.tolist(), known.b.tolist()) == ([0.25, 0.75], [2.0, 6.0], [6.0, 2.0])
    assert (known.visits.tolist(), known.datasource.tolist()) == ([1.0, 3.0], ["b", "d"])
    assert (known.step, known.group_size) == (7, 8)
    assert known.v.tolist() == signal_probability(known.a, known.b, 8).tolist()


SCORES = Scores(np.array([4.0, np.nan, 0.4]), np.array([4.0, 1.0, 7.6]), np.zeros(3), 9)


@pytest.mark.parametrize(
    ("scores", "reasons"),
    [
        (SCORES, ["passed", "unscored", "rejected"]),
        (SCORES._replace(updates=4), ["warmup"] * 3),
        (None, ["unscored"] * 3),
    ],
)
def test_a_filter_judges_what_it_has_scores_for(scores, reasons):
    found = PromptFilter(FilterConfig(warmup_steps=5), 8).judge(scores, ["s"] * 3, np.full(3, 0.5))
    assert [one.decision.reason.value for one in found] == reasons
    assert [one.decision.keep for one in found] == [reason != "rejected" for reason in reasons]
    p = [0.5, None, pytest.approx(0.05)] if scores else [None] * 3
    assert [one.p for one in found] == p
    assert [one.v is None for one in found] == [one.p is None for one in found]


def test_in_shadow_mode_everything_is_kept_and_q_is_the_rules():
    cfg = FilterConfig(warmup_steps=5, epsilon=0.03)
    found = [one.decision for one in PromptFilter(cfg, 8).judge(SCORES, ["s"] * 3, None)]
    assert found[::2] == [Decision(True, 1.0, Reason.SHADOW), Decision(True, 0.03, Reason.SHADOW)]
    assert found[1] == Decision(True, 1.0, Reason.UNSCORED)


def test_fill_up_takes_the_best_rejected_ones():
    yes, no = Decision(True, 1.0, Reason.PASSED), Decision(False, 0.1, Reason.REJECTED)

    def filled(values, missing, decisions=None):
        judged = [
            Judged(0.5, v, decision) for v, decision in zip(values, decisions or [no] * len(values), strict=True)
        ]
        return fill_up(judged, missing)

    found = filled([0.2, 0.9, 0.3, 0.2, 0.1], 2, [no, yes, no, no, no])
    assert [one.decision.reason.value for one in found] == ["forced", "passed", "forced", "rejected", "rejected"]
    assert found[0] == Judged(0.5, 0.2, Decision(True, 1.0, Reason.FORCED))
    assert [one.decision.keep for one in filled([0.1, 0.2], 5)] == [True, True]
    kept = [i for i, one in enumerate(filled([0.1, 0.2] * 50, 10)) if one.decision.keep]
    assert kept == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]  # of equal ones the first


@pytest.mark.parametrize(("keep_rate", "wanted"), [(Fraction(1, 20), 4), (Fraction(1, 2), 2), (Fraction(9, 10), 16)])
def test_the_share_of_a_batch_that_stopped_at_its_last_kept_is_unbiased(keep_rate, wanted):
    """P(scanned = n) = C(n−1, B−1) r^B (1−r)^(n−B), so E[share] must be r; E[kept/scanned] is above it."""

    def expectation(share):
        chances = (
            (n, comb(n - 1, wanted - 1) * float(keep_rate) ** wanted * float(1 - keep_rate) ** (n - wanted))
            for n in range(wanted, 40 * wanted + 400)
        )
        return sum(chance * share(wanted, n, True) for n, chance in chances)

    assert expectation(keep_share) == pytest.approx(float(keep_rate), rel=1e-6)
    assert expectation(lambda kept, scanned, _: kept / scanned) > float(keep_rate) * 1.004


def test_the_share_of_a_scan_of_fixed_length_is_what_it_kept():
    assert keep_share(3, 12, stopped=False) == 0.25
    assert keep_share(1, 4, stopped=True) == 0.25
    assert keep_share(8, 8, stopped=True) == keep_share(1, 1, stopped=True) == 1.0


def test_reasons_print_as_the_metrics_they_count():
    names = ["warmup", "passed", "explored", "forced", "rejected", "unscored", "shadow"]
    assert [f"{reason}" for reason in Reason] == names
