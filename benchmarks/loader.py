"""How much time and memory does the loader use on a large pool, and what does a slow encoder cost?

`python -m benchmarks.loader [--pool N] [--json FILE]`

Runs the real DifficultyFilteredLoader with a stub scorer that answers at once, until it has scanned the pool once.
The loader's own time per candidate is the time of that pass minus the time of the stub and the data set. Memory is
that of the process, after each tenth of the pass.

Then on a virtual clock: the real loader and the real pacer of the estimator's process, an encoder of a given speed,
and steps of a given length (rollouts 80%, training 20%). Every prompt is new, and the filter wants 45% of them.
"""

import argparse
import itertools
import json
import resource
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from depo_plugin.estimator.text_model import LEAST
from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.messages import Reason, Record, Scores
from depo_plugin.remote.pacer import Pacer
from depo_plugin.settings.config import FilterConfig

GOAL_US = 50.0
GOAL_GROWTH = 1.05  # memory at the end of the pass / memory after its first tenth


class Pool:
    """A data set of `count` prompts. It makes each prompt on demand and adds up the seconds."""

    def __init__(self, count: int):
        self.count, self.seconds = count, 0.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple:
        start = time.perf_counter()
        item = ("pool", f"What is {i} + {i // 7}?", str(i + i // 7), None)
        self.seconds += time.perf_counter() - start
        return item


class Scorer:
    """A stub scorer that answers at once. Its beliefs always have the same spread: about half are kept."""

    def __init__(self):
        self.seconds, self.candidates, self.scanned = 0.0, 0, 0
        self._a = np.random.default_rng(0).uniform(0.05, 7.95, 4096)

    def score_async(self, prompts: list[str], labels: list[str], waited_for: bool = False) -> SimpleNamespace:
        start = time.perf_counter()
        a_B = np.resize(np.roll(self._a, self.candidates), len(prompts))
        self.candidates += len(prompts)
        scores = Scores(a_B, 8.0 - a_B, np.zeros(len(prompts)), 1000)
        self.seconds += time.perf_counter() - start
        return SimpleNamespace(result=lambda: scores)

    def record(self, records: list[Record]) -> None:
        self.scanned += len(records)


def measure(count: int, batch: int, group_size: int) -> dict:
    """Draw prompts until one pass of the pool is scanned; return the figures."""
    pool, scorer = Pool(count), Scorer()
    inner = SimpleNamespace(dataset=pool, collate_fn=lambda items: items, num_workers=0)
    options = {"batch_size": batch, "group_size": group_size, "seed": 0, "num_episodes": 1}
    loader = DifficultyFilteredLoader(inner, scorer, FilterConfig(), **options)
    memory, tenth, drawn = [], count / 10, 0
    start = time.perf_counter()
    for _ in iter(loader):
        drawn += 1
        if scorer.scanned >= tenth * (len(memory) + 1):
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        if scorer.scanned >= count:
            break
    own = time.perf_counter() - start - pool.seconds - scorer.seconds
    return {
        "pool": count,
        "batch": batch,
        "scanned": scorer.scanned,
        "drawn": drawn,
        "us_per_candidate": 1e6 * own / scorer.scanned,
        "memory_mib": memory,
        "state_bytes": len(json.dumps(loader.state_dict())),
    }


# ── A slow encoder, on a virtual clock ──

RATES, BATCHES, STEPS_S = (126, 30, 16, 12), (128, 1024), (60, 120)
WANTED = 0.45  # of the prompts
POOL = 200_000
ROLLOUTS = 0.8  # of a step; the rest is training
STEPS = 40
WARMUP = 5
GOAL_BLOCKED, GOAL_DECIDED = 0.01, 0.90


class Encoder:
    """The estimator's process with an encoder that reads `rate` new prompts a second; calls wait for one another."""

    def __init__(self, rate: float):
        self.rate = rate
        self.now = self.blocked = 0.0  # the launch's clock, and how long it waited
        self._at = self._free_at = 0.0  # this process's clock, and when its last call ends
        self.pacer = Pacer(lambda: self._at)
        self.read: set[str] = set()
        self.unread: list[str] = []
        self.updates = 0
        self.records: list[Record] = []

    def _begin(self) -> None:
        self._at = max(self.now, self._free_at)

    def _read(self, prompts: list[str], seconds: float) -> None:
        """Read what there is time for, as TextModel.prepare does."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.read))
        new = new[: max(int(seconds * self.rate), LEAST if seconds >= 1 else 0)]
        self.read.update(new)
        self._at += len(new) / self.rate
        self._free_at = self._at

    def wait(self, until: float) -> None:
        """Let the launch wait for an answer that is there at `until`."""
        self.blocked += max(0.0, until - self.now)
        self.now = max(self.now, until)

    def score_async(self, prompts: list[str], labels: list[str], waited_for: bool = False) -> SimpleNamespace:
        self._begin()
        self.pacer.asked(self.now, waited_for)
        if waited_for:
            self._read(prompts, 0.0 if self.unread else self.pacer.for_those_who_wait())
        else:
            self._read(prompts, self.pacer.for_scores())
            self.unread = [prompt for prompt in prompts if prompt not in self.read]
        wanted_B = np.array([zlib.crc32(prompt.encode()) / 2**32 < WANTED for prompt in prompts])
        a_B = np.where(wanted_B, 4.0, 0.2)
        a_B[[prompt not in self.read for prompt in prompts]] = np.nan
        scores, done = Scores(a_B, 8.0 - a_B, np.zeros(len(prompts)), self.updates), self._free_at

        def result() -> Scores:
            self.wait(done)
            return scores

        return SimpleNamespace(result=result)

    def record(self, records: list[Record]) -> None:
        self.records += records

    def judge(self) -> float:
        """Return when the answer is there."""
        self._begin()
        self.pacer.judged(self.now)
        self._free_at = self._at
        return self._free_at

    def learn(self, prompts: list[str]) -> None:
        self._begin()
        self._read(prompts, self.pacer.for_learning() / 2)
        self.updates += 1
        self._read(self.unread, self.pacer.for_learning())


def paced(rate: float, batch: int, step_s: float) -> dict:
    """Return the share of a step that is blocked after the first, and of the candidates decided by a score."""
    encoder, pool = Encoder(rate), Pool(POOL)
    inner = SimpleNamespace(dataset=pool, collate_fn=lambda items: items[0][1], num_workers=0)
    cfg = FilterConfig(warmup_steps=WARMUP, epsilon=0.0)
    options = {"batch_size": batch, "group_size": 8, "seed": 0, "num_episodes": 1}
    loader = DifficultyFilteredLoader(inner, encoder, cfg, **options)
    blocked = []
    for _ in range(STEPS):
        before = encoder.blocked
        prompts = [next(loader) for _ in range(batch)]
        encoder.now += ROLLOUTS * step_s
        judged = encoder.judge()
        encoder.learn(prompts)
        encoder.now += (1 - ROLLOUTS) * step_s
        encoder.wait(judged)  # the log waits for the judgement alone
        blocked.append((encoder.blocked - before) / step_s)
    decided = [record for record in encoder.records if record.reason is not Reason.WARMUP]
    share = np.mean([record.reason is not Reason.UNSCORED for record in decided])
    scored = min(rate * step_s, batch / WANTED)
    allowed = scored / (scored + batch - WANTED * scored)
    return {
        "rate": rate,
        "batch": batch,
        "step_s": step_s,
        "blocked": float(np.mean(blocked[1:])),
        "blocked_most": float(np.max(blocked[1:])),
        "first_s": blocked[0] * step_s,
        "decided": float(share),
        "of_allowed": float(share / allowed),
    }


def main() -> None:
    """Print figures and goals, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.pool, args.batch, args.group_size)
    first, last = found["memory_mib"][0], found["memory_mib"][-1]
    verdicts = [
        (f"own time per candidate {found['us_per_candidate']:.1f} us", GOAL_US, found["us_per_candidate"] <= GOAL_US),
        (f"memory {first:.0f} -> {last:.0f} MiB over the pass", GOAL_GROWTH, last <= GOAL_GROWTH * first),
    ]
    print(f"pool {found['pool']:,}, batch {found['batch']}: {found['scanned']:,} scanned, {found['drawn']:,} drawn")
    for text, goal, met in verdicts:
        print(f"{text:45} goal {goal:g}: {'met' if met else 'MISSED'}")
    found["paced"] = [paced(*case) for case in itertools.product(RATES, BATCHES, STEPS_S)]
    columns = (
        "new prompts/s",
        "batch",
        "step, s",
        "blocked, mean",
        "most",
        "first batch, s",
        "decided",
        "of the possible",
    )
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in found["paced"]:
        shares = [f"{row[name]:.1%}" for name in ("blocked", "blocked_most")]
        ends = [f"{row['first_s']:.1f}", f"{row['decided']:.0%}", f"{row['of_allowed']:.0%}"]
        print(f"| {row['rate']} | {row['batch']:,} | {row['step_s']} | " + " | ".join([*shares, *ends]) + " |")
    missed = [r for r in found["paced"] if r["blocked"] > GOAL_BLOCKED or r["of_allowed"] < GOAL_DECIDED]
    print(f"blocked <= {GOAL_BLOCKED:.0%} and decided >= {GOAL_DECIDED:.0%} of the possible: {len(missed)} rows miss")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
