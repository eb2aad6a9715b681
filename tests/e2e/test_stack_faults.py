"""Faults in the real stack: a reward function that raises, an estimator that is killed. Two launches on one Ray."""

import os
import re
import signal
import time
from pathlib import Path
from statistics import fmean

import pytest
from stack import BATCH, GROUP, STEPS, WITH_QUICKSTART, Launch, base_flags, cpu_ray, launch_on

KILL_AT, SAVED = 4, 3  # the estimator is killed when step 4 is done; its checkpoint is of step 3
BROKEN = BATCH * GROUP + 100  # the response whose reward fails: one of the second batch
REWARD = f"""
import itertools
import reward_func as good
calls = itertools.count(1)

def reward_func(queries, prompts, labels):
    if next(calls) == {BROKEN}:
        raise ValueError("the grader is broken")
    return good.reward_func(queries, prompts, labels)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The environment of a Ray of our own, and of the rewards' log."""
    log = tmp_path_factory.mktemp("head") / "rollouts.jsonl"
    with cpu_ray.ray_head(cpu_ray.stack_env(WITH_QUICKSTART, DEPO_REWARD_LOG=str(log))) as env:
        yield env


def launch(env, out: Path, *extra: str, on_line=lambda line: None) -> Launch:
    """Run one launch without evaluation on this head; on_line sees each line of its output."""
    return launch_on(env, out, base_flags(out, "--eval.steps", "-1", *extra), on_line)


def processes(env) -> dict[int, str]:
    """The title of each process of the run that is at work: no Ray services, no worker that waits for a job."""
    found = {}
    for pid in cpu_ray.own_processes(env[cpu_ray.MARK], -1):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended since
            continue
        if re.match(r"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)|VLLM", title) or "train_ppo_ray" in title:
            found[pid] = title
    return found


def assert_nothing_is_left(env):
    """Soon after the driver has ended, nothing of its job runs: no actor, no engine, no child of one."""
    deadline = time.monotonic() + 60
    while left := processes(env):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_reward_function_that_raises_ends_an_async_run_with_one_clear_error_and_no_process(head, tmp_path):
    reward = tmp_path / "broken_reward.py"
    reward.write_text(REWARD)
    run = launch(head, tmp_path / "run", "--train.async_enable", "--reward.remote_url", str(reward))
    assert run.status not in (0, -signal.SIGKILL), "it neither went on nor had to be ended"
    assert [row["step"] for row in run.steps] == [1], "nothing was trained on the batch without a reward"
    told = f"1 of {BATCH * GROUP} responses have no reward: --reward.remote_url {reward} raised or returned none"
    assert told in run.output
    assert "the grader is broken" in run.output
    assert "No gradient was taken from this batch." in run.output
    assert_nothing_is_left(head)


def test_a_run_whose_estimator_is_killed_makes_all_its_steps_and_filters_again(head, tmp_path):
    killed = []

    def kill_once(line):
        if f"Global step {KILL_AT}:" in line:
            killed.extend(pid for pid, title in processes(head).items() if title.startswith("ray::EstimatorActor"))
            os.kill(killed[0], signal.SIGKILL)

    extra = f"--ckpt.save_steps {SAVED} --depo.filter.warmup_steps 2".split()
    run = launch(head, tmp_path / "run", *extra, on_line=kill_once)
    assert run.status == 0, run.output[-5000:]
    assert len(killed) == 1
    assert [row["step"] for row in run.steps] == list(range(1, STEPS + 1))
    assert [row["step"] for row in run.metrics] == list(range(1, STEPS + 1))
    assert all(row["rollout/num_samples"] == BATCH * GROUP for row in run.steps)
    assert run.output.count("the difficulty estimator did not answer (Actor") == 1
    assert run.output.count("the difficulty estimator did not answer") == 1
    assert run.output.count("the difficulty estimator answers again") == 1
    assert f"was restarted and has lost what it learned after checkpoint global_step{SAVED}" in run.output
    # Filtered before, unscored while it was away, filtered again; one update a step, from its checkpoint on.
    assert fmean(row["depo/keep_rate"] for row in run.metrics[2:KILL_AT]) < 1
    assert fmean(row["depo/keep_rate"] for row in run.metrics[-3:]) < 1
    assert all(row["depo/unscored"] == 0 for row in run.metrics[-3:])
    updates = [row["depo/updates"] for row in run.metrics if "depo/updates" in row]
    again = updates[updates.index(SAVED, KILL_AT) :]
    assert updates[:KILL_AT] == list(range(KILL_AT))
    assert again == list(range(SAVED, SAVED + len(again)))
    assert len(again) >= 3
    assert_nothing_is_left(head)
