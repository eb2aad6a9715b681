"""The evidence of each prompt's own past groups; it fades with time. 80 bytes per prompt.

Suffixes: B = prompts of one call, each once, V = visits.
"""

from typing import NamedTuple

import numpy as np

VISITS = 4  # visits stored per prompt; one more merges two neighbours (see with_visit)
FIELDS = {  # name -> dtype and shape of one prompt's entry
    "keys": (np.uint64, ()),  # prompt_key, sorted: found by binary search, and in the same order after a resume
    "successes": (np.float32, (VISITS,)),
    "samples": (np.float32, (VISITS,)),
    "ability": (np.float32, (VISITS,)),  # the policy's ability when the visit's groups were made
    "visits": (np.int32, ()),  # updates that learned from its groups
    "seen": (np.int32, ()),  # number of the update that last added evidence
    "site_mean": (np.float32, ()),  # the normal factor over the logit that was added to the text regression: its mean
    "site_precision": (np.float32, ()),  # and its precision, 0 if none was added (see belief.py)
    "site_score": (np.float32, ()),  # the score logit that the site was added with
    "site_at": (np.float32, ()),  # the text clock of belief.py when the site was added
}
SITE = ("site_mean", "site_precision", "site_score", "site_at")


class Evidence(NamedTuple):
    """The evidence about B prompts, float64. Visits are in order, oldest first. The site is from the first groups."""

    successes: np.ndarray  # (B, V) right responses, faded; may be fractional
    samples: np.ndarray  # (B, V) responses, faded; 0 for an empty visit
    ability: np.ndarray  # (B, V) the policy's ability at the visit
    site_mean: np.ndarray  # (B,) mean of the normal factor over the logit that was added to the text regression
    site_precision: np.ndarray  # (B,) its precision, 0 if none was added
    site_score: np.ndarray  # (B,) the score logit that it was added with
    site_at: np.ndarray  # (B,) the text clock of belief.py when it was added
    visits: np.ndarray  # (B,) updates that learned from their groups; never faded

    def of(self, chosen_B: np.ndarray) -> "Evidence":
        """Return the evidence about some of the prompts. chosen_B: bool, or indices."""
        return Evidence(*(array[chosen_B] for array in self))

    def with_visit(self, successes_B, samples_B, ability_B) -> "Evidence":
        """Return the evidence with one more visit: two neighbours merge, empty ones or those of nearest ability.

        ability_B: the policy's ability for each prompt, or one for all.
        """
        visit = (successes_B, samples_B, np.broadcast_to(ability_B, len(samples_B)))
        s, n, at = (np.c_[old, new] for old, new in zip(self[:3], visit, strict=True))
        apart = np.where((n[:, 1:] > 0) & (n[:, :-1] > 0), np.abs(np.diff(at)), -1.0)
        row, first = np.arange(len(s)), apart.argmin(1)
        total = n[row, first] + n[row, first + 1]
        weighted = n[row, first] * at[row, first] + n[row, first + 1] * at[row, first + 1]
        at[row, first] = np.divide(weighted, total, out=np.zeros(len(s)), where=total > 0)
        s[row, first] += s[row, first + 1]
        n[row, first] = total
        left = np.arange(VISITS)[None] + (np.arange(VISITS)[None] > first[:, None])
        return self._replace(
            **{name: x[row[:, None], left] for name, x in zip(self._fields[:3], (s, n, at), strict=True)}
        )


def no_evidence(count: int) -> Evidence:
    """Return the empty evidence of `count` prompts that were never met."""
    return Evidence(*np.zeros((3, count, VISITS)), *np.zeros((5, count)))


class PromptHistory:
    """The evidence of all known prompts, by prompt key."""

    def __init__(self):
        """Start without evidence."""
        self._arrays = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in FIELDS.items()}

    def __len__(self) -> int:
        return len(self._arrays["keys"])

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        return sum(array.nbytes for array in self._arrays.values())

    def evidence(self, keys_B: np.ndarray, now: int, keep: float) -> Evidence:
        """Return the evidence of these prompts at update `now`; zeros for an unknown prompt.

        keep: share of it that is left per update since the prompt was last seen.
        """
        if not len(self):
            return no_evidence(len(keys_B))
        at = np.minimum(np.searchsorted(self._arrays["keys"], keys_B), len(self) - 1)
        known = self._arrays["keys"][at] == keys_B
        found = {name: array[at].astype(np.float64) for name, array in self._arrays.items() if name != "keys"}
        for array in found.values():
            array[~known] = 0
        age = np.where(known, now - found["seen"], 0)
        fade = (keep**age)[:, None]
        successes, samples = fade * found["successes"], fade * found["samples"]
        return Evidence(successes, samples, found["ability"], *(found[name] for name in (*SITE, "visits")))

    def put(self, keys_B: np.ndarray, evidence: Evidence, now: int) -> None:
        """Replace the evidence of these prompts, seen at update `now`. keys_B: sorted, each once."""
        at = np.searchsorted(self._arrays["keys"], keys_B)
        new_B = at == len(self)
        new_B[~new_B] = self._arrays["keys"][at[~new_B]] != keys_B[~new_B]
        if new_B.any():
            at, missing = at[new_B], keys_B[new_B]
            for name, array in self._arrays.items():
                self._arrays[name] = np.insert(array, at, missing if name == "keys" else 0, axis=0)
        at = np.searchsorted(self._arrays["keys"], keys_B)
        for name in ("successes", "samples", "ability", "visits", *SITE):
            self._arrays[name][at] = getattr(evidence, name)
        self._arrays["seen"][at] = now

    def state_dict(self) -> dict:
        """Return copies of all arrays."""
        return {name: array.copy() for name, array in self._arrays.items()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state_dict(). Raise ValueError if fields are missing or unexpected."""
        if set(state) != set(FIELDS):
            raise ValueError(f"history: fields {sorted(set(state) ^ set(FIELDS))} are missing or unexpected.")
        self._arrays = {name: np.array(state[name], dtype) for name, (dtype, _) in FIELDS.items()}
