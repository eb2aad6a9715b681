"""The circuit breaker between training and its estimator: when to send a call, how long to wait, what to say.

              a wait timed out                         the call sent last was answered
    CLOSED ----------------------> OPEN ----------------------------------> HALF_OPEN
      |  \\                          ^                                        |    |
      |   '-- a call failed --------|--> HALF_OPEN       a wait timed out ----'    |
      |                                                                           |
      '<------------------ enough answers in a row -------------------------------'

CLOSED: calls are sent and waited for. OPEN: nothing is sent and nothing waits. HALF_OPEN: calls are sent again, and
each timed-out wait since the fault has cut the limit to a tenth, so that a slow estimator costs about one timeout in
total. A fault is warned of once, when CLOSED ends; its end is said once, when CLOSED comes back.

Knows nothing of Ray: it is told what happened, and answers what to do.
"""

from collections import Counter
from enum import Enum

ANSWERS = 3  # in a row that end a fault: an estimator that answers every second call is still faulty
ANY = "any"  # what an answer to any method counts for, beside its own method


class State(Enum):
    """What may be sent."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Counts answers and faults of one process's calls."""

    def __init__(self):
        """Start closed."""
        self._missing: Counter[str] = Counter()  # answers that are still needed to close, by method and ANY
        self._timeouts = 0  # timed-out waits since it was last closed
        self._open = False

    @property
    def state(self) -> State:
        """Where it stands."""
        if self._open:
            return State.OPEN
        return State.HALF_OPEN if self._missing else State.CLOSED

    def limit(self, timeout_s: float) -> float:
        """Return how many seconds to wait for an answer now; 0 while it is open."""
        return 0.0 if self._open else timeout_s * 0.1**self._timeouts

    def timed_out(self, method: str) -> bool:
        """Note that a wait timed out; return whether to warn. While it is open this is no news."""
        if self._open:
            return False
        self._open, self._timeouts = True, self._timeouts + 1
        return self._fault(method, raised=False)

    def failed(self, method: str, *, raised: bool) -> bool:
        """Note that a call failed; return whether to warn.

        raised: the method itself raised. It must then answer ANSWERS times before the breaker closes: other methods
        may well go on answering. Otherwise the estimator's process died, or had no memory.
        """
        return self._fault(method, raised)

    def answered(self, method: str, *, waited_for: bool) -> bool:
        """Note an answer; return whether it closed the breaker, so that the end of the fault is said.

        waited_for: the answer came within the limit of a wait. Other answers count for their method alone.
        """
        if not self._missing:
            return False
        counts = [method, ANY] if waited_for and not self._open else [method]
        self._missing -= Counter(counts)  # keeps what is above 0
        if self._missing:
            return False
        self._timeouts = 0
        return True

    def caught_up(self) -> None:
        """Note that the call sent last was answered, so that all calls before it were, too."""
        self._open = False

    def _fault(self, method: str, raised: bool) -> bool:
        first = not self._missing
        self._missing[ANY] = ANSWERS
        if raised:
            self._missing[method] = ANSWERS
        return first
