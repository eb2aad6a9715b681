"""The way to the estimator from every other process: calls to its Ray actor that never stop training.

A dead or slow actor becomes "no scores" (the loader then keeps every prompt) and one warning; Ray restarts the actor,
which takes up its newest checkpoint. When to send and how long to wait is decided by breaker.py.
"""

import logging
import time
from typing import NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from depo_plugin.estimator.checkpoint import CheckpointError
from depo_plugin.messages import Label, Record, Scores
from depo_plugin.remote.breaker import Breaker, State

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

LOAD_TIMEOUT_S = 600
SAVE_TIMEOUT_S = 600
TALLY = {  # what each process adds to the step's metrics, counted since the last step
    "time_blocked": "seconds that training waited for the estimator",
    "labels_unsent": "groups that were not learned from, because the estimator was behind",
    "clipped": "scores outside --depo.labels.reward_range, clipped to it",
}
RARE = {"load", "save"}  # called too rarely to be answered three times soon
DROPPED = "labels_dropped"  # counted beside them; the estimator keeps its total


def actor_name() -> str:
    """Return the estimator's actor name: one for each Ray job, so that two jobs never share an estimator."""
    return f"depo_estimator_{ray.get_runtime_context().get_job_id()}"


class Loaded(NamedTuple):
    """The answer to load(). tag: the checkpoint that was loaded, None if there is none."""

    tag: str | None


class Call(NamedTuple):
    """A call that was sent to the actor, and the reference of its answer."""

    method: str
    ref: ray.ObjectRef


class PendingScores:
    """Scores that the estimator is computing; result() waits for the handle's timeout at most."""

    def __init__(self, handle: "RemoteEstimator", call: Call | None):
        self._handle, self._call = handle, call

    def result(self) -> Scores | None:
        """Return the Scores, or None if the estimator could not give them in time."""
        return self._handle.wait(self._call)


class RemoteEstimator:
    """The estimator as other processes see it: a messages.EstimatorHandle whose faults become None and one warning.

    The calls of one process run in the order in which they were made.
    """

    def __init__(self, actor, timeout_s: float):
        """Take the actor. timeout_s: seconds that scores, metrics and weights are waited for at most."""
        self.actor = actor
        self.timeout_s = timeout_s
        self.tally = self._no_tally()
        self._breaker = Breaker()
        self._last: ray.ObjectRef | None = None  # of the call sent last
        self._unheard: dict[ray.ObjectRef, str] = {}  # reference -> method of calls that no one waits for

    # ── What is asked and told ──

    def score_async(self, prompts, labels, waited_for: bool = False) -> PendingScores:
        """Ask for the Scores of these prompts without waiting. waited_for: whether result() is called at once."""
        return PendingScores(self, self._call("score", prompts, labels, waited_for, time.time()))

    def record(self, records: list[Record]) -> None:
        """Send the decisions on one scanned batch, and this process's tally, without waiting."""
        if self._tell("record", records, self.tally):
            self.tally = self._no_tally()

    def shadow(self, prompts, labels, datasources) -> None:
        """Show the estimator prompts that are rolled out anyway (shadow mode), and this process's tally."""
        if self._tell("shadow", prompts, labels, datasources, self.tally, time.time()):
            self.tally = self._no_tally()

    def keep_weights(self, prompts, labels) -> tuple[list[float], list[float]] | None:
        """Return keep probabilities and kept/scanned of these prompts; None if the estimator cannot answer."""
        return self.wait(self._call("keep_weights", prompts, labels))

    def judge(self, labels: list[Label]) -> Call | None:
        """Send one step's labels to be judged, without waiting; wait() for the returned call gives the Judgement.

        Groups that were dropped (in the tally) are sent along. Returns None if the estimator is behind: these labels
        are not learned from.
        """
        call = self._call("judge", labels, int(self.tally[DROPPED]), time.time())
        if call is None:
            self.tally["labels_unsent"] += len(labels)
        else:
            self.tally[DROPPED] = 0.0
        return call

    def learn(self) -> None:
        """Have the estimator learn from the groups that were judged last, without waiting."""
        self._tell("learn")

    def reject(self, label: Label) -> None:
        """Send the label of a group that dynamic filtering threw away, without waiting."""
        if not self._tell("reject", label):
            self.tally["labels_unsent"] += 1

    def save(self, tag: str, live_tags: set[str]) -> float | str | None:
        """Write the checkpoint `tag`; return the seconds it took, or what went wrong, or None without an answer."""
        return self.wait(self._call("save", tag, live_tags), SAVE_TIMEOUT_S)

    def load(self, tag: str) -> Loaded | None:
        """Load the checkpoint `tag` or the newest older one; waits out restarts. None if there is no answer in time.

        Raises CheckpointError if the checkpoint is of another estimator.
        """
        try:
            return ask_until(self.actor, "load", tag, timeout_s=LOAD_TIMEOUT_S)
        except CheckpointError:
            raise
        except RayError as error:
            self._failed(error, "load")
            return None

    def take_tally(self) -> dict[str, float]:
        """Return what this process adds to the step's metrics (see TALLY), counted since the last call."""
        taken = {name: self.tally[name] for name in TALLY}
        self.tally = self._no_tally() | {DROPPED: self.tally[DROPPED]}
        return taken

    # ── Sending and waiting ──

    def wait(self, call: Call | None, timeout_s: float | None = None):
        """Return the call's answer; None if the actor died, failed or took too long, or if nothing was sent.

        timeout_s: the handle's own if None.
        """
        if call is None:
            return None
        waited_for = self._state() is not State.OPEN
        limit = self._breaker.limit(self.timeout_s if timeout_s is None else timeout_s)
        start = time.perf_counter()
        try:
            value = ray.get(call.ref, timeout=limit)
        except GetTimeoutError as error:
            if self._breaker.timed_out(call.method):
                self._warn(error)
            return None
        except RayError as error:  # its process died or had no memory, a node with it, its code raised
            self._failed(error, call.method)
            return None
        finally:
            self.tally["time_blocked"] += time.perf_counter() - start
        self._answered(call.method, waited_for)
        return value

    def _call(self, method: str, *args) -> Call | None:
        """Send a call; None, and nothing is sent, while the breaker is open."""
        if self._state() is State.OPEN:
            return None
        self._last = getattr(self.actor, method).remote(*args)
        return Call(method, self._last)

    def _tell(self, method: str, *args) -> bool:
        """Send a call that no one waits for and return whether it was sent; look at how earlier ones ended."""
        call = self._call(method, *args)
        if call is None:
            return False
        self._unheard[call.ref] = method
        ended, _ = ray.wait(list(self._unheard), num_returns=len(self._unheard), timeout=0)
        for ref in ended:
            told = self._unheard.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                self._failed(error, told)
            else:
                self._answered(told, waited_for=False)
        return True

    def _state(self) -> State:
        """Return the breaker's state, after a look at whether the actor has caught up."""
        if self._breaker.state is State.OPEN and ray.wait([self._last], timeout=0)[0]:
            self._breaker.caught_up()
        return self._breaker.state

    def _failed(self, error: RayError, method: str) -> None:
        if self._breaker.failed(method, raised=isinstance(error, RayTaskError) and method not in RARE):
            self._warn(error)

    def _answered(self, method: str, waited_for: bool) -> None:
        if self._breaker.answered(method, waited_for=waited_for):
            logger.warning("DEPO: the difficulty estimator answers again; prompts are filtered as before.")

    def _warn(self, error: Exception) -> None:
        logger.warning(
            "DEPO: the difficulty estimator did not answer (%s: %s). Training goes on, without filtering while there "
            "are no scores. If it is only slow, raise --depo.estimator.timeout_s or threads.",
            type(error).__name__,
            last_line(error),
        )

    @staticmethod
    def _no_tally() -> dict[str, float]:
        return dict.fromkeys([*TALLY, DROPPED], 0.0)


def connect(timeout_s: float) -> RemoteEstimator:
    """Return a handle of this job's estimator actor. Raises ValueError if there is none."""
    return RemoteEstimator(ray.get_actor(actor_name()), timeout_s)


def ask_until(actor, method: str, *args, timeout_s: float):
    """Return the answer of an actor that may be restarted meanwhile: what died with its process is asked again.

    Raises what the method raised, and GetTimeoutError or another RayError if there is no answer within timeout_s.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(getattr(actor, method).remote(*args), timeout=max(0.0, deadline - time.monotonic()))
        except (GetTimeoutError, RayTaskError):
            raise
        except RayError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def last_line(error: Exception) -> str:
    """Return the last line of an error's text. In Ray's errors, that line holds the reason."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
