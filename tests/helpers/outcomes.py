"""Groups that come back and decisions that the loader records, as tests make them. Plain values, no torch."""

import numpy as np

from depo_plugin.messages import Label, Reason, Record, prompt_key

GROUP = 4


def group(prompt, successes, d=0.5, n=GROUP):
    """Return the label of a group of n responses."""
    return Label(prompt, "answer", successes / n, d, n, 0 < successes < n)


def groups(count, seed=0):
    """Return groups of prompts of 1 to 40 characters whose pass rate falls with their length."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(1, 40))
        prompt = "".join(rng.choice(list("0123456789+"), length)) + f"={seed}{i}"
        d = None if rng.random() < 0.2 else float(rng.uniform(0.1, 0.9))
        made.append(group(prompt, int(rng.binomial(GROUP, 1 - length / 40)), d))
    return made


def record_of(label, **fields):
    """Return what the loader records of one candidate; kept by the rule unless `fields` say otherwise."""
    found = {"key": prompt_key(label.prompt, label.label), "text": (label.prompt, label.label), "p": 0.5, "v": 0.8}
    found |= {"q": 1.0, "keep": True, "reason": Reason.PASSED, "datasource": "math", "share": 1.0}
    return Record(**found | fields)


def rejected(p, v, prompt, **fields):
    """Return the record of a rejected candidate."""
    return record_of(group(prompt, 0), p=p, v=v, keep=False, q=0.1, reason=Reason.REJECTED, **fields)
