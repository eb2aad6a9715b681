"""Replay the outer loop of RL without a language model and compare filters. `python -m benchmarks.replay --help`"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.replay import judge, plots, report, texts, world
from benchmarks.replay.jobs import Job, work
from benchmarks.replay.methods import METHODS, NOT_DEFAULT, PAPER_OVERRIDES, depo_config, paper_config
from depo_plugin.settings.config import ConfigError
from depo_plugin.settings.yaml_io import flag_value

WORKERS = 2
SEEDS, QUICK_SEEDS = 3, 1
GROUP_SIZE = 8
MIXED_GROUP_SIZES = (4, 8, 16)
QUICK_POOLS = ("mixed", "drift")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__.splitlines()[0])
    defaults = [name for name in world.POOLS if name not in world.HIDDEN]
    parser.add_argument("--pools", nargs="+", help=f"of {','.join(world.POOLS)} (default: {','.join(defaults)})")
    parser.add_argument(
        "--methods", nargs="+", help=f"of {','.join(METHODS)} (default: all but {','.join(NOT_DEFAULT)})"
    )
    parser.add_argument("--group-size", nargs="+", help="such as 8 or 4,16 (default: 8, and on mixed 4 and 16 too)")
    parser.add_argument("--seeds", type=int, help=f"number of seeds (default: {SEEDS}, with --quick {QUICK_SEEDS})")
    parser.add_argument("--pool-file", type=Path, help='a pool of your own, {"prompt", "pass_rate"} a line')
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of depo's own")
    parser.add_argument("--quick", action="store_true", help="fewer pools, seeds and steps")
    parser.add_argument("--json", type=Path, help="write the rows here, plots beside it")
    parser.add_argument("--goals", action="store_true", help="end with status 1 if a goal is missed")
    parser.add_argument("--cache", type=Path, default=texts.default_cache(), help="texts and embeddings (%(default)s)")
    args = parser.parse_args(argv)
    args.methods = _names(parser, "--methods", args.methods, METHODS) or [m for m in METHODS if m not in NOT_DEFAULT]
    args.pools = _names(parser, "--pools", args.pools, world.POOLS)
    if not args.pools and args.pool_file is None:
        args.pools = list(QUICK_POOLS) if args.quick else defaults
    if args.seeds is None:
        args.seeds = QUICK_SEEDS if args.quick else SEEDS
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: must be at least 1.")
    try:
        args.overrides = {key: flag_value(value) for key, value in (_pair(parser, text) for text in args.set)}
        depo_config(args.overrides)
    except ConfigError as err:
        parser.error(str(err))
    try:
        args.sizes = [int(text) for text in _split(args.group_size)]
    except ValueError:
        parser.error(f"--group-size {' '.join(args.group_size)}: must be numbers such as 4 16.")
    if args.sizes and min(args.sizes) < 2:
        parser.error(f"--group-size {min(args.sizes)}: must be at least 2.")
    if args.pool_file is not None:
        try:
            *_, merged = world.read_pool_file(args.pool_file)
        except (OSError, world.PoolFileError) as err:
            parser.error(str(err))
        if merged:
            judge.say(f"{args.pool_file}: {merged} lines repeat an earlier prompt; their pass rates are averaged.")
        if args.pool_file.name in world.POOLS:
            parser.error(f"--pool-file {args.pool_file}: has the name of a default pool. Rename it.")
    return args


def _split(given: list[str] | None) -> list[str]:
    """Return the words of a list that is separated by spaces, commas or both."""
    return [word for part in given or [] for word in part.split(",") if word]


def _names(parser, flag: str, given: list[str] | None, known) -> list[str]:
    names = _split(given)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{flag} {','.join(unknown)}: unknown. Choose from {','.join(known)}.")
    return names


def _pair(parser, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        parser.error(f"--set {text}: must be KEY=VALUE, such as history.discount=1.0.")
    return key, value


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return the jobs in the order of the table."""
    pools = [(name, None) for name in args.pools]
    pools += [(args.pool_file.name, args.pool_file)] if args.pool_file else []
    jobs = []
    for pool, file in pools:
        default = MIXED_GROUP_SIZES if pool == "mixed" and not args.quick else (GROUP_SIZE,)
        for group_size, seed in itertools.product(args.sizes or default, range(args.seeds)):
            rest = tuple(args.methods), args.overrides, args.cache, args.quick, file
            jobs.append(Job(pool, group_size, seed, *rest))
    return jobs


def finished(jobs: list[Job], start: float) -> Iterator[tuple[Job, list[judge.Played], tuple[float, float]]]:
    """Yield each finished job with its runs and its pool's two rank correlations. The largest jobs start first."""
    if len(jobs) == 1:
        yield jobs[0], *work(jobs[0])
        return
    first = sorted(jobs, key=lambda job: -(world.POOLS[job.pool].size if job.pool in world.POOLS else 0))
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, job): job for job in first}
        for count, future in enumerate(as_completed(futures), 1):
            yield futures[future], *future.result()
            judge.say(f"[{count} of {len(jobs)} after {time.perf_counter() - start:.0f} s]")


def main(argv: list[str] | None = None) -> int:
    """Run all jobs, print the table and the goals, write rows and plots. Return the exit status."""
    args = parse(argv)
    start = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = jobs_of(args)
    for job in {job.pool: job for job in jobs}.values():
        judge.say(f"{job.pool}: texts and embeddings")
        job.build()  # caches them for the workers
    if "depo_paper" in args.methods:
        print(
            f"depo_paper: configs/depo_paper.yaml with {PAPER_OVERRIDES} (the bundled all-MiniLM-L6-v2); it keeps "
            f"everything for its first {paper_config().filter.warmup_steps} steps."
        )
    done: dict[int, tuple] = {}
    for job, *found in finished(jobs, start):
        done[jobs.index(job)] = found
        played = [one for i in sorted(done) for one in done[i][0]]
        if args.json:  # after each job, so that an interrupted run keeps its results
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps([one.row for one in played], indent=1) + "\n", encoding="utf-8")
    rows = [one.row for one in played]
    measured: dict[str, dict[int, tuple[float, float]]] = {}
    for i in sorted(done):
        measured.setdefault(jobs[i].pool, {})[jobs[i].seed] = done[i][1]
    print(report.table(rows, {pool: list(by_seed.values()) for pool, by_seed in measured.items()}))
    found = report.goals(rows)
    if found:
        print("\n" + report.goals_text(found))
    if args.json:
        for path in plots.draw(played, args.json):
            judge.say(f"wrote {path}")
    judge.say(f"{time.perf_counter() - start:.0f} s")
    return 1 if args.goals and not all(met for *_, met in found) else 0


if __name__ == "__main__":
    sys.exit(main())
