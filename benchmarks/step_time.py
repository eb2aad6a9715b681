"""How much slower is a step with DEPO? `python -m benchmarks.step_time [--method shadow] [--steps 40] [--pairs 2]`

Runs the quickstart on the real Ray, DeepSpeed and vLLM, in turn with --method grpo and --method depo (or shadow), with
the same model and batch. Prints the medians of OpenRLHF's own timing/step_total after warm-up, their ratio for each
pair, and the median of depo/time_blocked, the time that training waited for the estimator.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = 10  # first steps, which are left out because everything warms up in them
GOAL_SHARE, GOAL_S = 0.002, 0.020


def launch(method: str, steps: int, out: Path) -> list[dict]:
    """Run the quickstart and return one row per step."""
    command = ["bash", ROOT / "scripts" / "quickstart_cpu.sh", "--method", method, "--steps", str(steps), "--out", out]
    with (out.parent / f"{out.name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval" not in row]


def main() -> None:
    """Run the pairs, and print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("depo", "shadow"), default="depo", help="compared with grpo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs, blocked = [], []
    with tempfile.TemporaryDirectory(prefix="depo-step-time-") as folder:
        for pair in range(args.pairs):
            seconds = {}
            for method in ("grpo", args.method):
                rows = launch(method, args.steps, Path(folder) / f"{method}{pair}")[SKIPPED:]
                seconds[method] = statistics.median(row["timing/step_total"] for row in rows)
                blocked += [row["depo/time_blocked"] for row in rows if "depo/time_blocked" in row]
            pairs.append(seconds)
            shown = ", ".join(f"{method} {median:.3f} s" for method, median in seconds.items())
            print(f"pair {pair}: {shown} a step", flush=True)
    ratios = [pair[args.method] / pair["grpo"] for pair in pairs]
    waited, step = statistics.median(blocked), statistics.median(pair[args.method] for pair in pairs)
    goal = max(GOAL_SHARE * step, GOAL_S)
    print(f"step time, {args.method} / grpo: {', '.join(f'{ratio:.3f}' for ratio in ratios)} (the paper: 1.031)")
    print(f"blocked: median {1e3 * waited:.1f} ms over {len(blocked)} steps, goal {1e3 * goal:.0f} ms: "
          f"{'met' if waited <= goal else 'MISSED'}")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"pairs": pairs, "blocked_s": blocked}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
