"""The prompt history: keys that hold for ever, evidence worked by hand, memory, and state across a save."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from depo_plugin.estimator.history import VISITS, PromptHistory, no_evidence
from depo_plugin.messages import prompt_key

REPO = Path(__file__).resolve().parents[2]
ODD = "\ud800 half a surrogate"


def keys(*numbers):
    return np.array(numbers, np.uint64)


def put(h, key, successes, samples, ability=0.0, now=0, keep=1.0):
    """Add one visit, as the belief does."""
    h.put(
        keys(key),
        h.evidence(keys(key), now, keep).with_visit(np.array([successes]), np.array([samples]), ability),
        now,
    )


def visits(h, key, now=0, keep=1.0):
    """[(successes, samples, ability)] of the visits that are remembered."""
    found = h.evidence(keys(key), now, keep)
    return [(s, n, at) for s, n, at in zip(found[0][0], found[1][0], found[2][0], strict=True) if n > 0]


def same_key_in(hash_seed):
    code = f"from depo_plugin.messages import prompt_key as k; print(k('1 + 1 =', '2'), k({ODD!a}, ''))"
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", code], cwd=REPO, env=env, text=True).split()


def test_prompt_key_is_the_same_number_for_ever():
    """As `printf '1 + 1 =\\0002' | b2sum -l 64` says; checkpoints written today must find their prompts in years."""
    assert prompt_key("1 + 1 =", "2") == 0x8F520A8ECBB0A622
    assert prompt_key("1 + 1 =", "2") != prompt_key("1 + 1 =", "3")
    assert prompt_key("ab", "c") != prompt_key("a", "bc")
    assert 0 <= prompt_key(ODD, "") < 2**64


def test_prompt_key_is_the_same_in_every_process():
    expected = [str(0x8F520A8ECBB0A622), str(prompt_key(ODD, ""))]
    assert same_key_in("1") == same_key_in("12345") == expected


def test_what_was_never_met_is_no_evidence():
    h = PromptHistory()
    for known in (0, 1):
        assert len(h) == known
        found = h.evidence(keys(0, 7, 2**64 - 1), 3, 0.9)
        assert all((part == 0).all() for part in found)
        assert [part.shape for part in found] == [(3, VISITS)] * 3 + [(3,)] * 5
        put(h, 8, 1, 4)


def test_evidence_fades_by_the_updates_since_the_prompt_was_seen():
    """Half of it is kept: 8 samples seen at update 2 are worth 2 at update 4; a new group stands beside those."""
    h = PromptHistory()
    put(h, 7, 4, 8, ability=0.5, now=2)
    assert visits(h, 7, now=2, keep=0.5) == [(4, 8, 0.5)]
    assert visits(h, 7, now=4, keep=0.5) == [(1, 2, 0.5)]
    put(h, 7, 8, 8, ability=1.5, now=4, keep=0.5)
    assert visits(h, 7, now=4, keep=0.5) == [(1, 2, 0.5), (8, 8, 1.5)]
    assert visits(h, 7, now=5, keep=0.5) == [(0.5, 1, 0.5), (4, 4, 1.5)]


def test_neighbours_of_nearest_ability_become_one_visit():
    """Abilities 0, 1, 1.25, 3, then 5: the second and third are put together, at (2·1 + 6·1.25)/8."""
    h = PromptHistory()
    for ability, successes, samples in ((0, 1, 2), (1, 2, 2), (1.25, 3, 6), (3, 4, 8), (5, 5, 8)):
        put(h, 7, successes, samples, ability)
    assert VISITS == 4
    assert visits(h, 7) == [(1, 2, 0), (5, 8, (2 * 1 + 6 * 1.25) / 8), (4, 8, 3), (5, 8, 5)]


def test_nothing_is_lost_where_visits_are_put_together():
    """Successes, samples and samples · ability, summed over visits, are those of all that was added."""
    rng = np.random.default_rng(0)
    found, added = no_evidence(5), np.zeros((3, 5))
    for _ in range(30):
        samples, ability = rng.integers(1, 17, 5).astype(float), float(rng.normal())
        successes = rng.binomial(samples.astype(int), 0.4).astype(float)
        found = found.with_visit(successes, samples, ability)
        added += [successes, samples, samples * ability]
        assert (found.samples > 0).sum(1).max() <= VISITS
    sums = found.successes.sum(1), found.samples.sum(1), (found.samples * found.ability).sum(1)
    np.testing.assert_allclose(sums, added, rtol=1e-12)


def test_keys_in_any_order_find_their_own_evidence():
    """Against a plain dict; keys up to the largest, groups added among those that are there."""
    rng = np.random.default_rng(0)
    h, by_hand = PromptHistory(), {}
    for step in range(20):
        chosen = np.unique(rng.choice(keys(*range(60), 2**63 + 5, 2**64 - 1), 12))
        successes = rng.integers(0, 9, len(chosen)).astype(float)
        h.put(chosen, no_evidence(len(chosen)).with_visit(successes, np.full(len(chosen), 8.0), 0.0), step)
        by_hand |= dict(zip(chosen.tolist(), successes, strict=True))
        assert len(h) == len(by_hand)
    ask = rng.permutation(keys(*range(100), 2**64 - 1))
    found = h.evidence(ask, 20, 1.0)
    assert found.successes.sum(1).tolist() == [by_hand.get(key, 0) for key in ask.tolist()]


def test_state_comes_back_and_is_a_copy():
    h = PromptHistory()
    for step, key in enumerate((9, 2**64 - 1, 3, 9)):
        put(h, key, step + 0.5, 8, ability=0.1 * step, now=step)
    ask = keys(3, 9, 2**64 - 1, 4)
    before, state = h.evidence(ask, 7, 0.9), h.state_dict()
    put(h, 9, 8, 8, now=7)
    for _ in range(2):
        again = PromptHistory()
        again.load_state_dict(state)
        assert len(again) == 3
        for mine, theirs in zip(before, again.evidence(ask, 7, 0.9), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        put(again, 9, 8, 8, now=7)


def test_load_names_missing_and_unexpected_fields():
    state = PromptHistory().state_dict()
    state["extra"] = state.pop("seen")
    h = PromptHistory()
    with pytest.raises(ValueError, match=r"history: .*'extra', 'seen'"):
        h.load_state_dict(state)
    assert len(h) == 0


@pytest.mark.slow
def test_a_million_prompts_cost_less_than_100_bytes_each_and_are_found_at_once():
    """Bytes as it says and as the interpreter counts them; an update of 64 prompts within 1 s (0.1 s when idle)."""
    count = 1_000_000
    known = np.sort(np.random.default_rng(0).choice(2**63, count).astype(np.uint64))
    known[1:][known[1:] == known[:-1]] += np.uint64(1)
    tracemalloc.start()
    try:
        h = PromptHistory()
        for part in np.split(known, 8):
            h.put(part, no_evidence(len(part)).with_visit(np.ones(len(part)), np.full(len(part), 8.0), 0.0), 0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(h) == count
    assert h.nbytes < 100 * count
    assert h.nbytes == sum(array.nbytes for array in h.state_dict().values())
    assert held < 100 * count
    met, new = known[::20000], np.arange(14, dtype=np.uint64)
    asked = np.unique(np.r_[met, new])
    assert len(asked) == 64
    start = time.perf_counter()
    found = h.evidence(asked, 1, 0.99)
    h.put(asked, found.with_visit(np.ones(64), np.full(64, 8.0), 0.1), 1)
    assert time.perf_counter() - start < 1.0
    assert len(h) == count + 14
    assert h.evidence(met, 1, 1.0).samples.sum(1) == pytest.approx(8 * 0.99 + 8)
