"""The estimator: exact gradients at any micro-batch size, honest predictions, records, and state.

Most use a tiny random encoder and narrow heads; one learns with the bundled one.
"""

import copy
import functools
import random

import numpy as np
import pytest
import tiny_encoder
import torch
from test_losses import slow_total

from depo_plugin import checkpoint, estimator, metrics
from depo_plugin.checkpoint import CheckpointError
from depo_plugin.config import DepoConfig, EstimatorConfig, HistoryConfig
from depo_plugin.estimator import DifficultyEstimator, EstimatorError
from depo_plugin.filter import Reason, signal_probability
from depo_plugin.history import PromptHistory, prompt_key
from depo_plugin.labels import Label
from depo_plugin.model import DifficultyModel

GROUP = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def make(folder, monkeypatch):
    """make(lr=1e-3, kappa="inf", ...): an estimator of the tiny encoder; settings of both sections by name.

    The trunk is 64 wide, not 1024: the same layers, 100 times fewer weights.
    """
    monkeypatch.setattr(estimator, "DifficultyModel", functools.partial(DifficultyModel, hidden=64))

    def build(seed=0, group_size=GROUP, kappa="fit", discount=0.98, **settings):
        cfg = DepoConfig(
            estimator=EstimatorConfig(**({"model": folder, "updates_per_step": 1, "replay": 0} | settings)),
            history=HistoryConfig(kappa=kappa, discount=discount),
        )
        return DifficultyEstimator(cfg, group_size, seed)

    return build


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


def record_of(label, **fields):
    """What the loader records of one candidate; kept by the rule unless said otherwise."""
    found = {"key": prompt_key(label.prompt, label.label), "p": 0.5, "v": 0.8, "q": 1.0, "keep": True}
    return found | {"reason": Reason.PASSED, "share": 1.0, "datasource": "math"} | fields


def rejected(p, v, name):
    return record_of(group(name, 0), p=p, v=v, keep=False, q=0.1, reason=Reason.REJECTED)


def weights(made):
    return {name: value.clone() for name, value in made.backend.model.state_dict().items()}


def assert_same_weights(mine, theirs):
    assert len(mine) == len(theirs) > 50
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def without_dropout(made):
    for module in made.backend.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    made.backend.model.encoder.config.attention_probs_dropout_prob = 0.0
    for module in made.backend.model.encoder.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
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


# ── Learning ──


def reference_gradients(made, labels):
    """One prompt at a time, no padding, no micro-batches, float64, the loss in plain loops."""
    model = copy.deepcopy(made.backend.model).double().eval()
    s, c = [], []
    for label in labels:
        ids = torch.tensor([made._tokenizer(label.prompt)["input_ids"]])
        tokens = model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        x = model.trunk(tokens.mean(0)[None])
        s.append(model.score_head(x)[0, 0])
        c.append(model.confidence_head(x)[0, 0])
    y, d = [label.y for label in labels], [label.d for label in labels]
    cfg, count = made._cfg, len(labels)

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


@pytest.mark.parametrize("micro_batch_size", [1, 8, 20, 32])
def test_gradients_are_the_whole_batchs_at_any_micro_batch_size(make, micro_batch_size):
    labels = groups(20)
    made = keep_gradients(without_dropout(make(micro_batch_size=micro_batch_size)))
    expected, (total, score, distill, rank) = reference_gradients(made, labels)
    found_metrics = made.observe(labels)
    found = gradients(made)
    assert set(found) == set(expected)
    assert len(found) > 50
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name].double(), gradient, rtol=1e-3, atol=1e-5 * scale, err_msg=name)
    names = ("loss", "loss_score", "loss_distill", "loss_rank")
    assert [found_metrics[name] for name in names] == pytest.approx([total, score, distill, rank], rel=1e-5)


def test_recomputed_activations_draw_the_same_dropout(make, monkeypatch):
    """With dropout on, gradients must be those of the very forward pass that gave the loss."""
    recomputed, plain = (keep_gradients(make(micro_batch_size=8)) for _ in range(2))
    recomputed.observe(groups(20))
    monkeypatch.setattr(estimator, "recompute", lambda function, *inputs, use_reentrant: function(*inputs))
    plain.observe(groups(20))
    assert_same_weights(gradients(recomputed), gradients(plain))


def test_learns_to_tell_easy_from_hard_with_the_bundled_encoder():
    """Sums of 1 to 6 digits, easy below 3 and impossible above: after 8 steps unseen ones are ranked."""

    def draw(rng, count):
        made = []
        for _ in range(count):
            digits = int(rng.integers(1, 7))
            a, b = rng.integers(10 ** (digits - 1), 10**digits, 2)
            made.append(group(f"{a} + {b} =", rng.binomial(GROUP, [0.95, 0.9, 0.6, 0.3, 0.05, 0.0][digits - 1])))
        return made

    rng = np.random.default_rng(0)
    cfg = DepoConfig(estimator=EstimatorConfig(lr=3e-4, updates_per_step=1, replay=64))
    made = DifficultyEstimator(cfg, GROUP, seed=0)
    first = made.score(["1 + 1 =", "999 + 111 ="], ["2", "1110"])
    assert first.a / (first.a + first.b) == pytest.approx(0.5, abs=0.02)
    for _ in range(8):
        made.observe(draw(rng, 16))
    unseen = draw(rng, 48)
    scores = made.score([label.prompt for label in unseen], [label.label for label in unseen])
    p = scores.a / (scores.a + scores.b)
    assert metrics.spearman(p, np.array([label.y for label in unseen])) > 0.6


def test_updates_per_step_are_so_many_optimizer_steps_and_one_update(make):
    made = make(updates_per_step=3)
    made.observe(groups(6))
    assert {int(state["step"]) for state in made.state_dict()["optimizer"].values()} == {3}
    assert made.updates == 1


def test_encoder_and_heads_have_their_own_learning_rates(make):
    """Adam's first step is lr in size wherever there is a gradient: 1e-3 for heads, 0.2 of it for the encoder."""
    made = make(lr=1e-3, encoder_lr_ratio=0.2, weight_decay=0.0)
    before = weights(made)
    made.observe(groups(8))
    after = weights(made)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moved["score_head.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["encoder.encoder.layer.0.attention.self.query.weight"] == pytest.approx(2e-4, rel=0.01)
    made = make(encoder_lr_ratio=0.0)
    before = weights(made)
    made.observe(groups(8))
    assert all(torch.equal(value, weights(made)[name]) for name, value in before.items() if name.startswith("encoder"))


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(make):
    made, exact = make(dtype="bf16"), make()
    for _ in range(3):
        made.observe(groups(8))
        exact.observe(groups(8))
    assert {p.dtype for p in made.backend.model.parameters()} == {torch.float32}
    state = made.state_dict()["optimizer"]
    assert {value.dtype for fields in state.values() for value in fields.values()} == {torch.float32}
    found, expected = (m.score(["12+34=", "5="], ["", ""]).a for m in (made, exact))
    assert found == pytest.approx(expected, rel=0.05)
    assert (found != expected).any()


def test_replay_learns_from_as_many_recent_groups_again(make):
    made, seen = make(replay=6), []
    step = made._step
    made._step = lambda labels: seen.append([label.prompt for label in labels]) or step(labels)
    batches = [groups(4, seed) for seed in range(4)]
    for batch in batches:
        made.observe(batch)
    assert [len(prompts) for prompts in seen] == [4, 8, 8, 8]
    for number in range(1, 4):
        before = [label.prompt for batch in batches[:number] for label in batch][-6:]
        assert seen[number][:4] == [label.prompt for label in batches[number]]
        assert set(seen[number][4:]) <= set(before)
        assert len(set(seen[number])) == 8, "drawn without replacement"


# ── Predictions ──


def test_scores_are_text_and_history_in_one_belief(make):
    """a = κσ + S, b = κ(1 − σ) + N − S, σ from the model itself, by hand."""
    made = make(kappa=6.0, discount=1.0, lr=1e-12)
    made.observe([group("1+1=", 3), group("2+2=", 0), group("1+1=", 4)])
    ids = [made._tokenizer(prompt)["input_ids"] for prompt in ("1+1=", "2+2=", "3+3=")]
    with torch.no_grad():
        sigma = [
            torch.sigmoid(made.backend.model(torch.tensor([one]), torch.ones(1, len(one)))[0]).item() for one in ids
        ]
    found = made.score(["1+1=", "2+2=", "3+3="], ["answer"] * 3)
    assert found.a == pytest.approx([6 * sigma[0] + 7, 6 * sigma[1], 6 * sigma[2]], rel=1e-6)
    assert found.b == pytest.approx([6 * (1 - sigma[0]) + 1, 6 * (1 - sigma[1]) + 4, 6 * (1 - sigma[2])], rel=1e-6)
    assert found.updates == 1
    other_answer = made.score(["1+1="], ["another answer"])
    assert other_answer.a == pytest.approx([6 * sigma[0]], rel=1e-6), "another answer is another prompt"


def test_scores_do_not_depend_on_company_or_order(make):
    made = make(micro_batch_size=3)
    made.observe(groups(8))
    prompts = [label.prompt for label in groups(10, seed=5)] + [""]
    together = made.score(prompts, prompts).a
    alone = np.array([made.score([prompt], [prompt]).a[0] for prompt in prompts])
    backwards = made.score(prompts[::-1], prompts[::-1]).a[::-1]
    assert together == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(backwards, rel=1e-5)
    assert len(made.score([], []).a) == 0


def test_a_long_prompt_is_read_from_its_end(make):
    made = make(max_length=12)
    ends = made.score(["x " * 500 + "12+34=5678", "y " * 90 + "12+34=5678", "x " * 500 + "98+34=5678"], [""] * 3).a
    assert ends[0] == pytest.approx(ends[1], rel=1e-8)
    assert abs(ends[0] - ends[2]) > 1e-6 * ends[0]


def test_what_is_judged_was_predicted_before_learning(make):
    """No decision is on record, so predictions are fresh; the same labels again would be predicted far better."""
    made, twin = make(lr=5e-3, kappa="inf"), make(lr=5e-3, kappa="inf")
    labels = groups(12)
    scores = twin.score([label.prompt for label in labels], [label.label for label in labels])
    p = scores.a / (scores.a + scores.b)
    y = np.array([label.y for label in labels])
    found = made.observe(labels)
    assert found["mae"] == pytest.approx(np.abs(p - y).mean(), abs=1e-7)
    v = signal_probability(scores.a, scores.b, GROUP)
    signal = np.array([label.signal for label in labels])
    assert found["zero_auc"] == pytest.approx(metrics.auc(1 - v, ~signal))


def test_the_decisions_own_prediction_is_judged_where_it_is_on_record(make):
    made = make()
    one, two = group("1+1=", 4), group("2+2=", 1)
    made.record([record_of(one, p=0.9, v=0.3), record_of(two, p=0.25, v=0.7)])
    found = made.observe([two, one])
    assert found["mae"] == pytest.approx((0.1 + 0.0) / 2)
    assert found["pred_mean"] == pytest.approx((0.9 + 0.25) / 2)
    assert found["zero_auc"] == 1.0
    assert found["unmatched"] == 0


def test_history_is_updated_by_the_belief_before_it(make):
    """The estimator's history against one that is fed by hand with the scores of before each step."""
    made = make()
    by_hand = PromptHistory(HistoryConfig())
    labels = groups(6)
    for step in range(4):
        prior = made._prior([label.prompt for label in labels])
        made.observe(labels)
        keys = [prompt_key(label.prompt, label.label) for label in labels]
        by_hand.update(keys, prior, np.array([label.y * GROUP for label in labels]), np.full(6, float(GROUP)), step)
    for name, value in by_hand.state_dict().items():
        np.testing.assert_array_equal(made.state_dict()["history"][name], value)


def test_a_nan_score_is_a_fault_not_a_no(make):
    made = make()
    with torch.no_grad():
        made.backend.model.score_head.bias.fill_(float("nan"))
    with pytest.raises(EstimatorError, match=r"NaN or infinite.*--depo\.estimator\.lr"):
        made.score(["1+1="], [""])
    with pytest.raises(EstimatorError):
        made.observe(groups(4))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nothing_that_is_not_finite_reaches_the_weights(make, fault):
    made = make()
    if fault == "loss":
        with torch.no_grad():
            made.backend.model.confidence_head.bias.fill_(float("nan"))
    else:
        made.backend.model.score_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(made)
    with pytest.raises((EstimatorError, RuntimeError), match=r"is nan|non-finite"):
        made.observe(groups(4))
    assert all(torch.equal(value, weights(made)[name]) or value.isnan().all() for name, value in before.items())
    assert made.updates == 0


def test_very_sure_scores_stay_a_distribution(make):
    made = make(kappa=2.0)
    with torch.no_grad():
        made.backend.model.score_head.bias.fill_(1e4)
    scores = made.score(["1+1="], [""])
    assert scores.b[0] > 0
    assert 0 <= signal_probability(scores.a, scores.b, GROUP)[0] < 1e-4


# ── Edges of observe ──


def test_no_labels_are_counted_and_change_nothing(make):
    made = make()
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
def test_degenerate_steps_are_learned_from(make, labels):
    made = make()
    before = weights(made)
    found = made.observe(labels)
    assert made.updates == 1
    assert all(np.isfinite(value) for value in found.values())
    assert not torch.equal(weights(made)["score_head.bias"], before["score_head.bias"])


def test_an_impossible_label_is_refused_before_anything_is_learned(make):
    made = make()
    for y, n in ((1.5, 4), (float("nan"), 4), (0.5, 0)):
        with pytest.raises(ValueError, match=r"y .* not in \[0, 1\]"):
            made.observe([group("1+1=", 2), Label("2+2=", "", y, 0.5, n, True)])
    assert made.updates == len(made._history) == 0


def test_every_metric_is_a_finite_float_with_a_documented_name(make):
    made = make()
    labels = groups(12)
    made.record([record_of(label, p=i / 12) for i, label in enumerate(labels)] + [rejected(0.1, 0.3, "9")])
    found = made.observe(labels)
    assert set(found) <= set(metrics.NAMES)
    # What others add: the actor and the handle measure time.
    assert set(metrics.NAMES) - set(found) == {"time_update", "time_blocked"}
    assert all(type(value) is float and np.isfinite(value) for value in found.values())
    assert made.metrics() == found


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
    made._learn = lambda labels: {}
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
        result = made.observe(labels)
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


def test_global_random_streams_are_untouched(make):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    grad = torch.is_grad_enabled()
    made = make(replay=8)
    made.score(["1+1="], [""])
    for seed in range(2):
        made.observe(groups(6, seed))
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after
    assert torch.is_grad_enabled() == grad


def test_learning_works_where_the_caller_has_gradients_switched_off(make):
    made, usual = make(), make()
    with torch.no_grad():
        made.observe(groups(6))
    usual.observe(groups(6))
    assert_same_weights(weights(made), weights(usual))


def test_the_same_seed_and_data_give_the_same_weights_bit_for_bit(make):
    def learn(seed, torch_seed):
        torch.manual_seed(torch_seed)
        made = make(seed=seed, micro_batch_size=4)
        for step in range(3):
            made.observe(groups(10, step))
        return weights(made)

    reference = learn(seed=0, torch_seed=1)
    assert_same_weights(reference, learn(seed=0, torch_seed=2))
    other = learn(seed=1, torch_seed=1)
    assert not torch.equal(reference["score_head.weight"], other["score_head.weight"])


def test_dropout_differs_between_updates(make):
    """One stream per update, not one mask for ever: with lr 0 the loss of the same groups moves by dropout alone."""
    made = make(lr=1e-30)
    losses = [made.observe(groups(10))["loss_score"] for _ in range(3)]
    assert len(set(losses)) == 3


def test_a_resumed_estimator_goes_on_bit_for_bit(make, tmp_path):
    """Learns first, saves through the real checkpoint, and then both see the same steps."""

    def step(made, number):
        labels = groups(10, number)
        scores = made.score([label.prompt for label in labels], [label.label for label in labels])
        p, v = scores.a / (scores.a + scores.b), signal_probability(scores.a, scores.b, GROUP)
        made.record(
            [
                record_of(label, p=float(pp), v=float(vv), q=0.5 if i == 0 else 1.0, share=0.9)
                for i, (label, pp, vv) in enumerate(zip(labels, p, v, strict=True))
            ]
        )
        # Three groups stay out until the next step, so that records and all that hangs on them are part of the state.
        late = groups(10, number - 1)[7:] if number else []
        found = made.observe(labels[:7] + late)
        found.pop("time_score")
        return found

    settings = {"replay": 12, "updates_per_step": 2, "micro_batch_size": 4, "discount": 0.9}
    whole = make(seed=3, **settings)
    for number in range(3):
        step(whole, number)
    checkpoint.save(tmp_path / "global_step3", whole.state_dict())
    resumed = make(seed=4, **settings)  # the saved seed counts
    resumed.load_state_dict(checkpoint.load(tmp_path / "global_step3"))
    for number in range(3, 6):
        assert step(whole, number) == step(resumed, number)
    assert_same_weights(weights(whole), weights(resumed))
    asked = [label.prompt for label in groups(10, 5)], ["answer"] * 10
    assert whole.keep_weights(*asked) == resumed.keep_weights(*asked)
    assert whole.keep_weights(*asked)[1].count(0.9) == 3
    for mine, theirs in zip(whole.score(*asked), resumed.score(*asked), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    mine, theirs = whole.state_dict(), resumed.state_dict()
    assert {name: mine[name] for name in ("records", "recent", "counters", "updates", "rng", "unkept")} == {
        name: theirs[name] for name in ("records", "recent", "counters", "updates", "rng", "unkept")
    }


def test_a_state_is_a_copy(make):
    made = make()
    made.observe(groups(6))
    state = made.state_dict()
    kept = copy.deepcopy(state)
    made.record([record_of(group("1=", 1))])
    made.observe(groups(6, 1))
    assert_same_weights(state["model"], kept["model"])
    assert state["records"] == kept["records"]
    assert state["counters"] == kept["counters"]
    name = "score_head.weight"
    assert torch.equal(state["optimizer"][name]["exp_avg"], kept["optimizer"][name]["exp_avg"])


def test_a_state_of_another_estimator_is_refused_by_name(make, tmp_path):
    made = make()
    made.observe(groups(4))
    state = made.state_dict()
    with pytest.raises(CheckpointError, match=r"--rollout\.n_samples_per_prompt was 4, is 8"):
        make(group_size=8).load_state_dict(state)
    other = tiny_encoder.write(tmp_path / "another")
    with pytest.raises(CheckpointError, match=r"--depo\.estimator\.model was encoder\w*, is another"):
        make(model=other).load_state_dict(state)


def test_a_state_that_is_not_whole_is_refused_by_field(make):
    state = make().state_dict()
    state["surprise"] = state.pop("history")
    with pytest.raises(CheckpointError, match=r"missing \['history'\], unexpected \['surprise'\]"):
        make().load_state_dict(state)


def test_a_fresh_estimator_can_be_saved_and_loaded(make, tmp_path):
    """Before its first update the optimizer holds nothing."""
    fresh = make(seed=1)
    checkpoint.save(tmp_path / "global_step0", fresh.state_dict())
    resumed = make(seed=2)
    resumed.load_state_dict(checkpoint.load(tmp_path / "global_step0"))
    for made in (fresh, resumed):
        made.observe(groups(4))
    assert_same_weights(weights(fresh), weights(resumed))
