"""A curriculum: the window moves from easy to hard prompts. `--depo.filter.rule configs/rules/curriculum.py`."""

import numpy as np

STEPS = 200  # steps that the window moves; then it stays


def keep(beliefs):
    """Return the keep probability of each candidate (depo_plugin.rules.Beliefs says what is known of them)."""
    progress = min(beliefs.step / STEPS, 1.0)
    low, high = 0.4 - 0.3 * progress, 0.95 - 0.25 * progress
    return np.where((low <= beliefs.p) & (beliefs.p <= high), 1.0, 0.0)
