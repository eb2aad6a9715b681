"""Rollouts to labels: what the estimator learns from one group."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """The outcome of one prompt's group.

    prompt, label: as the policy saw them (the pair is the prompt's identity).
    y: pass rate in [0, 1], mean of the normalised scores.
    d: exp(mean token log-prob) of the group's responses in [1e-4, 1 - 1e-4], or None where it is not known.
    n: number of responses in the group.
    """

    prompt: str
    label: str
    y: float
    d: float | None
    n: int
