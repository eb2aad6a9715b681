"""Groups stay whole in OpenRLHF's own micro-batches, which cut across them: labels, importance weights, each base."""

import math
from statistics import fmean, stdev

import pytest
import regrouped_step
from in_copy import run_in_copy
from regrouped_step import BASES, CHANCES, GROUP, GROUPS, LENGTHS, LOG_PROBS, MODES, RANKS, REWARDS, SAMPLES, SHARES
from rollouts import Sample


@pytest.fixture(scope="module")
def steps(patched_copy):
    return run_in_copy(patched_copy, regrouped_step.__file__)


def base_advantages(base):
    """Each sample's advantage before any weight, from its group's rewards."""
    advantages = []
    for start in range(0, len(REWARDS), GROUP):
        rewards = REWARDS[start : start + GROUP]
        mean = fmean(rewards)
        if base == "rloo":  # against the mean of the others
            advantages += [r - (sum(rewards) - r) / (GROUP - 1) for r in rewards]
        elif base == "group_norm":
            advantages += [(r - mean) / (stdev(rewards) + 1e-9) for r in rewards]
        else:
            advantages += [r - mean for r in rewards]
    if base == "reinforce_baseline":  # whitened over all tokens
        mean = sum(a * n for a, n in zip(advantages, LENGTHS, strict=True)) / sum(LENGTHS)
        variance = sum((a - mean) ** 2 * n for a, n in zip(advantages, LENGTHS, strict=True)) / sum(LENGTHS)
        advantages = [(a - mean) / math.sqrt(variance) for a in advantages]
    return advantages


@pytest.mark.wheel
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", MODES)
def test_each_group_is_labelled_and_weighted_as_one_though_micro_batches_cut_across_it(mode, base, steps):
    step = steps[f"{mode} {base}"]
    assert sorted(i for part in step["cut"] for i in part) == list(SAMPLES)
    parts = [
        {k for k, part in enumerate(step["cut"]) if {g * GROUP + j for j in range(GROUP)} & set(part)}
        for g in range(GROUPS)
    ]
    assert sum(len(places) > 1 for places in parts) > GROUPS / 2  # groups in several micro-batches
    prompts, answers = [f"p{g}" for g in range(GROUPS)], [f"a{g}" for g in range(GROUPS)]
    rescaled = base != "reinforce_baseline"  # with which the settings refuse it
    assert list(step["sent"]) == ["keep_weights"] * rescaled + ["judge", "learn"]
    assert step["sent"].get("keep_weights") == ([prompts, answers] if rescaled else None)
    labels = step["sent"]["judge"]
    assert [label["prompt"] for label in labels] == prompts
    for g, label in enumerate(labels):
        own = slice(g * GROUP, (g + 1) * GROUP)
        assert (label["label"], label["n"], label["y"]) == (f"a{g}", GROUP, fmean(REWARDS[own]))
        assert label["tokens"] == sum(LENGTHS[own])
        assert label["d"] == pytest.approx(math.exp(fmean(LOG_PROBS[own])), rel=1e-5)
        assert label["signal"] == (len(set(REWARDS[own])) == 2)
    weights = [share / q if rescaled else 1.0 for share, q in zip(SHARES, CHANCES, strict=True)]
    expected = [a * weights[i // GROUP] for i, a in enumerate(base_advantages(base))]
    assert len({round(abs(a), 6) for a in expected}) > 3
    given = [pair for rank in step["ranks"] for pair in rank]
    assert sorted(i for i, _ in given) == list(SAMPLES)
    for i, advantages in given:
        assert advantages == pytest.approx([expected[i]] * LENGTHS[i], rel=1e-5, abs=1e-6)
    if mode == "dynamic":
        assert [len(rank) for rank in step["ranks"]] == [len(SAMPLES) // RANKS] * RANKS


@pytest.mark.wheel
def test_a_rejected_group_of_openrlhfs_single_responses_has_a_label_without_d(steps):
    (label,) = steps["rejected"]
    y = fmean(REWARDS[:GROUP])
    assert 0 < y < 1
    tokens = sum(LENGTHS[:GROUP])
    assert label == {"prompt": "p0", "label": "a0", "y": y, "d": None, "n": GROUP, "signal": True, "tokens": tokens}
    assert set(Sample.__dataclass_fields__) <= set(steps["fields"]), "the tests' stand-in has OpenRLHF's fields"
