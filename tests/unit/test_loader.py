"""The loader, driven by OpenRLHF's own drawing and training loops, and as they drive it."""

import itertools
import json
import logging
import math
from collections import Counter
from datetime import datetime
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_encoder
import torch
from depo_launch import nested
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_pool import (
    ACCEPT_ALL,
    FILTER,
    GROUP_SIZE,
    REJECT_ALL,
    Estimator,
    InProcess,
    Prompts,
    Texts,
    draw,
    episode,
    flat,
    inner_loader,
    key_to_number,
    make,
    noise,
    number,
    numbers,
    stream,
    take,
)
from openrlhf_loops import fit, generator, prompt_dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from depo_plugin import hooks
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.filter import signal_probability
from depo_plugin.loader import FORCED_IN_A_ROW, STATE
from depo_plugin.messages import Label, Reason, Stream
from depo_plugin.settings import config
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, FilterConfig

pools = st.integers(1, 40)
batches = st.integers(1, 20)
seeds = st.integers(0, 2**32)


def scan(loader, estimator, count):
    """Draw until so many candidates are decided on; return their records."""
    while len(estimator.records) < count:
        next(loader)
    return estimator.records[:count]


# ── What is drawn ──


@settings(deadline=None, max_examples=60)
@given(count=pools, batch_size=batches, episodes=st.integers(1, 3), seed=seeds)
def test_accepting_everything_gives_the_plain_permutations(count, batch_size, episodes, seed):
    """Also if the pool is smaller than a batch: then a batch goes on into the next passes."""
    loader, _ = make(count, batch_size, episodes=episodes, seed=seed, **ACCEPT_ALL)
    drawn = [episode(loader) for _ in range(episodes)]
    length = max(1, count // batch_size) * batch_size
    assert [len(d) for d in drawn] == [length] * episodes == [len(loader)] * episodes
    assert flat(drawn) == stream(count, seed, episodes * length)


@settings(deadline=None, max_examples=60)
@given(
    count=pools,
    batch_size=batches,
    seed=seeds,
    max_scan=st.integers(1, 5),
    rule=st.sampled_from(["window", "utility"]),
    width=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_the_pool_is_scanned_in_order_and_batches_are_full(count, batch_size, seed, max_scan, rule, width):
    """Every prompt of a pass is decided on once; a batch scans at most max_scan batches or one pass."""
    cfg = {"rule": rule, "low": 0.5 - width / 2, "high": 0.5 + width / 2, "min_utility": 1 - width}
    loader, estimator = make(count, batch_size, lambda i, _: noise(i), episodes=3, seed=seed, max_scan=max_scan, **cfg)
    drawn = [episode(loader) for _ in range(3)]
    assert [len(d) for d in drawn] == [len(loader)] * 3
    assert len(loader) % batch_size == 0
    scanned = numbers(estimator.records, count)
    assert scanned == stream(count, seed, len(scanned))
    assert flat(drawn) == numbers([record for record in estimator.records if record.keep], count)
    limit = max(batch_size, min(max_scan * batch_size, count))
    assert max(len(batch) for batch in estimator.batches) <= limit
    # V is symmetric in p and 1 − p: this test sees on which side of the bar it is, not whether a and b are exchanged.
    for record in estimator.records:
        p = noise(key_to_number(count)[record.key])
        value = float(signal_probability(8 * p, 8 * (1 - p), GROUP_SIZE))
        passed = cfg["low"] <= p <= cfg["high"] if rule == "window" else value >= cfg["min_utility"]
        assert (record.reason is Reason.PASSED) == passed
        assert (record.p, record.v) == (pytest.approx(p), pytest.approx(value, abs=1e-12))


def test_a_batch_is_filled_up_with_the_best_of_a_full_scan():
    """Of 40 candidates (4 batches of 10) the window takes fewer than 10: the rest are the ones of highest V."""
    loader, estimator = make(100, 10, low=0.45, high=0.5, epsilon=0.0, max_scan=4)
    drawn = take(loader, 10)
    (batch,) = estimator.batches
    assert len(batch) == 40
    passed, forced, rejected = (
        [r for r in batch if r.reason is reason] for reason in (Reason.PASSED, Reason.FORCED, Reason.REJECTED)
    )
    assert 0 < len(passed) < 10
    assert len(passed) + len(forced) == 10
    assert min(r.v for r in forced) >= max(r.v for r in rejected)
    assert {(r.q, r.share) for r in forced} == {(1.0, 1.0)}
    assert {r.share for r in passed} == {len(passed) / 40}  # a scan of fixed length
    assert set(drawn) == set(numbers(passed + forced, 100))


def test_records_say_what_was_decided():
    """A batch that fills before its scan ends: share = (kept − 1)/(scanned − 1), the last one kept."""
    loader, estimator = make(200, 16)
    drawn = take(loader, 16)
    (batch,) = estimator.batches
    assert numbers([r for r in batch if r.keep], 200) == drawn
    assert batch[-1].keep
    assert 20 < len(batch) < 64
    assert {r.share for r in batch} == {15 / (len(batch) - 1)}
    assert {(r.reason, r.q) for r in batch} <= {("passed", 1.0), ("rejected", 0.05), ("explored", 0.05)}
    scanned = numbers(batch, 200)
    assert [(r.text, r.datasource) for r in batch] == [
        ((f"prompt {i}", f"label {i}"), f"source {i % 2}") for i in scanned
    ]


def test_rejected_prompts_are_explored_at_the_rate_asked_for():
    """1,900 of 2,000 candidates or so fall outside; Binomial(n, 0.1) within 4.5 standard deviations."""
    loader, estimator = make(2000, 10, epsilon=0.1, low=0.5, high=0.55, max_scan=100)
    records = scan(loader, estimator, 2000)
    counts = Counter(record.reason for record in records)
    outside = counts[Reason.EXPLORED] + counts[Reason.REJECTED]
    assert outside > 1800
    assert counts[Reason.FORCED] == 0
    assert abs(counts[Reason.EXPLORED] - 0.1 * outside) < 4.5 * math.sqrt(outside * 0.1 * 0.9)
    assert {(r.q, r.keep) for r in records if r.reason is Reason.EXPLORED} == {(0.1, True)}


def test_what_is_explored_does_not_depend_on_how_the_scan_is_cut():
    """Nor on scores elsewhere: each place of a pass has its own draw."""

    def explored(batch_size, low):
        loader, estimator = make(300, batch_size, epsilon=0.2, low=low, high=low + 0.01, max_scan=100)
        records = scan(loader, estimator, 300)
        return set(numbers([r for r in records if r.reason is Reason.EXPLORED], 300))

    draws = np.random.default_rng([0, Stream.EXPLORE, 0]).random(300)
    lucky = {i for i, draw in zip(stream(300, 0, 300), draws, strict=True) if draw < 0.2}
    for batch_size, low in ((7, 0.5), (50, 0.6)):
        assert explored(batch_size, low) == {i for i in lucky if not low <= noise(i) <= low + 0.01}


def test_the_global_random_streams_are_left_alone():
    inner = inner_loader(50)  # which draws from torch's stream itself
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    loader, _ = make(50, 8, inner=inner)
    episode(loader)
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_one_prompt_at_a_time_in_the_inner_loaders_own_form():
    inner = inner_loader(5)
    loader, _ = make(5, 2, inner=inner, **ACCEPT_ALL)
    i = stream(5, 0, 1)[0]
    assert next(iter(loader)) == inner.collate_fn([inner.dataset[i]])
    assert type(next(loader)) is type(next(iter(inner)))


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match=r"empty.*--data.prompt_dataset.*--data.max_samples"):
        make(0, 4, inner=SimpleNamespace(dataset=[], collate_fn=None, num_workers=0))


# ── When scores are asked for ──


def test_scores_are_asked_for_one_batch_ahead():
    """Batch t+1 is decided with the weights after update t−1, whatever the estimator has learned meanwhile."""
    loader, estimator = make(400, 10, lambda i, updates: 0.5, **ACCEPT_ALL)
    for step in range(4):
        assert len(estimator.questions) == step + (step > 0)  # nothing is asked while a batch is drawn
        take(loader, 10)
        estimator.updates += 1
    # At first nothing is known and batch 0 is asked for at once; each other batch when the one before has left.
    assert [updates for updates, _ in estimator.questions] == [0, 0, 1, 2, 3]
    positions = stream(400, 0, 400)
    # At first half is expected to be kept: 10 / 0.5 · 1.25 = 25 candidates; those not needed are asked about again
    # with the next batch. All were kept, so the expected rate r becomes 0.8·r + 0.2 with each batch.
    counts = [math.ceil(12.5 / rate) for rate in (0.5, 0.6, 0.68, 0.744, 0.7952)]
    assert [asked for _, asked in estimator.questions] == [
        positions[start : start + count] for start, count in zip((0, 10, 20, 30, 40), counts, strict=True)
    ]


@pytest.mark.parametrize(
    ("pool", "max_scan", "asked"), [(400, 5, [25, 10, 10, 5]), (400, 1, [10]), (32, 5, [25, 7]), (4, 5, [10])]
)
def test_a_scan_goes_on_one_batch_at_a_time_up_to_its_limit(pool, max_scan, asked):
    """The limit is max_scan batches or one pass, and at least one batch."""
    loader, estimator = make(pool, 10, **REJECT_ALL, max_scan=max_scan)
    next(loader)
    assert [len(numbers) for _, numbers in estimator.questions] == asked


def test_after_many_rejections_one_good_batch_brings_the_expected_keep_rate_back():
    """It never falls below 1/max_scan, so after batch 21 it is 0.8·1/4 + 0.2 = 0.4: 10 / 0.4 · 1.25 candidates."""
    loader, estimator = make(400, 10, lambda i, updates: 0.5 if updates >= 20 else 0.9, epsilon=0.0, max_scan=4)
    draw(loader, estimator, 22 * 10, 10, 0)
    assert [len(asked) for _, asked in estimator.questions[-2:]] == [40, 32]


def test_warm_up_keeps_everything_for_so_many_updates():
    """Batch t is decided with the weights after update t−2, so 3 warm-up updates keep batches 0 to 3 whole."""
    loader, estimator = make(400, 10, **REJECT_ALL | {"warmup_steps": 3, "max_scan": 2})
    for _ in range(6):
        take(loader, 10)
        estimator.updates += 1
    assert [updates for updates, _ in estimator.questions[:6]] == [0, 0, 1, 2, 3, 4]
    reasons = [Counter(record.reason for record in batch) for batch in estimator.batches]
    assert reasons == [{Reason.WARMUP: 10}] * 4 + [{Reason.FORCED: 10, Reason.REJECTED: 10}] * 2
    assert len(estimator.questions[3][1]) == 10  # all will be kept, so no more are scored
    assert len(estimator.questions[-1][1]) == 20
    assert all(record.p is not None for record in estimator.records)  # the metrics need it


def test_the_last_batch_of_a_run_asks_for_nothing():
    loader, estimator = make(20, 10, episodes=2, **ACCEPT_ALL)
    for expected in (3, 4):  # one question before the first batch, one after each batch except the run's last
        episode(loader)
        assert len(estimator.questions) == expected


# ── When the estimator cannot answer ──


def test_without_scores_everything_is_kept_and_counted():
    loader, estimator = make(60, 10, estimator=Estimator(noise, answers=dict.fromkeys(range(99))), **REJECT_ALL)
    assert episode(loader) == stream(60, 0, 60)
    assert {(r.reason, r.q, r.p, r.v) for r in estimator.records} == {(Reason.UNSCORED, 1.0, None, None)}
    assert len(estimator.records) == 60


def test_only_the_unanswered_candidates_are_kept_unseen():
    """The first 25 candidates are scored and rejected, the next 10 have no scores."""
    loader, estimator = make(60, 10, estimator=Estimator(noise, answers={1: None}), **REJECT_ALL)
    assert take(loader, 10) == stream(60, 0, 60)[25:35]
    assert Counter(r.reason for r in estimator.batches[0]) == {Reason.REJECTED: 25, Reason.UNSCORED: 10}


def unread(*places):
    """What makes these candidates of an answer ones that the estimator had no time to read."""

    def spoil(scores):
        scores.a[list(places)] = scores.b[list(places)] = np.nan
        return scores

    return spoil


def test_what_was_not_read_in_time_is_asked_for_once_more_when_the_batch_is_planned():
    """The second answer counts; what it lacks, too, is kept unseen."""
    answers = {0: unread(1, 3, 5), 1: unread(2)}
    loader, estimator = make(60, 10, estimator=Estimator(noise, answers=answers), **REJECT_ALL)
    take(loader, 1)
    asked = [question for _, question in estimator.questions]
    order = stream(60, 0, 60)
    assert asked[1] == [order[1], order[3], order[5]]
    (unscored,) = [r for r in estimator.records if r.reason is Reason.UNSCORED]
    assert numbers([unscored], 60) == [order[5]]
    assert all(r.p is not None for r in estimator.records if r is not unscored)
    assert estimator.waits[:2] == [True, True]
    take(loader, 9)
    assert estimator.waits[-1] is False  # the next batch's scores are asked for ahead


def test_in_warm_up_nothing_is_asked_for_once_more():
    loader, estimator = make(60, 10, estimator=Estimator(noise, answers={0: unread(1, 3)}), warmup_steps=5)
    take(loader, 9)
    assert len(estimator.questions) == 1
    assert {r.reason for r in estimator.records} == {Reason.WARMUP}


def test_scores_that_were_not_read_in_time_are_saved_as_such():
    loader, estimator = make(50, 8, estimator=Estimator(noise, answers={1: unread(0, 2)}), seed=5)
    draw(loader, estimator, 8, 8, 0)
    saved = loader.state_dict()[STATE]["asked"]["scores"]
    assert (saved["a"][0], saved["b"][2]) == (None, None)
    again, twin = resumed(loader, estimator, 50, 8, seed=5)
    assert draw(again, twin, 30, 8, 8) == draw(loader, estimator, 30, 8, 8)


def test_a_nan_belief_is_kept_and_counted():
    def spoil(scores):
        scores.a[3] = np.nan
        return scores

    loader, estimator = make(60, 10, estimator=Estimator(noise, answers={0: spoil, 1: unread(0)}), **REJECT_ALL)
    spoiled = stream(60, 0, 4)[3]
    assert spoiled in take(loader, 10)
    (unscored,) = [r for r in estimator.records if r.reason is Reason.UNSCORED]
    assert (numbers([unscored], 60), unscored.p, unscored.v, unscored.q) == ([spoiled], None, None, 1.0)


def test_a_rule_of_the_users_own_decides_by_what_is_known(tmp_path):
    path = tmp_path / "rule.py"
    path.write_text("def keep(b):\n    return 1.0 * ((b.p > 0.5) & (b.datasource == 'source 1') & (b.step == 9))\n")
    loader, estimator = make(400, 4, fifth, rule=str(path), warmup_steps=0, epsilon=0.0)
    estimator.updates = 9
    records = scan(loader, estimator, 100)
    assert {r.reason for r in records if r.p > 0.5 and r.datasource == "source 1"} == {Reason.PASSED}
    assert {r.reason for r in records if r.p < 0.5 or r.datasource == "source 0"} == {Reason.REJECTED}


def test_a_rule_that_fails_in_the_run_keeps_prompts_with_one_warning_until_it_works_again(tmp_path, caplog):
    path = tmp_path / "rule.py"
    path.write_text("def keep(b):\n    assert b.step not in (3, 4), b.step\n    return 1.0 * (b.p > 0.5)\n")
    loader, estimator = make(400, 4, fifth, rule=str(path), warmup_steps=0, epsilon=0.0)
    reasons = []
    for step in (2, 3, 4, 5):
        estimator.updates, estimator.batches = step, []
        take(loader, 8)  # scores are asked for one batch ahead, so the second batch is of this step
        reasons.append({record.reason for record in estimator.batches[-1]})
    assert reasons[1] == reasons[2] == {Reason.UNSCORED}
    assert reasons[0] == reasons[3] == {Reason.PASSED, Reason.REJECTED}
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert f"--depo.filter.rule {path}: keep(beliefs) raises AssertionError: 3" in said[0]


def test_rejecting_everything_ends_and_says_why_once(caplog):
    """Every batch is filled up; 2 × FORCED_IN_A_ROW of them are one warning."""
    loader, estimator = make(2 * FORCED_IN_A_ROW * 4, 4, lambda i, _: 0.9, **REJECT_ALL, max_scan=3)
    with caplog.at_level(logging.WARNING):
        drawn = episode(loader)
    assert len(drawn) == len(loader) == 2 * FORCED_IN_A_ROW * 4
    assert len(estimator.records) == 3 * len(drawn)
    (warning,) = caplog.messages
    for words in ("10 batches", "rule window", "12 scanned", "solves 100% of", "ever 0%", "harder", "max_scan (3)"):
        assert words in warning


def test_the_warning_comes_again_after_a_better_batch(caplog):
    """Batches 0 to 9 are filled up, 10 and 11 are not, 12 to 29 are again."""
    loader, estimator = make(1000, 4, lambda i, updates: 0.5 if updates == 10 else 0.02, epsilon=0.0)
    with caplog.at_level(logging.WARNING):
        draw(loader, estimator, 30 * 4, 4, 0)
    assert len(caplog.messages) == 2
    assert "hardly ever 100%" in caplog.messages[0]
    assert "easier" in caplog.messages[0]


# ── Dynamic filtering's refunds ──


def test_a_refund_lengthens_the_episode_and_what_is_left_leads_the_next():
    loader, _ = make(40, 10, episodes=2, **ACCEPT_ALL)
    first = []
    for batch in loader:
        first.append(number(batch))
        if len(first) in (5, 12, 33):
            loader.refund(1)
    assert first == stream(40, 0, 43)
    assert episode(loader) == stream(40, 0, 83)[43:]  # of which 7 were planned before
    assert len(loader) == 40


def test_refunds_end_after_one_extra_pass_and_say_so(caplog):
    """Nor does a refund bring an episode back that has ended."""
    loader, _ = make(20, 10, episodes=2, **ACCEPT_ALL)
    for expected in (1, 2):
        with caplog.at_level(logging.WARNING):
            assert sum(loader.refund(1) is None for _ in itertools.islice(loader, 100)) == 20 + 20
        loader.refund(1)
        with pytest.raises(StopIteration):
            next(loader)
        assert len(caplog.messages) == expected
    for words in ("episode 2 ends", "at least 20 groups", "--algo.dynamic_filtering_range"):
        assert words in caplog.messages[1]


# ── OpenRLHF's own loops ──


def third(i):
    """Dynamic filtering throws a third of the groups away."""
    return i % 3 > 0


def fifth(i, updates=0):
    """Pass rates 0.1, 0.3, ... by prompt number: the window takes three in five."""
    return i % 5 / 5 + 0.1


@pytest.mark.wheel
@pytest.mark.parametrize(("count", "batch_size"), [(20, 5), (23, 5), (3, 5)])
def test_openrlhf_draws_full_batches_until_the_episode_ends(count, batch_size):
    loader, estimator = make(count, batch_size, inner=inner_loader(prompt_dataset(count)), episodes=2)

    def learn():
        estimator.updates += 1

    trained = fit(loader, generator(loader, batch_size), 2, after_step=learn).trained
    steps = max(1, count // batch_size)
    assert [[len(batch) for batch in batches] for batches in trained] == [[batch_size] * steps] * 2
    assert flat(flat(trained)) == numbers([record for record in estimator.records if record.keep], count)
    assert [r.datasource for r in estimator.records] == [f"source {i % 2}" for i in numbers(estimator.records, count)]


@pytest.mark.wheel
def test_openrlhf_replaces_rejected_groups_and_keeps_every_batch_full():
    """A third of the groups are thrown away; each is replaced, so two episodes still make 2 × 4 full batches."""
    loader, estimator = make(43, 10, episodes=2, **ACCEPT_ALL)
    trained = fit(loader, generator(loader, 10, accept=third), 2).trained
    assert [[len(batch) for batch in batches] for batches in trained] == [[10] * 4] * 2
    assert flat(flat(trained)) == [i for i in numbers(estimator.records, 43) if third(i)][:80]


@pytest.mark.wheel
def test_openrlhf_ends_when_dynamic_filtering_takes_nothing(caplog):
    loader, estimator = make(20, 5, episodes=2, **ACCEPT_ALL)
    with caplog.at_level(logging.WARNING):
        assert fit(loader, generator(loader, 5, accept=lambda i: False), 2).trained == [[], []]
    assert sum("at least 20 groups" in message for message in caplog.messages) == 2
    assert len(estimator.records) == 2 * 40  # the episode's own prompts and one pass more


@pytest.mark.wheel
def test_openrlhf_draws_larger_batches_than_it_trains():
    """vLLM oversampling: 8 prompts are generated at a time, 4 are trained."""
    loader, _ = make(21, 8, episodes=2, **ACCEPT_ALL)
    trained = fit(loader, generator(loader, 4, generate_batch_size=8), 2, asynchronous=True).trained
    assert [[len(batch) for batch in batches] for batches in trained] == [[4] * 4] * 2
    assert flat(flat(trained)) == stream(21, 0, 32)


@pytest.mark.wheel
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("accept", [None, third, lambda i: i % 7 == 0])
@pytest.mark.parametrize("count", [22, 43, 4])
def test_openrlhf_resumes_at_every_step_without_repeating_or_skipping(count, accept, asynchronous):
    """Three episodes are saved after each step as the trainers do; a run from any of them trains the same rest.

    Totals count what was given out, and without refunds each bar ends where its episode does. A state saved at the
    end of an episode belongs to that episode, in which no prompt is left: its bar starts at 0 and stays there. The
    last `accept` uses up the replacements, so that an episode ends in the step that is saved.
    """
    given = []  # prompts given out, counted where they leave
    inner = inner_loader(count)
    counted = SimpleNamespace(
        dataset=inner.dataset,
        collate_fn=lambda rows: given.extend(rows) or inner.collate_fn(rows),
        num_workers=inner.num_workers,
    )

    def train(inner=inner, after_step=lambda: None, **start):
        loader, _ = make(count, 5, fifth, episodes=3, seed=1, epsilon=0.0, inner=inner)
        return loader, fit(
            loader, generator(loader, 5, accept=accept), 3, **start, after_step=after_step, asynchronous=asynchronous
        )

    at = []
    loader, whole = train(counted, lambda: at.append(len(given)))
    batches = flat(whole.trained)
    assert len(batches) == len(whole.saved) >= 3
    assert [state["total_consumed_prompts"] for state in whole.saved] == at
    length = len(loader)
    if accept is None:
        assert [(bar.initial, bar.n, bar.total) for bar in whole.bars] == [(0, length, length)] * 3
    for step, state in enumerate(whole.saved, start=1):
        _, rest = train(start=state)
        assert flat(rest.trained) == batches[step:]
        assert rest.saved == whole.saved[step:]
        if accept is None:
            served = at[step - 1] % length
            bars = [(served, length if served else 0, length)] + [(0, length, length)] * (2 - state["episode"])
            assert [(bar.initial, bar.n, bar.total) for bar in rest.bars] == bars


def wrapped(count, monkeypatch, train_batch=40, max_epochs=1, max_steps=0):
    """What hooks.wrap_loader gives a launch of three episodes, batches of 5 and groups of 8."""
    monkeypatch.setattr(hooks, "attach", lambda *args: None)
    monkeypatch.setattr(hooks, "_process", hooks.Process(handle=Estimator(fifth)))
    args = nested(
        {
            "rollout.vllm_generate_batch_size": 5,
            "rollout.n_samples_per_prompt": 8,
            "train.batch_size": train_batch,
            "train.num_episodes": 3,
            "train.max_epochs": max_epochs,
            "train.seed": 0,
        }
    )
    args.depo = config.to_namespace(DepoConfig(filter=FilterConfig(**FILTER)))
    args.depo.shadow = False
    return hooks.wrap_loader(args, inner_loader(count), max_steps, "ppo_trainer.py")


@pytest.mark.wheel
@pytest.mark.parametrize("count", [20, 23, 3])
def test_the_schedule_is_made_for_the_steps_that_are_made(count, monkeypatch):
    """One optimizer step a batch: OpenRLHF plans count · 8 // 40 · 3 steps; a pool of 3 gives one batch an episode."""
    loader, steps = wrapped(count, monkeypatch, max_steps=count * 8 // 40 * 3)
    assert hooks._process.loader is loader
    assert steps == len(flat(fit(loader, generator(loader, 5), 3).trained)) == max(3, count // 5 * 3)


@pytest.mark.parametrize(
    ("train_batch", "max_epochs", "max_steps", "expected"),
    [
        (20, 1, 0, 24),  # 3 · 20 prompts · 8 responses = 480
        (40, 2, 0, 24),
        (40, 1, 13, 13),  # OpenRLHF counts the remainder of the pool, too
        (300, 1, 0, 1),  # 480 // 300; OpenRLHF: 160 // 300 · 3 = 0
        (999, 1, 0, 1),
    ],
)
def test_optimizer_steps_of_any_training_batch(train_batch, max_epochs, max_steps, expected, monkeypatch):
    assert wrapped(23, monkeypatch, train_batch, max_epochs, max_steps)[1] == expected


# ── State ──


def resumed(loader, estimator, count, batch_size, changes=(), **options):
    """A new loader and estimator that go on from the loader's state; the estimator has learned as much as the old one.

    changes: to DEPO's part of the state.
    """
    twin = Estimator(estimator.pass_rate, updates=estimator.updates)
    again, _ = make(count, batch_size, estimator=twin, **options)
    state = json.loads(json.dumps(loader.state_dict(), allow_nan=False))
    again.load_state_dict(state | {STATE: state[STATE] | dict(changes)})
    return again, twin


@pytest.mark.parametrize("rule", ["window", "utility"])
@pytest.mark.parametrize("served", [0, 1, 7, 8, 16, 40, 48, 56, 61, 96])
def test_a_resumed_loader_draws_what_the_uninterrupted_one_draws(served, rule, caplog):
    """The next 200 prompts, over several passes and episodes: from within a batch, its end, the end of an episode."""
    options = {"episodes": 99, "seed": 5, "rule": rule, "min_utility": 0.8, "warmup_steps": 2}
    loader, estimator = make(50, 8, **options)
    draw(loader, estimator, served, 8, 0)
    again, twin = resumed(loader, estimator, 50, 8, **options)
    assert caplog.messages == []
    expected = draw(loader, estimator, 200, 8, served)
    assert draw(again, twin, 200, 8, served) == expected
    assert again.state_dict() == loader.state_dict()
    assert len(set(expected)) > 25


def test_scores_that_were_asked_for_are_part_of_the_state():
    """The estimator learns between the question and the save: asked again, it would answer otherwise."""
    loader, estimator = make(50, 8, seed=5)
    draw(loader, estimator, 16, 8, 0)
    assert loader.state_dict()[STATE]["asked"]["scores"]["updates"] == 1 < estimator.updates == 2
    again, twin = resumed(loader, estimator, 50, 8, seed=5)
    forgetful, other = resumed(loader, estimator, 50, 8, {"asked": None}, seed=5)
    expected = draw(loader, estimator, 8, 8, 16)
    assert draw(again, twin, 8, 8, 16) == expected
    assert draw(forgetful, other, 8, 8, 16) != expected


def train(loader, handle, steps):
    """Draw batches of 40 and learn from them, y of prompt i being noise(i) in eighths.

    Returns their prompt numbers, and the q and share that weight them.
    """
    drawn, weights = [], []
    for _ in range(steps):
        batch = draw(loader, handle, 40, 40, 0)
        drawn += batch
        prompts, labels = [f"prompt {i}" for i in batch], [f"label {i}" for i in batch]
        weights += zip(*handle.made.keep_weights(prompts, labels), strict=True)
        y = [round(8 * noise(i)) / 8 for i in batch]
        groups = [Label(p, a, y, 0.5, 8, 0 < y < 1) for p, a, y in zip(prompts, labels, y, strict=True)]
        handle.made.judge(groups)
        handle.made.learn(groups)
    return drawn, weights


@pytest.fixture
def one_thread():
    """As the estimator's actor runs by default; more threads than free cores are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_with_the_real_estimator_a_resumed_run_draws_and_learns_the_same(tmp_path):
    """Both learn first, both are saved and loaded; the next 200 prompts and the weights are equal bit for bit."""
    options = {"episodes": 99, "rule": "utility", "min_utility": 0.8, "epsilon": 0.2, "warmup_steps": 2}
    cfg = DepoConfig(estimator=EstimatorConfig(model=tiny_encoder.write(tmp_path), lr=1e-2))
    one, other = (InProcess(DifficultyEstimator(cfg, GROUP_SIZE, seed=0)) for _ in range(2))
    (loader, _), (resumed, _) = (make(90, 40, estimator=handle, **options) for handle in (one, other))
    _, weights = train(loader, one, 3)
    assert weights == [(r.q, r.share) for r in one.records if r.keep]
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    other.made.load_state_dict(one.made.state_dict())
    expected, _ = train(loader, one, 5)
    assert train(resumed, other, 5)[0] == expected
    assert len(expected) == 200
    assert {r.reason for r in one.records} >= {Reason.WARMUP, Reason.PASSED, Reason.EXPLORED, Reason.REJECTED}
    tiny_encoder.assert_same_state(one.made.state_dict(), other.made.state_dict())


def test_a_save_does_not_change_what_is_drawn():
    loader, estimator = make(50, 8, episodes=9)
    watched, watcher = make(50, 8, episodes=9)
    drawn = []
    for i in range(48):
        drawn += draw(watched, watcher, 1, 8, i)
        watched.state_dict()
    assert drawn == draw(loader, estimator, 48, 8, 0)


def test_questions_that_went_unanswered_stay_so_after_a_resume():
    loader, estimator = make(50, 8, estimator=Estimator(noise, answers={1: None}), seed=5)
    draw(loader, estimator, 8, 8, 0)
    asked = loader.state_dict()[STATE]["asked"]
    assert asked["scores"] is None
    assert asked["count"] > 8
    again, twin = resumed(loader, estimator, 50, 8, seed=5)
    assert draw(again, twin, 30, 8, 8) == draw(loader, estimator, 30, 8, 8)
    assert Counter(r.reason for r in twin.batches[0]) == {Reason.UNSCORED: 8}


def test_a_loader_that_was_used_forgets_it_all_when_it_loads():
    options = {"episodes": 9, "seed": 5}
    used, estimator = make(50, 8, **options)
    fresh = used.state_dict()
    episode(used)
    used.load_state_dict(fresh)
    twin, other = make(50, 8, **options)
    assert draw(used, estimator, 100, 8, 0) == draw(twin, other, 100, 8, 0)


def test_a_resumed_run_may_filter_otherwise():
    """21 candidates (10/0.6·1.25) were asked about, the new limit is 10: that batch is filled from the 21."""
    loader, estimator = make(400, 10, **ACCEPT_ALL)
    draw(loader, estimator, 10, 10, 0)
    again, twin = resumed(loader, estimator, 400, 10, **REJECT_ALL, max_scan=1)
    assert len(set(draw(again, twin, 20, 10, 10))) == 20
    assert [len(batch) for batch in twin.batches] == [21, 10]


def test_a_resumed_run_keeps_its_refunds():
    loader, estimator = make(16, 8, **ACCEPT_ALL)
    draw(loader, estimator, 12, 8, 0)
    loader.refund(3)
    again, _ = resumed(loader, estimator, 16, 8, **ACCEPT_ALL)
    assert episode(again) == episode(loader) == stream(16, 0, 19)[12:]


def test_the_state_is_small_and_plain():
    """Batch 128 in a pool of 100,000, some 300 candidates' scores: two floats of up to 19 characters each."""
    loader, estimator = make(100_000, 128, estimator=Estimator(noise, strength=1e4 / 3))
    draw(loader, estimator, 128, 128, 0)
    state = loader.state_dict()
    assert 256 < len(state[STATE]["asked"]["scores"]["a"]) < 400
    text = json.dumps(state, allow_nan=False)
    assert len(text) < 20_000
    assert json.loads(text) == state
    assert {type(value) for value in state[STATE].values()} == {int, float, str, list, dict}


LOADER_STATE = {"pool", "batch_size", "seed", "episode", "served", "refunds", "cursor", "queue", "asked", "updates"}
LOADER_STATE |= {"keep_rate", "digest"}


def test_a_state_has_exactly_its_fields():
    loader, _ = make(20, 5)
    state = loader.state_dict()[STATE]
    assert set(state) == LOADER_STATE
    del state["cursor"]
    with pytest.raises(ValueError, match=r"missing \['cursor'\], unexpected \['position'\].*--ckpt.load_enable"):
        loader.load_state_dict({STATE: state | {"position": 3}})


# ── What has changed since the state was saved ──


@pytest.mark.parametrize("served", [0, 8, 12, 32, 40])
def test_with_another_batch_size_the_pass_goes_on(served, caplog):
    """Served 12 of batches of 8: four were planned and not given out. They come first. All batches are whole."""
    options = {"episodes": 9, "seed": 5, **ACCEPT_ALL}
    loader, estimator = make(40, 8, **options)
    draw(loader, estimator, served, 8, 0)
    again, _ = resumed(loader, estimator, 40, 5, **options)
    (warning,) = caplog.messages
    assert "--rollout.vllm_generate_batch_size (default: --rollout.batch_size) was 8, is 5" in warning
    assert "The pass over the pool goes on" in warning
    end = served + (40 - served) // 5 * 5
    assert episode(again) == stream(40, 5, end)[served:]
    assert episode(again) == stream(40, 5, end + 40)[end:]


@pytest.mark.parametrize("batch_size", [8, 5])
def test_with_another_seed_the_next_pass_starts_in_its_order(batch_size, caplog):
    options = {"episodes": 9, **ACCEPT_ALL}
    loader, estimator = make(40, 8, seed=5, **options)
    draw(loader, estimator, 16, 8, 0)
    again, _ = resumed(loader, estimator, 40, batch_size, seed=6, **options)
    (warning,) = caplog.messages
    assert "--train.seed was 5, is 6" in warning
    assert "The next pass over the pool starts now" in warning
    assert ("was 8, is 5" in warning) == (batch_size == 5)
    assert episode(again) == stream(40, 6, 40 + 24 // batch_size * batch_size)[40:]


def own_loader(count, workers):
    """OpenRLHF's own loader over so many numbered prompts."""
    dataset = Prompts(count)
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    return StatefulDataLoader(dataset, batch_size=1, shuffle=True, collate_fn=dataset.collate_fn, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("served", [0, 8, 10, 20])
def test_switched_on_in_a_checkpoint_without_it(served, workers, caplog):
    """The rest of the episode, in DEPO's own order and in whole batches."""
    inner = own_loader(20, workers)
    take(inner, served)
    loader, _ = make(20, 4, inner=inner, episodes=2, **ACCEPT_ALL)
    loader.load_state_dict(inner.state_dict())
    (warning,) = caplog.messages
    assert f"written without DEPO: its episode goes on after {served} prompts" in warning
    assert episode(loader) == stream(20, 0, (20 - served) // 4 * 4)
    assert len(episode(loader)) == 20


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("served", [0, 8, 11, 20])
def test_switched_off_in_a_checkpoint_with_it(served, workers):
    """OpenRLHF's own loader takes the state as it takes one of its own that has given out nothing."""
    loader, estimator = make(20, 4, inner=own_loader(20, workers), episodes=2, **ACCEPT_ALL)
    draw(loader, estimator, served, 4, 0)
    plain = own_loader(20, workers)
    plain.load_state_dict(loader.state_dict())
    for _ in range(2):
        assert sorted(map(number, plain)) == list(range(20))
    assert set(own_loader(20, workers).state_dict()) <= set(loader.state_dict())


@pytest.mark.wheel
@pytest.mark.parametrize("asynchronous", [False, True])
def test_openrlhf_goes_on_with_depo_switched_on_and_off(asynchronous):
    """Saved in the second of three episodes of 20 prompts; the other launch trains its rest, and the last."""

    def train(loader, **start):
        return fit(loader, generator(loader, 5), 3, asynchronous=asynchronous, **start)

    depo, plain = make(20, 5, episodes=3, **ACCEPT_ALL)[0], inner_loader(20)
    with_depo, without = train(depo).saved[5], train(plain).saved[5]
    assert (with_depo["episode"], without["episode"]) == (1, 1)
    trained = train(inner_loader(20), start=with_depo).trained
    assert [sorted(flat(batches)) for batches in trained] == [[], *[list(range(20))] * 2]
    trained = train(make(20, 5, episodes=3, **ACCEPT_ALL)[0], start=without).trained
    assert [len(flat(batches)) for batches in trained] == [0, 10, 20]


# ── Another pool, and what tells one from another ──


def loader_of(prompts, labels=None, **options):
    """A loader over these texts, without scores; in its estimator the labels that it asked about."""
    asked = []
    estimator = SimpleNamespace(
        score_async=lambda _, labels, waited_for: asked.extend(labels) or SimpleNamespace(result=lambda: None),
        record=lambda records: None,
        asked=asked,
    )
    return make(len(prompts), 4, estimator=estimator, inner=inner_loader(Texts(prompts, labels)), **options)


def saved_after(prompts, count):
    loader, _ = loader_of(prompts, episodes=3)
    for _ in range(count):
        next(loader)
    return loader.state_dict()


POOL = [f"What is {i} + {i}?" for i in range(20)]
OTHERS = {
    "as many others": ([f"What is {i} + {i + 1}?" for i in range(20)], None),
    "one text changed": ([*POOL[:-1], "What is 19 + 20?"], None),
    "one label changed": (POOL, [f"label {i}" for i in range(19)] + ["label 20"]),
    "two exchanged": ([POOL[1], POOL[0], *POOL[2:]], None),
    "longer": ([*POOL, "What is 20 + 20?"], None),
    "shorter": (POOL[:-1], None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_pool_is_told_and_the_next_pass_starts(other, caplog):
    """Positions of the old pool would be other prompts; nothing else of the run is lost."""
    prompts, _ = OTHERS[other]
    resumed, _ = loader_of(*OTHERS[other], episodes=3)
    resumed.load_state_dict(saved_after(POOL, 8))
    (warning,) = caplog.messages
    rest_of_stream = [prompts[i] for i in stream(len(prompts), 0, 2 * len(prompts))[len(prompts) :]]
    for words in (f"the prompts are others (20 then, {len(prompts)} now", "a date", rest_of_stream[0]):
        assert words in warning
    again = resumed.state_dict()[STATE]
    assert (again["cursor"], again["queue"], again["served"], again["episode"]) == (len(prompts), [], 8, 0)
    rest = [prompt for _, (prompt,), *_ in resumed]
    assert rest == rest_of_stream[: len(prompts) // 4 * 4 - 8]  # the rest of the episode


@pytest.mark.parametrize(
    "header",
    [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: {:%d %b %Y}\n\n",
        "Knowledge cutoff: 2024-06\nCurrent date: {:%Y-%m-%d}\n\n",
        "Knowledge Cutoff Date: April 2024.\nToday's Date: {:%B %d, %Y}.\nYou are Granite.",
        "You are Mistral.\nThe current date is {:%Y-%m-%d}.\n",
        "Today\u2019s date is {:%d %B %Y}\n",
    ],
    ids=["Llama", "gpt-oss", "Granite", "Mistral", "SmolLM"],
)
def test_a_date_in_the_chat_template_makes_no_other_prompt(header, caplog):
    """A run that is resumed on another day finds its pool; its digest is made of the keys of its prompts."""
    monday, tuesday = (
        [header.format(day) + text for text in POOL] for day in (datetime(2026, 9, 30), datetime(2026, 10, 1))
    )
    assert not set(monday) & set(tuesday)
    resumed, _ = loader_of(tuesday, episodes=3)
    resumed.load_state_dict(saved_after(monday, 8))
    assert caplog.messages == []
    assert [prompt for _, (prompt,), *_ in resumed] == [tuesday[i] for i in stream(20, 0, 20)[8:]]


def test_labels_of_any_kind_reach_the_estimator_as_text_and_openrlhf_as_they_are():
    label = {"answer": Decimal("1.5"), "on": datetime(2026, 11, 26)}
    loader, estimator = loader_of(POOL, [label] * 20)
    _, _, (given,), _ = next(loader)
    assert given is label
    assert set(estimator.asked) == {str(label)}
    json.dumps(loader.state_dict())


def test_chat_messages_without_a_template_are_refused_by_name():
    chat = [[{"role": "user", "content": text}] for text in POOL]
    with pytest.raises(ValueError, match=r"prompt 0 .* is not text but a list: .*add --data\.apply_chat_template"):
        loader_of(chat)
