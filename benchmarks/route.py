"""What routing by difficulty is worth, and what the proxy costs, before two real vLLM servers on the CPU.

One run of DEPO on the proof's ladder makes both models. The small one is its checkpoint after a fifth of the steps,
with the estimator of that step. The large one is the policy at the end. Each answers problems that the run did not
train on. `python -m benchmarks.route --help`
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import httpx
import openai
from reward_func import answer_of, last_integer
from tasks import make_split, write_jsonl
from tqdm import tqdm

from benchmarks.proof import ladder
from benchmarks.proof.launch import Size, launch, levels_of
from benchmarks.vllm_server import Server, routing, serving
from depo_plugin.commands import cli

RESULTS = Path(__file__).resolve().parent / "results" / "route"
SIZE, EARLY = Size(8, 200, 2, 1e-4), 40
SAMPLES, SEED, AT_ONCE = 8, 1000, 32
PAIRS = 200  # requests to a server, and through the router, for the time that it adds
LONG = "Read carefully, and answer with the number alone, without any words before or after it. " * 3  # 264 characters


def main() -> int:
    """Train if need be, answer, calibrate, measure; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.route", description=__doc__, allow_abbrev=False)
    parser.add_argument("--problems", type=int, default=480, help="held-out problems (default: %(default)s)")
    parser.add_argument("--share", default="0.3", help="of requests for the large model (default: %(default)s)")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/route"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of curves (%(default)s)")
    args = parser.parse_args()
    small, large = args.run / "checkpoints" / f"global_step{EARLY}_hf", args.run / "model"
    if not (large / "model.safetensors").exists():
        method = f"--advantage_estimator depo --ckpt.save_steps {EARLY} --ckpt.max_num 100 --ckpt.save_hf"
        launch("ladder", SIZE, method.split(), SEED, args.run.resolve())
    saved = args.run / "checkpoints" / "depo" / f"global_step{EARLY}.safetensors"
    with serving(small, large) as servers:
        groups = levels_of("ladder")
        rows = make_split(args.problems, SEED, evaluation=True, levels=ladder.LEVELS)
        for name, server in zip(("small", "large"), servers, strict=True):
            for row, rate in zip(rows, asyncio.run(pass_rates(server, rows, name)), strict=True):
                row["prompt"], row[name] = row["input"], rate
        solvable = [row for row in rows if groups[row["datasource"]] != "hopeless"]
        for name, chosen in (("all", rows), ("solvable", solvable)):
            write_jsonl(args.run / f"{name}.jsonl", chosen)
            print(f"\n{name} problems:", flush=True)
            words = ["--calibrate", str(args.run / f"{name}.jsonl"), "--share", args.share]
            if status := cli.main(["route", str(saved), *words, "--out", str(args.results / name)]):
                return status
        with routing(saved, *servers, args.run / "route.log") as router:
            added = {name: time_added(router, servers, rows, text) for name, text in (("short", ""), ("long", LONG))}
    (args.results / "latency.json").write_text(json.dumps(added, indent=1) + "\n")
    for name, found in added.items():
        print(f"{name} prompts ({found['characters']} characters): {found['direct_ms']:.1f} ms direct, ", end="")
        print(f"{found['routed_ms']:.1f} ms routed, {found['added_ms']:.1f} ms added (medians of {PAIRS})")
    return 0


async def pass_rates(server: Server, rows: list[dict], name: str) -> list[float]:
    """Return the share of right answers to each problem, of SAMPLES."""
    places, model = asyncio.Semaphore(AT_ONCE), server.model
    bar = tqdm(total=len(rows), desc=name, unit="problem", disable=None)

    async def rate(row: dict) -> float:
        async with places:
            options = {"n": SAMPLES, "max_tokens": 16, "temperature": 1.0, "seed": 0}
            answer = await client.completions.create(model=model, prompt=row["input"], **options)
        bar.update()
        found = [last_integer(answer_of(choice.text, row["input"])) for choice in answer.choices]
        return statistics.fmean(one == row["label"] for one in found)

    with bar:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
            return await asyncio.gather(*map(rate, rows))


def time_added(router: Server, servers: list[Server], rows: list[dict], text: str) -> dict[str, float]:
    """Return medians in ms of requests for one token: sent to a model's server, and through the router.

    Each prompt is new to the router, and goes to the same server both times. (A text that is too long for these small
    models is refused by the server both times.)
    """
    times: dict[str, list[float]] = {"direct": [], "routed": []}
    models = [server.model for server in servers]
    with httpx.Client(timeout=60) as client:
        for i, row in enumerate(tqdm(rows[:PAIRS], desc="time added", unit="pair", disable=None)):
            request = {"model": "any", "prompt": f"{text}{i} {row['input']}", "max_tokens": 1}
            start = time.perf_counter()
            answer = client.post(f"{router.url}/v1/completions", json=request)
            times["routed"].append(time.perf_counter() - start)
            which = answer.headers["x-depo-model"] == "large"
            start = time.perf_counter()
            url = f"{servers[which].url}/v1/completions"
            direct = client.post(url, json=request | {"model": models[which]})
            times["direct"].append(time.perf_counter() - start)
            assert direct.status_code == answer.status_code
    direct_ms, routed_ms = (1000 * statistics.median(times[name]) for name in ("direct", "routed"))
    added = [1000 * (b - a) for a, b in zip(times["direct"], times["routed"], strict=True)]
    return {
        "characters": len(request["prompt"]),
        "direct_ms": direct_ms,
        "routed_ms": routed_ms,
        "added_ms": statistics.median(added),
    }


if __name__ == "__main__":
    sys.exit(main())
