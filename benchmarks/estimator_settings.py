"""How fast does the estimator learn a difficulty ladder? `python -m benchmarks.estimator_settings [--json FILE]`

No language model: prompts of the quickstart's tasks, binomial outcomes of groups of 8 at a fixed pass rate per level,
32 prompts a step, each prompt met once. Judged on the next step's prompts, before they are learned from, against the
true pass rates: what the filter would keep after so many steps, and how much of it is worth a rollout.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from depo_plugin.config import load_config
from depo_plugin.estimator import DifficultyEstimator
from depo_plugin.filter import signal_probability
from depo_plugin.labels import Label

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "quickstart"))

import tasks

PROMPTS, GROUP, STEPS, LAST = 32, 8, 16, 4
# (lr, updates_per_step, replay); the first is the paper's way
SETTINGS = [(2e-4, 1, 0), (5e-4, 1, 0), (1e-3, 1, 0), (5e-4, 2, 0), (5e-4, 2, 256), (1e-3, 2, 256)]


def draw_prompts(rng: random.Random, rates: dict) -> tuple[list[str], np.ndarray]:
    """Return PROMPTS prompts of the ladder and their true pass rates."""
    levels = rng.choices(tasks.LEVELS, k=PROMPTS)
    prompts = [tasks.prompt_of(level, tasks.draw(level, rng)) for level in levels]
    return prompts, np.array([rates[level] for level in levels])


def run(settings: tuple, seed: int) -> dict:
    """Learn for STEPS steps; return means over the last LAST steps and the median seconds of an update."""
    names = ("estimator.lr", "estimator.updates_per_step", "estimator.replay")
    cfg = load_config(None, dict(zip(names, settings, strict=True)))
    estimator = DifficultyEstimator(cfg, GROUP, seed)
    rng, outcomes = random.Random(seed), np.random.default_rng(seed)
    rates = {level: 0.95 for level in tasks.EASY} | {level: 0.0 for level in tasks.HOPELESS}
    rates |= dict(zip(tasks.MIDDLE, np.linspace(0.7, 0.1, len(tasks.MIDDLE)), strict=True))
    rows, seconds = [], []
    for _ in range(STEPS):
        prompts, true = draw_prompts(rng, rates)
        scores = estimator.score(prompts, prompts)
        p = scores.a / (scores.a + scores.b)
        keep = (cfg.filter.low <= p) & (p <= cfg.filter.high)
        signal = signal_probability(1e6 * true, 1e6 * (1 - true) + 1e-9, GROUP)
        useful = signal >= 0.5
        found = (keep & useful).sum() / max(1, useful.sum())
        kept_signal = signal[keep].mean() if keep.any() else 0.0
        rows.append((np.abs(p - true).mean(), keep.mean(), signal.mean(), kept_signal, found))
        right = outcomes.binomial(GROUP, true)
        labels = [
            Label(x, x, k / GROUP, None, GROUP, 0 < k < GROUP) for x, k in zip(prompts, right.tolist(), strict=True)
        ]
        start = time.perf_counter()
        estimator.observe(labels)
        seconds.append(time.perf_counter() - start)
    keys = ("mae_true", "keep_rate", "signal_unfiltered", "signal_kept", "useful_found")
    return dict(zip(keys, np.mean(rows[-LAST:], axis=0).tolist(), strict=True)) | {
        "update_s": float(np.median(seconds))
    }


def main() -> None:
    """Print the table, medians over seeds; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| lr | updates | replay | mae | kept | signal: all | signal: kept | useful found | s/update |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for settings in SETTINGS:
        found = [run(settings, seed) for seed in range(args.seeds)]
        rows += [{"settings": settings, "seed": seed, **row} for seed, row in enumerate(found)]
        columns = [f"{np.median([row[name] for row in found]):.2f}" for name in found[0]]
        print(f"| {settings[0]:g} | {settings[1]} | {settings[2]} | " + " | ".join(columns) + " |", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
