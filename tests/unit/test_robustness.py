"""Whatever text and labels users send, in both modes scores stay in (0, 1), weights finite and states whole."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import tiny_encoder
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_encoder import assert_same_state, weights

from depo_plugin.estimator import text_model
from depo_plugin.estimator.encoder import load_encoder
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label

pytestmark = pytest.mark.slow

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
    tiny_encoder.narrow_heads(monkeypatch, hidden=32)
    monkeypatch.setattr(text_model, "load_encoder", lambda model, depth: copy.deepcopy(loaded))  # many are built
    return functools.partial(tiny_encoder.make_estimator, None, group_size=8, mode=request.param, replay=8)


def label(prompt, y=0.5, n=8, d=0.5, signal=True):
    return Label(prompt, "answer", y, d, n, signal)


def take_and_check(made, step, asked=()):
    """Judge and learn, then score twice: distributions with a mean inside (0, 1), the same both times; no metric and
    no weight is NaN or infinite."""
    (metrics, lines), prompts = made.judge(step), [*asked, *(one.prompt for one in step)]
    assert len(json.loads(json.dumps(lines, allow_nan=False))) == len(step)
    made.learn(step)
    scores, again = (made.score(prompts, ["answer"] * len(prompts)) for _ in range(2))
    np.testing.assert_array_equal(np.r_[scores.a, scores.b], np.r_[again.a, again.b])
    p = scores.a / (scores.a + scores.b)
    assert p.shape == (len(prompts),)
    assert np.isfinite([scores.a, scores.b]).all()
    assert (np.minimum(scores.a, scores.b) > 0).all()
    assert ((p > 0) & (p < 1)).all()
    v = signal_probability(scores.a, scores.b, 8)
    assert ((v >= 0) & (v <= 1)).all()
    assert all(value.isfinite().all() for value in weights(made).values())
    assert all(math.isfinite(value) for value in metrics.values())


# Few letters, so that texts repeat; any other character of Unicode but surrogates that stand alone.
texts = st.text(st.sampled_from("1+=a \n\t\0") | st.characters(exclude_categories=["Cs"]), max_size=30)
labels = st.builds(
    Label,
    prompt=texts,
    label=st.sampled_from(["", "4"]),
    y=st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.125, 0.5]),
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
        take_and_check(made, step, asked)
    assert made.updates == sum(map(bool, steps))


@pytest.mark.parametrize(
    "history",
    [
        {"kappa": "inf", "drift": False, "share": False},
        {"kappa": "inf"},
        {"kappa": 0.01},
        {"kappa": 1e9, "discount": 1e-6},
    ],
    ids=["paper", "inf", "small", "large"],
)
@settings(SETTINGS, max_examples=8)
@given(steps=steps)
def test_they_are_at_the_ends_of_the_settings_as_well(make, history, steps):
    made = make(**history)
    for step in steps:
        take_and_check(made, step, [""])


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
        take_and_check(made, EDGES[name], ["another"])
    assert any(not torch.equal(value, before[key]) for key, value in weights(made).items())


def test_surrogates_that_stand_alone_are_text_like_any_other(make):
    take_and_check(make(), [label(prompt, 0.25) for prompt in ("\ud800", "half \udfff a pair", "1+1=\ud83d")])


bad_rates = st.floats(allow_nan=True).filter(lambda y: not 0 <= y <= 1)


@SETTINGS
@given(
    bad=st.tuples(bad_rates, st.integers(1, 8)) | st.tuples(st.floats(0, 1), st.integers(-1, 0)),
    place=st.integers(0, 3),
)
def test_an_impossible_label_is_refused_and_changes_nothing(make, bad, place):
    made, step = make(), [label(f"{i}+2=") for i in range(3)]
    take_and_check(made, [label(f"{i}+1=", i / 4) for i in range(4)])
    before = made.state_dict()
    step.insert(place, label("9+9=", *bad))
    with pytest.raises(ValueError, match=r"label of '9\+9=': y .* not in \[0, 1\], or n .* < 1"):
        made.judge(step, dropped=1)
    assert_same_state(made.state_dict(), before)
