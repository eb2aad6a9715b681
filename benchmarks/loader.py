"""How much time and memory does the loader use on a large pool? `python -m benchmarks.loader [--pool N] [--json FILE]`

Runs the real DifficultyFilteredLoader with a stub scorer that answers at once, until it has scanned the pool once.
The loader's own time per candidate is the time of that pass minus the time of the stub and the data set. Memory is
that of the process, after each tenth of the pass.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.messages import Record, Scores
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
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
