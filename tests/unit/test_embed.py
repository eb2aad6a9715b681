"""Token batches, what is kept for the backward pass, and the precision that is computed in."""

import functools

import numpy as np
import pytest
import tiny_encoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from depo_plugin.estimator import backends, embed, text_model
from depo_plugin.estimator.text_model import Targets

CPU = torch.device("cpu")
COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def make(folder, monkeypatch):
    """make(dtype="fp32", ...): a text model of the whole tiny encoder, with narrow heads."""
    tiny_encoder.narrow_heads(monkeypatch)
    return functools.partial(tiny_encoder.make_text_model, folder, depth=1.0)


@pytest.fixture(params=["frozen", "finetune"])
def either(make, request):
    """make() in one mode, then in the other."""
    return functools.partial(make, mode=request.param)


RNG = np.random.default_rng(0)
PROMPTS = ["".join(RNG.choice(list("0123456789+"), RNG.integers(1, 99))) for _ in range(COUNT)]  # of 3 to 100 tokens
TARGETS = Targets(torch.arange(COUNT) % 5 / 4, torch.full((COUNT,), 0.4), torch.zeros(COUNT))


def step(made, number=0):
    """Return the step's losses, and its gradients by name."""
    found = made.step(made.embed(PROMPTS), TARGETS, number)
    return found, {name: one.grad.clone() for name, one in made.model.named_parameters() if one.grad is not None}


def read(made):
    with torch.no_grad():
        return made.embed(PROMPTS)


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
    batches = embed.micro_batches([[0] * length for length in (30, 700, 10, 31, 11, 10)], 62)
    assert [batch.tolist() for batch in batches] == [[2, 5, 4], [0, 3], [1]]
    assert embed.micro_batches([], 62) == []


def test_little_is_padding_if_there_are_many_prompts():
    """512 prompts of 20 to 500 tokens: batches of 16 in order of arrival compute 1.8 tokens for each that is one."""
    lengths = np.random.default_rng(0).integers(20, 501, 512)
    batches = embed.micro_batches([[0] * length for length in lengths], 1024)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    arrival = sum(16 * lengths[start : start + 16].max() for start in range(0, 512, 16))
    assert padded < 1.03 * lengths.sum()
    assert arrival > 1.7 * lengths.sum()


@pytest.mark.parametrize("kept", [0, 10**6, 1 << 40])
@pytest.mark.parametrize("tokens", [1, 300, 10**6])
def test_the_whole_batchs_gradient_at_any_budget_kept_or_recomputed(make, monkeypatch, tokens, kept):
    """Against one pass over all prompts, whose gradient test_text_model.py compares with loops in float64."""
    monkeypatch.setattr(backends, "MAX_NORM", float("inf"))
    monkeypatch.setattr(embed, "KEPT_BYTES", {"cpu": 1 << 40})
    losses, expected = step(make(micro_batch_tokens=10**6))
    again, recomputed = text_model.RECOMPUTED, []
    monkeypatch.setattr(text_model, "RECOMPUTED", lambda *inputs: recomputed.append(len(inputs[1])) or again(*inputs))
    monkeypatch.setattr(embed, "KEPT_BYTES", {"cpu": kept})
    metrics, found = step(make(micro_batch_tokens=tokens))
    assert metrics == pytest.approx(losses, rel=1e-4)
    assert len(found) > 50
    scale = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5 * scale, err_msg=name)
    if kept == 1 << 40:
        assert recomputed == []
    elif kept == 0:
        assert sum(recomputed) == COUNT
    elif tokens < 10**6:
        assert 0 < sum(recomputed) < COUNT, "as much as fits is kept"


# ── Precision ──


def test_gradients_of_several_micro_batches_are_summed_in_fp32():
    """256 + 1 is 257, which bf16 does not have: a weight cast once for both would be given 256."""
    weight = torch.ones(1, 1, requires_grad=True)
    with embed.autocast(CPU, "bf16"):
        parts = [F.linear(torch.tensor([[x]]), weight) for x in (256.0, 1.0)]
    assert parts[0].dtype == torch.bfloat16
    sum(part.float() for part in parts).backward()
    assert weight.grad.item() == 257.0


def test_bf16_computes_the_encoder_in_bf16_and_the_rest_in_fp32(either):
    made, exact, seen = either(dtype="bf16"), either(), {}
    heads, layer = getattr(made.model, "heads", made.model), made._encoder.encoder.layer[0]
    layer.intermediate.dense.register_forward_hook(lambda module, given, out: seen.update(encoder=out.dtype))
    heads.trunk[0].register_forward_hook(lambda module, given, out: seen.update(heads=out.dtype))
    for number in range(3):
        step(made, number)
        step(exact, number)
    assert seen == {"encoder": torch.bfloat16, "heads": torch.float32}
    state = made.state_dict()
    values = [*state["model"].values(), *(x for fields in state["optimizer"].values() for x in fields.values())]
    assert {value.dtype for value in values if value.is_floating_point()} == {torch.float32}
    found, expected = (one.logits(read(one)) for one in (made, exact))
    assert found == pytest.approx(expected, abs=0.1)
    assert (found != expected).any()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 vaes", "bf16"),
        ("Features\t: fp asimd svei8mm bf16 dgh", "bf16"),
        ("flags\t\t: fpu avx512f avx512_vnni avx512_fp16", "fp32"),
        (None, "fp32"),
    ],
)
def test_auto_is_bf16_if_the_cpu_has_instructions_for_it(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(embed, "CPU_INFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert embed.fastest_dtype(CPU) == expected


def test_the_precision_that_was_chosen_is_kept_over_a_resume(either, monkeypatch, tmp_path):
    """All three share a cache folder: fp32 reads no row of bf16, and the resumed one reads those of bf16."""
    monkeypatch.setattr(embed, "fastest_dtype", lambda *inputs: "bf16")
    first = either(dtype="auto", cache_dir=tmp_path)
    bf16 = read(first)
    monkeypatch.setattr(embed, "fastest_dtype", lambda *inputs: "fp32")
    resumed, exact = either(dtype="auto", cache_dir=tmp_path), either(cache_dir=tmp_path)
    fp32 = read(resumed)
    assert torch.equal(read(exact), fp32)
    assert not torch.equal(fp32, bf16)
    for made, rows, dtype in ((resumed, bf16, "bf16"), (exact, fp32, "fp32")):  # what a launch asks for wins
        made.load_state_dict(first.state_dict())
        assert torch.equal(read(made), rows)
        assert made.state_dict()["dtype"] == dtype
