"""How long the estimator may read new prompts without anyone waiting for it.

A step as the estimator's process sees it, and when it may read:

    scores are asked for ── the GPUs roll out ──> groups are judged ── the policy trains ──> scores are asked for
                          [for the next batch]                       [what is learned, then the rest of that batch]

A slow encoder then costs a share of the predictions, in proportion, and no waiting.
"""

import time
from collections.abc import Callable

FIRST_S = 30.0  # of each part, before its length was seen
SHARE = 0.95  # of the time from the question to the groups, as it was in the step before
LEARNING_SHARE = 0.9  # of the time from the groups to the next question
WAITED_SHARE = 0.01  # of a step, while training waits
LEAST_S = (
    1.0  # of everything: a short step waits so long for a fast encoder, and its batches then do not depend on timing
)


class Pacer:
    """Watches when scores are asked for and groups are judged, and says how long each kind of work may take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """clock: seconds from any start."""
        self._clock = clock
        self._asked_at: float | None = None
        self._judged_at: float | None = None
        self._rolling_s = self._training_s = FIRST_S

    def asked(self) -> None:
        """Note that the next batch's scores are asked for."""
        if self._judged_at is not None and (self._asked_at is None or self._asked_at < self._judged_at):
            self._training_s = self._clock() - self._judged_at
        self._asked_at = self._clock()

    def judged(self) -> None:
        """Note that a step's groups came."""
        if self._asked_at is not None and (self._judged_at is None or self._judged_at < self._asked_at):
            self._rolling_s = self._clock() - self._asked_at
        self._judged_at = self._clock()

    def for_scores(self) -> float:
        """Return the seconds for the next batch's scores, from now on."""
        return max(LEAST_S, SHARE * self._rolling_s)

    def for_learning(self) -> float:
        """Return the seconds that are left for learning and reading on, before the next question."""
        spent = 0.0 if self._judged_at is None else self._clock() - self._judged_at
        return max(0.0, max(LEAST_S, LEARNING_SHARE * self._training_s) - spent)

    def for_those_who_wait(self) -> float:
        """Return the seconds for scores that training waits for."""
        return max(LEAST_S, WAITED_SHARE * (self._rolling_s + self._training_s))
