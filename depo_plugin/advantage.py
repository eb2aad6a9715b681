"""The base advantages, and importance weights that undo the filter's choice.

Weights multiply OpenRLHF's advantages by (1/q) · kept/scanned, group by group. Suffix B: one entry per group.
"""

import numpy as np

DEFAULT_BASE = "group_norm"  # the paper's
# Name in OpenRLHF -> whether OpenRLHF whitens its advantages over the whole batch afterwards.
BASES = {
    DEFAULT_BASE: False,
    "dr_grpo": False,
    "rloo": False,
    "reinforce_baseline": True,
    "reinforce": True,
    "flash_reinforce": False,
}


def weights(q_B, share_B, clip: float | None = None) -> np.ndarray:
    """Return w_B = share/q, float64 (B,), at most `clip`.

    q_B in (0, 1]: each kept prompt's keep probability. share_B in (0, 1]: kept/scanned of its batch, as
    filter.keep_share gives it; 1 for forced prompts. The mean of w·g over the kept prompts is then unbiased for the
    mean of g over the unfiltered stream; 1/q alone is too large by scanned/kept. A clip trades bias for variance.
    """
    w_B = np.asarray(share_B, np.float64) / np.asarray(q_B, np.float64)
    return w_B if clip is None else w_B.clip(max=clip)


def rescale(experiences, w_B: np.ndarray, group_size: int) -> None:
    """Multiply each sample's advantages by the weight of its group, in place.

    experiences: OpenRLHF's list before balance_experiences, which drops `index`; advantages (samples, A), and index,
    the samples' places in the rollout, where groups of `group_size` are contiguous. w_B: by group, in rollout order.
    """
    import torch  # not at the top: the settings read BASES, and `depo config` must stay light

    for experience in experiences:
        group = np.asarray(experience.index) // group_size
        experience.advantages.mul_(torch.as_tensor(w_B[group], device=experience.advantages.device)[:, None])
