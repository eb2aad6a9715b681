"""How long does a checkpoint of the estimator take? `python -m benchmarks.checkpoint [--json FILE]`

Runs the real actor on its own Ray with the bundled encoder, frozen and trained, after one update and with PROMPTS
prompts in its history. Training is blocked for the whole call, because OpenRLHF's own save of that tag comes after it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ray

from depo_plugin.estimator.history import FIELDS
from depo_plugin.messages import Label
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import handle as remote_handle
from depo_plugin.settings import config

ROOT = Path(__file__).parents[1]
GROUP, REPEATS = 8, 5
MODES, PROMPTS = ("frozen", "finetune"), (1_000, 1_000_000)


def fill(host, count: int) -> float:
    """Give the actor's estimator a history of `count` prompts. Return how many seconds it takes to copy its state."""
    rng = np.random.default_rng(0)
    state = host.estimator.state_dict()
    history = {name: rng.random((count, *shape), np.float32).astype(dtype) for name, (dtype, shape) in FIELDS.items()}
    state["belief"]["history"] = history | {"keys": np.arange(count, dtype=np.uint64)}
    state["trained"] = np.arange(count, dtype=np.uint64)
    host.estimator.load_state_dict(state)
    start = time.perf_counter()
    host.estimator.state_dict()
    return time.perf_counter() - start


def measure(mode: str, root: Path) -> list[dict]:
    """Return one row of figures for each number of prompts."""
    algo = SimpleNamespace(dynamic_filtering_enable=False)
    args = SimpleNamespace(train=SimpleNamespace(seed=0), algo=algo)
    args.depo = config.to_namespace(config.load_config(None, {"estimator.mode": mode, "estimator.dtype": "fp32"}))
    actor = remote_actor.create(args, GROUP, str(root))
    handle = remote_handle.connect(600.0)
    handle.judge([Label(f"{i} + {i} =", str(2 * i), i % 9 / 8, 0.5, 8, i % 8 > 0) for i in range(32)])
    handle.learn()
    rows = []
    for count in PROMPTS:
        copying = ray.get(actor.__ray_call__.remote(fill, count))
        blocked, writing, loading = [], [], []
        for number in range(REPEATS):
            start = time.perf_counter()
            writing.append(handle.save(f"global_step{number}", {f"global_step{number - 1}"}))
            blocked.append(time.perf_counter() - start)
            start = time.perf_counter()
            ray.get(actor.load.remote(f"global_step{number}"))
            loading.append(time.perf_counter() - start)
        size = (root / f"global_step{number}.safetensors").stat().st_size
        figures = {"save_s": writing, "load_s": loading}
        rows.append(
            {"mode": mode, "prompts": count, "mb": size / 1e6, "blocked_ms": 1e3 * statistics.median(blocked)}
            | {"blocked_ms_worst": 1e3 * max(blocked), "copy_s": copying}
            | {name: statistics.median(values) for name, values in figures.items()}
        )
    ray.kill(actor)
    return rows


def main() -> None:
    """Print one row for each mode and number of prompts, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # Ray's workers need it, too
    rows = []
    with tempfile.TemporaryDirectory(prefix="depo-ray-") as folder:
        options = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False}
        ray.init("local", _temp_dir=folder, **options)
        for mode in MODES:
            rows += measure(mode, Path(folder) / "checkpoints" / mode / "depo")
        ray.shutdown()
    print(f"{'mode':10}{'prompts':>10}{'MB':>8}{'save s':>8}{'of it, copying':>16}{'blocked ms':>12}{'load s':>8}")
    for row in rows:
        print(
            f"{row['mode']:10}{row['prompts']:10,}{row['mb']:8.1f}{row['save_s']:8.2f}{row['copy_s']:16.2f}"
            f"{row['blocked_ms']:12.0f}{row['load_s']:8.2f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
