"""The methods that are compared. Each is a factory of an object that draws batches and learns from their groups.

    draw(count) -> prompt indices    learn(labels)    scanned() -> scans since the last call    seconds    resample

Most use the project's own DifficultyFilteredLoader and differ in the learner that scores.
Suffix: B = prompts of one call.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.replay import bandits, learners, texts
from benchmarks.replay.world import Policy
from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.messages import Label, Record, prompt_key
from depo_plugin.settings.config import DepoConfig, FilterConfig, load_config

ENDLESS = 10**9  # episodes
NARROW = {"filter.low": 0.2, "filter.high": 0.8}  # less coverage, for comparison with methods that cover less
PAPER_OVERRIDES = {"estimator.model": None}  # the bundled MiniLM in place of distilbert


class Done:
    """A finished request for scores."""

    def __init__(self, scores):
        self._scores = scores

    def result(self):
        """Return the scores."""
        return self._scores


class LoaderMethod:
    """The project's loader with a learner that has the estimator's verbs. It is also the loader's handle."""

    streams = True  # each prompt is met once in a pass

    def __init__(self, policy: Policy, learner, cfg: FilterConfig, seed: int, *, predicts=True, resample=False):
        """predicts: whether scores are predictions; resample: whether to draw again until all groups are effective."""
        self._pool, self._learner = policy.pool, learner
        self._predicts, self.resample = predicts, resample
        self.seconds = 0.0
        self._scanned: list[tuple] = []
        self._count = 0
        self._key_index = {prompt_key(prompt, ""): i for i, prompt in enumerate(policy.pool.prompts)}
        dataset = [("replay", prompt, "", i) for i, prompt in enumerate(policy.pool.prompts)]
        inner = SimpleNamespace(dataset=dataset, collate_fn=lambda items: items[0][3], num_workers=0)
        self._loader = DifficultyFilteredLoader(
            inner,
            self,
            cfg,
            batch_size=policy.pool.batch,
            group_size=policy.group_size,
            seed=seed,
            num_episodes=ENDLESS,
        )

    def draw(self, count: int) -> np.ndarray:
        """Return the indices of the loader's next prompts."""
        drawn = []
        while len(drawn) < count:
            try:
                drawn.append(next(self._loader))
            except StopIteration:
                iter(self._loader)
        return np.array(drawn)

    def learn(self, labels: list[Label]) -> None:
        """Give one step's groups to the learner."""
        start = time.perf_counter()
        self._learner.judge(labels)
        self._learner.learn(labels)
        self.seconds += time.perf_counter() - start

    def scanned(self) -> list[tuple]:
        """Return (index_B, p_B or None, v_B or None, kept_B) of each scan since the last call."""
        found, self._scanned = self._scanned, []
        return found

    def passes(self) -> float:
        """Return the number of passes over the pool that have been scanned."""
        return self._count / len(self._pool.prompts)

    # ── The loader's handle ──

    def score_async(self, prompts: list[str], labels: list[str], waited_for: bool = False) -> Done:
        """Score at once."""
        start = time.perf_counter()
        scores = self._learner.score(prompts, labels)
        self.seconds += time.perf_counter() - start
        return Done(scores)

    def record(self, records: list[Record]) -> None:
        """Store the decisions of one planned batch, and give them to the learner."""
        self._learner.record(records)
        index_B = np.array([self._key_index[one.key] for one in records])
        p_B = v_B = None
        if self._predicts:
            p_B, v_B = (np.array([getattr(one, name) for one in records], np.float64) for name in "pv")
        self._count += len(records)
        self._scanned.append((index_B, p_B, v_B, np.array([one.keep for one in records])))


@dataclass(frozen=True)
class Setup:
    """The arguments of a factory."""

    policy: Policy  # the simulated policy
    seed: int  # of the loader and the learner
    overrides: Mapping[str, Any] = field(default_factory=dict)  # changes of depo's settings
    keep_rate: float | None = None  # of depo on the same pool, seed and group size; only `random` needs it
    cache: Path | None = None  # folder of texts and embeddings


def depo_config(overrides: Mapping[str, Any]) -> DepoConfig:
    """Return the recommended settings with these changes."""
    return load_config("depo", overrides)


def paper_config() -> DepoConfig:
    """Return the paper's settings with an encoder that needs no network."""
    return load_config("depo_paper", PAPER_OVERRIDES)


def _estimated(setup: Setup, cfg: DepoConfig):
    from depo_plugin.estimator.estimator import DifficultyEstimator

    cache = setup.cache and texts.estimator_cache(setup.cache)
    estimator = DifficultyEstimator(cfg, setup.policy.group_size, setup.seed, cache_dir=cache)
    return LoaderMethod(setup.policy, estimator, cfg.filter, setup.seed)


def _plain(setup: Setup, resample: bool):
    learner = learners.Learner(setup.policy)
    return LoaderMethod(setup.policy, learner, depo_config({}).filter, setup.seed, predicts=False, resample=resample)


def _random(setup: Setup):
    cfg = replace(depo_config({}).filter, rule="utility", min_utility=1.0, epsilon=setup.keep_rate)
    return LoaderMethod(setup.policy, learners.Nothing(setup.policy), cfg, setup.seed, predicts=False)


def _history_only(setup: Setup):
    return LoaderMethod(setup.policy, learners.HistoryOnly(setup.policy), depo_config({}).filter, setup.seed)


def _ideal(setup: Setup):
    cfg = replace(depo_config({}).filter, warmup_steps=0)
    return LoaderMethod(setup.policy, learners.Ideal(setup.policy), cfg, setup.seed)


def _ridge(setup: Setup):
    cfg = replace(depo_config({}).filter, warmup_steps=0)
    _, embedding_NE = texts.embed(setup.policy.pool.prompts, setup.cache or texts.default_cache())
    return LoaderMethod(setup.policy, learners.Ridge(setup.policy, embedding_NE), cfg, setup.seed)


def _oracle(setup: Setup):
    cfg = replace(depo_config({}).filter, rule="utility", min_utility=0.5, epsilon=0.0, warmup_steps=0)
    return LoaderMethod(setup.policy, learners.Oracle(setup.policy), cfg, setup.seed)


# Name -> factories. If there are several, the run with the fewest rollouts per effective group counts.
METHODS: dict[str, tuple[Callable[[Setup], Any], ...]] = {
    "grpo": (lambda setup: _plain(setup, resample=False),),
    "dynamic": (lambda setup: _plain(setup, resample=True),),
    "random": (_random,),
    "depo_paper": (lambda setup: _estimated(setup, paper_config()),),
    "depo": (lambda setup: _estimated(setup, depo_config(setup.overrides)),),
    "depo_narrow": (lambda setup: _estimated(setup, depo_config({**setup.overrides, **NARROW})),),
    "text_only": (lambda setup: _estimated(setup, depo_config({"history.kappa": "inf"})),),
    "history_only": (_history_only,),
    "mopps": tuple(lambda setup, decay=decay: bandits.Mopps(setup.policy, setup.seed, decay) for decay in (0.5, 1.0)),
    "dps": (lambda setup: bandits.Dps(setup.policy, setup.seed),),
    "ideal": (_ideal,),
    "ridge": (_ridge,),
    "oracle": (_oracle,),
}
NOT_DEFAULT = ("depo_paper", "ridge")  # trains an encoder, minutes per run; is meaningful only on the fresh pool
