"""Does the policy get better? Train with GRPO, dynamic sampling and DEPO on the real stack, with equal rollouts.

A run that is done is not done again: its row is in --results. `python -m benchmarks.proof --help`
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.proof import compare, figures
from benchmarks.proof.launch import Size, launch, levels_of, run_key
from benchmarks.proof.methods import DEFAULT, METHODS, QUICK, RECOMMENDED

RESULTS = Path(__file__).resolve().parents[1] / "results" / "proof"
SIZES = {
    "ladder": {8: Size(8, 200, 2, 1e-4), 32: Size(32, 100, 2, 2e-4)},
    "smollm2": {8: Size(8, 24, 1, 1e-5, evals=2, held_out=64)},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", choices=SIZES, default="ladder", help="the policy (default: ladder, made for this)")
    parser.add_argument("--prompts", nargs="+", type=int, help="prompts of a step (default: 8 32)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; 8 prompts, 60 steps, one seed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows and pictures (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/proof"), help="folder of logs (default: %(default)s)")
    parser.add_argument("--no-runs", action="store_true", help="only tables and pictures of the rows that exist")
    args = parser.parse_args(argv)
    sizes = SIZES[args.model]
    args.methods = args.methods or list(QUICK if args.quick else DEFAULT)
    args.prompts = args.prompts or ([8] if args.quick else list(sizes))
    if unknown := [count for count in args.prompts if count not in sizes]:
        parser.error(f"--prompts {unknown[0]}: must be of {', '.join(map(str, sizes))} with --model {args.model}.")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: must be at least 1.")
    args.sizes = {count: sizes[count] for count in args.prompts}
    if args.quick:
        args.seeds = 1
        args.sizes = {count: replace(size, steps=60, episodes=1, evals=3) for count, size in args.sizes.items()}
    return args


def read(path: Path) -> list[dict]:
    """Return the rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: list[str] | None = None) -> int:
    """Make the missing runs, then print tables and goals, and draw; return the exit status."""
    args = parse(argv)
    name = "quick" if args.quick else args.model
    plan = [(seed, count, method) for seed in range(args.seeds) for count in args.sizes for method in args.methods]
    start, made = time.monotonic(), 0
    for number, (seed, count, method) in enumerate(plan, start=1):
        size, path = args.sizes[count], args.results / f"{name}-{count}.jsonl"
        out = (args.runs / f"{name}-{count}-{method}-{seed}").resolve()
        words = METHODS[method].words
        key = run_key(args.model, size, words, seed)
        if args.no_runs or any(row["key"] == key for row in read(path)):
            continue
        print(f"run {number} of {len(plan)}: {METHODS[method].label}, {count} prompts a step, seed {seed}", flush=True)
        at = time.monotonic()
        row = {"key": key, "method": method, "prompts": count, "seed": seed}
        row |= launch(args.model, size, words, seed, out)
        others = [row for row in read(path) if (row["method"], row["seed"]) != (method, seed)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in [*others, row]))
        made += 1
        mean = (time.monotonic() - start) / made
        learnable = compare.final(row, levels_of(args.model), "learnable")
        print(
            f"   learnable levels {learnable:.3f}, groups with a signal {compare.signal_share(row):.2f}, "
            f"{time.monotonic() - at:.0f} s; at most {mean * (len(plan) - number) / 60:.0f} minutes to go",
            flush=True,
        )
    return report(args, name)


def report(args: argparse.Namespace, name: str) -> int:
    """Print and draw what the rows say."""
    groups = levels_of(args.model)
    labels = {method: METHODS[method].label for method in METHODS}
    for count, size in args.sizes.items():
        found = read(args.results / f"{name}-{count}.jsonl")
        rows = {m: {r["seed"]: r for r in found if r["method"] == m and r["seed"] < args.seeds} for m in args.methods}
        rows = {method: dict(sorted(runs.items())) for method, runs in rows.items() if runs}
        if not rows:
            continue
        title = f"{name}, {count} prompts a step, {size.rollouts:,} rollouts"
        print(f"\n{title}\n\n" + "\n".join(compare.table(rows, groups, labels)))
        figures.draw(rows, groups, labels, title, args.results / f"{name}-{count}")
        for method in RECOMMENDED:
            if {method, "grpo"} <= rows.keys():
                print(f"\nGoals of {labels[method]}:")
                for met, line in compare.goals(rows, groups, method):
                    print(f"  {'met   ' if met else 'MISSED'}  {line}")
    print(f"\npictures and rows: {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
