"""Both ends of the wire: the estimator's Ray actor, and the handle that every other process uses.

The estimator is advice, never a dependency: the handle turns a dead or slow actor into "no scores" (the loader then
keeps every prompt) with one warning; Ray restarts the actor, which takes up its newest checkpoint.

    training at a step's pace:  call, call, wait ... answer      | a wait in vain: one warning, and from then on
    the actor:                  runs them in this process's order | nothing is sent and nothing waits until the call
                                                                  | sent last is answered
"""

import contextlib
import logging
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from depo_plugin import checkpoint, config

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

PLACEMENT_TIMEOUT_S = 120
BUILD_TIMEOUT_S = 600  # at the start; a first build may compile DeepSpeed's operators
LOAD_TIMEOUT_S = 600
SAVE_TIMEOUT_S = 600
RETRY_S = 60.0  # after a build that failed, until the next try
SOUND = 3  # answers in a row that end a fault: an estimator that gives every second one has it still
ANY = "any"  # what every answer counts for, beside its own method
TALLY = {  # what each process adds to the step's metrics
    "time_blocked": "seconds that training waited for the estimator",
    "labels_unsent": "groups since the last step that were not learned from, because the estimator was behind",
    "labels_dropped": "groups without a label, because a score is NaN or infinite (logged as a total)",
    "clipped": "scores outside --depo.labels.reward_range since the last step, clipped to it",
}


def actor_name() -> str:
    """Return the estimator's actor name: one per Ray job, so that two jobs never share an estimator."""
    return f"depo_estimator_{ray.get_runtime_context().get_job_id()}"


class BuildError(RuntimeError):
    """The estimator cannot be built in its actor's process; the text says why."""


class Loaded(NamedTuple):
    """What a checkpoint was asked for and answered with: `tag` is the one that was loaded, None if there is none."""

    tag: str | None


class EstimatorActor:
    """Hosts one DifficultyEstimator; calls of one caller run in the order they were made.

    An actor that Ray restarts builds its estimator at once and takes up the checkpoint that its run last saved or
    loaded. If that fails (a node without the encoder), it stays, answers with the reason and tries again later.
    """

    def __init__(self, args, group_size: int, snapshot_root: str, run: str):
        """Wait for build().

        args: OpenRLHF's arguments (args.depo holds our settings); group_size: responses per prompt;
        snapshot_root: folder of our checkpoints; run: an id of this launch, by which it knows its own checkpoints.
        """
        self.args, self.group_size, self.root, self.run = args, group_size, Path(snapshot_root), run
        self.rejected, self.judged = [], []
        self.tally, self.update_s = Counter(), 0.0
        self._estimator, self._failure, self._retry_at = None, "", 0.0
        if ray.get_runtime_context().was_current_actor_reconstructed:
            with contextlib.suppress(BuildError):  # said by the first call
                self.build()

    def ping(self) -> None:
        """Return when this process runs."""

    @property
    def estimator(self):
        """The estimator; built first if a restart could not do it. Raises BuildError with the reason."""
        if self._estimator is None:
            if time.monotonic() < self._retry_at:
                raise BuildError(self._failure)
            self.build()
        return self._estimator

    def build(self) -> None:
        """Build the estimator, unless it is there: new, or with what it had learned before a restart.

        Raises BuildError with node and reason.
        """
        if self._estimator is not None:
            return
        try:
            made = self._new()
            if ray.get_runtime_context().was_current_actor_reconstructed:
                self._take_up_latest(made)
        except Exception as error:  # whatever it is, it goes to the caller
            self._failure = f"on node {ray.util.get_node_ip_address()}: {type(error).__name__}: {error}"
            self._retry_at = time.monotonic() + RETRY_S
            raise BuildError(self._failure) from error
        self._estimator = made

    def _new(self):
        """Return a new estimator on this actor's device: a DeepSpeed engine with a GPU share, else plain torch."""
        import torch

        from depo_plugin.estimator import DifficultyEstimator  # seconds of imports: no part of being placed

        cfg = config.from_namespace(self.args.depo)
        strategy = None
        if cfg.estimator.num_gpus > 0:
            from depo_plugin.backends import deepspeed_strategy

            strategy = deepspeed_strategy(self.args)
        else:
            torch.set_num_threads(cfg.estimator.num_cpus)
        cache = self.root.with_name("depo_embeddings")  # beside our checkpoints: pruning those must not touch it
        return DifficultyEstimator(cfg, self.group_size, self.args.train.seed, strategy, cache)

    def _take_up_latest(self, made):
        made.watch_unmatched = False
        lost = "starts from the beginning"
        tag = checkpoint.pointed(self.root, self.run)
        newest = checkpoint.latest_valid(self.root, tag) if tag else None
        if newest is not None:
            tag, state = newest
            made.load_state_dict(state)
            lost = f"has lost what it learned after checkpoint {tag}"
        logger.warning("DEPO: the difficulty estimator was restarted and %s.", lost)

    def score(self, prompts: list[str], labels: list[str]):
        """Return the Scores of these prompts (see DifficultyEstimator.score)."""
        return self.estimator.score(prompts, labels)

    def record(self, records: list[dict], tally: dict[str, float]) -> None:
        """Remember a planned batch's decisions; tally: what the loader's process adds to the step's metrics."""
        self.tally.update(tally)
        self.estimator.record(records)

    def keep_weights(self, prompts: list[str], labels: list[str]) -> tuple[list[float], list[float]]:
        """Return what the importance weights of these kept prompts are made of (see DifficultyEstimator)."""
        return self.estimator.keep_weights(prompts, labels)

    def reject(self, label) -> None:
        """Take the Label of a group that dynamic filtering threw away; it is learned with the next step's groups."""
        self.rejected.append(label)

    def observe(self, labels: list) -> dict:
        """Judge one step's groups; return the step's metrics by name without the prefix depo/. learn() comes next."""
        labels, self.rejected, self.judged = labels + self.rejected, [], []
        metrics = self.estimator.judge(labels)
        self.judged = labels
        metrics |= {"time_update": self.update_s, **self.tally}
        self.tally.clear()
        return metrics

    def learn(self) -> None:
        """Learn from the groups that were judged last: a call of its own, so that no one waits for it."""
        start = time.perf_counter()
        judged, self.judged = self.judged, []
        self.estimator.learn(judged)
        self.update_s = time.perf_counter() - start

    def save(self, tag: str, live_tags: set[str]) -> float | str:
        """Write the checkpoint `tag`, drop ours whose OpenRLHF checkpoint is gone, return the seconds it took.

        Returns what went wrong if it cannot be written: a full disk says nothing about the estimator.
        """
        start, made = time.perf_counter(), self.estimator
        try:
            checkpoint.save(self.root / tag, made.state_dict())
            checkpoint.point(self.root, self.run, tag)
        except OSError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001, a fault of the save, named as that
            return f"{type(error).__name__}: {error}"
        checkpoint.prune(self.root, live_tags | {tag})
        return time.perf_counter() - start

    def load(self, tag: str) -> Loaded:
        """Load the checkpoint `tag`, or the newest valid older one. Raises CheckpointError if it does not fit."""
        with contextlib.suppress(OSError):  # a folder that cannot be written: only a restart could not find it
            checkpoint.point(self.root, self.run, tag)  # first, so that a restart takes it up by itself
        made = self.estimator
        found = checkpoint.latest_valid(self.root, tag)
        if found is None:
            return Loaded(None)
        used, state = found
        made.load_state_dict(state)
        return Loaded(used)


def create(args, group_size: int, snapshot_root: str, placement_group=None):
    """Start the estimator's actor, owned by the calling process, and wait until it is placed and built.

    Its process may die meanwhile: Ray restarts it, and what it was asked is asked again. Raises RuntimeError naming
    the settings and what the cluster has free if it cannot be placed in PLACEMENT_TIMEOUT_S, and the reason if it
    cannot be built.
    """
    settings = args.depo.estimator
    options = {
        "name": actor_name(),
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "max_restarts": -1,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.num_cpus)}},
    }
    if placement_group is not None and settings.num_gpus > 0:
        options["num_cpus"] = settings.num_gpus  # the shared bundles hold one CPU to each GPU
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=placement_group, placement_group_bundle_index=0
        )
    actor = ray.remote(EstimatorActor).options(**options).remote(args, group_size, snapshot_root, uuid.uuid4().hex)
    try:
        _ask_until(actor, "ping", timeout_s=PLACEMENT_TIMEOUT_S)
    except RayError:
        ray.kill(actor)
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise RuntimeError(
            f"DEPO: the difficulty estimator was not placed within {PLACEMENT_TIMEOUT_S} s. It asks for "
            f"--depo.estimator.num_gpus {settings.num_gpus} and --depo.estimator.num_cpus {settings.num_cpus}; the "
            f"cluster has free: {free}. Lower one of the two or add resources."
        ) from None
    try:
        _ask_until(actor, "build", timeout_s=BUILD_TIMEOUT_S)
    except BuildError as error:
        ray.kill(actor)
        raise RuntimeError(f"DEPO: the difficulty estimator cannot be built {error.cause}") from None
    except RayError as error:
        logger.warning(
            "DEPO: the difficulty estimator is not ready after %d s (%s). Training starts without it; prompts are "
            "filtered as soon as it answers.",
            BUILD_TIMEOUT_S,
            _last_line(error),
        )
    return actor


def _ask_until(actor, method: str, *args, timeout_s: float):
    """Return the answer of an actor that may be restarted meanwhile: what died with its process is asked again.

    Raises what the method raised, and GetTimeoutError or another RayError if there is no answer in timeout_s.
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


def _last_line(error: Exception) -> str:
    """Return the last line of an error's text, where Ray puts the reason."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class Call(NamedTuple):
    """A call that was sent to the actor, and the reference of its answer."""

    method: str
    ref: ray.ObjectRef


class PendingScores:
    """Scores that the estimator is computing; result() waits at most the handle's timeout."""

    def __init__(self, handle, call: Call | None):
        self._handle, self._call = handle, call

    def result(self):
        """Return the Scores, or None where the estimator could not give them in time."""
        return self._handle.wait(self._call, self._handle.timeout_s)


class EstimatorHandle:
    """The estimator as other processes see it; faults of the actor become None and one warning.

    It is sound again after SOUND answers in a row, and where a method raised, after as many of that method: the others
    may well go on answering. Until then, each wait in vain leaves a tenth of the patience for the next: all together
    take little more than one timeout, however long the estimator is slow.
    """

    def __init__(self, actor, timeout_s: float):
        self.actor = actor
        self.timeout_s = timeout_s
        self.tally = dict.fromkeys(TALLY, 0.0)
        self._owed = Counter()  # answers that end the fault which was warned of, by method and ANY; empty: no fault
        self._vain = 0  # waits in vain since the estimator was last sound
        self._behind = False  # after one, until the call sent last is answered
        self._last = None  # the reference sent last: this process's calls run in order, all others are answered before
        self._unheard = {}  # reference -> method of the calls that no one waits for

    def wait(self, call: Call | None, timeout_s: float):
        """Return the call's answer, or None where the actor died, failed or took too long, or nothing was sent."""
        if call is None:
            return None
        behind, start = self._is_behind(), time.perf_counter()
        try:
            value = ray.get(call.ref, timeout=0 if behind else timeout_s * 0.1**self._vain)
        except GetTimeoutError as error:
            if not behind:
                self._behind, self._vain = True, self._vain + 1
                self._fault(error, call.method)
            return None
        except RayError as error:  # its process died or had no memory, a node with it, its code raised
            self._fault(error, call.method)
            return None
        finally:
            self.tally["time_blocked"] += time.perf_counter() - start
        self._answered(call.method, *([] if behind else [ANY]))
        return value

    def _is_behind(self) -> bool:
        self._behind = self._behind and not ray.wait([self._last], timeout=0)[0]
        return self._behind

    def _fault(self, error, method: str):
        if not self._owed:
            logger.warning(
                "DEPO: the difficulty estimator did not answer (%s: %s). Training goes on, without filtering where it "
                "gives no scores. If it is only slow, raise --depo.estimator.timeout_s or num_cpus.",
                type(error).__name__,
                _last_line(error),
            )
        self._owed[ANY] = SOUND
        if isinstance(error, RayTaskError):
            self._owed[method] = SOUND

    def _answered(self, *counts: str):
        if not self._owed:
            return
        self._owed -= Counter(counts)  # keeps what is above 0
        if not self._owed:
            self._vain = 0
            logger.warning("DEPO: the difficulty estimator answers again; prompts are filtered as before.")

    def _call(self, method: str, *args) -> Call | None:
        """Send a call; None, and nothing is sent, while the estimator is behind."""
        if self._is_behind():
            return None
        self._last = getattr(self.actor, method).remote(*args)
        return Call(method, self._last)

    def _tell(self, method: str, *args) -> bool:
        """Send a call that no one waits for and return whether it was sent; say if one of those before has failed."""
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
                self._fault(error, told)
            else:
                self._answered(told)
        return True

    def take_tally(self) -> dict[str, float]:
        """Return what this process adds to the step's metrics, counted since the last call (see TALLY)."""
        tally, self.tally = self.tally, dict.fromkeys(TALLY, 0.0)
        return tally

    def score_async(self, prompts: list[str], labels: list[str]) -> PendingScores:
        """Ask for the Scores of these prompts without waiting."""
        return PendingScores(self, self._call("score", prompts, labels))

    def record(self, records: list[dict]) -> None:
        """Tell the estimator what was scanned and kept, without waiting."""
        if self._tell("record", records, self.tally):
            self.take_tally()

    def keep_weights(self, prompts: list[str], labels: list[str]) -> tuple[list[float], list[float]] | None:
        """Return keep probabilities and kept/scanned of these prompts, None where the estimator cannot answer."""
        return self.wait(self._call("keep_weights", prompts, labels), self.timeout_s)

    def observe(self, labels: list) -> Call | None:
        """Send one step's labels, to be judged and learned, without waiting.

        The returned call's answer is the step's metrics, before the learning (if that fails, a later call tells); None
        where the estimator is behind: these labels are not learned from.
        """
        metrics = self._call("observe", labels)
        if metrics is None:
            self.tally["labels_unsent"] += len(labels)
        else:
            self._tell("learn")
        return metrics

    def reject(self, label) -> None:
        """Send the label of a group that dynamic filtering threw away, without waiting."""
        if not self._tell("reject", label):
            self.tally["labels_unsent"] += 1

    def save(self, tag: str, live_tags: set[str]) -> float | str | None:
        """Write the checkpoint `tag`; return the seconds it took, what went wrong, or None without an answer."""
        return self.wait(self._call("save", tag, live_tags), SAVE_TIMEOUT_S)

    def load(self, tag: str) -> Loaded | None:
        """Load the checkpoint `tag` or the newest older one; waits out restarts. None if there is no answer in time.

        Raises CheckpointError if the checkpoint is of another estimator.
        """
        try:
            return _ask_until(self.actor, "load", tag, timeout_s=LOAD_TIMEOUT_S)
        except checkpoint.CheckpointError:
            raise
        except RayError as error:
            self._fault(error, "load")
            return None


def connect(timeout_s: float) -> EstimatorHandle:
    """Return a handle of this job's estimator actor; ValueError where there is none."""
    return EstimatorHandle(ray.get_actor(actor_name()), timeout_s)
