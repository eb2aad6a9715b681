"""How fast is the embedding cache on a large pool? `python -m benchmarks.embeddings [--rows N] [--json FILE]`

Runs the real EmbeddingCache with rows of the bundled encoder's width and scattered keys. A read gets 512 known rows. A
write gets 512 new rows; computing their embeddings takes no time here. "two_" figures: two processes read and write at
once. "kills": a process that writes without pause gets kill -9, 20 times.
"""

import argparse
import json
import multiprocessing
import os
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np

from depo_plugin.estimator.embedding_cache import FILE, EmbeddingCache

WIDTH, BATCH, REPEATS, KILLS, CHUNK = 384, 512, 100, 20, 20_000
READ_MS, WRITE_MS = 10.0, 100.0  # goals, for BATCH rows
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the keys i * MIX mod 2**64 are all different


def keys(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.uint64) * MIX


def rows(keys_B: np.ndarray) -> np.ndarray:
    """Return the row of each key, fp16 (B, WIDTH). It is computed from the key, so that a wrong row is detected."""
    bits_BE = (keys_B[:, None] >> np.arange(WIDTH, dtype=np.uint64) % 50).astype(np.uint16)
    return (bits_BE & np.uint16(0x3FFF)).view(np.float16)


def own_mib() -> float:
    """Return the memory that this process holds, without the pages of files that the system maps."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def get(cache: EmbeddingCache, keys_B: np.ndarray, known: bool) -> tuple[float, float]:
    """Return wall-clock and processor seconds of one get(). Raise AssertionError if a row is wrong."""
    made = rows(keys_B)
    start, start_cpu = time.perf_counter(), time.process_time()
    found = cache.get(keys_B, None if known else lambda missing: made[missing])
    seconds = time.perf_counter() - start, time.process_time() - start_cpu
    np.testing.assert_array_equal(found.view(np.uint16), made.view(np.uint16))
    return seconds


def timed(folder: Path, count: int, start: int, barrier=None) -> dict[str, list[tuple]]:
    """Return the seconds of REPEATS reads among the first `count` keys, and of REPEATS writes from key `start` on."""
    cache, rng = EmbeddingCache(folder, WIDTH), np.random.default_rng(start)
    if barrier:
        barrier.wait()
    seconds = {"read": [], "write": []}
    for number in range(REPEATS):
        seconds["read"].append(get(cache, keys(rng.choice(count, BATCH, replace=False)), True))
        first = start + number * BATCH
        seconds["write"].append(get(cache, keys(np.arange(first, first + BATCH)), False))
    return seconds


def figures(seconds: dict[str, list[tuple]]) -> dict[str, float]:
    """Return median, 95th percentile and maximum of reads and writes, in ms; *_cpu: processor time."""
    named = zip(("median", "p95", "max"), (50, 95, 100), strict=True)
    found = {name: {verb: 1e3 * np.percentile(seconds[verb], at, axis=0) for verb in seconds} for name, at in named}
    return {
        f"{verb}{kind}_{name}": float(of_verb[verb][i])
        for verb in seconds
        for i, kind in enumerate(("", "_cpu"))
        for name, of_verb in found.items()
    }


def _timed_to(pipe, *args) -> None:
    pipe.send(timed(*args))


def two_at_once(folder: Path, count: int, start: int) -> dict[str, float]:
    """Return the figures of two processes that read and write at once."""
    context = multiprocessing.get_context("spawn")
    barrier, both = context.Barrier(2), {"read": [], "write": []}
    pipes = [context.Pipe() for _ in range(2)]
    for number, (_, theirs) in enumerate(pipes):
        args = (theirs, folder, count, start + number * REPEATS * BATCH, barrier)
        context.Process(target=_timed_to, args=args).start()
    for ours, _ in pipes:
        for verb, seconds in ours.recv().items():
            both[verb] += seconds
    return figures(both)


def write_forever(folder: Path, start: int, ready) -> None:
    cache = EmbeddingCache(folder, WIDTH)
    ready.set()
    while True:
        get(cache, keys(np.arange(start, start + BATCH)), False)
        start += BATCH


def kills(folder: Path, start: int) -> dict[str, int]:
    """Kill a writer KILLS times. Return how many rows it stored. Raise AssertionError if data is damaged."""
    context = multiprocessing.get_context("spawn")
    for number in range(KILLS):
        ready = context.Event()
        first = start + number * 1_000 * BATCH
        writer = context.Process(target=write_forever, args=(folder, first, ready))
        writer.start()
        ready.wait()
        time.sleep(0.02 + 0.013 * number)
        writer.kill()
        writer.join()
    db = sqlite3.connect(folder / FILE)
    stored = 0
    for key, row in db.execute("SELECT key, row FROM rows"):
        stored += 1
        if stored % 10 == 0 or stored > start:  # every new row, and a tenth of the others
            key_B = np.array([key], np.int64).view(np.uint64)
            assert row == rows(key_B).tobytes(), f"key {key} has a wrong row"
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return {"kills": KILLS, "rows_stored_by_killed": stored - start}


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embeddings", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="depo-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        memory = own_mib()
        cache = EmbeddingCache(folder, WIDTH)
        fill = sum(
            get(cache, keys(np.arange(at, min(at + CHUNK, args.rows))), False)[0] for at in range(0, args.rows, CHUNK)
        )
        del cache
        found = {"rows": args.rows, "sqlite": sqlite3.sqlite_version, "fill_s": fill}
        start = time.perf_counter()
        EmbeddingCache(folder, WIDTH)
        found["open_ms"] = 1e3 * (time.perf_counter() - start)
        found |= figures(timed(folder, args.rows, args.rows))
        found["memory_growth_mib"] = own_mib() - memory
        stored = args.rows + REPEATS * BATCH
        found["bytes_a_row"] = sum(file.stat().st_size for file in folder.iterdir()) / stored
        found |= {f"two_{name}": value for name, value in two_at_once(folder, args.rows, stored).items()}
        found |= kills(folder, stored + 2 * REPEATS * BATCH)
    for name, value in found.items():
        print(f"{name:24}{value if not isinstance(value, float) else round(value, 1)}")
    for verb, goal in (("read", READ_MS), ("write", WRITE_MS)):
        met = found[f"{verb}_median"] <= goal and found[f"{verb}_p95"] <= goal
        print(f"{verb} {BATCH} rows: goal {goal:.0f} ms, median and p95: {'met' if met else 'MISSED'}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
