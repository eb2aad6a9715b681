"""The estimator's loss in plain Python loops: the reference for losses.py and for whoever uses it."""

import math

RANK_DELTA, RANK_MARGIN = 0.05, 0.5  # the paper's


def bce(logit, target):
    """Return −t·log σ(x) − (1−t)·log(1−σ(x)), one number."""
    return target * math.log1p(math.exp(-logit)) + (1 - target) * math.log1p(math.exp(logit))


def slow_total(s, c, y, d, cfg):
    """Return the whole loss and its three parts; all lists, d None if not known."""
    score = sum(bce(a, b) for a, b in zip(s, y, strict=True)) / len(s)
    known = [(a, b) for a, b in zip(c, d, strict=True) if b is not None]
    distill = sum(bce(a, b) for a, b in known) / len(known) if known else 0.0
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if round(y[i] - y[j], 9) > RANK_DELTA]
    rank = sum(max(0.0, RANK_MARGIN - (s[i] - s[j])) for i, j in pairs) / len(pairs) if pairs else 0.0
    return score + cfg.w_distill * distill + cfg.w_rank * rank, score, distill, rank
