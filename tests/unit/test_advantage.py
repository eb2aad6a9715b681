"""Importance weights: by hand, and that they undo the filter's choice in a simulation with the real loader."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from depo_plugin.advantage import rescale, weights
from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.messages import Reason, Scores, prompt_key
from depo_plugin.settings.config import FilterConfig

RUNS = 2000
POOL = 300
BATCH_SIZE = 8


def test_a_weight_is_the_share_over_the_keep_probability():
    """Half the candidates were kept: a sure one counts 0.5, one explored at 5% counts 10; clipped at most 3."""
    assert weights([1.0, 0.05], [0.5, 0.5]).tolist() == [0.5, 10.0]
    assert weights([1.0, 0.05], [0.5, 0.5], clip=3.0).tolist() == [0.5, 3.0]
    assert weights([1.0], [1.0]).tolist() == [1.0]  # forced, warm-up


def experience(indices, action_count=3, dtype=torch.float32):
    """One micro-batch: samples by place in the rollout, each with advantage place + 1 at every action."""
    advantages = (torch.tensor(indices, dtype=dtype) + 1)[:, None].repeat(1, action_count)
    return SimpleNamespace(index=indices, advantages=advantages)


def test_micro_batches_may_cut_across_groups():
    """Groups of 2: samples 0 1 | 2 3 | 4 5, packed by length into 5 0 3 and 4 1 2."""
    micro_batches = [experience([5, 0, 3]), experience([4, 1, 2], action_count=1)]
    tensors = [micro_batch.advantages for micro_batch in micro_batches]
    rescale(micro_batches, np.array([1.0, 10.0, 100.0]), 2)
    assert [m.advantages[:, 0].tolist() for m in micro_batches] == [[600.0, 1.0, 40.0], [500.0, 2.0, 30.0]]
    assert torch.equal(tensors[0][:, 0], tensors[0][:, 2])
    assert all(m.advantages is tensor for m, tensor in zip(micro_batches, tensors, strict=True))  # in place


def test_the_advantages_keep_their_precision():
    micro_batch = experience([0, 1], dtype=torch.bfloat16)
    rescale([micro_batch], weights([0.5], [1.0]), 2)
    assert micro_batch.advantages.dtype is torch.bfloat16
    assert micro_batch.advantages[:, 0].tolist() == [2.0, 4.0]


class Pool:
    """The pool, its estimator and its collate_fn in one: prompt i has p̂ = (i + 0.5)/POOL."""

    def __init__(self):
        self.records = []

    def __len__(self):
        return POOL

    def __getitem__(self, i):
        return "source", str(i), "", None

    def score_async(self, prompts, labels, waited_for=False):
        p = (np.array([int(prompt) for prompt in prompts]) + 0.5) / POOL
        return SimpleNamespace(result=lambda: Scores(8 * p, 8 * (1 - p), np.zeros(len(p)), 99))

    def record(self, records):
        self.records += records


NUMBER = {prompt_key(str(i), ""): i for i in range(POOL)}
GRADIENT = np.linspace(2.0, 1.0, POOL)  # prompt i's gradient: larger where p̂ is low


def planned(seed, **cfg):
    """Return the kept records of one batch that the loader plans with this seed."""
    pool = Pool()
    inner = SimpleNamespace(dataset=pool, collate_fn=lambda items: items, num_workers=0)
    loader = DifficultyFilteredLoader(
        inner, pool, FilterConfig(**cfg), batch_size=BATCH_SIZE, group_size=8, seed=seed, num_episodes=1
    )
    next(loader)
    return [record for record in pool.records if record.keep]


@pytest.fixture(scope="module")
def batches():
    """Batches of 8 kept by a window that takes the easier half and explores two in five of the rest: 7 in 10."""
    cfg = {"low": 0.5, "high": 1.0, "epsilon": 0.4, "max_scan": 30, "warmup_steps": 0}
    return [planned(seed, **cfg) for seed in range(RUNS)]


def estimates(batches, weight):
    """Return the mean of w·g of each batch, (RUNS,)."""
    return np.array([np.mean([weight(r) * GRADIENT[NUMBER[r.key]] for r in batch]) for batch in batches])


def z_score(sample):
    """By how many standard errors the mean lies above the pool's mean gradient, that of the unfiltered stream."""
    return (sample.mean() - GRADIENT.mean()) / (sample.std() / math.sqrt(RUNS))


@pytest.mark.slow
def test_weighted_gradients_are_unbiased_for_the_unfiltered_stream(batches):
    """|z| < 3.5 over 2,000 batches, whose standard error is below 0.8% of the mean."""
    assert len(batches) == RUNS
    assert {len(batch) for batch in batches} == {BATCH_SIZE}
    weighted = estimates(batches, lambda r: weights([r.q], [r.share]).item())
    assert weighted.std() / math.sqrt(RUNS) < 0.008 * GRADIENT.mean()
    assert abs(z_score(weighted)) < 3.5


@pytest.mark.slow
def test_other_weights_are_biased(batches):
    """None: the easier half speaks louder. 1/q alone: too large by scanned/kept = 1/0.7. Clipped: too small.

    kept/scanned with the last kept one counted, 8/n for share = 7/(n − 1): too large by about (1 − 0.7)/8 = 4%.
    """
    assert z_score(estimates(batches, lambda r: 1.0)) < -10
    assert estimates(batches, lambda r: 1 / r.q).mean() == pytest.approx(GRADIENT.mean() / 0.7, rel=0.03)
    assert z_score(estimates(batches, lambda r: weights([r.q], [r.share], clip=1.0).item())) < -10
    assert z_score(estimates(batches, lambda r: 8 / (7 / r.share + 1) / r.q)) > 4


def test_forced_prompts_have_weight_one():
    """Nothing passes, all 8 are forced; a scan that passes some still gives its forced ones 1."""
    for low in (0.999, 0.97):
        kept = planned(0, low=low, high=1.0, epsilon=0.0, warmup_steps=0)
        forced = [r for r in kept if r.reason == Reason.FORCED]
        assert len(forced) >= 4
        assert weights([r.q for r in forced], [r.share for r in forced]).tolist() == [1.0] * len(forced)
