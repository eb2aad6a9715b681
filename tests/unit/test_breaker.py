"""The circuit breaker as a table: what happened, and then its state, its limit and what was said. No Ray."""

import subprocess
import sys

import pytest

from depo_plugin.remote.breaker import ANSWERS, Breaker, State

CLOSED, OPEN, HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN

EVENTS = {  # what may happen to a call, and how the breaker is told; it returns whether to say something
    "answered": lambda breaker, method: breaker.answered(method, waited_for=True),
    "answered unheard": lambda breaker, method: breaker.answered(method, waited_for=False),
    "raised": lambda breaker, method: breaker.failed(method, raised=True),
    "died": lambda breaker, method: breaker.failed(method, raised=False),
    "timed out": lambda breaker, method: breaker.timed_out(method),
    "caught up": lambda breaker, _: breaker.caught_up(),
}


@pytest.mark.parametrize(
    ("events", "state", "limit_s", "said"),
    [
        # Without a fault nothing is said and the whole limit holds.
        ("", CLOSED, 100, ""),
        ("score answered, judge answered", CLOSED, 100, ""),
        # A timed-out wait: open, then half-open with a tenth of the limit, then closed after three answers.
        ("score timed out", OPEN, 0, "fault"),
        ("score timed out, caught up", HALF_OPEN, 10, "fault"),
        ("score timed out, caught up, 2 score answered", HALF_OPEN, 10, "fault"),
        ("score timed out, caught up, score answered, judge answered, score answered", CLOSED, 100, "fault end"),
        # What happens while it is open is no news; answers that come then are late and do not count.
        ("score timed out, 3 judge timed out, caught up", HALF_OPEN, 10, "fault"),
        ("score timed out, 9 score answered, caught up, 2 score answered", HALF_OPEN, 10, "fault"),
        ("score timed out, 9 score answered, caught up, 3 score answered", CLOSED, 100, "fault end"),
        # Each further timeout cuts the limit to a tenth, is not said again, and asks for three answers anew.
        ("score timed out, caught up, score timed out", OPEN, 0, "fault"),
        ("score timed out, caught up, 2 score answered, score timed out, caught up", HALF_OPEN, 1, "fault"),
        ("score timed out, caught up, score timed out, caught up, 3 score answered", CLOSED, 100, "fault end"),
        # The limit is whole again for the next fault, which is said.
        ("score timed out, caught up, 3 score answered, score timed out, caught up", HALF_OPEN, 10, "fault end fault"),
        # A dead process is not waited for, so the limit stays; three answers to any method end the fault.
        ("score died, judge died, score raised", HALF_OPEN, 100, "fault"),
        ("score died, 3 judge answered", CLOSED, 100, "fault end"),
        ("score died, 2 judge answered, score died, 2 judge answered", HALF_OPEN, 100, "fault"),
        # A method that raises must itself answer three times, however much the others answer.
        ("learn raised, 9 score answered", HALF_OPEN, 100, "fault"),
        ("2 learn raised, 9 score answered, 2 learn answered unheard", HALF_OPEN, 100, "fault"),
        ("2 learn raised, 9 score answered, 3 learn answered unheard", CLOSED, 100, "fault end"),
        ("score raised, learn raised, 3 score answered", HALF_OPEN, 100, "fault"),
        ("score raised, learn raised, 3 score answered, 3 learn answered unheard", CLOSED, 100, "fault end"),
        # Answers that no one waited for count for their method alone.
        ("score died, 9 record answered unheard", HALF_OPEN, 100, "fault"),
        ("learn raised, 9 learn answered unheard", HALF_OPEN, 100, "fault"),
        ("learn raised, 9 learn answered unheard, 3 score answered", CLOSED, 100, "fault end"),
        # A call sent before may raise while it is open; it stays open until the last call is answered.
        ("score timed out, learn raised", OPEN, 0, "fault"),
        ("score timed out, learn raised, caught up, 3 score answered", HALF_OPEN, 10, "fault"),
        ("score timed out, learn raised, caught up, 3 score answered, 3 learn answered", CLOSED, 100, "fault end"),
        ("learn raised, score timed out, 3 learn answered unheard", OPEN, 0, "fault"),
    ],
)
def test_events_give_a_state_a_limit_and_one_word_at_each_end_of_a_fault(events, state, limit_s, said):
    assert ANSWERS == 3
    breaker, heard = Breaker(), []
    for event in filter(None, events.split(", ")):
        times, event = event.split(" ", 1) if event[0].isdigit() else ("1", event)
        kind = next(kind for kind in EVENTS if event.endswith(kind))
        for _ in range(int(times)):
            if EVENTS[kind](breaker, event.removesuffix(kind).strip()):
                heard.append("end" if kind.startswith("answered") else "fault")
    assert (breaker.state, breaker.limit(100.0)) == (state, pytest.approx(limit_s))
    assert " ".join(heard) == said


def test_the_breaker_is_known_without_ray():
    code = "import sys; import depo_plugin.remote.breaker; assert not {'ray', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
