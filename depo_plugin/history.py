"""What is known of a prompt beside its text: its own past groups, and how many samples its text is worth (κ).

The belief is a Beta posterior: a = κ·σ(s) + S, b = κ·(1 − σ(s)) + (N − S).
Suffixes: B = prompts asked for, K = prompts known.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from depo_plugin.config import HistoryConfig

KAPPA_START = 8.0
KAPPA_RANGE = (1.0, 1e6)  # the upper end stands for "text only": κ = inf
INFORMATION_KEPT = 0.95  # per update: κ follows about the last 20 updates
MAX_STEP = 0.5  # of log κ per update
DIFFERENCE = 1e-3  # of log κ, for the derivative by central difference


class Scores(NamedTuple):
    """Beliefs about prompts: Beta(a, b) over each one's pass rate, float64 (B,), after `updates` updates."""

    a: np.ndarray
    b: np.ndarray
    updates: int


def prompt_key(prompt: str, label: str) -> int:
    """Return the prompt's identity, a 64-bit number that is the same in every process and after every restart."""
    text = f"{prompt}\0{label}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def beta_binomial_log_likelihood(a: float, b: float, successes: float, samples: float) -> float:
    """Return log B(a + successes, b + samples − successes) − log B(a, b), constant terms left out.

    Holds for fractional successes (rewards between right and wrong) as well.
    """
    lgamma = math.lgamma
    gained = lgamma(a + successes) - lgamma(a) + lgamma(b + samples - successes) - lgamma(b)
    return gained - (lgamma(a + b + samples) - lgamma(a + b))


class PromptHistory:
    """Successes and samples per prompt, fading with time, and κ; 32 bytes a prompt.

    Keys are kept sorted, so that a batch is found by binary search and a resumed run holds them in the same order.
    """

    def __init__(self, cfg: HistoryConfig):
        """Start without evidence. cfg.kappa: "fit", "inf" (text only, nothing is kept) or a number > 0."""
        self.text_only = cfg.kappa == "inf"
        self.fitted = cfg.kappa == "fit"
        self.discount = cfg.discount
        self.kappa = KAPPA_START if self.fitted else KAPPA_RANGE[1] if self.text_only else float(cfg.kappa)
        self.information = 0.0  # Fisher information about log κ, faded
        self.keys_K = np.empty(0, np.uint64)
        self.successes_K = np.empty(0, np.float64)
        self.samples_K = np.empty(0, np.float64)
        self.seen_K = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.keys_K)

    def posterior(self, keys: list[int], prior_B: np.ndarray, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a_B, b_B: a = κ·σ + S, b = κ·(1 − σ) + N − S, with S and N faded since the prompt was last seen.

        keys: B prompt keys; prior_B: σ(s) in (0, 1); now: the estimator's updates so far.
        """
        successes_B, samples_B = self._evidence(np.asarray(keys, np.uint64), now)
        return self._belief(self.kappa, np.asarray(prior_B, np.float64), successes_B, samples_B)

    def update(
        self, keys: list[int], prior_B: np.ndarray, successes_B: np.ndarray, samples_B: np.ndarray, now: int
    ) -> None:
        """Take in one step's groups: fit κ by the belief held before them, then add them.

        successes_B: y·n, not always whole; samples_B: n; a prompt may occur twice; prior_B, now as in posterior().
        """
        if self.text_only or not len(keys):
            return
        keys_B = np.asarray(keys, np.uint64)
        successes_B, samples_B = np.asarray(successes_B, np.float64), np.asarray(samples_B, np.float64)
        if self.fitted:
            self._fit(np.asarray(prior_B, np.float64), self._evidence(keys_B, now), successes_B, samples_B)
        unique, group_B = np.unique(keys_B, return_inverse=True)
        self._insert_missing(unique)
        at = np.searchsorted(self.keys_K, unique)
        fade = self.discount ** (now - self.seen_K[at])
        self.successes_K[at] = fade * self.successes_K[at] + np.bincount(group_B, successes_B)
        self.samples_K[at] = fade * self.samples_K[at] + np.bincount(group_B, samples_B)
        self.seen_K[at] = now

    def state_dict(self) -> dict:
        """Return all that can change a later belief, as copies."""
        return {
            "kappa": self.kappa,
            "information": self.information,
            "keys": self.keys_K.copy(),
            "successes": self.successes_K.copy(),
            "samples": self.samples_K.copy(),
            "seen": self.seen_K.copy(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(); ValueError naming missing or unexpected fields. A κ that is set stays."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"history: fields {sorted(set(state) ^ expected)} are missing or unexpected.")
        if self.fitted:
            self.kappa, self.information = float(state["kappa"]), float(state["information"])
        self.keys_K = np.array(state["keys"], np.uint64)
        self.successes_K = np.array(state["successes"], np.float64)
        self.samples_K = np.array(state["samples"], np.float64)
        self.seen_K = np.array(state["seen"], np.int64)

    @staticmethod
    def _belief(kappa, prior_B, successes_B, samples_B):
        return kappa * prior_B + successes_B, kappa * (1 - prior_B) + samples_B - successes_B

    def _evidence(self, keys_B, now):
        """Return faded successes and samples of keys_B, 0 where a key is not known."""
        if not len(self) or self.text_only:
            return np.zeros(len(keys_B)), np.zeros(len(keys_B))
        at = np.minimum(np.searchsorted(self.keys_K, keys_B), len(self) - 1)
        fade = np.where(self.keys_K[at] == keys_B, self.discount ** (now - self.seen_K[at]), 0.0)
        return fade * self.successes_K[at], fade * self.samples_K[at]

    def _insert_missing(self, unique):
        missing = unique[~np.isin(unique, self.keys_K)]
        if not len(missing):
            return
        at = np.searchsorted(self.keys_K, missing)
        self.keys_K = np.insert(self.keys_K, at, missing)
        self.successes_K = np.insert(self.successes_K, at, 0.0)
        self.samples_K = np.insert(self.samples_K, at, 0.0)
        self.seen_K = np.insert(self.seen_K, at, 0)

    def _fit(self, prior_B, evidence, successes_B, samples_B):
        """Move log κ one step up the Beta-binomial log-likelihood of these groups.

        The step is gradient / information, with the information as the faded sum of squared per-group gradients
        (empirical Fisher), so its size needs no tuning; it is clipped, and so is κ.
        """
        gradient_B = np.array(
            [
                self._slope(*group)
                for group in zip(prior_B, *evidence, successes_B, samples_B, strict=True)
                if group[-1] > 1  # one sample says nothing of how rates scatter around the text's
            ]
        )
        self.information = INFORMATION_KEPT * self.information + float(gradient_B @ gradient_B)
        if self.information > 0:
            step = float(np.clip(gradient_B.sum() / self.information, -MAX_STEP, MAX_STEP))
            self.kappa = float(np.clip(self.kappa * math.exp(step), *KAPPA_RANGE))

    def _slope(self, prior, seen_successes, seen_samples, successes, samples):
        """Return d log-likelihood / d log κ of one group."""

        def at(log_kappa):
            a, b = self._belief(math.exp(log_kappa), prior, seen_successes, seen_samples)
            return beta_binomial_log_likelihood(a, b, successes, samples)

        middle = math.log(self.kappa)
        return (at(middle + DIFFERENCE) - at(middle - DIFFERENCE)) / (2 * DIFFERENCE)
