"""The estimator in both modes: scores, what is judged and learned, and state. Most tests use a tiny random encoder."""

import copy
import dataclasses
import functools
import itertools
import json
import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_encoder
import torch
from outcomes import GROUP, group, groups, record_of, rejected
from tiny_encoder import assert_same_state, weights

from depo_plugin.estimator import checkpoint, embed, metrics
from depo_plugin.estimator.belief import Belief
from depo_plugin.estimator.checkpoint import CheckpointError
from depo_plugin.estimator.text_model import EstimatorError, unit
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label, Reason, prompt_key
from depo_plugin.settings.config import HistoryConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def make(folder, monkeypatch):
    """make(lr=1e-3, kappa="inf", ...): an estimator of the tiny encoder with narrow heads."""
    tiny_encoder.narrow_heads(monkeypatch)
    return functools.partial(tiny_encoder.make_estimator, folder)


@pytest.fixture(params=["frozen", "finetune"])
def either(make, request):
    """make() in one mode, then in the other."""
    return functools.partial(make, mode=request.param)


def heads(made):
    return getattr(made.text.model, "heads", made.text.model)


def score(made, labels):
    return made.score([label.prompt for label in labels], [label.label for label in labels])


def rates(made, labels):
    scores = score(made, labels)
    return scores.a / (scores.a + scores.b)


# ── Scores ──


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "replay"), [("frozen", 64), ("finetune", 0)])
def test_learns_to_tell_easy_from_hard_with_the_bundled_encoder(mode, replay):
    """Sums of 1 to 6 digits, easy below 3 and impossible above: after 8 steps unseen ones are ranked."""
    rng = np.random.default_rng(0)

    def draw(count):
        sizes = rng.integers(1, 7, count)
        prompts = [" + ".join(map(str, rng.integers(10 ** (size - 1), 10**size, 2))) + " =" for size in sizes]
        chances = np.array([0.95, 0.9, 0.6, 0.3, 0.05, 0.0])[sizes - 1]
        return [group(prompt, rng.binomial(GROUP, p)) for prompt, p in zip(prompts, chances, strict=True)]

    made = tiny_encoder.make_estimator(None, mode=mode, lr=3e-4, replay=replay)
    unseen = draw(48)
    assert rates(made, unseen) == pytest.approx(0.5, abs=0.02)
    for _ in range(8):
        made.learn(draw(16))
    assert metrics.spearman(rates(made, unseen), np.array([label.y for label in unseen])) > 0.6


@pytest.mark.parametrize(
    ("history", "steps"),
    [({}, 1), ({}, 0), ({"kappa": "inf", "drift": False, "share": False}, 1), ({"kappa": 6.0, "share": False}, 1)],
    ids=["default", "no optimizer steps", "paper", "no sharing"],
)
def test_scores_are_a_belief_of_what_the_text_says(either, history, steps):
    """Over four updates, against a belief of our own that is told logits, embeddings and groups by hand."""
    made = either(lr=3e-3, updates_per_step=steps, **history)
    width = tiny_encoder.WIDTH if either.keywords["mode"] == "frozen" and not history else 0
    by_hand, before = Belief(HistoryConfig(**history), width), weights(made)
    half = Label("0.5 from each response", "answer", 0.5, 0.5, GROUP, False)  # 2 successes of 4
    other_answer = dataclasses.replace(groups(1)[0], label="another answer is another prompt")
    asked = [*groups(6), half, other_answer, group("an unseen one", 0)]

    def told(labels):
        with torch.no_grad():
            x_BE = made.text.embed([label.prompt for label in labels])
        keys = [prompt_key(label.prompt, label.label) for label in labels]
        return keys, made.text.logits(x_BE), unit(x_BE.numpy())[:, :width]

    for update in range(4):
        labels = [*groups(6)[: 3 + update], *groups(3, seed=update + 1), half]
        successes = np.array([label.y * GROUP for label in labels])
        by_hand.update(*told(labels), successes, np.full(len(labels), float(GROUP)), update)
        made.learn(labels)
        assert made.belief.ability == pytest.approx(by_hand.ability, abs=1e-9)
        found = score(made, asked)
        assert found.updates == update + 1
        np.testing.assert_allclose(found[:2], by_hand.predict(*told(asked), update + 1), rtol=1e-6)
    moved = [name for name, value in weights(made).items() if not torch.equal(value, before[name])]
    assert bool(moved) == ("loss" in made.judge(groups(1)).metrics) == bool(steps)


def test_a_nan_score_is_a_fault_not_a_no(either):
    made = either()
    with torch.no_grad():
        heads(made).score_head.bias.fill_(float("nan"))
    for call in (lambda labels: score(made, labels), made.judge, made.learn):
        with pytest.raises(EstimatorError, match=r"NaN or infinite.*--depo\.estimator\.lr"):
            call(groups(4))


# ── What is judged ──


def test_a_group_is_judged_by_the_prediction_its_decision_was_made_by_or_by_a_new_one(either):
    made = either()
    made.learn(groups(6))
    one, two, lost = group("1+1=", 4), group("2+2=", 1), group("3+3=", 0)
    (p,), v = rates(made, [lost]), signal_probability(*score(made, [lost])[:2], GROUP)
    made.record([record_of(one, p=0.9, v=0.3), record_of(two, p=0.25, v=0.99)])
    found, lines = made.judge([two, lost, one])
    assert found["mae"] == pytest.approx((0.1 + 0.0 + p) / 3)
    assert found["pred_mean"] == pytest.approx((0.9 + 0.25 + p) / 3)
    assert v < 0.99
    assert found["zero_auc"] == 1.0, "both groups without a signal had a V below 0.99"
    assert (found["kept"], found["unmatched"]) == (2, 1)
    assert [(line["p"], line["v"]) for line in lines] == [
        (0.25, 0.99),
        (pytest.approx(p, rel=1e-5), pytest.approx(float(v[0]), rel=1e-5)),
        (0.9, 0.3),
    ]


def test_each_group_has_a_line_of_plain_values_with_its_text_once(make):
    """One passed, one explored without a score, one not on record, and one that dynamic filtering threw away."""
    made, source = make(), {"datasource": "a/b"}
    one = dataclasses.replace(group("1+1=", 4), tokens=120)
    two, lost, thrown = group("2+2=", 1), group("3+3=", 0), group("4+4=", 2, d=None)
    made.record([record_of(one, p=0.123456789, v=1 / 3, q=2e-7 / 3, reason=Reason.EXPLORED, **source)])
    made.record([record_of(two, p=None, v=None, reason=Reason.UNSCORED), record_of(thrown, p=0.5, v=0.75)])
    first = made.judge([one, two, one, lost], rejected=[thrown]).groups
    text = {"prompt": "1+1=", "label": "answer"}
    mine = {"y": 1.0, "n": 4, "signal": False, "tokens": 120}
    told = {"key": f"{one.key:016x}", "source": "a_b", "p": 0.123457, "v": 0.333333, "q": 6.66667e-08}
    assert first[0] == told | {"reason": "explored"} | mine | text
    assert list(first[0]) == "key source p v q reason y n signal tokens prompt label".split()
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    lines = {line["key"]: line for line in first[1:]}
    fresh = score(made, [two, lost])
    p_B, v_B = fresh.a / (fresh.a + fresh.b), signal_probability(fresh.a, fresh.b, GROUP)
    for label, p, v, reason, origin in zip([two, lost], p_B, v_B, ["unscored", None], ["math", None], strict=True):
        line = lines[f"{label.key:016x}"]
        assert (line["p"], line["v"]) == (pytest.approx(p, rel=1e-5), pytest.approx(v, rel=1e-5))
        assert (line["q"], line["reason"], line["source"], line["tokens"]) == (1.0, reason, origin, None)
    assert (first[2]["key"], first[2]["reason"], "prompt" in first[2]) == (first[0]["key"], None, False)
    assert list(first[4]) == "key source p v q reason y n signal tokens rejected prompt label".split()
    assert (first[4]["rejected"], first[4]["y"], first[4]["p"]) == (True, 0.5, 0.5)
    assert not any("rejected" in line for line in first[:4])
    again = made.judge([one, group("5+5=", 2)]).groups
    assert [line.get("prompt") for line in again] == [None, "5+5="]
    resumed = make()
    resumed.load_state_dict(made.state_dict())
    assert resumed.judge([one]).groups[0]["prompt"] == "1+1=", "another process writes the text anew"


def test_judging_changes_no_belief_and_no_weight(either):
    """An estimator that judges two steps before it learns from the first comes to the state of one that does not."""
    late, usual = either(replay=8), either(replay=8)
    for step in range(2):
        judged = usual.judge(groups(6, step)).metrics
        assert ("loss" in judged) == (step > 0), "losses are those of the last learning"
        assert judged["updates"] == step
        usual.learn(groups(6, step))
        late.judge(groups(6, step))
    for step in range(2):
        late.learn(groups(6, step))
    assert_same_state(late.state_dict(), usual.state_dict())


def test_steps_without_labels_are_counted_and_change_nothing_else(either):
    made = either()
    before, (found, lines) = made.state_dict(), made.judge([], dropped=3)
    made.learn([])
    assert (found["empty_steps"], found["labels_dropped"], lines) == (1, 3, [])
    assert "loss" not in found
    assert_same_state(made.state_dict() | {"totals": before["totals"]}, before)


def test_every_metric_is_a_finite_float_with_a_documented_name(either):
    made, labels = either(), groups(12)
    made.learn(groups(4, 1))
    made.score([f"{i} + {i} =" for i in range(20)], [""] * 20)  # enough to measure the encoder's speed
    kept = [record_of(label, p=i / 12) for i, label in enumerate(labels)]
    made.record([rejected(0.1, 0.3, "9", datasource="code"), *kept])
    made.score(["1+1="], [""])
    found = made.judge(labels).metrics
    assert all(type(value) is float and np.isfinite(value) for value in found.values())
    assert found["time_score"] > 0
    names = {f"{name.split('/')[0]}/SOURCE" if "/" in name else name for name in found}
    assert names <= set(metrics.NAMES)
    elsewhere = {name for name in metrics.NAMES if name.startswith("shadow")}  # of shadow mode
    elsewhere |= {"time_update", "time_blocked", "time_step"}  # the actor, the handle and the hooks measure these
    elsewhere |= {"read_rate"} if made._cfg.estimator.mode == "finetune" else set()
    assert set(metrics.NAMES) - names == elsewhere
    # Groups that dynamic filtering threw away have no d: they are learned from, not trained on.
    trained = [label for label in labels if label.d is not None]
    assert found["distinct"] == len(trained) < 12
    assert made.judge(trained[:2]).metrics["distinct"] == len(trained), "each prompt counts once"


# ── What is learned ──


def test_steps_learn_from_new_and_recent_groups_each_with_the_ability_of_its_time(either):
    """Groups are told apart by their d. Of older ones the last six are drawn from, without replacement."""
    made, seen, abilities = either(replay=6, updates_per_step=2), [], {}
    step = made.text.step
    made.text.step = lambda x_BE, targets, number: seen.append((targets, number)) or step(x_BE, targets, number)
    for update in range(4):
        recent, new = sorted(abilities)[-6:], [10 * update + i for i in range(1, 5)]
        made.learn([group(f"{one}+1=", 4 * (update % 2), d=one / 100) for one in new])
        abilities |= dict.fromkeys(new, made.belief.ability)
        assert [number for _, number in seen] == [2 * update, 2 * update + 1]
        for targets, _ in seen:
            learned = (targets.d * 100).round().int().tolist()
            assert learned[:4] == new
            assert set(learned[4:]) <= set(recent)
            assert len(set(learned)) == len(learned) == (8 if update else 4)
            assert targets.y.tolist() == [one // 10 % 2 for one in learned]
            shifts = [made.belief.narrowed(abilities[one]) for one in learned]
            assert targets.shift.tolist() == pytest.approx(shifts, abs=1e-6)
        seen.clear()
    assert len(set(abilities.values())) == made.updates == 4


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nothing_that_is_not_finite_reaches_the_weights(either, fault):
    made = either()
    if fault == "loss":
        with torch.no_grad():
            heads(made).confidence_head.bias.fill_(float("nan"))
    else:
        heads(made).score_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(made)
    with pytest.raises((EstimatorError, RuntimeError), match=r"is nan|non-finite"):
        made.learn(groups(4))
    assert_same_state(weights(made), before)
    assert made.updates == 1, "the belief has learned from them"
    assert not any(module.training for module in heads(made).modules()), "no dropout in the next score"


def test_dropout_is_in_no_score_and_no_judgement(either):
    """Only the heads train, and only in optimizer steps, which have gradients; the encoder's dropout never acts."""
    made, seen, encoder = either(), [], []
    heads(made).trunk[-1].register_forward_hook(
        lambda m, given, out: seen.append((torch.is_grad_enabled(), m.training))
    )
    for module in made.text._encoder.modules():
        module.register_forward_hook(lambda module, given, out: encoder.append(module.training))
    score(made, groups(2))  # before the first step
    made.judge(groups(6))
    made.learn(groups(6))
    score(made, groups(2))
    assert seen == [(False, False)] * 3 + [(True, True), (False, False)]
    assert len(encoder) > 10
    assert not any(encoder)


def test_a_frozen_encoder_reads_each_text_once_and_a_trained_one_once_a_step(make, monkeypatch, tmp_path):
    read, tokenize = [], embed.tokenize
    monkeypatch.setattr(embed, "tokenize", lambda t, prompts, n: read.extend(prompts) or tokenize(t, prompts, n))
    made = make(mode="frozen", replay=16, cache_dir=tmp_path)
    for seed in (0, 1, 0):
        score(made, groups(10, seed) + groups(2, seed))
        made.judge(groups(10, seed))
        made.learn(groups(10, seed))
    score(make(mode="frozen", cache_dir=tmp_path), groups(10))  # as a later process
    assert sorted(read) == sorted(label.prompt for seed in (0, 1) for label in groups(10, seed))
    assert not any(name.startswith("encoder") for name in weights(made))
    for steps in (1, 2):
        read.clear()
        make(updates_per_step=steps).learn(groups(12))
        assert len(read) == 12 * steps, "the belief and the first step share one pass"


# ── Chance and state ──


def test_the_callers_random_streams_are_untouched_and_the_seed_counts(either):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before, made = states(), [either(seed=seed, replay=8) for seed in range(2)]
    for one, step in itertools.product(made, range(2)):
        score(one, groups(6, step))
        one.judge(groups(6, step))
        one.learn(groups(6, step))
    assert states() == before
    assert not torch.equal(*(heads(one).score_head.weight for one in made))


def live(made, numbers):
    """Score, decide, judge and learn, step by step; return the metrics. Three groups of each step come back with the
    next one, so that decisions on record are part of the state."""
    found = []
    for number in numbers:
        labels = groups(10, number)
        scores = score(made, labels)
        p_B, v_B = scores.a / (scores.a + scores.b), signal_probability(scores.a, scores.b, GROUP)
        decided = zip(labels, p_B.tolist(), v_B.tolist(), "abcabcabca", strict=True)
        made.record([record_of(label, p=p, v=v, q=0.5, share=0.9, datasource=name) for label, p, v, name in decided])
        back = labels[:7] + (groups(10, number - 1)[7:] if number else [])
        found.append(made.judge(back, dropped=2).metrics | {"time_score": 0.0})
        made.learn(back)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("saved_after", "dtype"), [(0, "fp32"), (2, "bf16")])
def test_a_resumed_estimator_goes_on_bit_for_bit(either, tmp_path, saved_after, dtype):
    """Through the real checkpoint, and from the state itself, which is a copy; whatever the caller's gradient switch
    and random streams are. In mode frozen with the embeddings that were on disk then: computed anew, beside other
    prompts, they could differ in a last bit.
    """
    made = functools.partial(either, replay=12, updates_per_step=2, micro_batch_tokens=100, discount=0.9, dtype=dtype)
    whole = made(seed=3, cache_dir=tmp_path / "cache")
    live(whole, range(saved_after))
    state, later = whole.state_dict(), range(saved_after, saved_after + 2)
    untouched = copy.deepcopy(state)
    checkpoint.save(tmp_path / "tag", state)
    for copied in ("0", "1"):
        if (tmp_path / "cache").exists():
            shutil.copytree(tmp_path / "cache", tmp_path / copied)
    expected = live(whole, later)
    for copied, saved in (("0", checkpoint.load(tmp_path / "tag")), ("1", state)):
        torch.manual_seed(int(copied))
        resumed = made(seed=4, cache_dir=tmp_path / copied)  # the saved seed counts
        resumed.load_state_dict(saved)
        assert_same_state(resumed.state_dict(), untouched)
        with torch.set_grad_enabled(copied == "0"):
            assert live(resumed, later) == expected
        assert_same_state(resumed.state_dict(), whole.state_dict())
    assert_same_state(state, untouched)
    assert expected[-1]["labels_dropped"] == 2 * (saved_after + 2), "the total goes on"


def test_a_state_of_another_estimator_is_refused_by_name(make, tmp_path):
    state = make().state_dict()
    for other, difference in (
        ({"group_size": 8}, r"--rollout\.n_samples_per_prompt was 4, is 8"),
        ({"model": tiny_encoder.write(tmp_path / "another")}, r"--depo\.estimator\.model was encoder\w*, is another"),
        ({"mode": "frozen"}, r"--depo\.estimator\.mode was finetune, is frozen"),
        ({"depth": 1.0}, r"layers \(--depo\.estimator\.depth\) was 1, is 2"),
    ):
        with pytest.raises(CheckpointError, match=difference):
            make(**other).load_state_dict(state)


def test_groups_count_also_if_an_optimizer_step_fails(make, monkeypatch):
    """The belief has learned from them: the warm-up goes on, and evidence ages."""
    made = make()
    monkeypatch.setattr(made.text, "step", Mock(side_effect=RuntimeError("out of memory")))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            made.learn([Label("1 + 1 =", "2", 0.5, 0.5, 4, True, None)])
    assert made.updates == 3


def test_a_belief_with_other_text_features_is_refused_with_the_reason(make):
    """As by another --depo.history.share: a warning alone would lose all that was learned, without a word."""
    state = make().state_dict()
    state["belief"] |= {"information": np.eye(3), "vector": np.zeros(3)}
    with pytest.raises(
        CheckpointError, match=r"does not fit: belief: it was learned with 1 text features.*history.share"
    ):
        make().load_state_dict(state)


def test_frozen_heads_are_refused_by_a_folder_of_the_same_name_with_other_weights(make, folder, tmp_path):
    """Frozen weights are not in the state: heads and belief would go on with embeddings that they never saw."""
    state = make(mode="frozen").state_dict()
    other = tiny_encoder.write(tmp_path / Path(folder).name, seed=1)
    with pytest.raises(CheckpointError, match=r"the digest of the encoder's weights was \w{16}, is \w{16}"):
        make(mode="frozen", model=other).load_state_dict(state)


def test_a_state_that_is_not_whole_is_refused_by_field(make):
    made = make()
    before = made.state_dict()
    for name, part in (("belief", None), ("dtype", "text"), ("plan", "ledger")):
        state = copy.deepcopy(before)
        fields = state if part is None else state[part]
        fields["surprise"] = fields.pop(name)
        with pytest.raises(CheckpointError, match=rf"missing \['{name}'\], unexpected \['surprise'\]"):
            made.load_state_dict(state)
    assert_same_state(made.state_dict(), before)
