"""What is remembered of each prompt: its own past groups, fading with time. 76 bytes a prompt.

Suffixes: B = prompts asked for, each once, K = prompts known.
"""

from typing import NamedTuple

import numpy as np

VISITS = 4  # the nearest two are put together when another comes
FIELDS = {  # name -> dtype and shape of one prompt's entry
    "keys": (np.uint64, ()),  # prompt_key, sorted: found by binary search, and in the same order after a resume
    "successes": (np.float32, (VISITS,)),
    "samples": (np.float32, (VISITS,)),
    "ability": (np.float32, (VISITS,)),  # the policy's, when the visit's groups were made
    "seen": (np.int32, ()),  # the update that last added evidence
    "site_mean": (np.float32, ()),  # what the evidence says of the prompt's easiness (see belief.py)
    "site_precision": (np.float32, ()),
    "site_score": (np.float32, ()),  # the text's score logit that the site was given to
    "site_at": (np.float32, ()),  # the clock of the text's evidence then
}
SITE = ("site_mean", "site_precision", "site_score", "site_at")


class Evidence(NamedTuple):
    """What past groups say of prompts, float64.

    successes, samples, ability (B, V): faded, by visit, oldest first, samples 0 where there was none; SITE (B,): what
    the first of them gave the text's weights.
    """

    successes: np.ndarray
    samples: np.ndarray
    ability: np.ndarray
    site_mean: np.ndarray
    site_precision: np.ndarray
    site_score: np.ndarray
    site_at: np.ndarray

    def with_visit(self, successes_B, samples_B, ability: float) -> "Evidence":
        """Return it with one more visit; the two neighbours of nearest ability become one, empty ones first."""
        visit = (successes_B, samples_B, np.full(len(samples_B), ability))
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
    """Return what is known of prompts that were never met."""
    return Evidence(*np.zeros((3, count, VISITS)), *np.zeros((4, count)))


class PromptHistory:
    """Evidence by prompt key."""

    def __init__(self, discount: float):
        """Start without evidence. discount: the share that is left of it per update since the prompt was seen."""
        self._discount = discount
        self._arrays = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in FIELDS.items()}

    def __len__(self) -> int:
        return len(self._arrays["keys"])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self._arrays.values())

    def evidence(self, keys_B: np.ndarray, now: int) -> Evidence:
        """Return what is known of these prompts at update `now`, zeros where nothing is."""
        if not len(self):
            return no_evidence(len(keys_B))
        at = np.minimum(np.searchsorted(self._arrays["keys"], keys_B), len(self) - 1)
        known = self._arrays["keys"][at] == keys_B
        found = {name: array[at].astype(np.float64) for name, array in self._arrays.items() if name != "keys"}
        for array in found.values():
            array[~known] = 0
        age = np.where(known, now - found["seen"], 0)
        fade = (self._discount**age)[:, None]
        successes, samples = fade * found["successes"], fade * found["samples"]
        return Evidence(successes, samples, found["ability"], *(found[name] for name in SITE))

    def put(self, keys_B: np.ndarray, evidence: Evidence, now: int) -> None:
        """Replace what is known of these prompts, seen at update `now`. keys_B: sorted, each once."""
        at = np.searchsorted(self._arrays["keys"], keys_B)
        new_B = at == len(self)
        new_B[~new_B] = self._arrays["keys"][at[~new_B]] != keys_B[~new_B]
        if new_B.any():
            at, missing = at[new_B], keys_B[new_B]
            for name, array in self._arrays.items():
                self._arrays[name] = np.insert(array, at, missing if name == "keys" else 0, axis=0)
        at = np.searchsorted(self._arrays["keys"], keys_B)
        for name in ("successes", "samples", "ability", *SITE):
            self._arrays[name][at] = getattr(evidence, name)
        self._arrays["seen"][at] = now

    def state_dict(self) -> dict:
        """Return all evidence, as copies."""
        return {name: array.copy() for name, array in self._arrays.items()}

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(); ValueError naming missing or unexpected fields."""
        if set(state) != set(FIELDS):
            raise ValueError(f"history: fields {sorted(set(state) ^ set(FIELDS))} are missing or unexpected.")
        self._arrays = {name: np.array(state[name], dtype) for name, (dtype, _) in FIELDS.items()}
