"""From rollouts to labels: every expected number is worked out by hand from scores, rewards and token log-probs.

rollouts.Sample has the fields of OpenRLHF's Experience that labels.py reads; test_regrouping.py has real Experiences.
"""

import math
from datetime import datetime
from decimal import Decimal

import pytest
import torch
from rollouts import micro_batch

from depo_plugin.labels import D_MIN, from_experiences, from_rejected, group_label
from depo_plugin.messages import Label

UNIT = (0.0, 1.0)


def only(found):
    (label,) = found.labels
    assert (found.dropped, found.clipped) == (0, 0)
    return label


def test_groups_are_put_together_by_index_if_micro_batches_cut_across_them():
    """Groups of 3: responses 0-2, 3-5, 6-8. The micro-batches hold 4, 2 and 3 of them, in no order, or all of them."""
    rewards = [0, 1, 0, 1, 1, 1, 0, 1, 1]
    found = []
    for parts in ([[7, 0, 4, 2], [8, 3], [1, 5, 6]], [range(9)]):
        rows = [[[-0.1 * i, -0.2] for i in part] for part in parts]
        batches = [
            micro_batch(part, [rewards[i] for i in part], log_probs=row, group_size=3)
            for part, row in zip(parts, rows, strict=True)
        ]
        found.append(from_experiences(batches, 3, UNIT))
    assert found[0] == found[1]
    assert (found[0].dropped, found[0].clipped, found[0].scores) == (0, 0, 9)
    assert (found[0].prompts, found[0].answers) == (["p0", "p1", "p2"], ["a0", "a1", "a2"])
    d = [math.exp(-(0.1 * i + 0.2) / 2) for i in (1, 4, 7)]  # i: the mean of a group's places
    assert found[0].labels == [
        Label("p0", "a0", pytest.approx(1 / 3), pytest.approx(d[0]), 3, True, 6),
        Label("p1", "a1", 1.0, pytest.approx(d[1]), 3, False, 6),
        Label("p2", "a2", pytest.approx(2 / 3), pytest.approx(d[2]), 3, True, 6),
    ]


@pytest.mark.parametrize(
    ("log_probs", "mask"),
    [
        ([[-0.2, -0.4], [-0.5, -9.0]], [[1, 1], [1, 0]]),  # means -0.3 and -0.5; the masked -9 is padding
        ([[-0.2, -7.0, -0.6], [-7.0, -0.4, -7.0]], [[1, 0, 1], [0, 1, 0]]),  # holes, as in a talk of several turns
    ],
)
def test_d_is_the_exponential_of_the_mean_over_responses_of_their_mean_token_log_prob(log_probs, mask):
    batch = micro_batch([0, 1], [0, 1], log_probs=log_probs, mask=mask)
    label = only(from_experiences([batch], 2, UNIT))
    assert label.d == pytest.approx(math.exp(-0.4), rel=1e-6)
    assert label.tokens == 3


@pytest.mark.parametrize(("log_prob", "d"), [(0.0, 1 - 1e-4), (-1e-6, 1 - 1e-4), (-30.0, 1e-4), (-math.inf, 1e-4)])
def test_d_is_clamped(log_prob, d):
    assert D_MIN == 1e-4
    batch = micro_batch([0, 1], [0, 1], log_probs=[[log_prob], [log_prob]])
    assert only(from_experiences([batch], 2, UNIT)).d == d


def test_d_leaves_out_padding_whatever_it_holds_and_responses_without_a_token():
    padded = [[-0.5, -math.inf], [-math.inf, -math.inf]]
    batch = micro_batch([0, 1], [0, 1], log_probs=padded, mask=[[1, 0], [0, 0]])
    assert only(from_experiences([batch], 2, UNIT)).d == pytest.approx(math.exp(-0.5))
    nothing = micro_batch([0, 1], [0, 1], log_probs=padded, mask=[[0, 0], [0, 0]])
    assert only(from_experiences([nothing], 2, UNIT)).d is None


def test_d_is_unknown_if_a_log_prob_is_nan_and_the_score_still_counts():
    batch = micro_batch([0, 1], [0, 1], log_probs=[[math.nan], [-1.0]])
    assert only(from_experiences([batch], 2, UNIT)) == Label("p0", "a0", 0.5, None, 2, True, 2)


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
    """It has no label, but the importance weights still need its place among the groups."""
    found = from_experiences([micro_batch(range(6), [0, 1, 0, bad, 1, 1])], 2, UNIT)
    assert [one.prompt for one in found.labels] == ["p0", "p2"]
    assert (found.prompts, found.answers) == (["p0", "p1", "p2"], ["a0", "a1", "a2"])
    assert (found.dropped, found.clipped, found.scores, found.lowest, found.highest) == (1, 0, 5, 0.0, 1.0)


def test_scores_outside_the_range_are_clipped_and_counted():
    """-1 for wrong and 1 for right in the default range: -1 is as wrong as 0, and y the share of right ones."""
    found = from_experiences([micro_batch(range(8), [-1, 1, -1, -1, 1, 1, 1, 2.5], group_size=4)], 4, UNIT)
    assert [(one.y, one.signal) for one in found.labels] == [(0.25, True), (1.0, True)]
    assert (found.dropped, found.clipped, found.scores, found.lowest, found.highest) == (0, 4, 8, -1.0, 2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_both_ends_of_the_range_are_inside_it_however_the_rewards_dtype_rounds_them(sign, dtype):
    """float32 of 1.1 is above 1.1, and bf16 of it is 1.1015625: right responses all the same."""
    for end in [sign * i / 10 for i in range(1, 51)]:
        batch = micro_batch([0, 1], [0, 0])
        batch.rewards = torch.tensor([end, 0.0]).to(dtype)
        label = only(from_experiences([batch], 2, (0.0, end) if sign > 0 else (end, 0.0)))
        assert label.y == pytest.approx(0.5, abs=0.002), end


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
    assert from_experiences([batch], 2, UNIT).answers == [str(label)]


def test_scores_give_y_and_rewards_give_the_signal():
    """Shaped rewards may be out of range if the scores are in it. Without scores the rewards are the scores."""
    equal_scores = micro_batch([0, 1], [-3.0, 7.0], scores=[1.0, 1.0])
    equal_rewards = micro_batch([0, 1], [7.0, 7.0], scores=[0.0, 1.0])
    no_scores = micro_batch([0, 1], [0.25, 0.5])
    found = [only(from_experiences([batch], 2, UNIT)) for batch in (equal_scores, equal_rewards, no_scores)]
    assert [(label.y, label.signal) for label in found] == [(1.0, True), (0.5, False), (0.375, True)]


def test_half_precision_rewards_and_log_probs_are_taken():
    batch = micro_batch([0, 1], [0.5, 1.0], log_probs=[[-0.5], [-0.25]])
    batch.rewards, batch.action_log_probs = batch.rewards.bfloat16(), batch.action_log_probs.bfloat16()
    label = only(from_experiences([batch], 2, UNIT))
    assert (label.y, label.d) == (0.75, pytest.approx(math.exp(-0.375), rel=1e-6))


def test_a_group_that_dynamic_filtering_throws_away_has_no_d_and_its_scores_as_rewards():
    group = [
        micro_batch([i], [9.0], scores=[score], log_probs=[[-1.0] * (i + 1)], mask=[[1] * i + [i % 2]], group_size=4)
        for i, score in enumerate([0, 1, 1, 1])
    ]
    assert sum(one.action_mask.sum() for one in group) == 0 + 2 + 2 + 4
    assert only(from_rejected(group, UNIT)) == Label("p0", "a0", 0.75, None, 4, True, 8)
    group = [micro_batch([i], [9.0], scores=[1], group_size=4) for i in range(4)]
    assert only(from_rejected(group, UNIT)) == Label("p0", "a0", 1.0, None, 4, False, 4)
    found = from_rejected(group, (-1.0, 0.5))
    assert (found.labels[0].y, found.clipped) == (1.0, 4)
    group[2].scores = torch.tensor([math.nan])
    found = from_rejected(group, UNIT)
    assert (found.labels, found.prompts, found.answers, found.dropped) == ([], ["p0"], ["a0"], 1)
