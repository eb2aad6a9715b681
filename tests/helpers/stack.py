"""Launches of the real stack (Ray, DeepSpeed, vLLM, OpenRLHF) with the quickstart's tiny model."""

import contextlib
import itertools
import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import cpu_ray
import run as quickstart
import summary
import torch

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
QUICKSTART = ROOT / "scripts" / "quickstart"
# The patched OpenRLHF, and the quickstart's modules for reward functions and agents that import them.
WITH_QUICKSTART = os.pathsep.join([str(cpu_ray.PATCHED), str(QUICKSTART)])

BATCH, GROUP, STEPS, WARMUP, SEED, POOL, EVAL = 32, 8, 20, 4, 7, 320, 64
LIMIT_S = 900  # on a busy machine; a launch ends within two minutes on an idle one


@dataclass
class Launch:
    """A launch that has ended: its folder, exit status (negative: the signal), whole output and steps."""

    out: Path
    status: int
    output: str
    rows: list[dict]

    @property
    def steps(self) -> list[dict]:
        """The status of each step."""
        return [row for row in self.rows if "eval" not in row]

    @property
    def asked(self) -> list[str]:
        """The prompt of each response that vLLM generated, in order of completion (the reward function's log)."""
        return [row["prompt"] for row in summary.read_rows(self.out / "rollouts.jsonl")]

    @property
    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        return summary.read_rows(self.out / "model" / "depo" / "metrics.jsonl")


def base_flags(out: Path, *extra: str, method: str = "depo") -> list[str]:
    """Return the quickstart's flags for a short run in `out`, then `extra` (the last of a repeated flag counts)."""
    args = quickstart.parse_args(["--steps", str(STEPS), "--method", method, "--seed", str(SEED), "--out", str(out)])
    preset = quickstart.PRESETS["tiny"]
    out.mkdir(parents=True, exist_ok=True)
    data = quickstart.prepare_data(args, POOL)
    flags = quickstart.launch_flags(args, preset, quickstart.prepare_model("tiny"), data, episodes=2)
    return [*flags, "--eval.steps", "8", "--rollout.batch_size", str(BATCH), *extra]


def launch(out: Path, flags: list[str], head_env=None, num_gpus: int = 2, kill_when=None, **driver_env) -> Launch:
    """Run one launch on a Ray head that counts num_gpus GPUs; driver_env overrides the driver's environment.

    kill_when: asked at each line of output; once it says yes, every process of the run ends by SIGKILL.
    """
    env = cpu_ray.stack_env(WITH_QUICKSTART, DEPO_REWARD_LOG=str(out / "rollouts.jsonl"), **(head_env or {}))
    steps = quickstart.StepLog(out, STEPS, GROUP)
    lines = []
    with cpu_ray.ray_head(env, num_gpus) as env:
        process = cpu_ray.start_training(flags, env | driver_env, cwd=out)
        for line in process.stdout:
            lines.append(line)
            steps.feed(line)
            if kill_when and kill_when(line):
                kill(env)
                kill_when = None
        status = process.wait()
    steps.close()
    return Launch(out, status, "".join(lines), summary.read_rows(out / "steps.jsonl"))


def launch_on(env: dict[str, str], out: Path, flags: list[str], on_line=lambda line: None) -> Launch:
    """Run one launch on the head of ray_head's env, at most LIMIT_S seconds; on_line sees each line of its output."""
    steps, lines = quickstart.StepLog(out, STEPS, GROUP), []
    process = cpu_ray.start_training(flags, env, cwd=out)
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            lines.append(line)
            steps.feed(line)
            on_line(line)
        status = process.wait()
    finally:
        watchdog.cancel()
        process.kill()
        steps.close()
    return Launch(out, status, "".join(lines), summary.read_rows(out / "steps.jsonl"))


def assert_learned(run: Launch, steps: int) -> None:
    """Every step was made, every group found its decision and was learned from, and the filter is on."""
    assert run.status == 0, run.output[-5000:]
    assert [row["step"] for row in run.metrics] == list(range(1, steps + 1))
    assert [row["depo/updates"] for row in run.metrics] == list(range(steps))
    for name in ("depo/unmatched", "depo/clipped", "depo/labels_dropped", "depo/labels_unsent"):
        assert [row[name] for row in run.metrics] == [0.0] * steps, name
    assert 0 < fmean(row["depo/target_mean"] for row in run.metrics) < 1
    assert fmean(row["depo/keep_rate"] for row in run.metrics[3:]) < 1
    assert "DEPO: " not in "".join(line for line in run.output.splitlines() if "WARNING" in line)


def kill(env: dict[str, str]) -> None:
    """End every process of the run by SIGKILL, driver and Ray's included; env: as cpu_ray.ray_head gives it.

    All are stopped first, so that none sees another one die and still does something.
    """
    mark, sessions, pids = env[cpu_ray.MARK], {-1}, True
    while pids:  # also those that were starting meanwhile
        pids = {pid for session in sessions for pid in cpu_ray.own_processes(mark, session)}
        for sign, pid in itertools.product((signal.SIGSTOP, signal.SIGKILL), pids):
            with contextlib.suppress(ProcessLookupError):
                sessions.add(os.getsid(pid))
                os.kill(pid, sign)


def client_states(out: Path, tag: str) -> dict:
    """Return what OpenRLHF saved of its loop in the checkpoint `tag`: episode, steps, prompts and loader state."""
    path = out / "checkpoints" / "_actor" / tag / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False)  # written by a launch of these tests


def problems(path: Path) -> list[str]:
    """Return the prompts of a data file."""
    return [json.loads(line)["input"] for line in path.read_text().splitlines()]
