"""The estimator: exact gradients, honest predictions, records, and state, in both modes.

Most use a tiny random encoder and narrow heads; two learn with the bundled one.
"""

import copy
import dataclasses
import functools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_encoder
import torch
from test_losses import slow_total
from tiny_encoder import assert_same_state, assert_same_weights, weights

from depo_plugin.estimator import checkpoint, embed, estimator, metrics
from depo_plugin.estimator.belief import Belief, spread_of
from depo_plugin.estimator.checkpoint import CheckpointError
from depo_plugin.estimator.encoder import load_encoder
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.heads import DifficultyHeads, DifficultyModel
from depo_plugin.estimator.text_model import EstimatorError
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label, Reason, prompt_key
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, HistoryConfig

GROUP = 4
MODES = ("frozen", "finetune")
HISTORY = ("kappa", "discount", "drift", "share")
TEXT_ONLY = {"kappa": "inf", "drift": False, "share": False}  # the belief is σ(s), the ability stays 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def make(folder, monkeypatch):
    """make(lr=1e-3, kappa="inf", ...): an estimator of the tiny encoder; settings of both sections by name.

    The trunk is 64 wide, not 1024: the same layers, 100 times fewer weights.
    """
    for part in (DifficultyHeads, DifficultyModel):
        monkeypatch.setattr(estimator, part.__name__, functools.partial(part, hidden=64))

    def build(seed=0, group_size=GROUP, cache_dir=None, **settings):
        fixed = {"mode": "finetune", "model": folder, "dtype": "fp32", "updates_per_step": 1, "replay": 0}
        history = {name: settings.pop(name) for name in HISTORY if name in settings}
        cfg = DepoConfig(estimator=EstimatorConfig(**(fixed | settings)), history=HistoryConfig(**history))
        return DifficultyEstimator(cfg, group_size, seed, cache_dir=cache_dir)

    return build


@pytest.fixture(params=MODES)
def either(make, request):
    """make() in one mode, then in the other."""
    return functools.partial(make, mode=request.param)


def group(prompt, successes, d=0.5, n=GROUP):
    return Label(prompt, "answer", successes / n, d, n, 0 < successes < n)


def groups(count, seed=0):
    """Groups of prompts of 1 to 40 characters whose pass rate falls with their length."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(1, 40))
        prompt = "".join(rng.choice(list("0123456789+"), length)) + f"={seed}{i}"
        d = None if rng.random() < 0.2 else float(rng.uniform(0.1, 0.9))
        made.append(group(prompt, int(rng.binomial(GROUP, 1 - length / 40)), d))
    return made


def score(made, labels):
    return made.score([label.prompt for label in labels], [label.label for label in labels])


def rates(made, labels):
    scores = score(made, labels)
    return scores.a / (scores.a + scores.b)


def record_of(label, **fields):
    """What the loader records of one candidate; kept by the rule unless said otherwise."""
    found = {"key": prompt_key(label.prompt, label.label), "p": 0.5, "v": 0.8, "q": 1.0, "keep": True}
    return found | {"reason": Reason.PASSED, "share": 1.0, "datasource": "math"} | fields


def rejected(p, v, name, **fields):
    return record_of(group(name, 0), p=p, v=v, keep=False, q=0.1, reason=Reason.REJECTED, **fields)


def heads(made):
    model = made.backend.model
    return model if isinstance(model, DifficultyHeads) else model.heads


def without_dropout(made):
    for module in made.backend.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


def keep_gradients(made):
    """Let step() compute gradients and leave weights as they are."""

    def step(loss):
        made.backend.model.zero_grad()
        loss.backward()
        return 0.0

    made.backend.step = step
    return made


def gradients(made):
    return {name: p.grad.clone() for name, p in made.backend.model.named_parameters() if p.grad is not None}


# ── The reference: one prompt at a time, no padding, no micro-batches ──


def embeddings(encoder, tokenizer, prompts):
    """The mean of each prompt's last hidden states, as a list of (E,)."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        found.append(encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0))
    return found


def frozen_embeddings(folder, prompts):
    """Unit embeddings, (B, E), as the cache holds them: rounded to fp16."""
    encoder, tokenizer = load_encoder(folder, EstimatorConfig().depth)
    with torch.no_grad():
        rows = torch.stack(embeddings(encoder.eval(), tokenizer, prompts)).half().double()
    return rows / rows.norm(dim=1, keepdim=True)


def read_by_hand(made, folder, prompts):
    """Score logits and embeddings (none in mode finetune) of prompts, from the weights as they are."""
    with torch.no_grad():
        if made.backend.model is heads(made):
            unit = frozen_embeddings(folder, prompts)
            s_B = copy.deepcopy(heads(made)).double().eval()(unit * unit.shape[1] ** 0.5)[0]
            return s_B.numpy(), unit.numpy()
        model = copy.deepcopy(made.backend.model).eval()
        rows = torch.stack(embeddings(model.encoder, load_encoder(folder)[1], prompts))
        return model.heads(rows)[0].double().numpy(), np.empty((len(prompts), 0))


def reference_gradients(made, folder, labels, cfg, shift=0.0):
    """The loss in plain loops and its gradients, in float64. shift: what is added to the score logits."""
    model = copy.deepcopy(made.backend.model).double().eval()
    prompts = [label.prompt for label in labels]
    if isinstance(model, DifficultyHeads):
        rows, read = list(frozen_embeddings(folder, prompts) * tiny_encoder.WIDTH**0.5), model
    else:
        rows, read = embeddings(model.encoder, load_encoder(folder)[1], prompts), model.heads
    s, c = [], []
    for row in rows:
        x = read.trunk(row[None])
        s.append(read.score_head(x)[0, 0] + shift)
        c.append(read.confidence_head(x)[0, 0])
    y, d, count = [label.y for label in labels], [label.d for label in labels], len(labels)

    def bce(logit, target):
        return torch.nn.functional.softplus(logit) - target * logit

    total = sum(bce(a, b) for a, b in zip(s, y, strict=True)) / count
    known = [bce(a, b) for a, b in zip(c, d, strict=True) if b is not None]
    pairs = [(i, j) for i in range(count) for j in range(count) if y[i] - y[j] > cfg.rank_delta]
    assert known
    assert len(pairs) > count
    total = total + cfg.w_distill * sum(known) / len(known)
    rank = sum(torch.relu(cfg.rank_margin - (s[i] - s[j])) for i, j in pairs) / len(pairs)
    (total + cfg.w_rank * rank).backward()
    slow = slow_total([v.item() for v in s], [v.item() for v in c], y, d, cfg)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, slow


# ── Learning ──


def test_gradients_are_those_of_the_whole_batch(either, folder):
    labels = groups(20)
    made = keep_gradients(without_dropout(either(micro_batch_tokens=100, **TEXT_ONLY)))
    expected, (total, *parts) = reference_gradients(made, folder, labels, EstimatorConfig())
    found_metrics = made.observe(labels)
    found = gradients(made)
    assert set(found) == set(expected)
    assert len(found) >= 20
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    # A frozen embedding may be rounded to fp16 to the other side: 5e-4 of one of its 32 numbers.
    tolerance = {"rtol": 1e-3, "atol": 1e-5 * scale} if len(found) > 50 else {"rtol": 5e-3, "atol": 1e-3 * scale}
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name].double(), gradient, **tolerance, err_msg=name)
    assert found_metrics["loss"] == pytest.approx(total, rel=1e-4)
    assert [found_metrics[f"loss_{name}"] for name in ("score", "distill", "rank")] == pytest.approx(parts, rel=1e-4)


def test_the_model_learns_what_is_left_without_the_ability(either, folder):
    """Its logit is of a prompt at ability 0: the loss is of s + θ/√(1 + πτ²/8), τ² and θ being the belief's."""
    labels = [group(label.prompt, max(0, round(label.y * GROUP) - 1)) for label in groups(20)]
    made = keep_gradients(without_dropout(either()))
    kappa, ability = (made.observe(labels)[name] for name in ("kappa", "ability"))
    assert ability < -0.3
    shift = ability / np.sqrt(1 + np.pi * spread_of(kappa) / 8)
    expected, slow = reference_gradients(made, folder, labels, EstimatorConfig(), shift)
    found = gradients(made)
    assert made.metrics()["loss_score"] == pytest.approx(slow[1], rel=1e-4)
    name = next(name for name in expected if name.endswith("score_head.weight"))
    np.testing.assert_allclose(found[name].double(), expected[name], rtol=0.01, atol=1e-5)


def test_old_groups_are_learned_with_the_ability_of_then(either, monkeypatch):
    """The score logits that go into the loss, less the model's own, are one shift for each step's groups."""
    made, shifts = either(replay=64, lr=1e-30), {}
    without_dropout(made)

    def spy(s_B, c_B, y_B, d_B, cfg):
        shifts.update({round(d, 4): s for d, s in zip(d_B.tolist(), s_B.tolist(), strict=True)})
        return found(s_B, c_B, y_B, d_B, cfg)

    found = estimator.losses
    monkeypatch.setattr(estimator, "losses", spy)
    batches, abilities = [], []
    for step in range(3):
        batch = [group(f"{step}{i}+1=", 4 if step else 0, d=0.1 * step + 0.01 * i + 0.05) for i in range(8)]
        abilities.append(made.observe(batch)["ability"])
        batches.append(batch)
    assert len(shifts) == 24
    assert abilities[0] < abilities[1] < abilities[2]
    # Weights near zero: logits are within 0.03 of 0, so that what is left is the shift.
    means = [np.mean([shifts[round(label.d, 4)] for label in batch]) for batch in batches]
    kappa = made.metrics()["kappa"]
    expected = np.array(abilities) / np.sqrt(1 + np.pi * spread_of(kappa) / 8)
    assert means == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("mode", MODES)
def test_learns_to_tell_easy_from_hard_with_the_bundled_encoder(mode):
    """Sums of 1 to 6 digits, easy below 3 and impossible above: after 8 steps unseen ones are ranked."""

    def draw(rng, count):
        made = []
        for _ in range(count):
            digits = int(rng.integers(1, 7))
            a, b = rng.integers(10 ** (digits - 1), 10**digits, 2)
            made.append(group(f"{a} + {b} =", rng.binomial(GROUP, [0.95, 0.9, 0.6, 0.3, 0.05, 0.0][digits - 1])))
        return made

    rng = np.random.default_rng(0)
    replay = 64 if mode == "frozen" else 0
    cfg = DepoConfig(estimator=EstimatorConfig(mode=mode, dtype="fp32", lr=3e-4, updates_per_step=1, replay=replay))
    made = DifficultyEstimator(cfg, GROUP, seed=0)
    first = [group("1 + 1 =", 0), group("999 + 111 =", 0)]
    assert rates(made, first) == pytest.approx(0.5, abs=0.02)
    for _ in range(8):
        made.observe(draw(rng, 16))
    unseen = draw(rng, 48)
    assert metrics.spearman(rates(made, unseen), np.array([label.y for label in unseen])) > 0.6


def test_updates_per_step_are_so_many_optimizer_steps_and_one_update(either):
    made = either(updates_per_step=3)
    made.observe(groups(6))
    assert {int(state["step"]) for state in made.state_dict()["optimizer"].values()} == {3}
    assert made.updates == 1


def test_without_optimizer_steps_the_belief_alone_learns(either):
    made = either(updates_per_step=0)
    before, untouched = rates(made, [group("1+1=", 0), group("2+2=", 0)]), weights(made)
    found = made.observe([group("1+1=", 4)])
    assert_same_weights(weights(made), untouched)
    assert "loss" not in found
    assert rates(made, [group("1+1=", 0)])[0] > before[0] + 0.1


def test_encoder_and_heads_have_their_own_learning_rates(make):
    """Adam's first step is lr in size wherever there is a gradient: 1e-3 for heads, 0.2 of it for the encoder."""
    made = make(lr=1e-3, encoder_lr_ratio=0.2, weight_decay=0.0)
    before = weights(made)
    made.observe(groups(8))
    after = weights(made)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moved["heads.score_head.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["encoder.encoder.layer.0.attention.self.query.weight"] == pytest.approx(2e-4, rel=0.01)
    made = make(encoder_lr_ratio=0.0)
    before = weights(made)
    made.observe(groups(8))
    assert all(torch.equal(value, weights(made)[name]) for name, value in before.items() if name.startswith("encoder"))


def test_a_frozen_encoder_reads_each_text_once_and_is_not_trained(make, monkeypatch, tmp_path):
    read = []
    tokenize = embed.tokenize
    monkeypatch.setattr(embed, "tokenize", lambda t, prompts, n: read.extend(prompts) or tokenize(t, prompts, n))
    made = make(mode="frozen", replay=16, cache_dir=tmp_path)
    assert not any(name.startswith("encoder") for name in made.state_dict()["model"])
    for seed in (0, 1, 0):
        score(made, groups(10, seed) + groups(2, seed))
        made.observe(groups(10, seed))
    expected = [label.prompt for seed in (0, 1) for label in groups(10, seed)]
    assert sorted(read) == sorted(expected)
    again = make(mode="frozen", seed=1, cache_dir=tmp_path)
    np.testing.assert_array_equal(score(again, groups(10)).a, score(make(mode="frozen", seed=1), groups(10)).a)
    assert sorted(read) == sorted(expected + expected[:10]), "the second found them, the third has no folder"


def test_the_cache_is_one_for_each_encoder_and_length(make, tmp_path):
    """Scores from a folder that others use, too, are those of the estimator alone."""
    other = tiny_encoder.write(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    settings = [{}, {"model": other}, {"max_length": 12}, {"depth": 1.0}]
    for one in settings:
        shared = make(mode="frozen", cache_dir=cache, **one)
        np.testing.assert_array_equal(score(shared, groups(6)).a, score(make(mode="frozen", **one), groups(6)).a)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 4


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(either):
    made, exact = either(dtype="bf16"), either()
    for _ in range(3):
        made.observe(groups(8))
        exact.observe(groups(8))
    assert {p.dtype for p in made.backend.model.parameters()} == {torch.float32}
    state = made.state_dict()["optimizer"]
    assert {value.dtype for fields in state.values() for value in fields.values()} == {torch.float32}
    asked = [group("12+34=", 0), group("5=", 0)]
    assert rates(made, asked) == pytest.approx(rates(exact, asked), rel=0.05)
    assert (rates(made, asked) != rates(exact, asked)).any()


def test_replay_learns_from_as_many_recent_groups_again(either, monkeypatch):
    """Groups are told apart by their d: those of step k are k.xx."""
    seen, found = [], estimator.losses
    monkeypatch.setattr(estimator, "losses", lambda *a: seen.append((a[3] * 100).round().int().tolist()) or found(*a))
    made = either(replay=6)
    for step in range(4):
        made.observe([group(f"{step}{i}=", 2, d=(10 * step + i + 1) / 100) for i in range(4)])
    assert [len(one) for one in seen] == [4, 8, 8, 8]
    for step in range(1, 4):
        recent = [10 * k + i + 1 for k in range(step) for i in range(4)][-6:]
        assert seen[step][:4] == [10 * step + i + 1 for i in range(4)]
        assert set(seen[step][4:]) <= set(recent)
        assert len(set(seen[step])) == 8, "drawn without replacement"


# ── Predictions ──


@pytest.mark.parametrize(
    "history", [{}, TEXT_ONLY, {"kappa": 6.0, "share": False}], ids=["default", "paper", "no text"]
)
def test_scores_are_a_belief_of_what_the_model_says(either, folder, history):
    """Over four steps of learning, against a belief of our own that is told by hand what the model says."""
    made = either(lr=3e-3, **history)
    cfg = HistoryConfig(**history)
    width = tiny_encoder.WIDTH if either.keywords["mode"] == "frozen" and cfg.share else 0
    by_hand = Belief(cfg, width)
    asked = [*groups(6), group("an unseen one", 0)]

    def told(labels):
        s_B, unit = read_by_hand(made, folder, [label.prompt for label in labels])
        return [prompt_key(label.prompt, label.label) for label in labels], s_B, unit[:, :width]

    for step in range(4):
        labels = groups(6)[: 3 + step] + groups(3, seed=step + 1)
        counts = np.array([label.y * GROUP for label in labels]), np.full(len(labels), float(GROUP))
        by_hand.update(*told(labels), *counts, step)
        made.observe(labels)
        assert made.metrics()["ability"] == pytest.approx(by_hand.ability, abs=1e-3)
        found = score(made, asked)
        assert found.updates == step + 1
        a, b = by_hand.predict(*told(asked), step + 1)
        assert found.a == pytest.approx(a, rel=5e-3)
        assert found.b == pytest.approx(b, rel=5e-3)


def test_another_answer_is_another_prompt(either):
    made = either(share=False, drift=False)
    made.observe([group("1+1=", 4)])
    p = [rates(made, [Label("1+1=", answer, 0, None, GROUP, False)])[0] for answer in ("answer", "another")]
    assert p[0] > 0.6 > p[1]


def test_scores_do_not_depend_on_company_or_order(either):
    made, alone = either(micro_batch_tokens=40), either()
    for one in (made, alone):
        one.observe(groups(8))
    asked = [*groups(10, seed=5), group("", 0)]
    together = score(made, asked).a
    assert together == pytest.approx(np.array([score(alone, [one]).a[0] for one in asked]), rel=2e-3)
    assert together == pytest.approx(score(made, asked[::-1]).a[::-1], rel=1e-5)
    assert len(made.score([], []).a) == 0


def test_a_long_prompt_is_read_from_its_end(either):
    made = either(max_length=12)
    ends = made.score(["x " * 500 + "12+34=5678", "y " * 90 + "12+34=5678", "x " * 500 + "98+34=5678"], [""] * 3).a
    assert ends[0] == pytest.approx(ends[1], rel=1e-8)
    assert abs(ends[0] - ends[2]) > 1e-6 * ends[0]


def test_what_is_judged_was_predicted_before_learning(either):
    """No decision is on record, so predictions are fresh; the same labels again would be predicted far better."""
    made, twin = either(lr=5e-3), either(lr=5e-3)
    labels = groups(12)
    scores, p = score(twin, labels), rates(twin, labels)
    y = np.array([label.y for label in labels])
    found = made.observe(labels)
    assert found["mae"] == pytest.approx(np.abs(p - y).mean(), abs=1e-6)
    v = signal_probability(scores.a, scores.b, GROUP)
    signal = np.array([label.signal for label in labels])
    assert found["zero_auc"] == pytest.approx(metrics.auc(1 - v, ~signal))
    assert np.abs(rates(made, labels) - y).mean() < 0.7 * found["mae"]


def test_the_decisions_own_prediction_is_judged_where_it_is_on_record(make):
    made = make()
    one, two = group("1+1=", 4), group("2+2=", 1)
    made.record([record_of(one, p=0.9, v=0.3), record_of(two, p=0.25, v=0.7)])
    found = made.observe([two, one])
    assert found["mae"] == pytest.approx((0.1 + 0.0) / 2)
    assert found["pred_mean"] == pytest.approx((0.9 + 0.25) / 2)
    assert found["zero_auc"] == 1.0
    assert found["unmatched"] == 0


def test_rewards_between_0_and_1_count_as_fractional_successes(either):
    """What is told of a group is y · n of n; signal is for the metrics alone. A prompt that gets 0.5 from every
    response gives no gradient, yet it is believed as useful as one with as many right as wrong.
    """
    made, other = either(), either()
    halves = Label("1+1=", "answer", 0.5, 0.5, GROUP, False)
    partial = [Label(label.prompt, label.label, label.y * 0.7 + 0.1, label.d, GROUP, True) for label in groups(6)]
    first = made.observe([halves, *partial])
    second = other.observe([group("1+1=", 2), *partial])
    assert first["effective_ratio"] == pytest.approx(6 / 7)
    assert second["effective_ratio"] == 1.0
    found, expected = (score(one, [halves]) for one in (made, other))
    np.testing.assert_array_equal(np.r_[found[:2]], np.r_[expected[:2]])
    assert signal_probability(found.a, found.b, GROUP)[0] > 0.6
    assert (rates(made, partial)[np.argsort([label.y for label in partial])[[0, -1]]] != 0.5).all()


def test_a_nan_score_is_a_fault_not_a_no(either):
    made = either()
    with torch.no_grad():
        heads(made).score_head.bias.fill_(float("nan"))
    with pytest.raises(EstimatorError, match=r"NaN or infinite.*--depo\.estimator\.lr"):
        made.score(["1+1="], [""])
    with pytest.raises(EstimatorError):
        made.observe(groups(4))


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
        made.observe(groups(4))
    assert all(torch.equal(value, weights(made)[name]) or value.isnan().all() for name, value in before.items())
    assert made.updates == 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_very_sure_scores_stay_a_distribution(either, sign):
    for share in (False, True):
        made = either(kappa=2.0, share=share)
        with torch.no_grad():
            heads(made).score_head.bias.fill_(sign * 1e4)
        scores = made.score(["1+1="], [""])
        assert min(scores.a[0], scores.b[0]) > 0
        assert 0 <= signal_probability(scores.a, scores.b, GROUP)[0] < (1 if share else 1e-4)


# ── Judging and learning ──


def test_observe_is_judge_and_then_learn(either):
    whole, apart = either(replay=8), either(replay=8)
    for step in range(3):
        found = whole.observe(groups(6, step))
        judged = apart.judge(groups(6, step))
        apart.learn(groups(6, step))
        assert judged["mae"] == found["mae"]
        assert judged["updates"] == step == found["updates"] - 1
        assert ("loss" in judged) == (step > 0), "losses are those of the last learning"
    assert_same_state(whole.state_dict(), apart.state_dict())


def test_judging_changes_no_belief_and_no_weight(either):
    made = either()
    made.observe(groups(6))
    before = made.state_dict()
    scores = score(made, groups(6, 1))
    made.judge(groups(6, 1))
    after = made.state_dict()
    for name in ("model", "optimizer", "belief", "recent", "updates", "losses"):
        assert_same_state(after[name], before[name])
    np.testing.assert_array_equal(score(made, groups(6, 1)).a, scores.a)


def test_what_is_learned_late_is_the_same(either):
    """Two steps are judged before the first one is learned, as where the learning is behind the policy's training."""
    late, usual = either(), either()
    late.judge(groups(6))
    late.judge(groups(6, 1))
    late.learn(groups(6))
    late.learn(groups(6, 1))
    for step in range(2):
        usual.observe(groups(6, step))
    for name in ("model", "optimizer", "belief", "updates"):
        assert_same_state(late.state_dict()[name], usual.state_dict()[name])


# ── Edges of observe ──


def test_no_labels_are_counted_and_change_nothing(either):
    made = either()
    before = weights(made)
    found = made.observe([])
    assert found["empty_steps"] == 1
    assert made.updates == 0
    assert_same_weights(weights(made), before)
    assert "loss" not in found


@pytest.mark.parametrize(
    "labels",
    [
        [group("1+1=", 2)],
        [group("1+1=", 0), group("2+2=", 0), group("3+3=", 0)],
        [group("1+1=", 1, d=None), group("2+2=", 3, d=None)],
        [group("", 1), group("", 1)],
        [group("1+1=", 1, n=1)],
    ],
    ids=["one", "all equal", "no confidences", "empty prompt twice", "group of one"],
)
def test_degenerate_steps_are_learned_from(either, labels):
    made = either(drift=False)
    before = heads(made).score_head.weight.detach().clone()
    found = made.observe(labels)
    assert made.updates == 1
    assert all(np.isfinite(value) for value in found.values())
    assert not torch.equal(heads(made).score_head.weight, before)


def test_an_impossible_label_is_refused_before_anything_is_learned(either):
    made = either()
    before = made.state_dict()
    for y, n in ((1.5, 4), (-0.1, 4), (float("nan"), 4), (0.5, 0)):
        with pytest.raises(ValueError, match=r"y .* not in \[0, 1\]"):
            made.observe([group("1+1=", 2), Label("2+2=", "", y, 0.5, n, True)])
    assert_same_state(made.state_dict(), before)


def test_every_metric_is_a_finite_float_with_a_documented_name(either):
    made = either()
    labels = groups(12)
    made.record([record_of(label, p=i / 12) for i, label in enumerate(labels)])
    made.record([rejected(0.1, 0.3, "9", datasource="code")])
    made.score(["1+1="], [""])
    found = made.observe(labels)
    names = {f"{name.split('/')[0]}/SOURCE" if "/" in name else name for name in found}
    assert names <= set(metrics.NAMES)
    # What others add: the actor and the handle measure time.
    assert set(metrics.NAMES) - names == {"time_update", "time_blocked"}
    assert all(type(value) is float and np.isfinite(value) for value in found.values())
    assert made.metrics() == found
    assert found["time_score"] > 0


# ── Records ──


def test_weights_of_kept_prompts_are_those_of_their_decisions(make):
    made = make()
    explored = record_of(group("1+1=", 0), q=0.05, share=0.4, reason=Reason.EXPLORED)
    made.record([explored, record_of(group("2+2=", 0), share=0.4), rejected(0.1, 0.2, "5+5=")])
    made.record([record_of(group("1+1=", 0), share=0.7)])
    ask = (["2+2=", "1+1=", "never", "1+1=", "1+1=", "5+5="], ["answer"] * 6)
    expected = ([1.0, 0.05, 1.0, 1.0, 1.0, 1.0], [0.4, 0.4, 1.0, 0.7, 1.0, 1.0])
    assert made.keep_weights(*ask) == expected
    assert made.keep_weights(*ask) == expected, "asking takes nothing off the record"
    made.observe([group("1+1=", 2)])
    assert made.keep_weights(["1+1=", "1+1="], ["answer"] * 2) == ([1.0, 1.0], [0.7, 1.0]), "oldest first"


def test_the_unfiltered_stream_by_hand(make):
    """Six scanned: two pass, one explored (ε = 0.1), one forced, two rejected. p̂ sums to 2.6, V to 3.1.

    reward = (2.6 + (1 − 0.8) + (0.25 − 0.5) + (0 − 0.1)/0.1) / 6, without the forced one (outside the claim).
    r₀ = (3.1 + (0 − 0.6) + (1 − 0.9) + (0 − 0.3)/0.1) / 6, signals being 0, 1, 0 (explored) and 1 (forced).
    """
    easy, middle, never, forced = group("1=", 4), group("2=", 1), group("3=", 0), group("4=", 2)
    made = make()
    made.record(
        [
            record_of(easy, p=0.8, v=0.6),
            record_of(middle, p=0.5, v=0.9),
            record_of(never, p=0.1, v=0.3, q=0.1, reason=Reason.EXPLORED),
            record_of(forced, p=0.9, v=0.5, reason=Reason.FORCED),
            rejected(0.2, 0.5, "5="),
            rejected(0.1, 0.3, "6="),
        ]
    )
    found = made.observe([forced, easy, never, middle])
    counts = {name: found[name] for name in ("scanned", "kept", "explored", "forced", "unscored", "unmatched")}
    assert counts == {"scanned": 6, "kept": 4, "explored": 1, "forced": 1, "unscored": 0, "unmatched": 0}
    assert found["keep_rate"] == pytest.approx(4 / 6)
    assert found["effective_ratio"] == 0.5
    assert found["reward_unfiltered"] == pytest.approx((2.6 + 0.2 - 0.25 - 1.0) / 6)
    rate = (3.1 - 0.6 + 0.1 - 3.0) / 6
    assert rate < 0.01  # below what may divide
    assert found["effective_gain"] == pytest.approx(0.5 / 0.01)
    assert found["rollouts_saved"] == pytest.approx(GROUP * (2 / 0.01 - 4))


def test_the_unfiltered_effective_ratio_fades_over_steps(make):
    """Step 1: V sums to 1.2 over 2, both kept, signals 1 and 0: 1.2 + 0.4 − 0.6 = 1 over 2. Step 2: V = 0.9 and a
    signal over 4 with three rejected of 0.1: 0.3 + 0.9 + 0.1 = 1.3. r₀ = (0.9·1 + 1.3) / (0.9·2 + 4)."""
    made = make()
    one, two, three = group("1=", 1), group("2=", 4), group("3=", 2)
    made.record([record_of(one, v=0.6), record_of(two, v=0.6)])
    first = made.observe([one, two])
    assert first["effective_gain"] == pytest.approx(0.5 / 0.5)
    assert first["rollouts_saved"] == pytest.approx(0.0)
    made.record([record_of(three, v=0.9), *(rejected(0.1, 0.1, str(i)) for i in range(3))])
    second = made.observe([three])
    rate = (0.9 * 1 + 1.3) / (0.9 * 2 + 4)
    assert second["effective_gain"] == pytest.approx(1 / rate)
    assert second["rollouts_saved"] == pytest.approx(GROUP * (1 / rate - 1))


def test_reward_unfiltered_is_unbiased_over_many_streams(make):
    """A rule that keeps p̂ ≥ 0.5 and explores the rest with ε = 0.25, under predictions that are plainly wrong."""
    made = make()
    rng = np.random.default_rng(0)
    found, plain, truth = [], [], 0.3
    for step in range(300):
        records, labels = [], []
        for i in range(24):
            p_true = rng.choice([0.0, 0.6])  # mean 0.3
            p = 0.7 if p_true else rng.choice([0.2, 0.6])
            label = group(f"{step}.{i}", int(rng.binomial(GROUP, p_true)))
            passed, lucky = bool(p >= 0.5), bool(rng.random() < 0.25)
            reason = Reason.PASSED if passed else Reason.EXPLORED if lucky else Reason.REJECTED
            records.append(record_of(label, p=p, q=1.0 if passed else 0.25, keep=passed or lucky, reason=reason))
            labels += [label] * (passed or lucky)
        made.record(records)
        result = made.judge(labels)
        found.append(result["reward_unfiltered"])
        plain.append(result["target_mean"])
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(truth, abs=3 * error)
    assert error < 0.01
    assert np.mean(plain) > truth + 0.05, "the filtered reward is another number"


def test_batches_planned_ahead_are_counted_when_their_groups_come_back(make):
    """Asynchronous: two plans before the first observe; each step reports its own plan, the third none."""
    made = make()
    first, second = [group(f"{i}=", 2) for i in range(2)], [group(f"{i}+=", 2) for i in range(2)]
    made.record([*map(record_of, first), rejected(0.1, 0.1, "x")])
    made.record([*map(record_of, second), rejected(0.1, 0.1, "y"), rejected(0.1, 0.1, "z")])
    assert made.observe(first)["scanned"] == pytest.approx(3)
    assert made.observe(second)["scanned"] == pytest.approx(4)
    left = made.observe([group("not planned", 2)])
    assert "scanned" not in left
    assert "reward_unfiltered" not in left
    assert left["unmatched"] == 1


def test_a_batch_that_comes_back_in_two_steps_is_spread_over_them(make):
    """Dynamic filtering holds groups over: 4 kept of 6 scanned, 3 come back now and 1 later: 4.5 and 1.5."""
    made = make()
    labels = [group(f"{i}=", 2) for i in range(4)]
    made.record([*map(record_of, labels), rejected(0.1, 0.1, "x"), rejected(0.1, 0.1, "y")])
    assert made.observe(labels[:3])["scanned"] == pytest.approx(4.5)
    assert made.observe(labels[3:])["scanned"] == pytest.approx(1.5)


def test_a_plan_that_kept_nothing_is_counted_with_the_next(make):
    made = make()
    made.record([rejected(0.1, 0.1, str(i)) for i in range(5)])
    label = group("1=", 2)
    made.record([record_of(label)])
    assert made.observe([label])["scanned"] == 6


def test_unscored_candidates_count_with_their_outcome(make):
    """No prediction, kept with q = 1: p̂ + (y − p̂)/q is y whatever p̂; the metrics take a fresh one."""
    made = make()
    one, two = group("1=", 4), group("2=", 1)
    made.record([record_of(label, p=None, v=None, reason=Reason.UNSCORED) for label in (one, two)])
    found = made.observe([one, two])
    assert found["reward_unfiltered"] == pytest.approx((1.0 + 0.25) / 2)
    assert found["unscored"] == 2
    assert found["pred_mean"] == pytest.approx(0.5, abs=0.02)


def test_data_sources_are_told_apart_by_hand(make):
    """Two of math kept and one rejected, one of code kept and two rejected; the counts are of one step, then 0."""
    made = make()
    one, two, three = group("1=", 4), group("2=", 1), group("3=", 2)
    made.record([record_of(one), record_of(two), rejected(0.1, 0.1, "x")])
    assert "kept/math" not in made.judge([one]), "one source alone: nothing to tell apart"
    made.record([record_of(three, datasource="a/b"), *(rejected(0.1, 0.1, i, datasource="a/b") for i in "yz")])
    found = made.judge([two, three])
    sources = {name: value for name, value in found.items() if "/" in name}
    assert sources == {
        "kept/math": 2.0,
        "rejected/math": 1.0,
        "kept/a_b": 1.0,
        "rejected/a_b": 2.0,
        "pass_rate/math": 0.25,
        "pass_rate/a_b": 0.5,
    }
    found = made.judge([group("4=", 1)])
    counts = {name: value for name, value in sources.items() if not name.startswith("pass_rate")}
    assert {name: value for name, value in found.items() if "/" in name} == dict.fromkeys(counts, 0.0)


def test_thousands_of_data_sources_are_not_thousands_of_metrics(make):
    made = make()
    made.record([rejected(0.1, 0.1, f"{i}=", datasource=f"source {i}") for i in range(1000)])
    found = made.judge([group("1=", 1)])
    counts = [value for name, value in found.items() if name.startswith("rejected/")]
    assert len(counts) == estimator.SOURCES + 1
    assert sum(counts) == 1000
    assert found["rejected/others"] == 1000 - estimator.SOURCES


def test_prompts_that_never_come_back_are_given_up(make):
    made = make()
    for i in range(300):
        made.record([record_of(group(f"{i}=", 0)), *(rejected(0.1, 0.1, f"{i}.{j}") for j in range(8))])
    assert len(made.state_dict()["records"]) == estimator.FORGET_AFTER


def test_distinct_counts_trained_prompts_once_and_rejected_groups_never(make):
    """Groups that dynamic filtering threw away arrive without d: learned from, not trained on."""
    made = make()
    assert made.observe([group("1=", 2), group("2=", 2), group("3=", 4, d=None)])["distinct"] == 2
    assert made.observe([group("1=", 2), group("3=", 2)])["distinct"] == 3


# ── Chance and state ──


def test_global_random_streams_are_untouched(either):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    grad = torch.is_grad_enabled()
    made = either(replay=8)
    made.score(["1+1="], [""])
    for seed in range(2):
        made.observe(groups(6, seed))
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after
    assert torch.is_grad_enabled() == grad


def test_learning_works_where_the_caller_has_gradients_switched_off(either):
    made, usual = either(updates_per_step=2), either(updates_per_step=2)
    with torch.no_grad():
        made.observe(groups(6))
    usual.observe(groups(6))
    assert_same_weights(weights(made), weights(usual))


def test_the_same_seed_and_data_give_the_same_state_bit_for_bit(either):
    def learn(seed, torch_seed):
        torch.manual_seed(torch_seed)
        made = either(seed=seed, micro_batch_tokens=100, replay=8, updates_per_step=2)
        for step in range(3):
            score(made, groups(10, step))
            made.observe(groups(10, step))
        return made

    reference = learn(seed=0, torch_seed=1)
    assert_same_state(learn(seed=0, torch_seed=2).state_dict(), reference.state_dict())
    other = learn(seed=1, torch_seed=1)
    assert not torch.equal(heads(reference).score_head.weight, heads(other).score_head.weight)


def test_dropout_differs_between_updates(either):
    """One stream per update, not one mask for ever: with lr 0 the loss of the same groups moves by dropout alone."""
    made = either(lr=1e-30, **TEXT_ONLY)
    losses = [made.observe(groups(10))["loss_score"] for _ in range(3)]
    assert len(set(losses)) == 3
    made = without_dropout(either(lr=1e-30, **TEXT_ONLY))
    losses = [made.observe(groups(10))["loss_score"] for _ in range(3)]
    assert len(set(losses)) == 1


def plan_and_observe(made, number):
    """One step: score, decide, judge, learn. Three groups stay out until the next one, so that records and all that
    hangs on them are part of the state."""
    labels = groups(10, number)
    scores = score(made, labels)
    p, v = scores.a / (scores.a + scores.b), signal_probability(scores.a, scores.b, GROUP)
    made.record(
        [
            record_of(label, p=float(pp), v=float(vv), q=0.5 if i == 0 else 1.0, share=0.9, datasource="abc"[i % 3])
            for i, (label, pp, vv) in enumerate(zip(labels, p, v, strict=True))
        ]
    )
    late = groups(10, number - 1)[7:] if number else []
    found = made.observe(labels[:7] + late)
    found.pop("time_score")
    return found


def test_a_resumed_estimator_goes_on_bit_for_bit(either, tmp_path):
    """Learns first, saves through the real checkpoint, and then both see the same steps.

    In mode frozen with the embeddings that were on disk then: computed anew, beside other prompts, they could differ
    in a last bit.
    """
    settings = {"replay": 12, "updates_per_step": 2, "micro_batch_tokens": 100, "discount": 0.9}
    whole = either(seed=3, cache_dir=tmp_path / "cache", **settings)
    for number in range(3):
        plan_and_observe(whole, number)
    checkpoint.save(tmp_path / "global_step3", whole.state_dict())
    if (tmp_path / "cache").exists():
        shutil.copytree(tmp_path / "cache", tmp_path / "as it was")
    resumed = either(seed=4, cache_dir=tmp_path / "as it was", **settings)  # the saved seed counts
    resumed.load_state_dict(checkpoint.load(tmp_path / "global_step3"))
    assert_same_state(resumed.state_dict(), whole.state_dict())
    for number in range(3, 6):
        assert plan_and_observe(whole, number) == plan_and_observe(resumed, number)
    asked = groups(10, 5)
    names = [label.prompt for label in asked], [label.label for label in asked]
    assert whole.keep_weights(*names) == resumed.keep_weights(*names)
    assert whole.keep_weights(*names)[1].count(0.9) == 3
    for mine, theirs in zip(score(whole, asked), score(resumed, asked), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert_same_state(whole.state_dict(), resumed.state_dict())


def test_a_state_is_a_copy(either):
    made = either(replay=8)
    for number in range(2):
        plan_and_observe(made, number)
    state = made.state_dict()
    kept = copy.deepcopy(state)
    plan_and_observe(made, 2)
    assert_same_state(state, kept)
    again = either(replay=8)
    again.load_state_dict(state)
    plan_and_observe(again, 2)
    assert_same_state(state, kept)
    assert_same_weights(weights(again), weights(made))


def test_a_state_of_another_estimator_is_refused_by_name(make, tmp_path):
    made = make()
    made.observe(groups(4))
    state = made.state_dict()
    with pytest.raises(CheckpointError, match=r"--rollout\.n_samples_per_prompt was 4, is 8"):
        make(group_size=8).load_state_dict(state)
    other = tiny_encoder.write(tmp_path / "another")
    with pytest.raises(CheckpointError, match=r"--depo\.estimator\.model was encoder\w*, is another"):
        make(model=other).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"--depo\.estimator\.mode was finetune, is frozen"):
        make(mode="frozen").load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"layers \(--depo\.estimator\.depth\) was 1, is 2"):
        make(depth=1.0).load_state_dict(state)


def test_frozen_heads_are_refused_by_a_folder_of_the_same_name_with_other_weights(make, folder, tmp_path):
    """Frozen weights are not in the state: heads and belief would go on with embeddings that they never saw."""
    state = make(mode="frozen").state_dict()
    other = tiny_encoder.write(tmp_path / Path(folder).name, seed=1)
    with pytest.raises(CheckpointError, match=r"the digest of the encoder's weights was \w{16}, is \w{16}"):
        make(mode="frozen", model=other).load_state_dict(state)


def test_a_state_that_shared_evidence_is_refused_where_it_is_not_shared(make):
    state = make(mode="frozen").state_dict()
    with pytest.raises((CheckpointError, ValueError), match=r"--depo\.history\.share"):
        make(mode="frozen", share=False).load_state_dict(state)


def test_a_state_that_is_not_whole_is_refused_by_field(either):
    state = either().state_dict()
    state["surprise"] = state.pop("belief")
    with pytest.raises(CheckpointError, match=r"missing \['belief'\], unexpected \['surprise'\]"):
        either().load_state_dict(state)


def test_a_fresh_estimator_can_be_saved_and_loaded(either, tmp_path):
    """Before its first update the optimizer holds nothing."""
    fresh = either(seed=1)
    checkpoint.save(tmp_path / "global_step0", fresh.state_dict())
    resumed = either(seed=2)
    resumed.load_state_dict(checkpoint.load(tmp_path / "global_step0"))
    for made in (fresh, resumed):
        made.observe(groups(4))
    assert_same_weights(weights(fresh), weights(resumed))


# ── Groups that come back as others ──


def said(caplog):
    return [record.getMessage() for record in caplog.records if "came back with another" in record.getMessage()]


def sent(label):
    return record_of(label, text=(label.prompt, label.label))


def test_groups_that_come_back_as_others_are_said_once(make, caplog):
    """An agent that adds a hint to each prompt: no group finds its decision, and one pair shows it."""
    made = make()
    made._warmup_steps = 2
    for step in range(6):
        given = [group(f"{step}+{i}=", 4) for i in range(4)]
        made.record(list(map(sent, given)))
        made.observe([dataclasses.replace(label, prompt=label.prompt + " Hint!") for label in given])
        assert len(said(caplog)) == (step >= 2), "after the warm-up"
    (told,) = said(caplog)
    assert told.startswith("DEPO: 4 of 4 groups came back with another prompt or label than they were sent with")
    assert "Sent, for example: prompt ...'0+0=', label '" in told
    assert "Came back: prompt ...'2+0= Hint!', label '" in told
    assert "the agent, the reward function" in told


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_groups_that_are_found_or_lost_by_chance_are_not_said(lost, make, caplog):
    """Up to half of the groups without a decision, as after an answer that came too late."""
    made = make()
    made._warmup_steps = 2
    for step in range(6):
        given = [group(f"{step}+{i}=", 4) for i in range(4)]
        made.record(list(map(sent, given[lost:])))
        made.observe(given)
    assert said(caplog) == []


def test_after_a_restart_lost_decisions_are_no_fault_of_the_prompts(make, caplog):
    """Three batches were on their way when the estimator died; their groups come back beside new decisions."""
    made = make()
    made._warmup_steps = 2
    made.updates, made.watch_unmatched = 10, False  # as the actor makes it
    batches = [[group(f"{step}+{i}=", 4) for i in range(4)] for step in range(8)]
    for step, batch in enumerate(batches):
        if step + 3 < len(batches):
            made.record(list(map(sent, batches[step + 3])))
        made.observe(batch)
    assert said(caplog) == []
    for step in range(8, 12):
        given = [group(f"{step}+{i}=", 4) for i in range(4)]
        made.record(list(map(sent, given)))
        made.observe([dataclasses.replace(label, label="another") for label in given])
    assert len(said(caplog)) == 1, "it is on again once groups were found"
