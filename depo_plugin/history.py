"""What is remembered of each prompt: its own past groups, fading with time. 32 bytes a prompt.

Suffixes: B = prompts asked for, each once, K = prompts known.
"""

import hashlib
from typing import NamedTuple

import numpy as np

FIELDS = {  # one array each, by prompt
    "keys": np.uint64,  # prompt_key, sorted: found by binary search, and in the same order after a resume
    "successes": np.float32,
    "samples": np.float32,
    "ability": np.float32,  # the policy's ability when the evidence was made, averaged over its samples
    "seen": np.int32,  # the update that last added evidence
    "site_mean": np.float32,  # what the evidence says of the prompt's easiness (see belief.py)
    "site_precision": np.float32,
}


class Scores(NamedTuple):
    """Beliefs about prompts: Beta(a, b) over each one's pass rate, float64 (B,), after `updates` updates."""

    a: np.ndarray
    b: np.ndarray
    updates: int


class Evidence(NamedTuple):
    """What past groups say of prompts, float64 (B,): faded successes and samples, the mean ability they were made at,
    the site they give the text's weights, and the updates since the prompt was last seen."""

    successes: np.ndarray
    samples: np.ndarray
    ability: np.ndarray
    site_mean: np.ndarray
    site_precision: np.ndarray
    age: np.ndarray


def prompt_key(prompt: str, label: str) -> int:
    """Return the prompt's identity, a 64-bit number that is the same in every process and after every restart."""
    text = f"{prompt}\0{label}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class PromptHistory:
    """Evidence by prompt key."""

    def __init__(self, discount: float):
        """Start without evidence. discount: the share that is left of it per update since the prompt was seen."""
        self._discount = discount
        self._arrays = {name: np.empty(0, dtype) for name, dtype in FIELDS.items()}

    def __len__(self) -> int:
        return len(self._arrays["keys"])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self._arrays.values())

    def evidence(self, keys_B: np.ndarray, now: int) -> Evidence:
        """Return what is known of these prompts at update `now`, zeros where nothing is."""
        if not len(self):
            return Evidence(*np.zeros((6, len(keys_B))))
        at = np.minimum(np.searchsorted(self._arrays["keys"], keys_B), len(self) - 1)
        known = self._arrays["keys"][at] == keys_B
        found = {name: np.where(known, array[at], 0).astype(np.float64) for name, array in self._arrays.items()}
        age = np.where(known, now - found["seen"], 0)
        fade = self._discount**age
        return Evidence(
            fade * found["successes"],
            fade * found["samples"],
            found["ability"],
            found["site_mean"],
            found["site_precision"],
            age,
        )

    def put(self, keys_B: np.ndarray, evidence: Evidence, now: int) -> None:
        """Replace what is known of these prompts, seen at update `now`. keys_B: sorted, each once."""
        missing = keys_B[~np.isin(keys_B, self._arrays["keys"])]
        if len(missing):
            at = np.searchsorted(self._arrays["keys"], missing)
            for name, array in self._arrays.items():
                self._arrays[name] = np.insert(array, at, missing if name == "keys" else 0)
        at = np.searchsorted(self._arrays["keys"], keys_B)
        for name in ("successes", "samples", "ability", "site_mean", "site_precision"):
            self._arrays[name][at] = getattr(evidence, name)
        self._arrays["seen"][at] = now

    def state_dict(self) -> dict:
        """Return all evidence, as copies."""
        return {name: array.copy() for name, array in self._arrays.items()}

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(); ValueError naming missing or unexpected fields."""
        if set(state) != set(FIELDS):
            raise ValueError(f"history: fields {sorted(set(state) ^ set(FIELDS))} are missing or unexpected.")
        self._arrays = {name: np.array(state[name], dtype) for name, dtype in FIELDS.items()}
