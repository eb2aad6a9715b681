"""The text model in both modes: what it reads, one optimizer step, and its cache, against each prompt alone."""

import copy
import functools

import numpy as np
import pytest
import tiny_encoder
import torch
from outcomes import groups
from slow_losses import RANK_DELTA, RANK_MARGIN, slow_total
from torch.nn import functional as F

from depo_plugin.estimator import backends, embed, text_model
from depo_plugin.estimator.encoder import load_encoder
from depo_plugin.estimator.heads import DifficultyHeads
from depo_plugin.estimator.text_model import EstimatorError, Targets

PROMPTS = [label.prompt for label in groups(20)]
TARGETS = Targets(  # pass rates of groups of 4; every fifth confidence is not known; a shift for each prompt
    torch.tensor([i % 5 / 4 for i in range(20)]),
    torch.tensor([float("nan") if i % 5 == 2 else 0.04 * i + 0.1 for i in range(20)]),
    torch.linspace(-1.5, 1.0, 20),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def make(folder, monkeypatch):
    """make(lr=1e-3, ...): a text model of the tiny encoder with narrow heads."""
    tiny_encoder.narrow_heads(monkeypatch)
    return functools.partial(tiny_encoder.make_text_model, folder)


@pytest.fixture(params=["frozen", "finetune"])
def either(make, request):
    """make() in one mode, then in the other."""
    return functools.partial(make, mode=request.param)


def heads(made):
    return getattr(made.model, "heads", made.model)


def step(made, number=0):
    return made.step(made.embed(PROMPTS), TARGETS, number)


def read(made, prompts=PROMPTS):
    with torch.no_grad():
        return made.embed(prompts)


def read_alone(made, folder, prompts):
    """Return a float64 copy of the model, what its heads read, (B, E), and both logits: one prompt at a time."""
    model, frozen = copy.deepcopy(made.model).double().eval(), isinstance(made.model, DifficultyHeads)
    encoder, tokenizer = load_encoder(folder, 0.67)
    encoder, rows = encoder.double().eval() if frozen else model.encoder, []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        rows.append(encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0))
    x_BE = torch.stack(rows)
    if frozen:  # as the cache holds them: rounded to fp16
        x_BE = x_BE.detach().half().double()
        x_BE *= tiny_encoder.WIDTH**0.5 / x_BE.norm(dim=1, keepdim=True)
    return model, x_BE, *getattr(model, "heads", model)(x_BE)


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
def test_what_is_read_is_that_of_each_prompt_alone(either, folder, tokens):
    made, prompts = either(micro_batch_tokens=tokens), [*PROMPTS, "", PROMPTS[3], "abc " * 20]
    step(made)  # with weights near zero all logits would be alike
    _, x_BE, s_B, _ = read_alone(made, folder, prompts)
    found = read(made, prompts)
    torch.testing.assert_close(found, x_BE.float(), rtol=1e-3, atol=2e-3)
    assert made.logits(found) == pytest.approx(s_B.detach().numpy(), abs=2e-4)
    assert s_B.std() > 1e-3
    assert len(made.logits(read(made, []))) == 0


def test_gradients_are_those_of_the_whole_batch(either, folder, monkeypatch):
    """In micro-batches, against the loss in loops over float64 logits; the shift is added to the score logits."""
    monkeypatch.setattr(backends, "MAX_NORM", float("inf"))
    made = either(micro_batch_tokens=100)
    heads(made).trunk[-1].p = 0.0  # no dropout
    model, _, s_B, c_B = read_alone(made, folder, PROMPTS)
    s_B = s_B + TARGETS.shift
    y, d = TARGETS.y.tolist(), [None if value != value else value for value in TARGETS.d.tolist()]
    known = ~TARGETS.d.isnan()
    pairs = [F.relu(RANK_MARGIN - s_B[i] + s_B[j]) for i in range(20) for j in range(20) if y[i] - y[j] > RANK_DELTA]
    assert len(pairs) == 160
    total = F.binary_cross_entropy_with_logits(s_B, TARGETS.y.double()) + 3.0 * torch.stack(pairs).mean()
    (total + 0.5 * F.binary_cross_entropy_with_logits(c_B[known], TARGETS.d[known].double())).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    metrics = step(made)
    found = {name: weight.grad for name, weight in made.model.named_parameters() if weight.grad is not None}
    assert set(found) == set(expected)
    assert len(found) >= 20
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    # A frozen embedding may be rounded to fp16 to the other side: 5e-4 of one of its 32 numbers.
    tolerance = {"rtol": 1e-3, "atol": 1e-5 * scale} if len(found) > 50 else {"rtol": 5e-3, "atol": 1e-3 * scale}
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name].double(), gradient, **tolerance, err_msg=name)
    slow = slow_total(s_B.tolist(), c_B.tolist(), y, d, tiny_encoder.settings(folder).estimator)
    names = ("loss", "loss_score", "loss_distill", "loss_rank")
    assert [metrics[name] for name in names] == pytest.approx(slow, rel=1e-4)
    norm = np.sqrt(sum((gradient**2).sum().item() for gradient in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=5e-3)


def test_encoder_and_heads_have_their_own_learning_rates(make, monkeypatch):
    """Adam's first step is lr in size wherever there is a gradient: 1e-3 for heads, 0.2 of it for the encoder."""
    monkeypatch.setattr(text_model, "WEIGHT_DECAY", 0.0)
    for ratio, expected in ((0.2, 2e-4), (0.0, 0.0)):
        made = make(lr=1e-3, encoder_lr_ratio=ratio)
        before = made.state_dict()["model"]
        step(made)
        moved = {name: (value - before[name]).abs().max() for name, value in made.state_dict()["model"].items()}
        assert moved["heads.score_head.weight"] == pytest.approx(1e-3, rel=0.01)
        assert max(v for n, v in moved.items() if n.startswith("encoder.")) == pytest.approx(expected, rel=0.01)


def test_dropout_is_drawn_by_the_steps_number(either):
    """The learning rate is nearly 0, so the loss of the same prompts moves by dropout alone."""
    made = either(lr=1e-30)
    losses = [step(made, number)["loss_score"] for number in (0, 1, 2, 0)]
    assert len(set(losses)) == 3
    assert losses[0] == losses[3]


def test_very_sure_logits_are_bounded(either):
    made = either()
    for bias, bound in ((1e4, text_model.LOGIT_MAX), (-1e4, -text_model.LOGIT_MAX)):
        with torch.no_grad():
            heads(made).score_head.bias.fill_(bias)
        assert made.logits(read(made)).tolist() == [bound] * 20


NEW = [f"{i:04}" * 5 for i in range(100)]  # 20 characters each: 21 with the one that a prompt counts at least


@pytest.mark.parametrize(("seconds", "known"), [(0, 0), (0.5, 5), (2, 20), (0.99, 9), (1, 16), (60, 100)])
def test_as_much_is_read_as_there_is_time_for(make, seconds, known):
    """The best of the last three speeds: 210 characters a second. With a second or more at least 16 prompts."""
    made = make(mode="frozen")
    made._speeds.extend([9999.0, 20.0, 210.0, 100.0])
    assert made.rate(NEW[:3]) == pytest.approx(10)
    assert made.prepare(NEW, seconds).tolist() == [True] * known + [False] * (100 - known)
    assert made._cache.known(text_model._keys(NEW)).sum() == known
    again = made.prepare(NEW[::-1], 0)
    assert again.tolist() == [False] * (100 - known) + [True] * known


def test_a_speed_is_measured_by_the_second_call_and_not_by_small_ones(make):
    made = make(mode="frozen")
    assert made.prepare(NEW * 3, 60).sum() == 300  # the first 256 of them are all of them, three times
    assert (list(made._speeds), made.rate(NEW)) == ([], None)
    read(made, ["a small call"])
    assert list(made._speeds) == []
    read(made, [f"one more: {i}" for i in range(20)])
    (speed,) = made._speeds
    assert speed > 0
    read(made, [f"one more: {i}" for i in range(20)])  # from the cache
    assert list(made._speeds) == [speed]


def test_a_trained_encoder_has_nothing_to_read_ahead(make):
    assert make(mode="finetune").prepare(NEW, 0).all()


def test_an_embedding_that_is_not_finite_is_a_fault_and_is_not_cached(make, monkeypatch):
    made, whole = make(mode="frozen"), embed.embed
    monkeypatch.setattr(embed, "embed", lambda *inputs: whole(*inputs) * float("nan"))
    with pytest.raises(EstimatorError, match=r"NaN or infinity.*--depo\.estimator\.dtype fp32"):
        made.embed(PROMPTS)
    monkeypatch.setattr(embed, "embed", whole)
    assert made.embed(PROMPTS).isfinite().all()


def test_the_cache_is_one_for_each_encoder_depth_length_and_precision(make, tmp_path):
    """What is read from a folder that others use as well is what a text model reads on its own."""
    other, cache = tiny_encoder.write(tmp_path / "other", seed=1), tmp_path / "cache"
    settings = [{}, {"model": other}, {"max_length": 12}, {"depth": 1.0}, {"dtype": "bf16"}]
    found = [read(make(mode="frozen", cache_dir=cache, **one)) for one in settings]
    for rows, one in zip(found, settings, strict=True):
        assert torch.equal(rows, read(make(mode="frozen", **one)))
        assert sum(torch.equal(rows, others) for others in found) == 1
    assert len(list(cache.iterdir())) == 5
