"""The estimator's loss (arXiv 2602.06375): score, distillation, ranking.

Suffix: B = the whole batch of one update. A mean over no entries is 0 and can still be differentiated.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from depo_plugin.settings.config import EstimatorConfig

RANK_DELTA = 0.05  # δ: a pair is ranked if its pass rates differ by more than this (paper: the same)
RANK_MARGIN = 0.5  # distance of a pair's score logits from which its loss is 0 (paper: the same)
# Pass rates are means of a few scores, so differences of exactly δ are common (1/20). Rounding must not rank them.
TIE = 1e-6


class Losses(NamedTuple):
    """The loss and its parts; scalars."""

    total: torch.Tensor  # the weighted sum of the parts, which is minimised
    score: torch.Tensor  # score_loss, without its weight
    distill: torch.Tensor  # distill_loss, without its weight
    rank: torch.Tensor  # rank_loss, without its weight


def score_loss(s_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
    """Return the mean BCE of score logits s and observed pass rates y in [0, 1] (soft targets)."""
    return F.binary_cross_entropy_with_logits(s_B, y_B)


def distill_loss(c_B: torch.Tensor, d_B: torch.Tensor) -> torch.Tensor:
    """Return the mean BCE of confidence logits c and the policy's confidences d in (0, 1), over the known d.

    d is NaN if it is not known, because the group's log-probs were never computed.
    """
    known_B = ~d_B.isnan()
    if not known_B.any():
        return c_B.sum() * 0
    return F.binary_cross_entropy_with_logits(c_B[known_B], d_B[known_B])


def rank_loss(s_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
    """Return the mean of relu(RANK_MARGIN − (s_i − s_j)) over all pairs of the batch with y_i > y_j + RANK_DELTA."""
    pair_BB = y_B[:, None] - y_B[None, :] > RANK_DELTA + TIE
    if not pair_BB.any():
        return s_B.sum() * 0
    return F.relu(RANK_MARGIN - (s_B[:, None] - s_B[None, :]))[pair_BB].mean()


def losses(s_B: torch.Tensor, c_B: torch.Tensor, y_B: torch.Tensor, d_B: torch.Tensor, cfg: EstimatorConfig) -> Losses:
    """Return score + w_distill·distill + w_rank·rank and the parts. Inputs: (B,) float32; d is NaN if not known."""
    score = score_loss(s_B, y_B)
    distill = distill_loss(c_B, d_B)
    rank = rank_loss(s_B, y_B)
    return Losses(score + cfg.w_distill * distill + cfg.w_rank * rank, score, distill, rank)
