"""Token batches, what is kept for the backward pass, and the precision that is chosen; one tiny random encoder."""

import numpy as np
import pytest
import tiny_encoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import slow_total
from torch.nn import functional as F

from depo_plugin.estimator import embed, estimator
from depo_plugin.estimator.checkpoint import CheckpointError
from depo_plugin.estimator.encoder import load_encoder
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.heads import DifficultyModel
from depo_plugin.messages import Label
from depo_plugin.settings.config import DepoConfig, EstimatorConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def make(folder, monkeypatch):
    """make(dtype="fp32", ...): an estimator that trains the tiny encoder, with narrow heads and no dropout."""

    def narrow(encoder):
        model = DifficultyModel(encoder, hidden=64)
        model.heads.trunk[-1].p = 0.0
        return model

    monkeypatch.setattr(estimator, "DifficultyModel", narrow)

    def build(**given):
        given = {
            "model": folder,
            "mode": "finetune",
            "dtype": "fp32",
            "updates_per_step": 1,
            "replay": 0,
            "depth": 1.0,
        } | given
        return DifficultyEstimator(DepoConfig(estimator=EstimatorConfig(**given)), 4, seed=0)

    return build


def labels(count):
    """Prompts of 3 to 100 tokens with all pass rates of groups of 4."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("0123456789+"), rng.integers(1, 99))) for _ in range(count)]
    return [Label(text, "x", i % 5 / 4, 0.4, 4, 0 < i % 5 < 4) for i, text in enumerate(texts)]


def scores(made, groups):
    return made.score([one.prompt for one in groups], [one.label for one in groups]).a


def gradients(made, groups):
    """The gradients of one update, and its losses."""
    found = {}
    step = made.backend.optimizer.step

    def keep_then_step():
        named = made.backend.model.named_parameters()
        found.update({name: one.grad.clone() for name, one in named if one.grad is not None})
        return step()

    made.backend._max_norm = float("inf")
    made.backend.optimizer.step = keep_then_step
    return made.observe(groups), found


# ── Micro-batches ──


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 3000))
def test_micro_batches_hold_each_prompt_once_within_the_budget_and_with_little_padding(lengths, tokens):
    ids = [[0] * length for length in lengths]
    batches = embed.micro_batches(ids, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest, shortest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        assert len(batch) * longest <= tokens or len(batch) == 1
        assert longest <= 1.125 * shortest + 8


def test_like_lengths_share_a_micro_batch_and_a_long_prompt_has_its_own():
    lengths = [30, 700, 10, 31, 11, 10]
    batches = embed.micro_batches([[0] * length for length in lengths], 62)
    assert [batch.tolist() for batch in batches] == [[2, 5, 4], [0, 3], [1]]
    assert embed.micro_batches([], 62) == []


def test_little_is_padding_where_there_are_many_prompts():
    """512 prompts of 20 to 500 tokens: batches of 16 in order of arrival compute 1.8 tokens for each that is one."""
    lengths = np.random.default_rng(0).integers(20, 501, 512)
    batches = embed.micro_batches([[0] * length for length in lengths], 1024)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    arrival = sum(16 * lengths[start : start + 16].max() for start in range(0, 512, 16))
    assert padded < 1.03 * lengths.sum()
    assert arrival > 1.7 * lengths.sum()


# ── The same numbers however they are computed ──


@pytest.mark.parametrize("tokens", [1, 100, 300, 10**6])
def test_scores_are_those_of_one_prompt_at_a_time(make, tokens):
    made, groups = make(micro_batch_tokens=tokens), labels(24)
    alone = [scores(made, [one])[0] for one in groups]
    assert scores(made, groups) == pytest.approx(np.array(alone), rel=1e-5)


@pytest.mark.parametrize("kept", [0, 10**6, 1 << 40])
@pytest.mark.parametrize("tokens", [1, 300, 10**6])
def test_the_whole_batchs_gradient_at_any_budget_kept_or_recomputed(make, monkeypatch, tokens, kept):
    """Against one pass over all prompts; the ranking loss against pairs in plain Python."""
    groups, recomputed = labels(20), []
    monkeypatch.setattr(embed, "KEPT_BYTES", 1 << 40)
    _, expected = gradients(make(micro_batch_tokens=10**6), groups)
    again = estimator.RECOMPUTED
    monkeypatch.setattr(estimator, "RECOMPUTED", lambda *inputs: recomputed.append(len(inputs[1])) or again(*inputs))
    monkeypatch.setattr(embed, "KEPT_BYTES", kept)
    made = make(micro_batch_tokens=tokens)
    with torch.no_grad():
        s, c = made._heads(made._encode([one.prompt for one in groups]))
    metrics, found = gradients(made, groups)
    assert len(found) > 50
    scale = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5 * scale, err_msg=name)
    s = made._belief.narrowed(made._belief.ability) + s
    slow = slow_total(s.tolist(), c.tolist(), [one.y for one in groups], [one.d for one in groups], made._cfg)
    names = ("loss", "loss_score", "loss_distill", "loss_rank")
    assert [metrics[name] for name in names] == pytest.approx(slow, rel=1e-4)
    if kept == 1 << 40:
        assert recomputed == []
    elif kept == 0:
        assert sum(recomputed) == 20
    elif tokens < 10**6:
        assert 0 < sum(recomputed) < 20, "as much as fits is kept"


def test_gradients_of_several_micro_batches_are_summed_in_fp32():
    """256 + 1 is 257, which bf16 does not have: a weight cast once for both would be given 256."""
    weight = torch.ones(1, 1, requires_grad=True)
    with embed.autocast(CPU, "bf16"):
        parts = [F.linear(torch.tensor([[x]]), weight) for x in (256.0, 1.0)]
    assert parts[0].dtype == torch.bfloat16
    sum(part.float() for part in parts).backward()
    assert weight.grad.item() == 257.0


def test_an_update_of_one_step_runs_the_encoder_once_per_prompt(make, monkeypatch):
    """What the belief reads and what the step learns from is one pass; a second step needs a second one."""
    rows, whole = [], embed.embed
    monkeypatch.setattr(embed, "embed", lambda *inputs: rows.append(len(inputs[1])) or whole(*inputs))
    make().learn(labels(12))
    assert sum(rows) == 12
    rows.clear()
    make(updates_per_step=2).learn(labels(12))
    assert sum(rows) == 24


def test_the_same_data_gives_the_same_weights(make):
    one, two = (make(dtype="bf16", replay=8) for _ in range(2))
    for made in (one, two):
        made.observe(labels(12))
        made.observe(labels(16))
    for a, b in zip(one.backend.model.parameters(), two.backend.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ── Precision ──


def test_auto_takes_the_clearly_faster_one(folder, monkeypatch):
    encoder, _ = load_encoder(folder)
    for fp32, bf16, expected in (
        (1.0, 0.5, "bf16"),
        (1.0, 3.0, "fp32"),
        (1.0, 0.9, "fp32"),
        (1.0, float("inf"), "fp32"),
    ):
        seconds = {"fp32": [9.0, fp32, 9.0], "bf16": [9.0, bf16, 9.0]}  # the fastest of three counts
        monkeypatch.setattr(embed, "probe_seconds", lambda *inputs, seconds=seconds: seconds[inputs[-1]].pop())
        assert embed.fastest_dtype(encoder, CPU, 128) == expected


def test_the_probe_is_short_and_takes_no_failure_for_speed(folder, monkeypatch):
    encoder, _ = load_encoder(folder)
    before = torch.get_rng_state()
    assert 0 < embed.probe_seconds(encoder, CPU, 128, "bf16") < 1
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(embed, "embed", lambda *inputs: torch.full((1, 2), float("nan")))
    assert embed.probe_seconds(encoder, CPU, 128, "bf16") == float("inf")
    monkeypatch.setattr(embed, "embed", lambda *inputs: torch.zeros(2) @ torch.zeros(3))
    assert embed.probe_seconds(encoder, CPU, 128, "bf16") == float("inf")
    assert embed.fastest_dtype(encoder, CPU, 128) == "fp32", "where nothing works"
    asked = []
    monkeypatch.setattr(embed, "probe_seconds", lambda *inputs: asked.append(inputs[-1]) or 1.0)
    monkeypatch.setattr(embed, "PROBE_SECONDS", -1.0)
    assert embed.fastest_dtype(encoder, CPU, 128) == "fp32", "a draw"
    assert asked == ["fp32", "bf16"], "one round where the time is up"


def test_the_precision_that_was_chosen_is_kept_over_a_resume(make, monkeypatch):
    monkeypatch.setattr(embed, "fastest_dtype", lambda *inputs: "bf16")
    first = make(dtype="auto")
    first.observe(labels(8))
    monkeypatch.setattr(embed, "fastest_dtype", lambda *inputs: "fp32")
    resumed, exact = make(dtype="auto"), make(dtype="fp32")
    fresh = scores(resumed, labels(6))
    assert (fresh == scores(exact, labels(6))).all()
    for made in (resumed, exact):
        made.load_state_dict(first.state_dict())
    assert (scores(resumed, labels(6)) == scores(first, labels(6))).all()
    assert resumed.state_dict()["dtype"] == "bf16"
    assert exact.state_dict()["dtype"] == "fp32", "what a launch asks for wins"
    state = first.state_dict()
    del state["dtype"]
    with pytest.raises(CheckpointError, match="dtype"):
        resumed.load_state_dict(state)


def test_bf16_computes_the_encoder_in_bf16_and_the_rest_in_fp32(make):
    made, exact, groups = make(dtype="bf16"), make(), labels(6)
    seen = {}
    layer = made._encoder.encoder.layer[0]
    layer.intermediate.dense.register_forward_hook(lambda module, given, out: seen.update(linear=out.dtype))
    made._heads.trunk[0].register_forward_hook(lambda module, given, out: seen.update(heads=out.dtype))
    found, expected = scores(made, groups), scores(exact, groups)
    assert seen == {"linear": torch.bfloat16, "heads": torch.float32}
    assert found == pytest.approx(expected, rel=0.02)
    assert (found != expected).any()


def test_attention_is_in_fp32_under_autocast():
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16), embed.Fp32Attention():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
