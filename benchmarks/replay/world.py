"""Pools of prompts and a simulated policy: an item-response model in place of a language model.

    logit p = pace · ability(t) + text part (family, level) + item noise + walk(t),   k ~ Binomial(G, p)

The sizes are those of real runs: a GRPO run of a 1.5B model gained 1.2 of ability in 405 steps, while each prompt's
own logit walked by about 0.043 a step. Families learn at their own pace.

Suffixes: N = prompts of a pool, B = prompts of one call.
"""

import json
import math
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.replay import texts
from depo_plugin.estimator.metrics import spearman
from depo_plugin.labels import D_MIN
from depo_plugin.messages import Label

BATCH = 64
GAIN = 0.004  # ability gained by a step in which every group has a signal
WASTED_GAIN = 0.0002  # ability gained by a step in which no group has a signal
WALK = 0.043  # standard deviation of what a step adds to a prompt's own logit
PACE_MAX = 2.0  # a family's pace is uniform in [0, 2]: 1 in the mean
RATE_CLIP = 0.01  # a pool file's pass rates are clipped to [0.01, 0.99]: 0 of 8 is not "never"
CONFIDENCE_NOISE = 0.5  # standard deviation of the noise in logit d


class Stream(IntEnum):
    """The world's uses of chance, each with its own random stream: default_rng([seed, Stream, ...])."""

    WORLD = 20
    OUTCOME = 21
    CONFIDENCE = 22
    PROBE = 23
    SELECT = 24
    WALK = 25


@dataclass(frozen=True)
class PoolSpec:
    """A default pool."""

    number: int  # of its random streams; drift and mixed share one, so that only the jumps differ
    mean: float  # of the starting policy's logits over the pool
    spread: float  # standard deviation of these logits
    text_spearman: float  # rank correlation that a ridge regression on frozen embeddings should reach
    size: int = 2000  # prompts
    steps: int = 120  # of one run
    jumps: tuple[tuple[int, float], ...] = ()  # (step, change of ability) from outside, such as another data mix
    fresh: bool = False  # whether no prompt is met twice


# For comparison: text_spearman is 0.26 on GSM8K, and 0.57 for the levels of MATH. math is like a 7B model's pass rates
# on DeepScaleR. Half of ushaped's pass rates are below 0.01 or above 0.99, as in pools of code.
POOLS = {
    "easy": PoolSpec(0, mean=2.5, spread=2.5, text_spearman=0.30),
    "hard": PoolSpec(1, mean=-3.5, spread=2.5, text_spearman=0.45),
    "mixed": PoolSpec(2, mean=-0.5, spread=3.0, text_spearman=0.50),
    "drift": PoolSpec(2, mean=-0.5, spread=3.0, text_spearman=0.50, jumps=((50, 2.0), (90, -1.2))),
    "fresh": PoolSpec(3, mean=-0.5, spread=3.0, text_spearman=0.57, size=12000, steps=84, fresh=True),
    "math": PoolSpec(5, mean=-1.0, spread=4.0, text_spearman=0.40, size=12000, steps=84, fresh=True),
    "ushaped": PoolSpec(6, mean=0.0, spread=7.0, text_spearman=0.40),
    "learnable": PoolSpec(4, mean=-0.55, spread=0.4, text_spearman=0.40, steps=60),  # p stays within 0.2..0.8
}
HIDDEN = ("learnable",)  # not among the default pools


@dataclass(frozen=True)
class Pool:
    """Prompts and the truth about them."""

    name: str
    prompts: list[str]  # all different
    logit_N: np.ndarray  # true logits of the starting policy's pass rates
    text_N: np.ndarray  # the part of these logits that family and level determine
    noise: float  # standard deviation of the rest
    text_spearman: float  # rank correlation of a cross-validated ridge regression with the starting pass rates
    steps: int  # of one run
    batch: int = BATCH  # prompts of a step
    jumps: tuple[tuple[int, float], ...] = ()  # as in PoolSpec
    fresh: bool = False  # as in PoolSpec
    walk: float = 0.0  # standard deviation of what a step adds to each prompt's own logit
    pace_N: np.ndarray | None = None  # what the ability is multiplied by; None: 1
    index: dict[str, int] = field(default_factory=dict)  # prompt -> its position in `prompts`

    @property
    def known_spearman(self) -> float:
        """Rank correlation of the text's true part, which ideal knows, with the starting pass rates."""
        return spearman(self.text_N, self.logit_N) or 0.0

    def __post_init__(self):
        self.index.update({prompt: i for i, prompt in enumerate(self.prompts)})
        if len(self.index) != len(self.prompts):
            raise ValueError(f"pool {self.name}: prompts repeat")


class PoolFileError(ValueError):
    """A pool file cannot be used. The text names the line and the reason."""


def sigmoid(x):
    """Return 1 / (1 + e^−x) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def signal_chance(p, group_size: int):
    """Return u(p) = 1 − p^G − (1−p)^G, the chance that a group is not all right and not all wrong."""
    return 1 - p**group_size - (1 - p) ** group_size


# ── Default pools ──


def build_pool(name: str, seed: int, cache: Path, spec: PoolSpec | None = None) -> Pool:
    """Return a default pool. All seeds have the same texts; each seed draws its own effects and noise.

    Bisection finds the text's share of the logits' variance at which the ridge regression reaches spec.text_spearman.
    Mean and spread of the logits do not change.
    """
    spec = spec or POOLS[name]
    prompts, family_N, level_N = texts.gym_texts(spec.size, cache)
    rng = np.random.default_rng([seed, Stream.WORLD, spec.number])
    effect = rng.normal(size=len(texts.FAMILIES))
    # Families differ more than levels: otherwise a ridge regression would miss too much of what ideal knows.
    slope = rng.uniform(0.5, 1.5, size=len(texts.FAMILIES))
    text_N = _standardised(effect[family_N] - slope[family_N] * level_N)
    noise_N = rng.normal(size=spec.size)
    noise_N = _standardised(noise_N - noise_N @ text_N / spec.size * text_N)  # uncorrelated: variances add up exactly
    ridge = texts.ridge_of(prompts, cache)

    def mixed(share: float) -> np.ndarray:
        return math.sqrt(share) * text_N + math.sqrt(1 - share) * noise_N

    def measured(share: float) -> float:
        return spearman(ridge.best(mixed(share)), mixed(share)) or 0.0

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if measured(middle) < spec.text_spearman else (low, middle)
    share = (low + high) / 2
    return Pool(
        name,
        prompts,
        spec.mean + spec.spread * mixed(share),
        spec.mean + spec.spread * math.sqrt(share) * text_N,
        spec.spread * math.sqrt(1 - share),
        measured(share),
        spec.steps,
        jumps=spec.jumps,
        fresh=spec.fresh,
        walk=WALK,
        pace_N=rng.uniform(0.0, PACE_MAX, size=len(texts.FAMILIES))[family_N],
    )


def _standardised(x_N: np.ndarray) -> np.ndarray:
    return (x_N - x_N.mean()) / x_N.std()


# ── A user's own pool ──


def read_pool_file(path: Path, batch: int = BATCH) -> tuple[list[str], np.ndarray, int]:
    """Return a pool file's prompts, their pass rates and how many lines repeat an earlier prompt.

    Each line is a JSON object with "prompt" and "pass_rate"; other keys and empty lines are ignored. A repeated prompt
    counts once, with the mean of its pass rates. Raise PoolFileError, with file and line, if a line is not valid.
    """
    rates: dict[str, list[float]] = {}
    lines = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                prompt, rate = _pool_line(line, f"{path}, line {number}")
                rates.setdefault(prompt, []).append(rate)
                lines += 1
    if len(rates) < batch:
        raise PoolFileError(f"{path}: {len(rates)} different prompts, fewer than a batch ({batch}). Give more.")
    return list(rates), np.array([np.mean(found) for found in rates.values()]), lines - len(rates)


def _pool_line(line: bytes, place: str) -> tuple[str, float]:
    wanted = 'Each line must be {"prompt": "...", "pass_rate": 0.25}.'
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise PoolFileError(f"{place}: not UTF-8. {wanted}") from err
    except json.JSONDecodeError as err:
        raise PoolFileError(f"{place}: not JSON: {err.msg} (column {err.colno}). {wanted}") from err
    if not isinstance(row, dict):
        raise PoolFileError(f"{place}: not a JSON object. {wanted}")
    if missing := [key for key in ("prompt", "pass_rate") if key not in row]:
        raise PoolFileError(f"{place}: {' and '.join(missing)} missing. {wanted}")
    prompt, rate = row["prompt"], row["pass_rate"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise PoolFileError(f"{place}: prompt must be a text that is not empty. {wanted}")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise PoolFileError(f"{place}: pass_rate {rate!r} must be a number from 0 to 1. {wanted}")
    return prompt, float(rate)


def file_pool(path: Path, cache: Path, steps: int, jumps=(), batch: int = BATCH) -> Pool:
    """Return the pool of a user's file. The starting policy has the file's pass rates, clipped.

    The true part of the text is not known, so text_N is the out-of-fold ridge prediction and noise its residual.
    """
    prompts, rate_N, _ = read_pool_file(path, batch)
    rate_N = rate_N.clip(RATE_CLIP, 1 - RATE_CLIP)
    logit_N = np.log(rate_N / (1 - rate_N))
    text_N = texts.ridge_of(prompts, cache).best(logit_N)
    noise = max(float(np.sqrt(np.mean((logit_N - text_N) ** 2))), 0.1)
    return Pool(
        path.name, prompts, logit_N, text_N, noise, spearman(text_N, logit_N) or 0.0, steps, batch, jumps, walk=WALK
    )


def shortened(spec: PoolSpec, steps: int, size: int) -> PoolSpec:
    """Return the spec of a smaller pool with fewer steps. Its jumps are at the same shares of the run."""
    jumps = tuple((round(at * steps / spec.steps), change) for at, change in spec.jumps)
    return replace(spec, steps=steps, size=size, jumps=jumps)


# ── The policy ──


class Groups(NamedTuple):
    """The outcomes of one rollout call."""

    index_B: np.ndarray  # of the prompts in the pool
    successes_B: np.ndarray  # right responses
    samples: int  # responses per prompt
    signal_B: np.ndarray  # whether the rewards of the group differ, bool


class Policy:
    """A policy with one ability, which grows when it is trained. Beside it each prompt's own logit walks.

    Chance depends only on (seed, step, call, prompt). If two methods roll out the same prompt in the same step at the
    same ability, they get the same outcome. So chance does not explain a difference between methods.
    """

    def __init__(self, pool: Pool, group_size: int, seed: int):
        """Start at ability 0, before step 0."""
        self.pool, self.group_size, self._seed = pool, group_size, seed
        self.ability = 0.0
        self._walked_N = np.zeros(len(pool.prompts))
        self.step = -1
        self._calls = 0

    def begin_step(self) -> None:
        """Go to the next step: jumps of the ability, and from the second step on each prompt's walk."""
        self.step += 1
        self._calls = 0
        if self.step and self.pool.walk:
            rng = np.random.default_rng([self._seed, Stream.WALK, self.step])
            self._walked_N += self.pool.walk * rng.normal(size=len(self._walked_N))
        self.ability += sum(change for at, change in self.pool.jumps if at == self.step)

    def gained(self, index_B: np.ndarray) -> np.ndarray | float:
        """Return what the ability adds to the logits, float64 (B,): pace · ability."""
        return self.ability if self.pool.pace_N is None else self.pool.pace_N[index_B] * self.ability

    def logits(self, index_B: np.ndarray) -> np.ndarray:
        """Return the logits of the true pass rates at the current step, float64 (B,)."""
        return self.pool.logit_N[index_B] + self._walked_N[index_B] + self.gained(index_B)

    def rates(self, index_B: np.ndarray) -> np.ndarray:
        """Return the true pass rates at the current step, float64 (B,)."""
        return sigmoid(self.logits(index_B))

    def rollout(self, index_B: np.ndarray) -> Groups:
        """Return the outcomes of one random group per prompt."""
        self._calls += 1
        rng = np.random.default_rng([self._seed, Stream.OUTCOME, self.step, self._calls])
        return self._groups(np.asarray(index_B), rng)

    def probe(self, index_B: np.ndarray) -> np.ndarray:
        """Return whether a group of each prompt, simulated only to judge predictions, has a signal; bool (B,)."""
        rng = np.random.default_rng([self._seed, Stream.PROBE, self.step])
        return self._groups(np.asarray(index_B), rng).signal_B

    def _groups(self, index_B, rng):
        luck_B = rng.random(len(self.pool.prompts))[index_B]
        successes_B = binomial_quantile(luck_B, self.rates(index_B), self.group_size)
        return Groups(index_B, successes_B, self.group_size, (successes_B > 0) & (successes_B < self.group_size))

    def labels(self, groups: Groups, rejected: bool = False) -> list[Label]:
        """Return these groups' labels for the estimator. rejected: dynamic sampling throws them away, so d is None."""
        rng = np.random.default_rng([self._seed, Stream.CONFIDENCE, self.step, self._calls])
        # A policy is more confident if it solves a prompt: d rises with p, from about 0.4 to about 0.95.
        logit_B = self.logits(groups.index_B)
        d_B = sigmoid(1.2 + 0.35 * logit_B + CONFIDENCE_NOISE * rng.normal(size=len(logit_B))).clip(D_MIN, 1 - D_MIN)
        rows = zip(groups.index_B.tolist(), groups.successes_B.tolist(), d_B.tolist(), groups.signal_B, strict=True)
        return [
            Label(self.pool.prompts[i], "", k / groups.samples, None if rejected else d, groups.samples, bool(signal))
            for i, k, d, signal in rows
        ]

    def train(self, effective: int, wasted: int) -> None:
        """Raise the ability by one batch: GAIN times the effective share plus WASTED_GAIN times the wasted share."""
        self.ability += (GAIN * effective + WASTED_GAIN * wasted) / self.pool.batch


def binomial_quantile(luck_B: np.ndarray, p_B: np.ndarray, count: int) -> np.ndarray:
    """Return the least k with P(K ≤ k) > luck, K ~ Binomial(count, p): a draw of K where luck is uniform in [0, 1)."""
    mass = np.array([math.comb(count, k) for k in range(count + 1)], np.float64)
    k = np.arange(count + 1)
    p_B1 = np.asarray(p_B, np.float64)[:, None]
    cumulative = np.cumsum(mass * p_B1**k * (1 - p_B1) ** (count - k), axis=1)
    return np.minimum((cumulative <= np.asarray(luck_B)[:, None]).sum(1), count)
