"""The losses against plain Python loops in float64 and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from slow_losses import slow_total

from depo_plugin.estimator.losses import distill_loss, losses, rank_loss, score_loss
from depo_plugin.settings.config import EstimatorConfig


def tensors(*columns):
    return [torch.tensor([math.nan if v is None else v for v in column], dtype=torch.float32) for column in columns]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
@pytest.mark.parametrize("weights", [(0.5, 3.0), (0.0, 1.0), (2.0, 0.0)])
def test_losses_equal_the_slow_reference(size, weights):
    rng = np.random.default_rng(size)
    cfg = EstimatorConfig(w_distill=weights[0], w_rank=weights[1])
    s, c = rng.normal(0, 1, size).tolist(), rng.normal(0, 1, size).tolist()
    y = (rng.integers(0, 21, size) / 20).tolist()  # groups of 20: many pairs differ by exactly δ = 0.05
    d = [None if rng.random() < 0.3 else float(rng.uniform(1e-4, 1 - 1e-4)) for _ in range(size)]
    found = losses(*tensors(s, c, y, d), cfg)
    assert [part.item() for part in found] == pytest.approx(slow_total(s, c, y, d, cfg), rel=1e-5, abs=1e-6)


def test_score_loss_by_hand():
    """σ(0) = ½: BCE is log 2 whatever the target; σ(log 3) = ¾ against 1: log(4/3)."""
    assert score_loss(*tensors([0.0, 0.0], [0.25, 1.0])).item() == pytest.approx(math.log(2))
    assert score_loss(*tensors([math.log(3)], [1.0])).item() == pytest.approx(math.log(4 / 3))


def test_distill_loss_is_over_the_known_alone():
    c, d = tensors([0.0, 50.0, 0.0], [0.5, None, 0.9])
    c.requires_grad_()
    loss = distill_loss(c, d)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert c.grad[1] == 0
    assert torch.isfinite(c.grad).all()


def test_rank_loss_by_hand():
    """y = 1, 0.5, 0 and s = 0.2, 0, 0.1 give pairs (0,1), (0,2), (1,2): relu of 0.5 − 0.2, 0.5 − 0.1, 0.5 + 0.1."""
    s, y = tensors([0.2, 0.0, 0.1], [1.0, 0.5, 0.0])
    assert rank_loss(s, y).item() == pytest.approx((0.3 + 0.4 + 0.6) / 3)
    # Far enough apart and in order: nothing to learn.
    s, y = tensors([3.0, 2.0, 1.0], [1.0, 0.5, 0.0])
    assert rank_loss(s, y).item() == 0.0


def test_a_difference_of_exactly_delta_is_no_pair_whatever_the_rounding():
    """k/20 + 1/20 − k/20 is above 0.05 in float32 for some k and below for others."""
    above = 0
    for k in range(20):
        s, y = tensors([0.0, 0.0], [(k + 1) / 20, k / 20])
        above += bool((y[0] - y[1]) > 0.05)
        assert rank_loss(s, y).item() == 0.0
    assert 0 < above < 20


def test_nothing_to_learn_from_is_zero_and_still_has_a_gradient():
    for y, d in ([[0.5, 0.5], [None, None]], [[0.3], [None]]):
        s, c = (torch.zeros(len(y), requires_grad=True) for _ in range(2))
        found = losses(s, c, *tensors(y, d), EstimatorConfig())
        assert found.distill.item() == found.rank.item() == 0.0
        found.total.backward()
        assert torch.isfinite(s.grad).all()
        assert (c.grad == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_finite_differences(seed):
    """In float64: the slow total, moved by 1e-6 at each logit in turn. Ranked pairs at the margin have no gradient."""
    rng = np.random.default_rng(seed)
    size, cfg = 12, EstimatorConfig(w_distill=0.7, w_rank=2.0)
    s, c = rng.normal(0, 1, size), rng.normal(0, 1, size)
    y = (rng.integers(0, 9, size) / 8).tolist()
    d = [None if rng.random() < 0.3 else float(rng.uniform(0.05, 0.95)) for _ in range(size)]
    s_B, c_B = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (s, c))
    y_B, d_B = (torch.tensor([math.nan if v is None else v for v in x], dtype=torch.float64) for x in (y, d))
    losses(s_B, c_B, y_B, d_B, cfg).total.backward()
    for logits, gradient in ((s, s_B.grad), (c, c_B.grad)):
        for i in range(size):
            total = []
            for step in (1e-6, -1e-6):
                logits[i] += step
                total.append(slow_total(s.tolist(), c.tolist(), y, d, cfg)[0])
                logits[i] -= step
            assert gradient[i].item() == pytest.approx((total[0] - total[1]) / 2e-6, abs=1e-7)


def test_a_ranked_pair_pulls_its_two_scores_apart_by_hand():
    """y = 1, 0, 0.98 and s = 0, 0, 0: pairs (0,1), (2,1), both below the margin; each a gradient of 1/2 per score."""
    s, y = tensors([0.0, 0.0, 0.0], [1.0, 0.0, 0.98])
    s.requires_grad_()
    rank_loss(s, y).backward()
    assert s.grad.tolist() == [-0.5, 1.0, -0.5]
