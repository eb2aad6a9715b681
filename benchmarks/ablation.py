"""What does each part of the estimator add? `python -m benchmarks.ablation [--seeds N] [--pools P,P] --json FILE`

Replays (see benchmarks/replay) the recommended settings with one change at a time. Each row shows how the change
affects the gain in effective ratio over grpo (as a share of ideal's gain), the errors, and the estimator's time.
"""

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.replay import judge, texts
from benchmarks.replay.jobs import Job

CHANGES = {
    "no score of the heads (no gradient at all)": {"estimator.updates_per_step": 0},
    "two optimizer steps": {"estimator.updates_per_step": 2},
    "heads lr 1e-4": {"estimator.lr": 1e-4},
    "heads lr 2e-3": {"estimator.lr": 2e-3},
    "without ranking loss": {"estimator.w_rank": 0.0},
    "without distillation loss": {"estimator.w_distill": 0.0},
    "without replay": {"estimator.replay": 0},
    "replay 1024": {"estimator.replay": 1024},
    "without sharing": {"history.share": False},
    "without drift": {"history.drift": False},
    "without history (text only)": {"history.kappa": "inf"},
    "kappa fixed at 2": {"history.kappa": 2.0},
    "kappa fixed at 16": {"history.kappa": 16.0},
    "forget: discount 0.98": {"history.discount": 0.98},
    "never forget: discount 1": {"history.discount": 1.0},
    "utility rule, 0.5": {"filter.rule": "utility", "filter.min_utility": 0.5},
    "utility rule, 0.65": {"filter.rule": "utility", "filter.min_utility": 0.65},
    "best of those scanned": {"filter.rule": "utility", "filter.min_utility": 1.0},
    "window 0.1 to 0.9": {"filter.low": 0.1, "filter.high": 0.9},
    "window 0.2 to 0.8": {"filter.low": 0.2, "filter.high": 0.8},
    "no exploration": {"filter.epsilon": 0.0},
    "all layers of the encoder": {"estimator.depth": 1.0},
    "half of the encoder's layers": {"estimator.depth": 0.5},
}
FINETUNE = {
    "finetune": {"estimator.mode": "finetune"},
    "finetune, all layers": {"estimator.mode": "finetune", "estimator.depth": 1.0},
    "finetune without sharing": {"estimator.mode": "finetune", "history.share": False},
    "the paper's training (finetune, lr 2e-4, no replay)": {
        "estimator.mode": "finetune",
        "estimator.depth": 1.0,
        "estimator.lr": 2e-4,
        "estimator.replay": 0,
        "history.share": False,
        "history.drift": False,
        "history.kappa": "inf",
    },
}
GROUP_SIZE = 8
COLUMNS = ("gain", "coverage", "mae", "zero_auc", "ece", "seconds")


def work(job: Job, changes: dict[str, dict]) -> list[dict]:
    """Return one row per change, for one pool and seed."""
    import torch

    torch.set_num_threads(1)
    pool = job.build()
    base = judge.Bench(pool, GROUP_SIZE, job.seed, {}, job.cache)
    grpo, ideal = (base.run(name).row for name in ("grpo", "ideal"))
    rows = []
    for change, overrides in changes.items():
        row = judge.Bench(pool, GROUP_SIZE, job.seed, overrides, job.cache).run("depo").row
        gain = row["effective_ratio"] - grpo["effective_ratio"]
        rows.append(
            {
                "change": change,
                "pool": pool.name,
                "seed": job.seed,
                "gain": gain / (ideal["effective_ratio"] - grpo["effective_ratio"]),
                "coverage": row["coverage"] - ideal["coverage"],
                "mae": row["mae_true"] / ideal["mae_true"],
                "zero_auc": (row["zero_auc"] - 0.5) / (ideal["zero_auc"] - 0.5),
                "ece": row["ece"],
                "seconds": row["estimator_seconds"],
            }
        )
        judge.say(f"{pool.name} seed {job.seed} {change}: {gain:+.3f}")
    return rows


def main() -> None:
    """Run all jobs, print the table of means, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pools", default="mixed,hard,drift,fresh")
    parser.add_argument("--finetune", action="store_true", help="only the changes that train the encoder, too (slow)")
    parser.add_argument("--quick", action="store_true", help="smaller pools, fewer steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    changes = {"recommended": {}} | (FINETUNE if args.finetune else CHANGES)
    pools, cache = args.pools.split(","), texts.default_cache()
    seeded = itertools.product(pools, range(args.seeds))
    jobs = [Job(pool, GROUP_SIZE, seed, (), {}, cache, args.quick) for pool, seed in seeded]
    for job in {job.pool: job for job in jobs}.values():
        job.build()  # caches texts and embeddings for the workers
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        rows = list(itertools.chain.from_iterable(workers.map(work, jobs, itertools.repeat(changes))))
    print(
        "Means over seeds; gain, mae and zero AUC (above one half) as shares of ideal's, coverage as the difference."
    )
    print("| pool | change | gain | coverage | mae | zero AUC | ece | seconds |\n|---|---|---|---|---|---|---|---|")
    for pool, change in itertools.product(pools, changes):
        found = [row for row in rows if (row["pool"], row["change"]) == (pool, change)]
        values = [f"{np.mean([row[name] for row in found]):.3f}" for name in COLUMNS]
        print(f"| {pool} | {change} | " + " | ".join(values) + " |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
