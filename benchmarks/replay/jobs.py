"""What one worker process does at once. Its own module: a spawned process does not import a package's __main__."""

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replay import judge, world

QUICK_STEPS, QUICK_SIZE = 70, 1000
FILE_STEPS = 120


@dataclass(frozen=True)
class Job:
    """What one worker does at once: all methods on one pool, group size and seed."""

    pool: str
    group_size: int
    seed: int
    methods: tuple[str, ...]
    overrides: dict
    cache: Path
    quick: bool
    pool_file: Path | None = None  # instead of a default pool

    def build(self) -> world.Pool:
        """Return the pool."""
        if self.pool_file is not None:
            return world.file_pool(self.pool_file, self.cache, QUICK_STEPS if self.quick else FILE_STEPS)
        return world.build_pool(self.pool, self.seed, self.cache, self.spec())

    def spec(self) -> world.PoolSpec:
        """Return the default pool's spec, or a shorter one."""
        spec = world.POOLS[self.pool]
        if not self.quick:
            return spec
        return (
            world.shortened(spec, QUICK_STEPS // 2, spec.size // 2)
            if spec.fresh
            else world.shortened(spec, QUICK_STEPS, QUICK_SIZE)
        )


def work(job: Job) -> tuple[list[judge.Played], tuple[float, float]]:
    """Play a job; return its runs and what the pool's texts tell: text_spearman and known_spearman."""
    import torch

    torch.set_num_threads(1)
    pool = job.build()
    bench = judge.Bench(pool, job.group_size, job.seed, job.overrides, job.cache)
    played = []
    for method in job.methods:
        start = time.perf_counter()
        played.append(bench.run(method))
        ratio, seconds = played[-1].row["effective_ratio"], time.perf_counter() - start
        judge.say(f"{pool.name} G={job.group_size} seed {job.seed} {method}: effective {ratio:.3f} ({seconds:.1f} s)")
    return played, (pool.text_spearman, pool.known_spearman)
