"""The job of one worker process. It needs its own module, because a spawned process does not import __main__."""

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replay import judge, world

QUICK_STEPS, QUICK_SIZE = 70, 1000
FILE_STEPS = 120


@dataclass(frozen=True)
class Job:
    """The job of one worker: all methods on one pool, group size and seed."""

    pool: str  # name
    group_size: int  # samples per prompt
    seed: int  # of pool, policy and methods
    methods: tuple[str, ...]  # names
    overrides: dict  # changes of depo's settings
    cache: Path  # folder of texts and embeddings
    quick: bool  # whether to use a smaller pool and fewer steps
    pool_file: Path | None = None  # used instead of a default pool

    def build(self) -> world.Pool:
        """Return the pool."""
        if self.pool_file is not None:
            return world.file_pool(self.pool_file, self.cache, QUICK_STEPS if self.quick else FILE_STEPS)
        return world.build_pool(self.pool, self.seed, self.cache, self.spec())

    def spec(self) -> world.PoolSpec:
        """Return the spec of the default pool, or a smaller one if `quick`."""
        spec = world.POOLS[self.pool]
        if not self.quick:
            return spec
        return (
            world.shortened(spec, QUICK_STEPS // 2, spec.size // 2)
            if spec.fresh
            else world.shortened(spec, QUICK_STEPS, QUICK_SIZE)
        )


def work(job: Job) -> tuple[list[judge.Played], tuple[float, float]]:
    """Play a job. Return its runs, and text_spearman and known_spearman of its pool."""
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
