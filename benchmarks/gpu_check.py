"""Does the estimator work on a GPU, and at what cost? `python -m benchmarks.gpu_check [--json FILE] [--quick]`

Both backends (plain torch, DeepSpeed) and both modes (frozen, finetune) are timed with two encoders: the bundled one
and a random one of the size of BERT base. Then their scores are compared with those of the CPU, and checkpoints go
from the GPU to the CPU and back. Without a GPU the same runs on the CPU with small sizes. No vLLM and no download.

The work is done in child processes (PARTS): DeepSpeed's process group stays with a process, and after some CUDA errors
a process can do nothing more. Each child writes its rows to a file; the parent prints the tables.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, BertModel

from benchmarks.estimator import ANSWER, GROUP, WORDS, labels_of
from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.encoder import bundled_encoder
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.settings.config import load_config

MODES = ("frozen", "finetune")
RANDOM = "random BERT"  # folder and name of the encoder that is made here
PARTS = (  # backend and sections of each child process; a later one reads what an earlier one saved
    ("torch", ("speed", "memory", "agreement")),
    ("torch", ("checkpoint",)),
    ("deepspeed", ("speed", "memory", "agreement", "checkpoint")),
)
PART_LIMIT_S = {"cuda": 150, "cpu": 600}  # of one child process; on a CPU, DeepSpeed compiles on its first use
SEED, STEPS = 0, 5
SHORT, LONG = 300, 2_000  # characters of a prompt
# Largest difference of any predicted pass rate after STEPS updates. Rounding differs between devices and grows with
# each AdamW step; the scores themselves move by more than MOVED.
DEVICE_LIMIT, BACKEND_LIMIT, BF16_LIMIT, LOADED_LIMIT, MOVED = 5e-3, 1e-3, 5e-2, 1e-3, 2e-2
KEPT_GOAL_MIB = 1024  # of activations in one update: what a share of a GPU can spare. A goal, not a check
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError, ImportError)
SPEED_HEAD = (
    "| encoder | backend | mode | auto dtype | new prompts/s, 300 chars | new prompts/s, 2,000 chars "
    "| cached prompts/s | s per learn() of {groups} groups, 2,000 chars | peak MiB, scoring | peak MiB, learning |"
)
CHECK_HEAD = "| check | backend | mode | figure | limit | result |"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    scored: prompts of one timed score(); groups: of one timed learn(); repeats: timed calls, the median counts;
    update: prompts of the update whose activations are measured; few: groups of an update whose result is compared;
    compared: the encoder of all but the timings, None for the bundled one; bert: settings of the random one.
    """

    scored: int
    groups: int
    repeats: int
    update: int
    few: int
    compared: str | None
    bert: dict


FULL = Sizes(scored=512, groups=128, repeats=3, update=256, few=32, compared=None, bert={})
QUICK = Sizes(
    scored=4,
    groups=2,
    repeats=1,
    update=4,
    few=4,
    compared=RANDOM,
    bert={"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
)


# ── Prompts, encoder ──


def prompts_of(count: int, chars: int, use: int) -> list[str]:
    """Return different prompts of that many characters; another `use` gives others."""
    rng = np.random.default_rng([chars, use])
    texts = (f"{use}.{i}: {' '.join(rng.choice(WORDS, chars // 2))}" for i in range(count))
    return [text[:chars] for text in texts]


def random_bert(folder: Path, settings: dict) -> None:
    """Write a BERT with random weights and the bundled encoder's tokenizer. settings: differences from BERT base."""
    source = bundled_encoder()
    torch.manual_seed(SEED)
    BertModel(BertConfig(**settings)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)


def name_of(folder: Path | None) -> str:
    """Return an encoder's name and number of parameters. folder: of fp32 weights, None for the bundled encoder."""
    if folder is None:
        return "bundled MiniLM, 23M"
    return f"{folder.name}, {(folder / 'model.safetensors').stat().st_size / 4e6:.0f}M"


# ── The two backends ──


def openrlhf_strategy():
    """Return (strategy for the DeepSpeed backend, how it was made).

    It comes from backends.deepspeed_strategy(). That needs Ray and vLLM, which OpenRLHF imports beside it. If one of
    them is missing, OpenRLHF's own get_strategy() is called here with the same settings.
    """
    from depo_plugin.estimator.backends import deepspeed_strategy

    ds = SimpleNamespace(zero_stage=0, param_dtype="fp32", adam_offload=False, grad_accum_dtype=None)
    args = SimpleNamespace(ds=ds, train=SimpleNamespace(seed=SEED, batch_size=1, micro_batch_size=1), local_rank=-1)
    try:
        return deepspeed_strategy(args), "from backends.deepspeed_strategy()"
    except ImportError as err:
        from openrlhf.utils import get_strategy

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
        strategy = get_strategy(args)
        strategy.setup_distributed()
        return strategy, f"from OpenRLHF's get_strategy(): backends.deepspeed_strategy() stops at `{err}`"


@dataclass
class Bench:
    """What one child process works with.

    backend: "torch" or "deepspeed"; device: of the estimator; work: folder that the children share; rows: the file
    that they write to; strategy: of the DeepSpeed backend, None for plain torch.
    """

    backend: str
    device: torch.device
    sizes: Sizes
    work: Path
    rows: Path
    strategy: object = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def compared(self) -> Path | None:
        """Return the encoder of all but the timings."""
        return self.work / self.sizes.compared if self.sizes.compared else None

    @property
    def on(self) -> str:
        """Name backend and device, as in the tables."""
        return f"{self.backend}, {self.device.type}"

    def build(self, mode: str, model: Path | None = None, **settings) -> DifficultyEstimator:
        """Return a new estimator of this backend on its device. settings: of the section estimator."""
        if self.strategy is None:
            return torch_estimator(self.device, mode, model, **settings)
        return DifficultyEstimator(config_of(mode, model, **settings), GROUP, SEED, strategy=self.strategy)

    def write(self, row: dict) -> None:
        """Append a row to the file and show it as progress."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{time.perf_counter() - self.started:4.0f} s] {line(row)}", file=sys.stderr, flush=True)

    def check(self, name: str, mode: str, figure: float, limit: float, fault: str = "") -> None:
        """Write a check: it passes if the figure is at most the limit and there is no other fault."""
        self.write(check_row(name, self.on, mode, f"{figure:.2g}", f"≤ {limit:g}", fault or not figure <= limit))


def config_of(mode: str, model: Path | None, **settings):
    """Return the settings of an estimator."""
    given = {"mode": mode, "model": str(model) if model else None} | settings
    return load_config(None, {f"estimator.{name}": value for name, value in given.items()})


def torch_estimator(device: torch.device, mode: str, model: Path | None = None, **settings) -> DifficultyEstimator:
    """Return an estimator of the plain torch backend on that device.

    No setting of the package puts this backend on a GPU. It takes the device that torch creates the weights on.
    """
    with device:
        return DifficultyEstimator(config_of(mode, model, **settings), GROUP, SEED)


def check_row(name: str, on: str, mode: str, figure: str, limit: str, fault: bool | str | None) -> dict:
    """Return a row of the table of checks. fault: True or a text if it failed, None for a figure without a check."""
    result = "figure only" if fault is None else "FAILED" if fault else "ok"
    if isinstance(fault, str) and fault:
        result += f": {fault}"
    return {"table": "checks", "cells": [name, on, mode, figure, limit, result], "failed": bool(fault)}


def line(row: dict) -> str:
    """Return a row as Markdown."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in row['cells'])} |"


# ── What is measured ──


def seconds(device: torch.device, call: Callable, *args) -> float:
    """Return how long the call takes, the GPU's work included."""
    start = time.perf_counter()
    call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(device: torch.device) -> str:
    """Return the peak of GPU memory since the last call, "-" on a CPU."""
    if device.type != "cuda":
        return "-"
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return f"{peak:.0f}"


def speed(bench: Bench) -> None:
    """Write one row of rates, times and memory for each encoder and mode."""
    for folder in (None, bench.work / RANDOM):
        for mode in MODES:
            speed_row(bench, folder, mode)


def speed_row(bench: Bench, folder: Path | None, mode: str) -> None:
    """Measure one estimator. Every timed score() is given prompts that it never saw, except for the cached rate."""
    device, sizes = bench.device, bench.sizes
    peak_mib(device)
    made = bench.build(mode, folder)

    def per_second(prompts: list[str]) -> float:
        return len(prompts) / seconds(device, made.score, prompts, [ANSWER] * len(prompts))

    long = prompts_of(sizes.scored * sizes.repeats, LONG, 1)
    rates, cached = [], "-"
    for chars in (SHORT, LONG):
        made.score(warm := prompts_of(max(2, sizes.scored // 8), chars, 0), [ANSWER] * len(warm))
        prompts = long if chars == LONG else prompts_of(sizes.scored * sizes.repeats, chars, 1)
        runs = [prompts[i : i + sizes.scored] for i in range(0, len(prompts), sizes.scored)]
        rates.append(f"{statistics.median(map(per_second, runs)):,.0f}")
        if mode == "frozen":
            cached = f"{statistics.median(map(per_second, runs)):,.0f}"
    scoring = peak_mib(device)
    # The first learn() warms up and fills the replay: the timed ones learn from as many recent groups again.
    groups = labels_of(long[: sizes.groups * (1 + sizes.repeats)])
    learns = [seconds(device, made.learn, groups[i :: 1 + sizes.repeats]) for i in range(1 + sizes.repeats)]
    cells = [name_of(folder), bench.on, mode, made.state_dict()["text"]["dtype"], *rates, cached]
    cells += [f"{statistics.median(learns[1:]):.3f}", scoring, peak_mib(device)]
    bench.write({"table": "speed", "cells": cells, "failed": False})


def memory(bench: Bench) -> None:
    """Write what one update of the finetune mode keeps for the backward pass, and its peak. No replay."""
    device, count = bench.device, bench.sizes.update
    made = bench.build("finetune", bench.compared, replay=0)
    groups = labels_of(prompts_of(count, LONG, 2))
    made.learn(groups)  # so that AdamW's state is there
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    made.learn(groups)
    dtype = made.state_dict()["text"]["dtype"]
    what = f"of one update of {count} prompts of {LONG:,} chars, {dtype}, {name_of(bench.compared)}"
    if device.type == "cuda":
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        bench.write(
            check_row(f"peak MiB above the idle estimator {what}", bench.on, "finetune", f"{peak:.0f}", "", None)
        )
    with kept_bytes() as sizes:
        made.learn(groups)
    kept = sum(sizes.values()) / 2**20
    goal = f"goal ≤ {KEPT_GOAL_MIB}"
    bench.write(check_row(f"MiB kept for the backward pass {what}", bench.on, "finetune", f"{kept:.0f}", goal, None))


@contextlib.contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Yield a dict that gets the bytes of each storage that autograd keeps inside, parameters left out."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a result that keeps itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


# ── What is compared ──


class NoDropout(TorchFunctionMode):
    """Inside, dropout changes nothing: devices draw different random numbers from the same seed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.nn.functional.dropout else func(*args, **(kwargs or {}))


def pass_rates(made: DifficultyEstimator, few: int) -> np.ndarray:
    """Return the predicted pass rates of `few` prompts that are learned from and as many new ones."""
    prompts = prompts_of(few, SHORT, 3) + prompts_of(few, SHORT, 4)
    scores = made.score(prompts, [ANSWER] * len(prompts))
    return scores.a / (scores.a + scores.b)


def learn(made: DifficultyEstimator, few: int, steps: int) -> None:
    """Judge and learn from the same groups so many times, as the training loop does, without dropout."""
    groups = labels_of(prompts_of(few, SHORT, 3))
    with NoDropout():
        for _ in range(steps):
            made.judge(groups)
            made.learn(groups)


def agreement(bench: Bench) -> None:
    """Compare scores after STEPS updates that start from one state.

    Plain torch: with the CPU, and bf16 with fp32. DeepSpeed: with plain torch on the same device.
    """
    few = bench.sizes.few

    def learned(made: DifficultyEstimator, start: Path) -> np.ndarray:
        made.load_state_dict(checkpoint.load(start))
        learn(made, few, STEPS)
        return pass_rates(made, few)

    for mode in MODES:
        start, reached = bench.work / f"start-{mode}", bench.work / f"reached-{mode}.npy"
        if bench.backend == "deepspeed":
            apart = np.abs(learned(bench.build(mode, bench.compared, dtype="fp32"), start) - np.load(reached)).max()
            name = f"largest Δp after {STEPS} updates, fp32: this and torch, {bench.device.type}"
            bench.check(name, mode, apart, BACKEND_LIMIT)
            continue
        cpu = torch_estimator(torch.device("cpu"), mode, bench.compared, dtype="fp32")
        checkpoint.save(start, cpu.state_dict())
        before = pass_rates(cpu, few)
        wanted = learned(cpu, start)
        moved = np.abs(wanted - before).max()
        fault = "" if moved > MOVED else f"nothing was learned: the scores moved by {moved:.2g} only"
        found = learned(bench.build(mode, bench.compared, dtype="fp32"), start)
        np.save(reached, found)
        apart = np.abs(found - wanted).max()
        bench.check(f"largest Δp after {STEPS} updates, fp32: this and torch, cpu", mode, apart, DEVICE_LIMIT, fault)
        if bench.device.type == "cuda":  # many CPUs have no bf16 instructions and take minutes
            apart = np.abs(learned(bench.build(mode, bench.compared, dtype="bf16"), start) - found).max()
            bench.check(f"largest Δp after {STEPS} updates: bf16 and fp32", mode, apart, BF16_LIMIT)


def checkpoints(bench: Bench) -> None:
    """Take a state from the device to the CPU and back, by checkpoint; both sides go on learning after each way."""
    few, cpu = bench.sizes.few, torch.device("cpu")
    ways = {
        "to the CPU": lambda mode: torch_estimator(cpu, mode, bench.compared, dtype="fp32"),
        "from the CPU": lambda mode: bench.build(mode, bench.compared, dtype="fp32"),
    }
    for mode in MODES:
        made = bench.build(mode, bench.compared, dtype="fp32")
        learn(made, few, 2)
        for way, build in ways.items():
            folder = bench.work / f"{bench.backend} {mode} {way}"
            checkpoint.save(folder, made.state_dict())
            loaded = build(mode)
            loaded.load_state_dict(checkpoint.load(folder))
            unequal = differences(made.state_dict(), loaded.state_dict())
            name = f"checkpoint {way}:"
            bench.check(f"{name} values that are not bit for bit equal", mode, len(unequal), 0, ", ".join(unequal[:3]))
            before = pass_rates(loaded, few)
            bench.check(f"{name} largest Δp", mode, np.abs(before - pass_rates(made, few)).max(), LOADED_LIMIT)
            learn(made, few, 2)
            learn(loaded, few, 2)
            after = pass_rates(loaded, few)
            fault = "" if np.abs(after - before).max() > 0 else "the loaded one learned nothing"
            apart = np.abs(after - pass_rates(made, few)).max()
            bench.check(f"{name} largest Δp after 2 more updates", mode, apart, DEVICE_LIMIT, fault)
            made = loaded


def differences(one, other, path: str = "") -> list[str]:
    """Return the paths of the values in which two states differ; tensors and arrays are compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        return [found for key in one for found in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor | np.ndarray):
        arrays = [np.asarray(value) for value in (one, other)]
        kinds = [(value.dtype, value.shape) for value in arrays]
        return [] if kinds[0] == kinds[1] and arrays[0].tobytes() == arrays[1].tobytes() else [path]
    return [] if one == other or (one != one and other != other) else [path]


# ── The processes ──

SECTIONS = {"speed": speed, "memory": memory, "agreement": agreement, "checkpoint": checkpoints}


def child(part: int, work: Path, sizes: Sizes) -> None:
    """Run one part. A section that fails becomes a failed row, and the next one is tried."""
    backend, sections = PARTS[part]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(backend, device, sizes, work, work / f"part{part}.jsonl")
    if backend == "deepspeed":
        try:
            bench.strategy, how = openrlhf_strategy()
        except FAULTS as err:
            traceback.print_exc()
            bench.write(
                check_row("DeepSpeed starts", bench.on, "", "", "", f"{type(err).__name__}: {first_line(err)}")
            )
            return
        bench.write(check_row("DeepSpeed starts", bench.on, "", how, "", False))
    for name in sections:
        try:
            SECTIONS[name](bench)
        except FAULTS as err:
            traceback.print_exc()
            bench.write(check_row(f"{name} runs", bench.on, "", "", "", f"{type(err).__name__}: {first_line(err)}"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def first_line(err: Exception) -> str:
    """Return the first line of an error's text."""
    return (str(err).splitlines() or [""])[0][:200]


def run_part(part: int, work: Path, quick: bool, gpu: bool) -> list[dict]:
    """Run one part in a process of its own; return its rows, a failed one if the process did not end well."""
    backend, sections = PARTS[part]
    print(f"== {backend}: {', '.join(sections)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", str(part), "--work", str(work)]
    # Without a GPU: one thread, for two that wait for each other are slower on a busy machine.
    env = os.environ if gpu else {"OMP_NUM_THREADS": "1"} | os.environ | {"DS_ACCELERATOR": "cpu"}
    fault, limit = "", PART_LIMIT_S["cuda" if gpu else "cpu"]
    try:
        # Their own output goes to stderr: DeepSpeed logs to stdout.
        status = subprocess.run(
            command + ["--quick"] * quick, env=env, stdout=sys.stderr, timeout=limit, check=False
        ).returncode
        fault = f"its process ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        fault = f"not done after {limit} s"
    path = work / f"part{part}.jsonl"
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if fault:
        rows.append(check_row(f"{', '.join(sections)}: process", backend, "", "", "", fault))
    return rows


def setup() -> dict:
    """Return what the figures depend on."""
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in ("transformers", "deepspeed", "openrlhf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    else:
        found["GPU"] = "none: not run on a GPU, the figures are a CPU's with small sizes"
    return found


def main() -> int:
    """Run all parts, print the tables; return 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write setup and rows to this file, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, as without a GPU")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    quick = args.quick or not gpu
    sizes = QUICK if quick else FULL
    if args.part is not None:
        child(args.part, args.work, sizes)
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="depo-gpu-") as folder:
        work = Path(folder)
        random_bert(work / RANDOM, sizes.bert)
        rows = [row for part in range(len(PARTS)) for row in run_part(part, work, quick, gpu)]
    failed = [row for row in rows if row["failed"]]
    found = setup()
    print("; ".join(f"{name} {value}" for name, value in found.items()))
    for table, head in (("speed", SPEED_HEAD.format(groups=sizes.groups)), ("checks", CHECK_HEAD)):
        print(f"\n{head}\n{'|---' * (head.count('|') - 1)}|")
        for row in (row for row in rows if row["table"] == table):
            print(line(row))
    print(
        f"\nMedians of {sizes.repeats}; {sizes.scored} prompts a score(); learn() with the default replay. "
        "Plain torch has no setting for a GPU: it was built inside `with torch.device(...)`."
    )
    if not gpu:
        print("not run on a GPU")
    for row in failed:
        print(f"FAILED: {', '.join(filter(None, row['cells']))}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"setup": found, "rows": rows}, indent=1), encoding="utf-8")
    print(f"{len(failed)} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
