"""A quota by data source, among prompts that promise a signal. `--depo.filter.rule configs/rules/quota.py`."""

import numpy as np

SHARE = {"add-2digit": 0.25, "sub-2digit": 1.0}  # share of a source's useful prompts that is rolled out
OTHERS = 0.5


def keep(beliefs):
    """Return the keep probability of each candidate (depo_plugin.rules.Beliefs says what is known of them)."""
    share = np.array([SHARE.get(source, OTHERS) for source in beliefs.datasource])
    return np.where(beliefs.v >= 0.5, share, 0.0)
