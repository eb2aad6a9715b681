"""Micro-batches of responses as labels.py and the hooks see them; test_regrouping.py has OpenRLHF's own class."""

from dataclasses import dataclass

import torch


@dataclass
class Sample:
    """The fields of OpenRLHF's Experience that labels.py reads."""

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
