"""The estimator's Ray actor: one DifficultyEstimator in a process of its own, owned by the driver."""

import contextlib
import functools
import logging
import os
import time
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.metrics import Judgement, shadow_line
from depo_plugin.filter import PromptFilter, record_of
from depo_plugin.messages import Label, Record, Scores
from depo_plugin.remote import handle
from depo_plugin.remote.handle import DROPPED, Loaded, ask_until, last_line
from depo_plugin.remote.pacer import Pacer
from depo_plugin.settings import config

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

PLACEMENT_TIMEOUT_S = 120
BUILD_TIMEOUT_S = 600  # at the start; a first build may compile DeepSpeed's operators
MOST_THREADS = 4  # by default: the models' own processes need the other cores
SNAPSHOT_S = 300.0  # between OpenRLHF's checkpoints: what a restart may lose
SNAPSHOT = Path("snapshot", "newest")  # in a folder of its own: it is no checkpoint of a tag
RETRY_S = 60.0  # after a build that failed, until the next try


class BuildError(RuntimeError):
    """The estimator cannot be built in its actor's process; the text says why."""


class EstimatorActor:
    """Hosts one DifficultyEstimator; calls of one caller run in the order they were made.

    An actor that Ray restarts builds its estimator at once and takes up the checkpoint that its run last saved or
    loaded, or a newer snapshot: Ray's memory monitor may take this process long after OpenRLHF's last checkpoint. If
    that fails (a node without the encoder), it stays, answers with the reason and tries again later.
    """

    def __init__(self, args, group_size: int, snapshot_root: str, run: str):
        """Wait for build().

        args: OpenRLHF's arguments (args.depo holds our settings); group_size: responses per prompt; snapshot_root:
        folder of our checkpoints; a relative one is seen from this process, as OpenRLHF's own workers see theirs (with
        `ray start`, Ray's workers run in another folder than the driver); run: an id of this launch, by which it knows
        its own checkpoints.
        """
        self.args, self.group_size, self.root, self.run = args, group_size, Path(snapshot_root).absolute(), run
        self.rejected: list[Label] = []
        self.judged: list[Label] = []
        self.tally: Counter[str] = Counter()
        self.update_s = 0.0
        self.pacer = Pacer(replaces=args.algo.dynamic_filtering_enable and not args.depo.shadow)
        self.unread: list[str] = []  # prompts that were asked about and are not embedded yet
        self._estimator, self._failure, self._retry_at = None, "", 0.0
        self._written_at = time.monotonic()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            with contextlib.suppress(BuildError):  # said by the first call
                self.build()

    def ping(self) -> None:
        """Return when this process runs."""

    @functools.cached_property
    def filter(self) -> PromptFilter:
        """The filter of shadow mode. Made when asked for: its rule may be a file that this node does not have."""
        return PromptFilter(config.from_namespace(self.args.depo).filter, self.group_size)

    @property
    def estimator(self):
        """The estimator; built first if a restart could not do it. Raises BuildError with the reason."""
        if self._estimator is None:
            if time.monotonic() < self._retry_at:
                raise BuildError(self._failure)
            self.build()
        return self._estimator

    def build(self) -> None:
        """Build the estimator if there is none yet: new, or with what it had learned before a restart.

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

        from depo_plugin.estimator.backends import deepspeed_strategy
        from depo_plugin.estimator.embedding_cache import folder_of
        from depo_plugin.estimator.estimator import DifficultyEstimator  # seconds of imports: not while being placed

        cfg = config.from_namespace(self.args.depo)
        strategy = deepspeed_strategy(self.args) if cfg.estimator.num_gpus > 0 else None
        if strategy is None:
            torch.set_num_threads(cfg.estimator.threads or default_threads())
        cache = folder_of(cfg.estimator.cache_dir, self.root.parent)
        return DifficultyEstimator(cfg, self.group_size, self.args.train.seed, strategy, cache)

    def _take_up_latest(self, made) -> None:
        made.ledger.expect_unmatched()
        lost = "starts from the beginning"
        tag = checkpoint.pointed(self.root, self.run)
        newest = checkpoint.latest_valid(self.root, tag) if tag else None
        if newest is not None:
            tag, state = newest
            made.load_state_dict(state)
            lost = f"has lost what it learned after checkpoint {tag}"
        snapshot = None
        with contextlib.suppress(checkpoint.CheckpointError):
            snapshot = checkpoint.load(self.root / SNAPSHOT)
        if snapshot and snapshot["run"] == self.run and snapshot["state"]["updates"] > made.updates:
            made.load_state_dict(snapshot["state"])
            lost = f"has lost what it learned after its update {made.updates}"
        logger.warning("DEPO: the difficulty estimator was restarted and %s.", lost)

    def score(self, prompts: list[str], labels: list[str], waited_for: bool, sent: float) -> Scores:
        """Return the Scores of these prompts, NaN for those that there was no time to read (see pacer.py).

        waited_for: whether training waits for them; else they are asked for one batch ahead; sent: when they were
        asked for, in seconds since the epoch.
        """
        self.pacer.asked(sent, waited_for)
        if waited_for:
            return self.estimator.score(prompts, labels, self._quick())
        scores = self.estimator.score(prompts, labels, self.pacer.for_scores())
        self.unread = [prompts[i] for i in np.flatnonzero(np.isnan(scores.a))]
        return scores

    def _quick(self) -> float:
        """Return the seconds for reading while someone waits: none if the encoder is behind anyway."""
        return 0.0 if self.unread else self.pacer.for_those_who_wait()

    def record(self, records: list[Record], tally: dict[str, float]) -> None:
        """Take the decisions on a planned batch; tally: what the loader's process adds to the step's metrics."""
        self.tally.update(tally)
        self.estimator.record(records)

    def shadow(
        self, prompts: list[str], labels: list[str], datasources: list[str], tally: dict[str, float], sent: float
    ) -> None:
        """Score prompts that are rolled out anyway, and note what the filter would have done with them."""
        judged = self.filter.judge(self.score(prompts, labels, False, sent), datasources, None)
        rows = zip(datasources, prompts, labels, judged, strict=True)
        self.record([record_of(*row, share=1.0) for row in rows], tally)

    def keep_weights(self, prompts: list[str], labels: list[str]) -> tuple[list[float], list[float]]:
        """Return what the importance weights of these kept prompts are made of (see Ledger.keep_weights)."""
        return self.estimator.keep_weights(prompts, labels)

    def reject(self, label: Label) -> None:
        """Take the label of a group that dynamic filtering threw away; it is judged with the next step's groups."""
        self.rejected.append(label)

    def judge(self, labels: list[Label], dropped: int, sent: float) -> Judgement:
        """Judge one step's groups, and those that dynamic filtering threw away since the last step.

        dropped: groups of this step without a label; sent: as in score(). They are learned from by learn(), a call of
        its own, so that no one waits for it.
        """
        self.pacer.judged(sent)
        rejected, self.rejected, self.judged = self.rejected, [], []
        found = self.estimator.judge(labels, dropped + int(self.tally.pop(DROPPED, 0)), rejected, self._quick())
        self.judged = labels + rejected
        found.metrics.update({"time_update": self.update_s, **self.tally})
        self.tally.clear()
        return found

    def shadow_line(self) -> str | None:
        """Return the sentence of shadow mode (see Ledger.shadow_metrics), None before the first group."""
        return shadow_line(self.estimator.ledger.shadow_metrics())

    def learn(self) -> None:
        """Learn from the groups that were judged last; then read on in the next batch's prompts."""
        start = time.perf_counter()
        judged, self.judged = self.judged, []
        self.tally["labels_unsent"] += self.estimator.learn(judged, self.pacer.for_learning() / 2)
        self.update_s = time.perf_counter() - start
        self.estimator.text.prepare(self.unread, self.pacer.for_learning())
        if time.monotonic() - self._written_at > SNAPSHOT_S:
            self._written_at = time.monotonic()
            with contextlib.suppress(OSError):  # the next save() says it
                checkpoint.save(self.root / SNAPSHOT, {"run": self.run, "state": self.estimator.state_dict()})

    def save(self, tag: str, live_tags: set[str]) -> float | str:
        """Write the checkpoint `tag` and remove ours whose OpenRLHF checkpoint is gone; return the seconds it took.

        Returns what went wrong if it cannot be written: a full disk says nothing about the estimator.
        """
        start, made = time.perf_counter(), self.estimator
        try:
            checkpoint.save(self.root / tag, made.state_dict())
            checkpoint.point(self.root, self.run, tag)
        except OSError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001, a fault of the save, reported as that
            return f"{type(error).__name__}: {error}"
        self._written_at = time.monotonic()
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


def default_threads() -> int:
    """Return how many CPU threads the estimator uses unless told: half of this node's cores, at most MOST_THREADS."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // 2))


def create(args, group_size: int, snapshot_root: str, placement_group=None):
    """Start the estimator's actor, owned by the calling process, and wait until it is placed and built.

    If no CPU is free, it runs without reserving one. If its process dies meanwhile, Ray restarts it, and the same call
    is sent again. Raises RuntimeError naming the settings and what the cluster has free if it cannot be placed in
    PLACEMENT_TIMEOUT_S, and the reason if its process cannot start or it cannot be built.
    """
    settings = args.depo.estimator
    options = {
        "name": handle.actor_name(),
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "max_restarts": -1,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.num_cpus)}},
    }
    if placement_group is not None and settings.num_gpus > 0:
        options["num_cpus"] = settings.num_gpus  # the shared bundles hold one CPU for each GPU
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=placement_group, placement_group_bundle_index=0
        )
    elif settings.num_gpus == 0 and (free := ray.available_resources().get("CPU", 0.0)) < settings.num_cpus:
        options["num_cpus"] = 0
        logger.warning(
            "DEPO: the cluster has %g CPUs free, --depo.estimator.num_cpus is %d: the difficulty estimator reserves "
            "none and shares those of other processes.",
            free,
            settings.num_cpus,
        )
    actor = ray.remote(EstimatorActor).options(**options).remote(args, group_size, snapshot_root, uuid.uuid4().hex)
    try:
        ask_until(actor, "ping", timeout_s=PLACEMENT_TIMEOUT_S)
    except RayTaskError as error:  # Ray could not make it from what its node has installed
        ray.kill(actor)
        raise RuntimeError(
            f"DEPO: the difficulty estimator's process cannot start: {last_line(error)}. openrlhf-depo must be "
            "installed on every node, in the environment of Ray's workers."
        ) from None
    except RayError:
        ray.kill(actor)
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise RuntimeError(
            f"DEPO: the difficulty estimator was not placed within {PLACEMENT_TIMEOUT_S} s. It asks for "
            f"--depo.estimator.num_gpus {settings.num_gpus} and --depo.estimator.num_cpus {settings.num_cpus}; the "
            f"cluster has free: {free}. Lower one of the two or add resources."
        ) from None
    try:
        ask_until(actor, "build", timeout_s=BUILD_TIMEOUT_S)
    except BuildError as error:
        ray.kill(actor)
        reason = getattr(error, "cause", error)  # Ray raises a class of both: its text has the actor's whole traceback
        raise RuntimeError(f"DEPO: the difficulty estimator cannot be built {reason}") from None
    except RayError as error:
        logger.warning(
            "DEPO: the difficulty estimator is not ready after %d s (%s). Training starts without it; prompts are "
            "filtered as soon as it answers.",
            BUILD_TIMEOUT_S,
            last_line(error),
        )
    return actor
