"""From rollouts to labels: every expected number is worked out by hand from scores, rewards and token log-probs.

Most tests use Sample, which has those fields of OpenRLHF's Experience that labels.py reads; the last one puts real
Experiences, batched and split by OpenRLHF itself, through the same functions.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from depo_plugin.labels import D_MIN, from_experiences, from_rejected, group_label, group_prompts
from depo_plugin.messages import Label

ROOT = Path(__file__).resolve().parents[2]
UNIT = (0.0, 1.0)


@dataclass
class Sample:
    """A micro-batch as labels.py sees it; the real class is the last test's."""

    index: list[int]
    prompts: list[str]
    labels: list[str]
    rewards: torch.Tensor
    scores: torch.Tensor | None
    action_log_probs: torch.Tensor
    action_mask: torch.Tensor


def micro_batch(index, rewards, scores=None, log_probs=None, mask=None, group_size=2):
    """Responses number `index` of a rollout; the prompt of group g is "p<g>", its answer "a<g>"."""
    log_probs = [[-1.0]] * len(index) if log_probs is None else log_probs
    mask = [[1] * len(row) for row in log_probs] if mask is None else mask
    return Sample(
        index=list(index),
        prompts=[f"p{i // group_size}" for i in index],
        labels=[f"a{i // group_size}" for i in index],
        rewards=torch.tensor(rewards, dtype=torch.float32),
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float32),
        action_log_probs=torch.tensor(log_probs, dtype=torch.float32),
        action_mask=torch.tensor(mask, dtype=torch.bool),
    )


def only(found):
    (label,) = found.labels
    assert (found.dropped, found.clipped) == (0, 0)
    return label


def test_groups_are_put_together_by_index_where_micro_batches_cut_across_them():
    # Groups of 3: responses 0-2, 3-5, 6-8. The micro-batches hold 4, 2 and 3 of them, in no order.
    rewards = {0: 0, 1: 1, 2: 0, 3: 1, 4: 1, 5: 1, 6: 0, 7: 1, 8: 1}
    parts = [[7, 0, 4, 2], [8, 3], [1, 5, 6]]
    batches = [micro_batch(part, [rewards[i] for i in part], group_size=3) for part in parts]
    found = from_experiences(batches, 3, UNIT)
    assert (found.dropped, found.clipped, found.scores) == (0, 0, 9)
    assert [(one.prompt, one.label, one.n, one.signal) for one in found.labels] == [
        ("p0", "a0", 3, True),
        ("p1", "a1", 3, False),
        ("p2", "a2", 3, True),
    ]
    assert [one.y for one in found.labels] == pytest.approx([1 / 3, 1.0, 2 / 3])


def test_one_micro_batch_or_many_give_the_same_labels():
    rewards = [0.0, 0.25, 1.0, 0.5]
    log_probs = [[-0.1, -0.3], [-0.5, -0.7], [-1.0, -2.0], [-0.2, -0.4]]
    whole = from_experiences([micro_batch(range(4), rewards, log_probs=log_probs)], 2, UNIT)
    single = [micro_batch([i], [rewards[i]], log_probs=[log_probs[i]]) for i in (3, 1, 0, 2)]
    assert from_experiences(single, 2, UNIT) == whole
    assert [one.y for one in whole.labels] == [0.125, 0.75]


def test_d_is_the_exponential_of_the_mean_over_responses_of_their_mean_token_log_prob():
    # By hand: (-0.2 - 0.4) / 2 = -0.3; one token, -0.5; their mean is -0.4. The masked -9 counts nowhere.
    batch = micro_batch([0, 1], [0, 1], log_probs=[[-0.2, -0.4], [-0.5, -9.0]], mask=[[1, 1], [1, 0]])
    assert only(from_experiences([batch], 2, UNIT)).d == pytest.approx(math.exp(-0.4), rel=1e-6)


def test_the_mask_may_have_holes_as_in_a_talk_of_several_turns():
    batch = micro_batch(
        [0, 1], [0, 1], log_probs=[[-0.2, -7.0, -0.6], [-7.0, -0.4, -7.0]], mask=[[1, 0, 1], [0, 1, 0]]
    )
    assert only(from_experiences([batch], 2, UNIT)).d == pytest.approx(math.exp(-0.4), rel=1e-6)


@pytest.mark.parametrize(("log_prob", "d"), [(0.0, 1 - 1e-4), (-1e-6, 1 - 1e-4), (-30.0, 1e-4), (-math.inf, 1e-4)])
def test_d_is_clamped(log_prob, d):
    assert D_MIN == 1e-4
    batch = micro_batch([0, 1], [0, 1], log_probs=[[log_prob], [log_prob]])
    assert only(from_experiences([batch], 2, UNIT)).d == d


def test_d_is_unknown_where_a_log_prob_is_nan_and_the_score_still_counts():
    batch = micro_batch([0, 1], [0, 1], log_probs=[[math.nan], [-1.0]])
    assert only(from_experiences([batch], 2, UNIT)) == Label("p0", "a0", 0.5, None, 2, True)


@pytest.mark.parametrize(
    ("reward_range", "scores", "y"),
    [
        ((0.0, 1.0), [0.0, 0.5, 0.75], 1.25 / 3),
        ((-1.0, 1.0), [-1.0, 0.0, 1.0], 0.5),  # 0, 0.5, 1
        ((-0.5, 2.0), [-0.5, 2.0, 0.75], 0.5),  # 0, 1, 1.25 / 2.5
        ((0.0, 10.0), [1.0, 2.0, 3.0], 0.2),
    ],
)
def test_y_is_the_mean_of_the_scores_mapped_to_the_unit_interval(reward_range, scores, y):
    label = group_label("p", "a", scores, scores, None, reward_range)
    assert (label.y, label.d, label.n) == (pytest.approx(y), None, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_score_that_is_not_finite_is_dropped_and_counted(bad):
    batch = micro_batch(range(6), [0, 1, 0, bad, 1, 1])
    found = from_experiences([batch], 2, UNIT)
    assert [one.prompt for one in found.labels] == ["p0", "p2"]
    assert found[1:] == (1, 0, 5, 0.0, 1.0)  # dropped, clipped, finite scores, lowest, highest


def test_scores_outside_the_range_are_clipped_and_counted():
    """-1 for wrong and 1 for right in the default range: -1 is as wrong as 0, and y the share of right ones."""
    found = from_experiences([micro_batch(range(8), [-1, 1, -1, -1, 1, 1, 1, 2.5], group_size=4)], 4, UNIT)
    assert [(one.y, one.signal) for one in found.labels] == [(0.25, True), (1.0, True)]
    assert found[1:] == (0, 4, 8, -1.0, 2.5)


def test_both_ends_of_the_range_are_inside_it():
    found = from_experiences([micro_batch(range(4), [-2, -2, 3, 3])], 2, (-2.0, 3.0))
    assert (found.dropped, found.clipped, [one.y for one in found.labels]) == (0, 0, [0.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_end_of_the_range_that_the_rewards_dtype_rounds_is_inside_it(sign, dtype):
    """float32 of 1.1 is above 1.1, and bf16 of it is 1.1015625: right responses all the same."""
    ends = [sign * i / 10 for i in range(1, 51)]
    for end in ends:
        batch = micro_batch([0, 1], [0, 0])
        batch.rewards = torch.tensor([end, end]).to(dtype)
        label = only(from_experiences([batch], 2, (0.0, end) if sign > 0 else (end, 0.0)))
        assert label.y == pytest.approx(1.0 if sign > 0 else 0.0, abs=0.004), end
    assert len(ends) == 50


# What OpenRLHF makes of the answers of reward functions and servers: the shape of one response's tensor.
SHAPES = {"number": (), "a list or an array of one": (1,), "a list of lists": (1, 1)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rewards_of_every_shape_give_the_same_labels(shape):
    rewards = [0.0, 1.0, 1.0, 0.25]
    plain = micro_batch(range(4), rewards, scores=rewards)
    shaped = micro_batch(range(4), rewards, scores=rewards)
    shaped.rewards, shaped.scores = (x.reshape(4, *shape) for x in (shaped.rewards, shaped.scores))
    assert from_experiences([shaped], 2, UNIT) == from_experiences([plain], 2, UNIT)
    singles = [micro_batch([i], [r], scores=[r], group_size=4) for i, r in enumerate(rewards)]
    expected = from_rejected(singles, UNIT)
    for one in singles:
        one.rewards, one.scores = one.rewards.reshape(1, *shape), one.scores.reshape(1, *shape)
    assert from_rejected(singles, UNIT) == expected
    assert expected.labels[0].y == 0.5625


def test_two_rewards_for_one_response_are_refused_by_name():
    batch = micro_batch([0, 1], [0, 1])
    batch.rewards = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"rewards of shape \(2, 2\) for 2 responses: each response needs one number"):
        from_experiences([batch], 2, UNIT)


@pytest.mark.parametrize(
    "label",
    [datetime(2026, 11, 26), Decimal("1.50"), b"4", {"answer": 4}, ["4"], None, 4],
    ids=lambda x: type(x).__name__,
)
def test_of_a_label_its_text_alone_is_kept(label):
    batch = micro_batch([0, 1], [0, 1])
    batch.labels = [label, label]
    assert only(from_experiences([batch], 2, UNIT)).label == str(label)
    assert only(from_rejected([micro_batch([0], [1], scores=[1])], UNIT)).label == "a0"
    assert group_prompts([batch], 2) == (["p0"], [str(label)])


def test_without_scores_the_rewards_are_the_scores():
    assert only(from_experiences([micro_batch([0, 1], [0.25, 0.5])], 2, UNIT)).y == 0.375


def test_scores_give_y_and_rewards_give_the_signal():
    # Shaped rewards: out of range, which is nobody's business, for the scores are in it.
    equal_scores = micro_batch([0, 1], [-3.0, 7.0], scores=[1.0, 1.0])
    equal_rewards = micro_batch([0, 1], [7.0, 7.0], scores=[0.0, 1.0])
    first, second = (only(from_experiences([batch], 2, UNIT)) for batch in (equal_scores, equal_rewards))
    assert (first.y, first.signal) == (1.0, True)
    assert (second.y, second.signal) == (0.5, False)


def test_half_precision_rewards_and_log_probs_are_taken():
    batch = micro_batch([0, 1], [0.5, 1.0], log_probs=[[-0.5], [-0.25]])
    batch.rewards, batch.action_log_probs = batch.rewards.bfloat16(), batch.action_log_probs.bfloat16()
    label = only(from_experiences([batch], 2, UNIT))
    assert (label.y, label.d) == (0.75, pytest.approx(math.exp(-0.375), rel=1e-6))


def test_a_group_that_dynamic_filtering_throws_away_has_no_d_and_its_scores_as_rewards():
    group = [micro_batch([i], [9.0], scores=[score], group_size=4) for i, score in enumerate([0, 1, 1, 1])]
    assert only(from_rejected(group, UNIT)) == Label("p0", "a0", 0.75, None, 4, True)
    group = [micro_batch([i], [9.0], scores=[1], group_size=4) for i in range(4)]
    assert only(from_rejected(group, UNIT)) == Label("p0", "a0", 1.0, None, 4, False)
    found = from_rejected(group, (-1.0, 0.5))
    assert (found.labels[0].y, found.clipped) == (1.0, 4)
    group[2].scores = torch.tensor([math.nan])
    assert from_rejected(group, UNIT)[:2] == ([], 1)


def test_prompts_of_the_groups_are_in_rollout_order():
    parts = [[5, 0], [2, 3, 1], [4]]
    batches = [micro_batch(part, [0.0] * len(part)) for part in parts]
    assert group_prompts(batches, 2) == (["p0", "p1", "p2"], ["a0", "a1", "a2"])


# Real Experiences: single responses as SamplesGenerator makes them, the rejected group as it is; batched in an odd
# order as split_rollout_samples does, and given log-probs and advantages as the experience maker does.
REAL = """
import dataclasses, json, sys, torch
from openrlhf.trainer.ppo_utils.experience import Experience
from depo_plugin import labels
group, rewards, lengths = 3, [0., 1., 1., .5, .5, .5], [2, 1, 3, 1, 1, 2]
def response(i):
    sequence = torch.ones(1, 1 + lengths[i], dtype=torch.long)
    mask = torch.zeros_like(sequence)
    mask[:, 1:] = 1
    return Experience(
        sequences=sequence, attention_mask=torch.ones_like(sequence), action_mask=mask[:, 1:], index=[i],
        prompts=[f"p{i // group}"], labels=[f"a{i // group}"], images=[None], mm_train_inputs=[None],
        rewards=torch.tensor([rewards[i]]), scores=torch.tensor([rewards[i]]),
    )
(rejected,) = labels.from_rejected([response(i) for i in range(group)], (0., 1.)).labels
batches = [Experience.concat_experiences([response(i) for i in part], 0) for part in ([4, 0, 2, 5], [3, 1])]
for batch in batches:  # token t of response i: -(i + 1) / 10, on padding -99
    rows = -(torch.tensor(batch.index).float()[:, None] + 1) / 10
    batch.action_log_probs = torch.where(batch.action_mask.bool(), rows.expand(batch.action_mask.shape), -99.)
found, dropped, *_ = labels.from_experiences(batches, group, (0., 1.))
print(json.dumps({
    "rejected": dataclasses.astuple(rejected), "found": [dataclasses.astuple(one) for one in found],
    "dropped": dropped, "prompts": labels.group_prompts(batches, group),
    "fields": [field.name for field in dataclasses.fields(Experience)],
    "shapes": [batch.rewards.dim() for batch in batches],
}))
"""


@pytest.mark.wheel
def test_real_experiences(patched_copy):
    paths = os.pathsep.join([str(patched_copy), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", REAL], env=env, cwd=patched_copy, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    real = json.loads(run.stdout.splitlines()[-1])
    assert set(Sample.__dataclass_fields__) <= set(real["fields"])
    assert real["shapes"] == [1, 1]
    # Mean log-prob per response is -0.1, -0.2, ..., -0.6 whatever its length: group means -0.2 and -0.5.
    assert real["rejected"] == ["p0", "a0", pytest.approx(2 / 3), None, 3, True]
    assert real["found"] == [
        ["p0", "a0", pytest.approx(2 / 3), pytest.approx(math.exp(-0.2), rel=1e-6), 3, True],
        ["p1", "a1", pytest.approx(0.5), pytest.approx(math.exp(-0.5), rel=1e-6), 3, False],
    ]
    assert (real["dropped"], real["prompts"]) == (0, [["p0", "p1"], ["a0", "a1"]])
