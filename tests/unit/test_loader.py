"""The loader, driven by OpenRLHF's own drawing code where it is installed, else as that code draws."""

import ast
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import time
import typing
from collections import Counter
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_encoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from depo_plugin import hooks
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.filter import signal_probability
from depo_plugin.loader import FORCED_IN_A_ROW, DifficultyFilteredLoader
from depo_plugin.messages import Label, Reason, Scores, Stream, prompt_key
from depo_plugin.settings import config
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, FilterConfig

GROUP_SIZE = 8
ACCEPT_ALL = {"low": 0.0, "high": 1.0, "epsilon": 0.0, "warmup_steps": 0}
REJECT_ALL = {"low": 0.98, "high": 0.99, "epsilon": 0.0, "warmup_steps": 0}
FILTER = {"low": 0.25, "high": 0.75, "epsilon": 0.05, "warmup_steps": 0}


class Prompts(torch.utils.data.Dataset):
    """The interface of OpenRLHF's PromptDataset; prompt i is "prompt i", its label "label i"."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return f"source {i % 2}", f"prompt {i}", f"label {i}", None

    def collate_fn(self, items):
        return tuple(list(column) for column in zip(*items, strict=True))


class Estimator:
    """Scripted beliefs: p̂ = pass_rate(prompt number, updates) with the evidence of `strength` samples.

    Answers as the actor does: with what it had learned when it was asked, whenever the answer is fetched. answers:
    what to do with the n-th question: None for no scores, or a function of the Scores.
    """

    def __init__(self, pass_rate, updates=0, strength=8.0, answers=None):
        self.pass_rate, self.updates, self.strength = pass_rate, updates, strength
        self.answers = answers or {}
        self.questions = []  # (updates, prompt numbers)
        self.batches = []  # records by call

    def score_async(self, prompts, labels):
        numbers = [int(prompt.split()[1]) for prompt in prompts]
        assert numbers
        assert labels == [f"label {i}" for i in numbers]
        p = np.array([self.pass_rate(i, self.updates) for i in numbers])
        scores = Scores(self.strength * p, self.strength * (1 - p), self.updates)
        answer = self.answers.get(len(self.questions), lambda scores: scores)
        self.questions.append((self.updates, numbers))
        results = [answer and answer(scores)]
        return SimpleNamespace(result=results.pop)  # an answer that was late may be there the second time

    def record(self, records):
        self.batches.append(records)

    @property
    def records(self):
        return [record for batch in self.batches for record in batch]


def noise(i, updates):
    """A pass rate in [0, 1) that is another one after each update."""
    return int.from_bytes(hashlib.blake2b(f"{i} {updates}".encode(), digest_size=4).digest(), "big") / 2**32


def inner_loader(count):
    dataset = Prompts(count)
    return StatefulDataLoader(dataset, batch_size=1, shuffle=True, collate_fn=dataset.collate_fn)


def make(count, batch_size, pass_rate=noise, *, episodes=1, seed=0, estimator=None, inner=None, **cfg):
    estimator = estimator or Estimator(pass_rate)
    loader = DifficultyFilteredLoader(
        inner or inner_loader(count),
        estimator,
        FilterConfig(**(FILTER | cfg)),
        batch_size=batch_size,
        group_size=GROUP_SIZE,
        seed=seed,
        num_episodes=episodes,
    )
    return loader, estimator


def number(batch):
    """The prompt number of what the loader gives for one prompt."""
    ((_, (prompt,), (label,), (image,)),) = [batch]
    assert label == prompt.replace("prompt", "label")
    assert image is None
    return int(prompt.split()[1])


def episode(loader):
    return [number(batch) for batch in loader]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def stream(count, seed, length):
    """The pool in the order of each pass, one after the other."""
    passes = (np.random.default_rng([seed, Stream.ORDER, n]).permutation(count) for n in range(length // count + 1))
    return np.concatenate(list(passes)).tolist()[:length]


@functools.cache
def key_to_number(count):
    return {prompt_key(f"prompt {i}", f"label {i}"): i for i in range(count)}


def numbers(records, count):
    return [key_to_number(count)[record["key"]] for record in records]


pools = st.integers(1, 40)
batches = st.integers(1, 20)
seeds = st.integers(0, 2**32)


# ── What is drawn ──


@settings(deadline=None, max_examples=60)
@given(count=pools, batch_size=batches, episodes=st.integers(1, 3), seed=seeds)
def test_accepting_everything_gives_the_plain_permutations(count, batch_size, episodes, seed):
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
    budget=st.sampled_from(["steps", "data"]),
    rule=st.sampled_from(["window", "utility"]),
    width=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_the_pool_is_scanned_in_order_and_batches_are_full(count, batch_size, seed, max_scan, budget, rule, width):
    """Every prompt of a pass is decided on once; a batch scans at most max_scan batches or one pass."""
    cfg = {"budget": budget, "rule": rule, "low": 0.5 - width / 2, "high": 0.5 + width / 2, "min_utility": 1 - width}
    loader, estimator = make(
        count, batch_size, lambda i, _: noise(i, 0), episodes=3, seed=seed, max_scan=max_scan, **cfg
    )
    drawn = []
    for _ in range(3):
        got = episode(loader)
        assert len(got) % batch_size == 0
        assert len(got) >= batch_size
        if budget == "steps":
            assert len(got) == len(loader)
        drawn += got
    scanned = numbers(estimator.records, count)
    assert scanned == stream(count, seed, len(scanned))
    kept = numbers([record for record in estimator.records if record["keep"]], count)
    if budget == "steps":
        assert drawn == kept
    else:
        assert len(scanned) == 3 * count * math.ceil(batch_size / count)  # one pass; three of a pool too small
        assert drawn == kept[: len(drawn)]
        assert len(kept) - len(drawn) < batch_size  # the last remainder is dropped
    limit = max(batch_size, min(max_scan * batch_size, count))
    assert max(len(batch) for batch in estimator.batches) <= limit
    # V is symmetric in p and 1 − p, so only which side of the bar it is on is told apart here, not the order.
    for record in estimator.records:
        p = noise(key_to_number(count)[record["key"]], 0)
        value = float(signal_probability(8 * p, 8 * (1 - p), GROUP_SIZE))
        passed = cfg["low"] <= p <= cfg["high"] if rule == "window" else value >= cfg["min_utility"]
        assert (record["reason"] is Reason.PASSED) == passed
        assert (record["p"], record["v"]) == (pytest.approx(p), pytest.approx(value, abs=1e-12))


def test_a_batch_is_filled_up_with_the_best_of_a_full_scan():
    """Of 40 candidates (4 batches of 10) the window takes fewer than 10: the rest are the ones of highest V."""
    loader, estimator = make(100, 10, low=0.45, high=0.5, epsilon=0.0, max_scan=4)
    drawn = {number(next(loader)) for _ in range(10)}
    (batch,) = estimator.batches
    assert len(batch) == 40
    passed = [r for r in batch if r["reason"] is Reason.PASSED]
    forced = [r for r in batch if r["reason"] is Reason.FORCED]
    rejected = [r for r in batch if r["reason"] is Reason.REJECTED]
    assert 0 < len(passed) < 10
    assert len(passed) + len(forced) == 10
    assert min(r["v"] for r in forced) >= max(r["v"] for r in rejected)
    assert {(r["q"], r["share"]) for r in forced} == {(1.0, 1.0)}
    assert {r["share"] for r in passed} == {len(passed) / 40}  # a scan of fixed length
    assert drawn == set(numbers(passed + forced, 100))


def test_records_say_what_was_decided():
    """A batch that fills before its scan ends: share = (kept − 1)/(scanned − 1), the last one kept."""
    loader, estimator = make(200, 16)
    drawn = [number(next(loader)) for _ in range(16)]
    (batch,) = estimator.batches
    assert set(batch[0]) == {"key", "text", "p", "v", "q", "keep", "reason", "datasource", "share"}
    assert numbers([r for r in batch if r["keep"]], 200) == drawn
    assert batch[-1]["keep"]
    assert 20 < len(batch) < 64
    assert {r["share"] for r in batch} == {15 / (len(batch) - 1)}
    assert {(r["reason"], r["q"]) for r in batch} <= {("passed", 1.0), ("rejected", 0.05), ("explored", 0.05)}
    assert [r["datasource"] for r in batch] == [f"source {i % 2}" for i in numbers(batch, 200)]


def test_rejected_prompts_are_explored_at_the_rate_asked_for():
    """1,900 of 2,000 candidates or so fall outside; Binomial(n, 0.1) within 4.5 standard deviations."""
    loader, estimator = make(2000, 10, epsilon=0.1, low=0.5, high=0.55, budget="data", max_scan=100)
    drawn = episode(loader)
    counts = Counter(record["reason"] for record in estimator.records)
    outside = counts[Reason.EXPLORED] + counts[Reason.REJECTED]
    assert outside > 1800
    assert counts[Reason.FORCED] == 0
    assert abs(counts[Reason.EXPLORED] - 0.1 * outside) < 4.5 * math.sqrt(outside * 0.1 * 0.9)
    assert {r["q"] for r in estimator.records if r["reason"] is Reason.EXPLORED} == {0.1}
    explored = numbers([r for r in estimator.records if r["reason"] is Reason.EXPLORED], 2000)
    assert set(explored) & set(drawn)


def test_what_is_explored_does_not_depend_on_how_the_scan_is_cut():
    """Nor on scores elsewhere: each place of a pass has its own draw."""

    def explored(batch_size, low):
        loader, estimator = make(300, batch_size, epsilon=0.2, low=low, high=low + 0.01, budget="data", max_scan=100)
        episode(loader)
        return set(numbers([r for r in estimator.records if r["reason"] is Reason.EXPLORED], 300))

    draws = np.random.default_rng([0, Stream.EXPLORE, 0]).random(300)
    lucky = {i for i, draw in zip(stream(300, 0, 300), draws, strict=True) if draw < 0.2}
    assert explored(7, 0.5) == {i for i in lucky if not 0.5 <= noise(i, 0) <= 0.51}
    both = explored(7, 0.5) ^ explored(50, 0.6)
    assert both <= {i for i in range(300) if 0.5 <= noise(i, 0) <= 0.51 or 0.6 <= noise(i, 0) <= 0.61}


def test_draws_follow_from_the_seed():
    def drawn(seed):
        loader, _ = make(50, 8, episodes=2, seed=seed)
        return episode(loader) + episode(loader)

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert stream(50, 3, 100)[:50] != stream(50, 3, 100)[50:]


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
        make(0, 4, inner=SimpleNamespace(dataset=[], collate_fn=None))


# ── When scores are asked for ──


def test_scores_are_asked_for_one_batch_ahead():
    """Batch t+1 is decided with the weights after update t−1, whatever the estimator has learned meanwhile."""
    loader, estimator = make(400, 10, lambda i, updates: 0.5, **ACCEPT_ALL)
    for step in range(4):
        assert len(estimator.questions) == max(step, 0) + (step > 0)  # nothing is asked while a batch is drawn
        for _ in range(10):
            next(loader)
        estimator.updates += 1
    # At first nothing is known and batch 0 is asked for at once; each other batch when the one before has left.
    assert [updates for updates, _ in estimator.questions] == [0, 0, 1, 2, 3]
    positions = stream(400, 0, 400)
    # At first half is expected to be kept: 10 / 0.5 · 1.25 = 25 candidates, what was not needed again with the next
    # batch. All were kept, so the expected rate r becomes 0.8·r + 0.2: 0.6, 0.68, 0.744, 0.7952 by batch.
    counts = (25, math.ceil(12.5 / 0.6), math.ceil(12.5 / 0.68), math.ceil(12.5 / 0.744), math.ceil(12.5 / 0.7952))
    starts = (0, 10, 20, 30, 40)
    assert [asked for _, asked in estimator.questions] == [
        positions[start : start + count] for start, count in zip(starts, counts, strict=True)
    ]


def test_a_scan_goes_on_one_batch_at_a_time_up_to_its_limit():
    loader, estimator = make(400, 10, **REJECT_ALL, max_scan=5)
    next(loader)
    assert [len(asked) for _, asked in estimator.questions] == [25, 10, 10, 5]


def test_a_scan_of_one_batch_asks_for_no_more():
    loader, estimator = make(400, 10, **REJECT_ALL, max_scan=1)
    next(loader)
    assert [len(asked) for _, asked in estimator.questions] == [10]


def test_warm_up_keeps_everything_for_so_many_updates():
    """Batch t is decided with the weights after update t−2, so 3 warm-up updates keep batches 0 to 3 whole."""
    loader, estimator = make(400, 10, **REJECT_ALL | {"warmup_steps": 3, "max_scan": 2})
    for _ in range(6):
        for _ in range(10):
            next(loader)
        estimator.updates += 1
    assert [updates for updates, _ in estimator.questions[:6]] == [
        0,
        0,
        1,
        2,
        3,
        4,
    ]  # 3, 4: a filtered batch, of two questions
    reasons = [Counter(record["reason"] for record in batch) for batch in estimator.batches]
    assert reasons[:4] == [{Reason.WARMUP: 10}] * 4
    assert reasons[4:] == [{Reason.FORCED: 10, Reason.REJECTED: 10}] * 2
    assert len(estimator.questions[3][1]) == 10  # all will be kept, so no more are scored
    assert len(estimator.questions[-1][1]) == 20
    assert all(record["p"] is not None for record in estimator.records)  # wanted for the metrics


def test_the_last_batch_of_a_run_asks_for_nothing():
    loader, estimator = make(20, 10, episodes=2, **ACCEPT_ALL)
    for expected in (3, 4):  # after each batch, but the last: one question more
        episode(loader)
        assert len(estimator.questions) == expected


# ── When the estimator cannot answer ──


def test_without_scores_everything_is_kept_and_counted():
    loader, estimator = make(60, 10, estimator=Estimator(noise, answers=dict.fromkeys(range(99))), **REJECT_ALL)
    assert episode(loader) == stream(60, 0, 60)
    assert {(r["reason"], r["q"], r["p"], r["v"]) for r in estimator.records} == {(Reason.UNSCORED, 1.0, None, None)}
    assert len(estimator.records) == 60


def test_only_the_unanswered_candidates_are_kept_unseen():
    """The first 25 candidates are scored and rejected, the next 10 have no scores."""
    loader, estimator = make(60, 10, estimator=Estimator(noise, answers={1: None}), **REJECT_ALL)
    assert [number(next(loader)) for _ in range(10)] == stream(60, 0, 60)[25:35]
    assert Counter(r["reason"] for r in estimator.batches[0]) == {Reason.REJECTED: 25, Reason.UNSCORED: 10}


def test_a_nan_belief_is_kept_and_counted():
    def spoil(scores):
        scores.a[3] = np.nan
        return scores

    loader, estimator = make(60, 10, estimator=Estimator(noise, answers={0: spoil}), **REJECT_ALL)
    drawn = [number(next(loader)) for _ in range(10)]
    assert stream(60, 0, 4)[3] in drawn
    unscored = [r for r in estimator.records if r["reason"] is Reason.UNSCORED]
    assert [(r["p"], r["v"], r["q"]) for r in unscored] == [(None, None, 1.0)]
    assert numbers(unscored, 60) == [stream(60, 0, 4)[3]]


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
        for _ in range(30):
            for _ in range(4):
                next(loader)
            estimator.updates += 1
    assert len(caplog.messages) == 2
    assert "hardly ever 100%" in caplog.messages[0]
    assert "easier" in caplog.messages[0]


# ── Budget data: one pass is one episode ──


def test_an_episode_of_budget_data_is_one_pass_and_its_remainder_leads_the_next():
    """Pass rates 0.1, 0.3, 0.5, ... by prompt number: of 25 prompts 15 are in the window, batches of 4."""
    loader, estimator = make(25, 4, lambda i, _: (i % 5) / 5 + 0.1, episodes=2, budget="data", epsilon=0.0)
    in_window = [i for i in stream(25, 0, 50) if i % 5 in (1, 2, 3)]
    assert len(in_window) == 30
    assert episode(loader) == in_window[:12]
    assert sum(len(batch) for batch in estimator.batches) == 25
    assert episode(loader) == in_window[12:28]  # led by the 3 that were left; the last 2 are dropped
    assert numbers(estimator.records, 25) == stream(25, 0, 50)


def test_the_last_scan_of_a_pass_ends_with_it():
    """Batch 0 fills at place 9; of the 15 left nothing passes, so 11 and then only the last 4 are asked about."""
    places = {i: place for place, i in enumerate(stream(25, 0, 25))}
    estimator = Estimator(lambda i, _: 0.5 if 6 <= places[i] < 10 else 0.9)
    loader, _ = make(25, 4, estimator=estimator, budget="data", epsilon=0.0, max_scan=6)
    assert episode(loader) == stream(25, 0, 10)[6:]
    # 4/0.5·1.25, then 4/0.48·1.25: the expected rate is 0.8·0.5 + 0.2·4/10.
    assert [len(asked) for _, asked in estimator.questions] == [10, 11, 4]
    assert [len(batch) for batch in estimator.batches] == [10, 15]


def test_budget_data_keeps_order_and_pool_with_everything_accepted():
    loader, _ = make(10, 4, episodes=2, **ACCEPT_ALL, budget="data")
    assert episode(loader) + episode(loader) == stream(10, 0, 20)
    assert len(set(stream(10, 0, 10))) == 10


def test_a_pass_without_a_full_batch_still_gives_one():
    loader, estimator = make(10, 8, lambda i, _: noise(i, 0), episodes=3, budget="data", **REJECT_ALL)
    for _ in range(3):
        assert len(episode(loader)) == 8
    assert [len(batch) for batch in estimator.batches] == [10, 10, 10]
    assert Counter(r["reason"] for r in estimator.records) == {Reason.FORCED: 24, Reason.REJECTED: 6}


@pytest.mark.parametrize("budget", ["steps", "data"])
def test_a_pool_smaller_than_a_batch_fills_from_the_next_passes(budget):
    loader, _ = make(3, 8, episodes=2, **ACCEPT_ALL, budget=budget)
    first, second = episode(loader), episode(loader)
    assert first + second == stream(3, 0, 16)
    assert (len(first), len(second)) == (8, 8)


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


def test_refunds_end_after_one_extra_pass_and_say_so(caplog):
    loader, _ = make(20, 10, episodes=2, **ACCEPT_ALL)
    for expected in (1, 2):
        count = 0
        with caplog.at_level(logging.WARNING):
            for _ in loader:
                loader.refund(1)
                count += 1
        assert count == 20 + 20
        assert len(caplog.messages) == expected
    assert "episode 2 ends" in caplog.messages[1]
    assert "at least 20 groups" in caplog.messages[1]
    assert "--algo.dynamic_filtering_range" in caplog.messages[1]


def test_an_exhausted_loader_stays_exhausted_until_iter():
    loader, _ = make(20, 10, episodes=2, **ACCEPT_ALL)
    assert len(episode(loader)) == 20
    for _ in range(3):
        loader.refund(1)
        with pytest.raises(StopIteration):
            next(loader)
    assert len(episode(loader)) == 20


def test_budget_data_has_nothing_to_refund():
    loader, _ = make(20, 10, **ACCEPT_ALL, budget="data")
    count = 0
    for _ in loader:
        loader.refund(1)
        count += 1
    assert count == 20


# ── OpenRLHF's own drawing code ──


def openrlhf_source(*parts):
    root = Path(importlib.util.find_spec("openrlhf").origin).parent
    return root.joinpath(*parts)


@functools.cache
def drawing_code():
    """OpenRLHF's _collect_prompt_batch and SamplesGenerator, compiled from its file without importing vLLM."""
    source = openrlhf_source("trainer", "ppo_utils", "samples_generator.py").read_text()
    wanted = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in ("_collect_prompt_batch", "SamplesGenerator")
    ]
    assert len(wanted) == 2
    names = vars(typing) | {"torch": torch, "Experience": object, "logger": logging.getLogger("openrlhf")}
    exec(compile(ast.Module(wanted, []), "samples_generator.py", "exec"), names)
    return names["_collect_prompt_batch"], names["SamplesGenerator"]


class Bar:
    """Stands where OpenRLHF makes its progress bar."""

    made: typing.ClassVar[list] = []

    def __init__(self, iterable, desc, initial):
        self.episode = int(desc.removeprefix("Episode [").partition("/")[0]) - 1
        self.total, self.initial, self.n = len(iterable), initial, initial
        self.made.append(self)

    def update(self, n):
        self.n += n

    def close(self):
        pass


@functools.cache
def training_loops():
    """OpenRLHF's loops over episodes and steps: PPOTrainer.fit and GenerateSamplesActor.fit."""
    loops = []
    for file, owner in (("ppo_trainer.py", "PPOTrainer"), ("ppo_trainer_async.py", "GenerateSamplesActor")):
        source = openrlhf_source("trainer", file)
        (node,) = [n for n in ast.parse(source.read_text()).body if getattr(n, "name", "") == owner]
        (loop,) = [n for n in node.body if getattr(n, "name", "") == "fit"]
        names = {"tqdm": Bar, "time": time, "logger": logging.getLogger("openrlhf.test")}
        exec(compile(ast.Module([loop], []), file, "exec"), names)
        loops.append(names["fit"])
    return loops


def prompt_dataset(count):
    """OpenRLHF's own PromptDataset over `count` rows."""
    spec = importlib.util.spec_from_file_location("prompts", openrlhf_source("datasets", "prompts_dataset.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = SimpleNamespace(input_key="prompt", label_key="label", apply_chat_template=False)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), is_rank_0=lambda: False)
    rows = [{"prompt": f"prompt {i}", "label": f"label {i}", "datasource": f"source {i % 2}"} for i in range(count)]
    return module.PromptDataset(rows, None, strategy)


def generator(loader, rollout_batch_size, generate_batch_size=None, accept=None):
    """OpenRLHF's SamplesGenerator with one sample a prompt, whose rollouts come back at once.

    accept: whether dynamic filtering keeps a prompt's group; None: it is off.
    """
    collect, base = drawing_code()

    class Generator(base):
        def _generate_vllm(self, dataloader_iter, num_prompts, dynamic_filtering, **kwargs):
            prompts, _, _, exhausted = collect(dataloader_iter, num_prompts)
            if not prompts:
                return [], 0, True
            todo, accepted, consumed = list(prompts), [], len(prompts)
            while todo:
                prompt = todo.pop(0)
                if accept is None or accept(int(prompt.split()[1])):
                    accepted.append(prompt)
                    continue
                loader.refund(1)
                replacement, _, _, exhausted = collect(dataloader_iter, 1)
                todo += replacement
                consumed += len(replacement)
            return accepted, consumed, exhausted

    rollout = SimpleNamespace(
        batch_size=rollout_batch_size, n_samples_per_prompt=1, vllm_generate_batch_size=generate_batch_size
    )
    args = SimpleNamespace(
        rollout=rollout,
        vllm=SimpleNamespace(enable_sleep=False),
        algo=SimpleNamespace(dynamic_filtering_enable=accept is not None),
    )
    return Generator(SimpleNamespace(args=args), loader, None, None, [])


class Run(typing.NamedTuple):
    """What a training loop did: batches of prompt numbers by episode, what it saved after each step, its bars."""

    trained: list
    saved: list
    bars: list


FRESH = {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "data_loader_state_dict": {}}


def fit(loader, generator, episodes, start=FRESH, after_step=lambda: None, asynchronous=False):
    """Let OpenRLHF's own loop train so many episodes, from what it saved (start); rollouts are trained as they come.

    asynchronous: the loop of the process that makes the rollouts.
    """
    run = Run([[] for _ in range(episodes)], [], [])

    def step(samples, states):
        run.trained[states["episode"]].append([int(prompt.split()[1]) for prompt in samples])
        run.saved.append(json.loads(json.dumps(states | {"global_step": len(run.saved) + start["global_step"] + 1})))
        after_step()

    trainer = SimpleNamespace(
        args=SimpleNamespace(
            train=SimpleNamespace(num_episodes=episodes),
            eval=SimpleNamespace(steps=math.inf),
            algo=SimpleNamespace(dynamic_filtering_enable=False),
        ),
        prompts_dataloader=loader,
        samples_generator=generator,
        generate_kwargs={},
        wandb_logger=None,
        tensorboard_logger=None,
    )
    Bar.made = run.bars
    if asynchronous:
        if start["global_step"]:
            loader.load_state_dict(start["data_loader_state_dict"])
        trainer._should_eval = lambda step: False
        trainer._partial_rollout = True  # no lock around the rollouts
        trainer.rollout_slots = SimpleNamespace(get=lambda block: 0, put=lambda step, block: None)
        trainer.rollout_queue = SimpleNamespace(put=lambda row, block: row == "done" or step(*row[:2]))
        training_loops()[1](trainer, start["episode"], start["total_consumed_prompts"])
    else:
        held = []
        trainer.init_checkpoint_states = lambda: start
        trainer.restore_best_checkpoint_state = lambda states: None
        trainer.broadcast_to_vllm = lambda: None
        trainer.train_step = lambda samples, step: (held.append(samples) or {}, step + 1)
        trainer.save_logs_and_checkpoints = lambda number, status, states: step(held.pop(), states)
        training_loops()[0](trainer)
    return run


@pytest.mark.wheel
@pytest.mark.parametrize(("count", "batch_size"), [(20, 5), (23, 5), (3, 5)])
def test_openrlhf_draws_full_batches_until_the_episode_ends(count, batch_size):
    dataset = prompt_dataset(count)
    inner = StatefulDataLoader(dataset, batch_size=1, shuffle=True, collate_fn=dataset.collate_fn, drop_last=True)
    loader, estimator = make(count, batch_size, inner=inner, episodes=2)

    def learn():
        estimator.updates += 1

    trained = fit(loader, generator(loader, batch_size), 2, after_step=learn).trained
    steps = max(1, count // batch_size)
    assert [[len(batch) for batch in batches] for batches in trained] == [[batch_size] * steps] * 2
    kept = numbers([record for record in estimator.records if record["keep"]], count)
    assert flat(flat(trained)) == kept
    assert [record["datasource"] for record in estimator.records] == [
        f"source {i % 2}" for i in numbers(estimator.records, count)
    ]


@pytest.mark.wheel
def test_openrlhf_replaces_rejected_groups_and_keeps_every_batch_full():
    """A third of the groups are thrown away; each is replaced, so two episodes still make 2 × 4 full batches."""
    loader, estimator = make(43, 10, episodes=2, **ACCEPT_ALL)
    trained = fit(loader, generator(loader, 10, accept=lambda i: i % 3 > 0), 2).trained
    assert [[len(batch) for batch in batches] for batches in trained] == [[10] * 4] * 2
    kept = [i for i in numbers(estimator.records, 43) if i % 3]
    assert flat(flat(trained)) == kept[:80]


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


def third(i):
    """Dynamic filtering throws a third of the groups away."""
    return i % 3 > 0


def fifth(i, updates=0):
    """Pass rates 0.1, 0.3, ... by prompt number: the window takes three in five."""
    return i % 5 / 5 + 0.1


@pytest.mark.wheel
@pytest.mark.parametrize("count", [22, 43, 3])
def test_with_budget_data_replacements_fill_the_last_batch_of_a_pass_from_the_next_one(count):
    """No batch is short, each pass is scanned once, and what was begun early of the next one leads it."""
    loader, estimator = make(count, 10, fifth, episodes=3, budget="data", epsilon=0.0)
    run = fit(loader, generator(loader, 10, accept=third), 3)
    assert [len(batches) > 0 for batches in run.trained] == [True] * 3
    assert {len(batch) for batch in flat(run.trained)} == {10}
    scanned = numbers(estimator.records, count)
    assert scanned == stream(count, 0, len(scanned))
    at_least = 3 * count * math.ceil(10 / count)
    assert at_least <= len(scanned) <= 2 * at_least
    kept = [i for i in numbers([r for r in estimator.records if r["keep"]], count) if third(i)]
    assert flat(flat(run.trained)) == kept[: len(flat(flat(run.trained)))]


@pytest.mark.wheel
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("accept", [None, third])
@pytest.mark.parametrize("cfg", [{}, {"budget": "data"}, {"budget": "data", "expected_keep_rate": 0.6}])
@pytest.mark.parametrize("count", [43, 45, 4])
def test_openrlhfs_bar_episode_and_total_are_true_also_after_every_resume(count, cfg, accept, asynchronous):
    """The total is what was given out. A bar shows it from the start of its episode or, where the episodes before were
    of other lengths than it expects, from the start of the run; it ends where this episode is expected to end.
    """
    given = []  # prompts given out, counted where they leave
    inner = inner_loader(count)
    counted = SimpleNamespace(
        dataset=inner.dataset, collate_fn=lambda rows: given.extend(rows) or inner.collate_fn(rows)
    )
    options = {"episodes": 3, "epsilon": 0.0, **cfg}
    loader, _ = make(count, 5, fifth, inner=counted, **options)
    at = []
    run = fit(
        loader,
        generator(loader, 5, accept=accept),
        3,
        after_step=lambda: at.append(len(given)),
        asynchronous=asynchronous,
    )
    assert [state["total_consumed_prompts"] for state in run.saved] == at
    assert [bar.episode for bar in run.bars] == [0, 1, 2]
    begins = [0, *(max(n for n, s in zip(at, run.saved, strict=True) if s["episode"] == e) for e in (0, 1, 2))]
    length = max(1, count // 5) * 5
    if cfg:
        scanned = count * math.ceil(5 / count)
        length = max(5, int(scanned * cfg.get("expected_keep_rate", 1.0) + 1e-6) // 5 * 5)
    for bar in run.bars:
        zero = begins[bar.episode] - bar.initial
        assert zero in (0, begins[bar.episode])
        assert bar.total + zero == begins[bar.episode] + length
        assert bar.n + zero == begins[bar.episode + 1]
        if not cfg and accept is None:
            assert (bar.initial, bar.n) == (0, bar.total)
    for state in run.saved:
        again, _ = make(count, 5, fifth, **options)
        rest = fit(again, generator(again, 5, accept=accept), 3, start=state, asynchronous=asynchronous)
        assert rest.saved == run.saved[state["global_step"] :]
        begin, total = begins[state["episode"]], state["total_consumed_prompts"]
        refunds = state["data_loader_state_dict"]["refunds"] if not cfg else 0
        bar = rest.bars[0]
        assert bar.episode == state["episode"]
        zero = total - bar.initial
        assert zero in (0, begin)
        assert bar.total + zero == begin + max(length + refunds, total - begin + 1)
        assert bar.n + zero == begins[state["episode"] + 1]


def wrapped(count, batch_size, monkeypatch, train_batch=40, max_epochs=1, max_steps=0, **cfg):
    """What hooks.wrap_loader gives a launch of three episodes, groups of 8, without telling the estimator of it."""
    monkeypatch.setattr(hooks, "attach", lambda *args: None)
    monkeypatch.setattr(hooks, "_process", SimpleNamespace(handle=Estimator(fifth), loader=None))
    settings = config.to_namespace(DepoConfig(filter=FilterConfig(**(FILTER | {"epsilon": 0.0} | cfg))))
    args = SimpleNamespace(
        depo=settings,
        rollout=SimpleNamespace(vllm_generate_batch_size=batch_size, n_samples_per_prompt=8),
        train=SimpleNamespace(batch_size=train_batch, num_episodes=3, max_epochs=max_epochs, seed=0),
    )
    return hooks.wrap_loader(args, inner_loader(count), max_steps, "ppo_trainer.py")


@pytest.mark.wheel
@pytest.mark.parametrize("count", [20, 23, 60, 3, 200])
@pytest.mark.parametrize("cfg", [{}, {"budget": "data", "expected_keep_rate": 0.6}])
def test_the_schedule_is_made_for_the_steps_that_are_made(count, cfg, monkeypatch):
    """One optimizer step a batch. OpenRLHF plans count · 8 // 40 · 3 steps; budget data makes 0.6 of that, for the
    window takes three in five, and a pool of 3 gives one batch an episode.
    """
    loader, steps = wrapped(count, 5, monkeypatch, max_steps=count * 8 // 40 * 3, **cfg)
    run = fit(loader, generator(loader, 5), 3)
    assert steps == len(flat(run.trained)) == max(3, int(count * 3 * 0.6) // 5 if cfg else count // 5 * 3)


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
    _, steps = wrapped(23, 5, monkeypatch, train_batch, max_epochs, max_steps)
    assert steps == expected


# ── State ──


def resumed(loader, estimator, state, count, batch_size, **options):
    """A new loader and estimator that go on from a state; the estimator has learned as much as the old one."""
    twin = Estimator(estimator.pass_rate, updates=estimator.updates)
    again, _ = make(count, batch_size, estimator=twin, **options)
    again.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    return again, twin


def draw(loader, estimator, count, batch_size, served):
    """Draw `count` prompts as training does: an update after each batch, a new episode after the end of one.

    served: prompts that were drawn before, so that updates fall where they would have.
    """
    drawn = []
    iterator = iter(loader)
    while len(drawn) < count:
        try:
            drawn.append(number(next(iterator)))
        except StopIteration:
            iterator = iter(loader)
            continue
        if (served + len(drawn)) % batch_size == 0:
            estimator.updates += 1
    return drawn


@pytest.mark.parametrize("budget", ["steps", "data"])
@pytest.mark.parametrize("rule", ["window", "utility"])
@pytest.mark.parametrize("served", [0, 1, 7, 8, 16, 40, 48, 56, 61, 96])
def test_a_resumed_loader_draws_what_the_uninterrupted_one_draws(served, rule, budget):
    """The next 200 prompts, over several passes and episodes: from within a batch, its end, the end of an episode."""
    options = {"episodes": 99, "seed": 5, "rule": rule, "budget": budget, "min_utility": 0.8, "warmup_steps": 2}
    loader, estimator = make(50, 8, **options)
    draw(loader, estimator, served, 8, 0)
    again, twin = resumed(loader, estimator, loader.state_dict(), 50, 8, **options)
    expected = draw(loader, estimator, 200, 8, served)
    assert draw(again, twin, 200, 8, served) == expected
    assert again.state_dict() == loader.state_dict()
    assert len(set(expected)) > 25


def test_scores_that_were_asked_for_are_part_of_the_state():
    """The estimator learns between the question and the save: asked again, it would answer otherwise."""
    loader, estimator = make(50, 8, seed=5)
    draw(loader, estimator, 16, 8, 0)
    state = loader.state_dict()
    assert state["asked"]["scores"]["updates"] == 1 < estimator.updates == 2
    again, twin = resumed(loader, estimator, state, 50, 8, seed=5)
    forgetful, other = resumed(loader, estimator, state | {"asked": None}, 50, 8, seed=5)
    expected = draw(loader, estimator, 8, 8, 16)
    assert draw(again, twin, 8, 8, 16) == expected
    assert draw(forgetful, other, 8, 8, 16) != expected


class Actor:
    """The real estimator as its handle shows it, in this process; y of prompt i is noise(i) in eighths."""

    def __init__(self, encoder):
        cfg = DepoConfig(estimator=EstimatorConfig(model=encoder, lr=1e-2))
        self.estimator = DifficultyEstimator(cfg, GROUP_SIZE, seed=0)
        self.records = []

    def score_async(self, prompts, labels):
        scores = self.estimator.score(prompts, labels)
        return SimpleNamespace(result=lambda: scores)

    def record(self, records):
        self.records += records
        self.estimator.record(records)

    def train(self, loader, steps):
        """Draw and learn from batches of 40; return their prompts, and the q and share that weight them."""
        drawn, seen = [], []
        for _ in range(steps):
            batch = list(itertools.islice(iter(loader), 40))
            batch += itertools.islice(iter(loader), 40 - len(batch))  # the next episode's
            drawn += map(number, batch)
            prompts, labels = [b[1][0] for b in batch], [b[2][0] for b in batch]
            seen += zip(*self.estimator.keep_weights(prompts, labels), strict=True)
            y = [round(8 * noise(number(b), 0)) / 8 for b in batch]
            groups = zip(prompts, labels, y, strict=True)
            self.estimator.observe([Label(p, a, y, 0.5, 8, 0 < y < 1) for p, a, y in groups])
        return drawn, seen


@pytest.fixture
def one_thread():
    """As the estimator's actor runs by default; more threads than free cores are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_with_the_real_estimator_a_resumed_run_draws_and_learns_the_same(tmp_path):
    """Both learn first, both are saved and loaded; the next 200 prompts and the weights are equal bit for bit."""
    options = {"episodes": 99, "rule": "utility", "min_utility": 0.8, "epsilon": 0.2, "warmup_steps": 2}
    encoder = tiny_encoder.write(tmp_path)
    actor = Actor(encoder)
    loader, _ = make(90, 40, estimator=actor, **options)
    _, seen = actor.train(loader, 3)
    assert seen == [(r["q"], r["share"]) for r in actor.records if r["keep"]]
    saved = json.loads(json.dumps(loader.state_dict())), actor.estimator.state_dict()
    again = Actor(encoder)
    resumed, _ = make(90, 40, estimator=again, **options)
    resumed.load_state_dict(saved[0])
    again.estimator.load_state_dict(saved[1])
    expected, _ = actor.train(loader, 5)
    assert again.train(resumed, 5)[0] == expected
    assert len(expected) == 200
    assert {r["reason"] for r in actor.records} >= {Reason.WARMUP, Reason.PASSED, Reason.EXPLORED, Reason.REJECTED}
    weights, twins = (a.estimator.backend.model.state_dict() for a in (actor, again))
    assert all(torch.equal(weights[name], twins[name]) for name in weights)


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
    state = loader.state_dict()
    assert state["asked"]["scores"] is None
    assert state["asked"]["count"] > 8
    again, twin = resumed(loader, estimator, state, 50, 8, seed=5)
    assert draw(again, twin, 30, 8, 8) == draw(loader, estimator, 30, 8, 8)
    assert Counter(r["reason"] for r in twin.batches[0]) == {Reason.UNSCORED: 8}


@pytest.mark.parametrize("budget", ["steps", "data"])
def test_a_loader_that_was_used_forgets_it_all_when_it_loads(budget):
    options = {"episodes": 9, "seed": 5, "budget": budget}
    loader, estimator = make(50, 8, **options)
    draw(loader, estimator, 16, 8, 0)
    used, _ = make(50, 8, estimator=estimator, **options)
    fresh = used.state_dict()
    episode(used)
    used.load_state_dict(fresh)
    twin, other = make(50, 8, **options)
    other.updates = estimator.updates
    assert draw(used, estimator, 100, 8, 0) == draw(twin, other, 100, 8, 0)


def test_a_resumed_run_may_filter_otherwise():
    """21 candidates (10/0.6·1.25) were asked about, the new limit is 10: that batch is filled from the 21."""
    loader, estimator = make(400, 10, **ACCEPT_ALL)
    draw(loader, estimator, 10, 10, 0)
    again, twin = resumed(loader, estimator, loader.state_dict(), 400, 10, **REJECT_ALL, max_scan=1)
    assert len(set(draw(again, twin, 20, 10, 10))) == 20
    assert [len(batch) for batch in twin.batches] == [21, 10]


def test_a_resumed_run_keeps_its_refunds():
    loader, estimator = make(16, 8, **ACCEPT_ALL)
    draw(loader, estimator, 12, 8, 0)
    loader.refund(3)
    again, _ = resumed(loader, estimator, loader.state_dict(), 16, 8, **ACCEPT_ALL)
    assert episode(again) == episode(loader) == stream(16, 0, 19)[12:]


@pytest.mark.wheel
@pytest.mark.parametrize("budget", ["steps", "data"])
@pytest.mark.parametrize("accept", [None, lambda i: i % 3 > 0, lambda i: i % 7 == 0])
def test_openrlhf_resumes_at_every_step_without_repeating_or_skipping(accept, budget):
    """Three episodes are saved after each step as the trainers do; a run from any of them trains the same rest.

    A state saved at the end of an episode belongs to that episode, in which no prompt is left. The third case uses up
    the replacements, so that the episode ends in the step that is saved.
    """
    options = {"episodes": 3, "seed": 1, "budget": budget, **ACCEPT_ALL}
    loader, _ = make(22, 5, **options)
    whole = fit(loader, generator(loader, 5, accept=accept), 3)
    batches = flat(whole.trained)
    assert len(batches) == len(whole.saved) >= 3
    for step, state in enumerate(whole.saved, start=1):
        again, _ = make(22, 5, **options)
        rest = fit(again, generator(again, 5, accept=accept), 3, start=state)
        assert flat(rest.trained) == batches[step:]
        assert rest.saved == whole.saved[step:]


def test_the_state_is_small_and_plain():
    """Batch 128 in a pool of 1,000,000, some 300 candidates' scores: two floats of up to 19 characters each."""
    loader, estimator = make(1_000_000, 128, estimator=Estimator(noise, strength=1e4 / 3))
    draw(loader, estimator, 128, 128, 0)
    state = loader.state_dict()
    assert 256 < len(state["asked"]["scores"]["a"]) < 400
    text = json.dumps(state, allow_nan=False)
    assert len(text) < 20_000
    assert json.loads(text) == state
    assert {type(value) for value in state.values()} == {int, float, str, list, dict}


LOADER_STATE = {"pool", "batch_size", "seed", "budget", "episode", "before", "served", "refunds", "cursor", "queue"}
LOADER_STATE |= {"open", "asked", "updates", "keep_rate", "digest"}


def test_a_state_has_exactly_its_fields():
    loader, _ = make(20, 5)
    state = loader.state_dict()
    assert set(state) == LOADER_STATE
    without = {name: value for name, value in state.items() if name != "cursor"}
    with pytest.raises(ValueError, match=r"missing \['cursor'\], unexpected \['position'\].*--ckpt.load_enable"):
        loader.load_state_dict(without | {"position": 3})


def test_a_state_of_openrlhfs_own_loader_is_refused():
    inner = inner_loader(20)
    next(iter(inner))
    loader, _ = make(20, 5)
    with pytest.raises(ValueError, match=r"unexpected \['_.*written without DEPO"):
        loader.load_state_dict(inner.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4}, r"--rollout.vllm_generate_batch_size .* was 5, is 4"),
        ({"seed": 7}, r"--train.seed was 0, is 7"),
        ({"budget": "data"}, r"--depo.filter.budget was steps, is data"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(options, message):
    loader, _ = make(20, 5)
    other, _ = make(**({"count": 20, "batch_size": 5} | options))
    with pytest.raises(ValueError, match=message + r"\. Resume with the values.*--ckpt.load_enable"):
        other.load_state_dict(loader.state_dict())


def test_all_differences_are_named_at_once():
    loader, _ = make(20, 5)
    other, _ = make(20, 4, seed=7)
    with pytest.raises(ValueError, match=r"batch_size.*--train.seed"):
        other.load_state_dict(loader.state_dict())


# ── Another pool, and what tells one from another ──


class Texts(Prompts):
    """A pool of these prompts and labels."""

    def __init__(self, prompts, labels=None):
        super().__init__(len(prompts))
        self.prompts = prompts
        self.labels = [f"label {i}" for i in range(len(prompts))] if labels is None else labels

    def __getitem__(self, i):
        return "source", self.prompts[i], self.labels[i], None


def loader_of(prompts, labels=None, **options):
    dataset = Texts(prompts, labels)
    inner = SimpleNamespace(dataset=dataset, collate_fn=dataset.collate_fn)
    estimator = SimpleNamespace(
        score_async=lambda *_: SimpleNamespace(result=lambda: None), record=lambda records: None
    )
    return make(len(prompts), 4, estimator=estimator, inner=inner, **options)[0]


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
    loader = loader_of(POOL, episodes=3)
    for _ in range(8):
        next(loader)
    state = loader.state_dict()
    resumed = loader_of(*OTHERS[other], episodes=3)
    resumed.load_state_dict(state)
    (warning,) = [record.getMessage() for record in caplog.records]
    prompts, _ = OTHERS[other]
    assert f"not the prompts of the checkpoint (20 then, {len(prompts)} now" in warning
    assert "a date" in warning
    assert prompts[0] in warning
    again = resumed.state_dict()
    assert (again["cursor"], again["queue"], again["served"], again["episode"]) == (len(prompts), [], 8, 0)
    rest = [prompt for _, (prompt,), *_ in resumed]
    assert len(rest) == len(prompts) // 4 * 4 - 8  # the rest of the episode
    assert len(set(rest)) == len(rest)
    assert rest == [prompts[i] for i in stream(len(prompts), 0, 2 * len(prompts))[len(prompts) :][: len(rest)]]


def test_the_same_pool_goes_on_without_a_word(caplog):
    loader, resumed = loader_of(POOL), loader_of(POOL)
    for _ in range(8):
        next(loader)
    resumed.load_state_dict(loader.state_dict())
    assert caplog.records == []
    assert [prompt for _, (prompt,), *_ in resumed] == [prompt for _, (prompt,), *_ in loader]


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
    """A run that is resumed on another day finds its pool, and each prompt its history."""
    monday, tuesday = (
        [header.format(day) + text for text in POOL] for day in (datetime(2026, 9, 30), datetime(2026, 10, 1))
    )
    assert not set(monday) & set(tuesday)
    loader, resumed = loader_of(monday), loader_of(tuesday)
    for _ in range(8):
        next(loader)
    resumed.load_state_dict(loader.state_dict())
    assert caplog.records == []
    assert [prompt_key(text, "a") for text in monday] == [prompt_key(text, "a") for text in tuesday]
    assert len({prompt_key(text, "a") for text in monday}) == 20


def test_a_date_that_is_part_of_the_problem_tells_prompts_apart():
    keys = {
        prompt_key(f"How many days from 2026-01-0{i} to 2026-11-26? The date: 2026-0{i}-01", "a") for i in range(9)
    }
    assert len(keys) == 9


def test_labels_of_any_kind_reach_the_estimator_as_text_and_openrlhf_as_they_are():
    label = {"answer": Decimal("1.5"), "on": datetime(2026, 11, 26)}
    asked = []
    loader = loader_of(POOL, [label] * 20)
    loader._estimator.score_async = lambda prompts, labels: (
        asked.extend(labels) or SimpleNamespace(result=lambda: None)
    )
    _, _, (given,), _ = next(loader)
    assert given is label
    assert set(asked) == {str(label)}
    json.dumps(loader.state_dict())


def test_chat_messages_without_a_template_are_refused_by_name():
    chat = [[{"role": "user", "content": text}] for text in POOL]
    with pytest.raises(ValueError, match=r"prompt 0 .* is no text but a list: .*add --data\.apply_chat_template"):
        loader_of(chat)
