"""Importance weights that undo the filter's choice: OpenRLHF's advantages times (1/q) · kept/scanned, by group.

Suffix B: one entry per group of responses to one prompt.
"""

import torch


def weights(q_B, share_B, clip: float | None = None) -> torch.Tensor:
    """Return w_B = share/q, float64 (B,), at most `clip`.

    q_B in (0, 1]: each kept prompt's keep probability. share_B in (0, 1]: kept/scanned of its batch, as
    filter.keep_share gives it; 1 for forced prompts. The mean of w·g over the kept prompts is then unbiased for the
    mean of g over the unfiltered stream; 1/q alone is larger by scanned/kept. A clip trades bias for variance.
    """
    w_B = torch.as_tensor(share_B, dtype=torch.float64) / torch.as_tensor(q_B, dtype=torch.float64)
    return w_B if clip is None else w_B.clamp(max=clip)


def rescale(experiences, w_B: torch.Tensor, group_size: int) -> None:
    """Multiply each sample's advantages by the weight of its group, in place.

    experiences: OpenRLHF's list before balance_experiences, which drops `index`; advantages (samples, A), and index,
    the samples' places in the rollout, where groups of `group_size` are contiguous. w_B: by group, in rollout order.
    """
    for experience in experiences:
        group = torch.as_tensor(experience.index) // group_size
        experience.advantages.mul_(w_B[group].to(experience.advantages.device)[:, None])
