"""How long the estimator may read new prompts without anyone waiting for it.

A step as the estimator's process sees it, and when it may read:

    scores are asked for ── the GPUs roll out ──> groups are judged ── the policy trains ──> scores are asked for
                          [for the next batch]                       [what is learned, then the rest of that batch]

A slow encoder then costs a share of the predictions, in proportion, and no waiting.
"""

import time
from collections import deque
from collections.abc import Callable

FIRST_S = 30.0  # of each part, before its length was seen
SHARE = 0.98  # of each part's time, the shorter of the last two: one may hold an evaluation
WAITED_SHARE = 0.01  # of a step, while training waits
LEAST_S = 2.0  # of everything: short steps wait so long, and with a fast encoder nothing depends on timing then


class Pacer:
    """Notes when scores were asked for and groups were sent, and says how long each kind of work may take from now on.

    Times are those at which the callers sent, in seconds since the epoch: a call may have waited for the one before.
    """

    def __init__(self, clock: Callable[[], float] = time.time, *, replaces: bool = False):
        """clock: seconds since the epoch.

        replaces: whether groups are thrown away and replaced during the rollouts (dynamic filtering). Then the
        rollouts wait for the next batch's scores at the first replacement.
        """
        self._clock, self._replaces = clock, replaces
        self._asked_at: float | None = None  # for the next batch's scores
        self._judged_at: float | None = None
        self._trains = False  # whether nothing was asked since the last groups
        self._rolling = deque([FIRST_S], maxlen=2)  # seconds of the last two
        self._training = deque([FIRST_S], maxlen=2)

    def asked(self, sent: float, waited_for: bool) -> None:
        """Note a question for scores."""
        if self._trains and self._judged_at is not None:
            self._training.append(sent - self._judged_at)
            self._trains = False
        if not waited_for:
            self._asked_at = sent

    def judged(self, sent: float) -> None:
        """Note a step's groups."""
        if not self._trains and self._asked_at is not None:
            self._rolling.append(sent - self._asked_at)
        self._judged_at, self._trains = sent, True

    def for_scores(self) -> float:
        """Return the seconds for the next batch's scores."""
        if self._replaces:
            return LEAST_S
        return max(LEAST_S, self._left(self._asked_at, SHARE * min(self._rolling)))

    def for_learning(self) -> float:
        """Return the seconds for learning and then reading on, before the next question; 0 if they are over."""
        return self._left(self._judged_at, max(LEAST_S, SHARE * min(self._training)))

    def for_those_who_wait(self) -> float:
        """Return the seconds for scores that training waits for."""
        return max(LEAST_S, WAITED_SHARE * (min(self._rolling) + min(self._training)))

    def _left(self, since: float | None, seconds: float) -> float:
        return max(0.0, seconds if since is None else since + seconds - self._clock())
