"""What users send, any text and any labels: in both modes scores stay in (0, 1), weights finite, states whole."""

import copy
import math

import numpy as np
import pytest
import tiny_encoder
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_encoder import assert_same_state, weights

from depo_plugin.estimator import checkpoint, estimator
from depo_plugin.estimator.encoder import load_encoder
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.heads import DifficultyHeads, DifficultyModel
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, HistoryConfig

SETTINGS = settings(
    max_examples=15,
    deadline=None,  # a shared machine may stall
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # what make() patches holds for all examples
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_encoder(tiny_encoder.write(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(params=["frozen", "finetune"])
def make(loaded, monkeypatch, request):
    """make(...): an estimator of the tiny encoder with narrow heads, in one mode, then in the other."""
    for part in (DifficultyHeads, DifficultyModel):
        monkeypatch.setattr(estimator, part.__name__, lambda x, part=part: part(x, hidden=32))

    monkeypatch.setattr(estimator, "load_encoder", lambda model, depth: copy.deepcopy(loaded))  # many are built

    def build(seed=0, cache_dir=None, history=None, **changes):
        fixed = {"mode": request.param, "dtype": "fp32", "replay": 8, "updates_per_step": 1}
        cfg = DepoConfig(estimator=EstimatorConfig(**(fixed | changes)), history=history or HistoryConfig())
        return DifficultyEstimator(cfg, 8, seed, cache_dir=cache_dir)

    return build


def label(prompt, y=0.5, n=8, d=0.5, signal=True):
    return Label(prompt, "answer", y, d, n, signal)


def assert_sound(made, prompts):
    """Score twice: distributions with a mean inside (0, 1), the same both times; no weight is NaN or infinite."""
    scores, again = (made.score(prompts, ["answer"] * len(prompts)) for _ in range(2))
    np.testing.assert_array_equal(np.r_[scores.a, scores.b], np.r_[again.a, again.b])
    p = scores.a / (scores.a + scores.b)
    assert p.shape == (len(prompts),)
    assert np.isfinite([scores.a, scores.b]).all()
    assert (np.minimum(scores.a, scores.b) > 0).all()
    assert ((p > 0) & (p < 1)).all()
    v = signal_probability(scores.a, scores.b, 8)
    assert ((v >= 0) & (v <= 1)).all()
    assert all(value.isfinite().all() for value in made.backend.model.state_dict().values())
    assert all(math.isfinite(value) for value in made.metrics().values())


# Few letters, so that texts repeat; any other character of Unicode but surrogates that stand alone.
texts = st.text(st.sampled_from("1+=a \n\t\0") | st.characters(exclude_categories=["Cs"]), max_size=30)
rewards = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.125, 0.5])
labels = st.builds(
    Label,
    prompt=texts,
    label=st.sampled_from(["", "4"]),
    y=rewards,
    d=st.none() | st.floats(1e-4, 1 - 1e-4),
    n=st.integers(1, 64),
    signal=st.booleans(),
)
steps = st.lists(st.lists(labels, max_size=8), max_size=4)


@SETTINGS
@given(steps=steps, asked=st.lists(texts, max_size=6))
def test_any_texts_and_labels_are_learned_from(make, steps, asked):
    made = make()
    for step in steps:
        made.observe(step)
        assert_sound(made, asked + [one.prompt for one in step])
    assert made.updates == sum(map(bool, steps))


@pytest.mark.parametrize(
    "history",
    [
        HistoryConfig(kappa="inf", drift=False, share=False),
        HistoryConfig(kappa="inf"),
        HistoryConfig(kappa=0.01),
        HistoryConfig(kappa=1e9, discount=1e-6),
    ],
    ids=["paper", "inf", "small", "large"],
)
@settings(SETTINGS, max_examples=8)
@given(steps=steps)
def test_so_they_are_at_the_ends_of_the_settings(make, history, steps):
    made = make(history=history)
    for step in steps:
        made.observe(step)
        assert_sound(made, ["", *(one.prompt for one in step)])


EDGES = {
    "empty prompts": [label("", 0.0), label("", 1.0), label(" ")],
    "a long prompt": [label("1+1=" * 25_000, 0.25), label("short", 1.0)],
    "characters that no vocabulary has": [label("\U0001f600\u202e\x00\ufffd", 0.25), label("日本語" * 50)],
    "duplicates": [label("1+1=", y) for y in (0.0, 0.5, 1.0)] * 8,
    "a batch of one": [label("1+1=", 0.375)],
    "all wrong": [label(f"{i}+1=", 0.0, signal=False) for i in range(32)],
    "all right": [label(f"{i}+1=", 1.0, signal=False) for i in range(32)],
    "nothing to rank": [label(f"{i}+1=", 0.5, d=None) for i in range(8)],
    "fractions": [label(f"{i}+1=", i / 7, signal=i % 2 == 0) for i in range(8)],
    "single responses and large groups": [label("1=", 1.0, n=1), label("2=", 0.0, n=1), label("3=", 0.998, n=4096)],
    "confidences at their ends": [label("1=", 0.2, d=1e-4), label("2=", 0.4, d=1 - 1e-4)],
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_learned_from_again_and_again(make, name):
    made = make(updates_per_step=2)
    before = weights(made)
    for _ in range(1 if name == "a long prompt" else 5):  # 100,000 characters are read in 0.2 s
        made.observe(EDGES[name])
        assert_sound(made, [one.prompt for one in EDGES[name]] + ["another"])
    assert any(not torch.equal(value, before[key]) for key, value in weights(made).items())


def test_one_sided_steps_leave_a_belief_that_can_come_back(make):
    """60 steps of nothing but failures, then successes: beliefs never reach 0, and come back within ten steps."""
    made = make(updates_per_step=0)
    prompts = [f"{i}+1=" for i in range(16)]
    for _ in range(60):
        made.observe([label(prompt, 0.0, signal=False) for prompt in prompts])
    assert_sound(made, prompts)
    scores = made.score(["99+1="], ["answer"])
    assert (scores.a / (scores.a + scores.b))[0] < 0.01
    for _ in range(10):
        made.observe([label(prompt, 0.75) for prompt in prompts])
    assert_sound(made, prompts)
    scores = made.score(prompts, ["answer"] * 16)
    assert (scores.a / (scores.a + scores.b)).min() > 0.3


SURROGATES = ["\ud800", "half \udfff a pair", "1+1=\ud83d"]


def test_surrogates_that_stand_alone_are_text_like_any_other(make):
    made = make()
    made.observe([label(prompt, 0.25) for prompt in SURROGATES])
    assert_sound(made, SURROGATES)


bad = st.floats(allow_nan=True).filter(lambda y: not 0 <= y <= 1)


@SETTINGS
@given(y=bad, place=st.integers(0, 3), n=st.integers(1, 8))
def test_a_rate_outside_0_and_1_is_refused_and_changes_nothing(make, y, place, n):
    made = make()
    made.observe([label(f"{i}+1=", i / 4) for i in range(4)])
    made.record([])
    before, metrics = made.state_dict(), made.metrics()
    step = [label(f"{i}+2=") for i in range(3)]
    step.insert(place, label("9+9=", y, n))
    with pytest.raises(ValueError, match=r"label of '9\+9=': y .* not in \[0, 1\]"):
        made.observe(step)
    assert_same_state(made.state_dict(), before)
    assert made.metrics() == metrics
    assert_sound(made, ["1+1=", "9+9="])


@settings(SETTINGS, max_examples=8)
@given(steps=st.lists(st.lists(labels, min_size=1, max_size=6), min_size=2, max_size=4), cut=st.integers(0, 4))
def test_saved_and_restored_midway_it_goes_on_bit_for_bit(make, tmp_path_factory, steps, cut):
    """Through the checkpoint on the disk; embeddings lie in one folder, as those of a resumed run do."""
    tmp_path, cut = tmp_path_factory.mktemp("run"), min(cut, len(steps))
    whole = make(seed=1, cache_dir=tmp_path / "cache")
    for step in steps[:cut]:
        whole.observe(step)
    checkpoint.save(tmp_path / "global_step1", whole.state_dict())
    for step in steps[cut:]:
        whole.observe(step)
    resumed = make(seed=2, cache_dir=tmp_path / "cache")
    resumed.load_state_dict(checkpoint.load(tmp_path / "global_step1"))
    for step in steps[cut:]:
        resumed.observe(step)
    assert_same_state(resumed.state_dict(), whole.state_dict())
    prompts = [one.prompt for step in steps for one in step]
    scores = [made.score(prompts, ["answer"] * len(prompts)) for made in (whole, resumed)]
    np.testing.assert_array_equal(np.r_[scores[0][:2]], np.r_[scores[1][:2]])
