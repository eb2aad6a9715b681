"""Does training go on if the estimator dies? `python -m benchmarks.soak [--steps 200] [--kill-every 20] [--json FILE]`

Runs the real stack (Ray, DeepSpeed, vLLM, OpenRLHF) in async mode, with the quickstart's tiny model and a checkpoint
every ten steps. Once in every `--kill-every` steps, the estimator's process gets a SIGKILL at a random moment.
Afterwards the prompts that vLLM got (the reward log), the trained groups (OpenRLHF's step log) and the loader's
position (OpenRLHF's checkpoints) must agree: no batch is lost and none is used twice. Exits with 1 if they do not.
Logs and checkpoints stay in runs/soak.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import cpu_ray
import numpy as np
import run as quickstart
import summary
import torch

from depo_plugin.estimator import checkpoint
from depo_plugin.messages import Stream
from depo_plugin.settings import config

ROOT = Path(__file__).parents[1]
SEED = 42
SAVE_STEPS = 10
ACTOR = "ray::EstimatorActor"  # the title that Ray gives its process; a method's name follows while it runs
START_S, YOUNG_S = 300.0, 10.0  # longest wait for the first process; it is killed when it is at most so old
NEAR = 5  # steps that are compared: before a kill, and after the estimator answers again


# ── The position of each prompt on the stream ──


class PromptStream:
    """The endless sequence of prompts in the loader's order: each pass is a new permutation of the pool."""

    def __init__(self, pool: list[str], seed: int):
        self._pool, self._seed, self._passes = pool, seed, {}

    def __getitem__(self, position: int) -> str:
        number, place = divmod(position, len(self._pool))
        if number not in self._passes:
            rng = np.random.default_rng([self._seed, Stream.ORDER, number])
            self._passes[number] = rng.permutation(len(self._pool))
        return self._pool[self._passes[number][place]]


def batches_of(prompts: list[str], batch_size: int, group_size: int) -> list[Counter]:
    """Return the batches of a reward log, each as prompt -> number of its groups.

    A batch is finished before the next one begins, so its responses lie together in the log. Raise ValueError if a
    prompt has an incomplete group, or if the last batch is not full.
    """
    batches, size = [], batch_size * group_size
    for start in range(0, len(prompts), size):
        counts = Counter(prompts[start : start + size])
        if odd := [prompt for prompt, count in counts.items() if count % group_size]:
            raise ValueError(f"batch {len(batches) + 1}: {odd[0]!r} has {counts[odd[0]]} responses")
        batches.append(Counter({prompt: count // group_size for prompt, count in counts.items()}))
    if batches and batches[-1].total() != batch_size:
        raise ValueError(f"batch {len(batches)} has {batches[-1].total()} groups, not {batch_size}")
    return batches


def places(
    stream: PromptStream, batches: list[Counter], most: int, start: int = 0, known: dict[int, int] | None = None
) -> list[tuple[int, int]]:
    """Return each batch's first and last + 1 position on the stream, from `start` on.

    Each prompt gets its own position, after all positions of earlier batches. A batch ends with its last prompt, or
    `most` candidates after its start if it was filled up with rejected prompts. known: batch number (from 1) -> its
    end. Raise ValueError if no positions fit: a prompt was drawn twice, or in the wrong order.
    """
    starts, steps = {start}, []
    for number, batch in enumerate(batches, start=1):
        ends = {}  # possible end of this batch -> its start
        for first in sorted(starts):
            if (last := _last(stream, batch, first, first + most)) is not None:
                ends = {last + 1: first, first + most: first} | ends
        if not ends:
            raise ValueError(f"batch {number}: {batch} not among {most} candidates from any of {sorted(starts)} on")
        if known and number in known:
            if known[number] not in ends:
                raise ValueError(f"batch {number}: ends at one of {sorted(ends)}, not at {known[number]}")
            ends = {known[number]: ends[known[number]]}
        steps.append(ends)
        starts = set(ends)
    end, spans = min(starts), []
    for ends in reversed(steps):
        spans.insert(0, (ends[end], end))
        end = ends[end]
    return spans


def _last(stream: PromptStream, batch: Counter, position: int, stop: int) -> int | None:
    """Return the last position if each prompt takes its first one from `position` on; None if that is after `stop`."""
    wanted = Counter(batch)
    for at in range(position, stop):
        wanted.subtract([stream[at]] if wanted[stream[at]] else [])
        if not wanted.total():
            return at
    return None


# ── The run ──


@dataclass
class Kill:
    """One kill of the estimator. step: the last trained step; doing: the method that its process ran."""

    step: int
    pid: int
    doing: str


@dataclass
class Killer:
    """Kills the estimator's process at a random moment, once in every `every` steps, and once while the run starts."""

    mark: str  # of the run's processes (see cpu_ray.MARK)
    steps: int  # of the whole run
    every: int  # steps per kill
    kills: list[Kill] = field(default_factory=list)  # the kills so far

    def __post_init__(self):
        rng = np.random.default_rng(SEED)
        blocks = range(0, self.steps - self.every + 1, self.every)
        # After a block's second step, so that one step has been timed, and before its last, so that more steps follow.
        self._due = {int(start + rng.integers(2, self.every)): float(rng.uniform()) for start in blocks}
        self.planned = len(self._due) + 1
        self._step = 0
        self._timers = [threading.Thread(target=self._kill, args=(START_S, rng.uniform(0, YOUNG_S)))]
        self._timers[0].start()

    def after(self, step: int, seconds: float):
        """Record a trained step and its duration. If a kill is due, kill within the same duration from now."""
        self._step = step
        if (share := self._due.pop(step, None)) is not None:
            self._timers.append(threading.Timer(share * seconds, self._kill))
            self._timers[-1].start()

    def _kill(self, limit: float = 60.0, age: float = 0.0):
        """Kill the process that is there, or that comes within `limit` seconds, `age` seconds after it was seen."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:  # the process may be restarting
            if estimators(self.mark):
                time.sleep(age)
            for pid, method in estimators(self.mark):
                os.kill(pid, signal.SIGKILL)
                self.kills.append(Kill(self._step, pid, method or "waiting"))
                return
            time.sleep(0.1)

    def wait(self):
        """Wait until all started kills are done."""
        for timer in self._timers:
            timer.join()


def run_processes(mark: str) -> list[int]:
    """Return the ids of all the run's processes.

    A process that sets its title may overwrite the mark in its environment. So every process that shares a session
    with a marked one counts, too.
    """
    sessions = set()
    for pid in cpu_ray.own_processes(mark, -1):
        with contextlib.suppress(OSError):
            sessions.add(os.getsid(pid))
    return sorted({pid for session in sessions for pid in cpu_ray.own_processes(mark, session)})


def estimators(mark: str) -> list[tuple[int, str]]:
    """Return the id of each estimator process of the run, and the method that it runs ("" if it waits)."""
    found = []
    for pid in run_processes(mark):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            if title.startswith(ACTOR):
                found.append((pid, title.removeprefix(ACTOR).strip(".")))
    return found


def launch(out: Path, steps: int, every: int) -> tuple[int, Killer]:
    """Run the launch and kill estimators meanwhile. Return its exit status and the killer."""
    args = quickstart.parse_args(["--steps", str(steps), "--seed", str(SEED), "--out", str(out)])
    preset = quickstart.PRESETS["tiny"]
    episodes = max(1, round(steps / quickstart.STEPS_PER_EPISODE))
    episodes = episodes if steps % episodes == 0 else 1
    data = quickstart.prepare_data(args, preset.batch_size * steps // episodes)
    flags = quickstart.launch_flags(args, preset, quickstart.prepare_model("tiny"), data, episodes)
    flags += ["--train.async_enable", "--eval.steps", "-1", "--ckpt.save_steps", str(SAVE_STEPS)]
    env = cpu_ray.stack_env(DEPO_REWARD_LOG=str(out / "rollouts.jsonl"), RAY_DEDUP_LOGS="0")
    log = quickstart.StepLog(out, steps, preset.group_size)
    with cpu_ray.ray_head(env) as env:
        killer = Killer(env[cpu_ray.MARK], steps, every)
        process = cpu_ray.start_training(flags, env, cwd=out)
        last = time.monotonic()
        for line in process.stdout:
            log.feed(line)
            if match := quickstart.STEP.search(line):
                now = time.monotonic()
                killer.after(int(match[1]), now - last)
                last = now
        status = process.wait()
        killer.wait()
    log.close()
    return status, killer


# ── The checks ──


def loader_states(root: Path) -> dict[int, dict]:
    """Return step -> DEPO's part of the loader's state in OpenRLHF's checkpoints under root."""
    found = {}
    for folder in root.glob("global_step*"):
        saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)  # written by this run
        found[saved["global_step"]] = saved["data_loader_state_dict"]["depo"]
    return found


def account(out: Path, steps: int, status: int, killer: Killer) -> tuple[dict, list[tuple[str, bool]]]:
    """Return the figures of a finished run, and each check with its outcome."""
    preset, cfg = quickstart.PRESETS["tiny"], config.FilterConfig()
    size, group = preset.batch_size, preset.group_size
    rows = summary.read_rows(out / "steps.jsonl")
    rewards = summary.read_rows(out / "rollouts.jsonl")
    warnings = [line for line in (out / "train.log").read_text().splitlines() if "DEPO" in line and "WARNING" in line]
    pool = [row["input"] for row in summary.read_rows(out / "data" / "train.jsonl")]
    checks = [
        (f"ended with status {status}", status == 0),
        (f"{len(rows)} steps, each once and in order", [row["step"] for row in rows] == list(range(1, steps + 1))),
        (
            f"{len(killer.kills)} of {killer.planned} kills, each of another process",
            len({kill.pid for kill in killer.kills}) == killer.planned,
        ),
        (f"{len(rewards)} responses paid for, {steps} x {size} x {group}", len(rewards) == steps * size * group),
    ]
    if not all(met for _, met in checks):
        return {"steps": len(rows), "kills": [asdict(kill) for kill in killer.kills]}, checks
    cursors = {step: state["cursor"] for step, state in loader_states(out / "checkpoints" / "_actor").items()}
    try:
        batches = batches_of([row["prompt"] for row in rewards], size, group)
        spans = places(PromptStream(pool, SEED), batches, cfg.max_scan * size, known=cursors)
        checks += [
            (f"{len(spans)} batches, no position of the stream in two of them", True),
            (f"the loader's positions in checkpoints {sorted(cursors)} are those of the reward log", bool(cursors)),
        ]
    except ValueError as fault:
        checks.append((str(fault), False))
        return {"steps": len(rows), "kills": [asdict(kill) for kill in killer.kills]}, checks

    starts = range(0, len(rewards), size * group)
    asked = [(fmean(row["reward"] for row in rewards[i : i + size * group]), size * group) for i in starts]
    trained = [(row["rollout/reward_mean"], row["rollout/num_samples"]) for row in rows]
    same = len(asked) == len(trained) and np.allclose(asked, trained, rtol=0, atol=1e-5)
    checks.append(("each trained once, whole and in order: its mean reward is the step's", same))
    valid = checkpoint.latest_valid(out / "checkpoints" / "depo", f"global_step{steps}")
    checks.append(("the estimator's last checkpoint can be read", valid is not None))

    groups = summary.training_groups(out, group)
    ratios = [fmean(map(summary.has_signal, groups[i : i + size])) for i in range(0, len(groups), size)]
    ends = [row["seconds"] for row in rows]
    seconds = [ends[0], *(after - before for before, after in pairwise(ends))]
    filtered = [end - start > size for start, end in spans]  # something was rejected
    first = filtered.index(True) if any(filtered) else steps
    unfiltered = [i for i in range(first, steps) if not filtered[i]]
    killed, answered = [kill.step for kill in killer.kills], answers_again(out / "train.log")
    before = [ratios[i] for kill in killed for i in range(max(first, kill - NEAR), kill) if filtered[i]]
    windows = [range(step, step + NEAR) for step in answered if first <= step <= steps - NEAR]
    windows = [window for window in windows if not {*window} & {*killed}]
    after = [ratios[i] for window in windows for i in window if filtered[i]]
    back = any(filtered[min(killed, default=0) :]) and all(any(filtered[i] for i in window) for window in windows)
    checks.append((f"answers again {len(answered)} times; filters again within {NEAR} steps of {len(windows)}", back))
    found = {
        "steps": len(rows),
        "minutes": ends[-1] / 60,
        "kills": [asdict(kill) for kill in killer.kills],
        "answers_again_after_steps": answered,
        "warnings": len(warnings),
        "first_filtered_step": first + 1,
        "batches_unfiltered": len(unfiltered),
        "prompts_unfiltered": len(unfiltered) * size,
        "seconds_unfiltered": sum(seconds[i] for i in unfiltered),
        "prompts_scanned": spans[-1][1],
        "updates_left": valid[1]["updates"] if valid else None,
        "effective_ratio": {
            "warm_up": _mean(ratios[:first]),
            "before_kills": _mean(before),
            "unfiltered": _mean([ratios[i] for i in unfiltered]),
            "after_kills": _mean(after),
        },
    }
    return found, checks


def answers_again(log: Path) -> list[int]:
    """Return the number of trained steps at each time when the estimator answered the loader's process again."""
    found, step = [], 0
    for line in log.read_text().splitlines():
        if match := quickstart.STEP.search(line):
            step = int(match[1])
        elif "GenerateSamplesActor" in line and "answers again" in line:
            found.append(step)
    return found


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def main() -> int:
    """Run, print and write the figures and the checks. Return 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kill-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out = ROOT / "runs" / "soak"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    found, checks = account(out, args.steps, *launch(out, args.steps, args.kill_every))
    print(json.dumps(found, indent=1))
    for text, met in checks:
        print(f"{'ok' if met else 'FAILED':7}{text}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found | {"checks": checks}, indent=1))
    return 0 if all(met for _, met in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
