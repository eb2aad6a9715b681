"""The estimator's loss (arXiv 2602.06375): score, distillation, ranking.

Suffix: B = the whole batch of one update. A mean over nothing is 0 and still belongs to the graph.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from depo_plugin.settings.config import EstimatorConfig

RANK_DELTA = 0.05  # δ: a pair is ranked if its pass rates differ by more (paper: the same)
RANK_MARGIN = 0.5  # wanted distance of a pair's score logits (paper: the same)
# Pass rates are means of a few scores, so differences of exactly δ are common (1/20). Rounding must not decide them.
TIE = 1e-6


class Losses(NamedTuple):
    """The weighted sum, which is minimised, and its parts without their weights; scalars."""

    total: torch.Tensor
    score: torch.Tensor
    distill: torch.Tensor
    rank: torch.Tensor


def score_loss(s_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
    """Return the mean BCE of score logits s and observed pass rates y in [0, 1] (soft targets)."""
    return F.binary_cross_entropy_with_logits(s_B, y_B)


def distill_loss(c_B: torch.Tensor, d_B: torch.Tensor) -> torch.Tensor:
    """Return the mean BCE of confidence logits c and the policy's confidences d in (0, 1), over those that are known.

    d is NaN if it is not known (groups whose log-probs were never computed).
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
    """Return score + w_distill·distill + w_rank·rank and the parts; all (B,) float32, d NaN if not known."""
    score = score_loss(s_B, y_B)
    distill = distill_loss(c_B, d_B)
    rank = rank_loss(s_B, y_B)
    return Losses(score + cfg.w_distill * distill + cfg.w_rank * rank, score, distill, rank)
