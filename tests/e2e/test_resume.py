"""Killed at any moment, a run goes on as if nothing had happened: bit for bit where rewards are recorded, and on the
real stack from the checkpoint that OpenRLHF goes on from."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_encoder
from stack import (
    BATCH,
    GROUP,
    HELPERS,
    SEED,
    WITH_QUICKSTART,
    base_flags,
    client_states,
    cpu_ray,
    kill,
    launch,
    problems,
)

from benchmarks.soak import PromptStream, batches_of, places
from depo_plugin.estimator import checkpoint
from depo_plugin.settings import config

STEPS = 30
FIRST_CHECKED = 20  # the last kill is over by then: 10 steps of 20 prompts are left
# A life ends "STEP" (at a random moment of about that step) or where resume_life.py pauses; then the tag the next one
# goes on from, where that is certain. OpenRLHF itself cannot go on where it was killed between its rotation, which
# may throw out the checkpoint that `latest` names, and its next save: no life ends while an evaluation was the worst.
LIVES = [
    ("3", None),
    ("global_step6:ours", "global_step5"),
    ("best_global_step8:between", "global_step8"),
    ("global_step11:theirs", "global_step10"),
    ("17", None),
]


@dataclass
class Life:
    """What one process said and where it began."""

    output: str

    @property
    def start(self) -> dict:
        """Its step, the estimator's updates and the policy's weight after loading."""
        return next(json.loads(line[5:]) for line in self.output.splitlines() if line.startswith("LIFE {"))

    @property
    def resumed(self) -> str | None:
        """The tag that the estimator was resumed from."""
        told = [line for line in self.output.splitlines() if "DEPO: estimator resumed from" in line]
        return told[0].split()[-1] if told else None


def live(folder: Path, encoder: str, end: str | None = None, delay: float = 0.0) -> Life:
    """Run one life to its end, or until it is killed: `delay` seconds after it drew step `end`, or paused there."""
    mark = uuid.uuid4().hex
    (folder / "paused").unlink(missing_ok=True)
    pause = end if end and ":" in end else ""
    with tempfile.TemporaryDirectory(prefix="depo-ray-", ignore_cleanup_errors=True) as ray_folder:
        env = cpu_ray.stack_env(RAY_TMPDIR=ray_folder, RAY_USAGE_STATS_ENABLED="0", **{cpu_ray.MARK: mark})
        script = HELPERS / "resume_life.py"
        process = subprocess.Popen(
            [cpu_ray.PYTHON, script, folder, encoder, str(STEPS), pause],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if line == f"LIFE drawn {end}\n":
                    time.sleep(delay)
                    break
                if pause and line == f"LIFE drawn {pause.partition(':')[0].rpartition('step')[2]}\n":
                    wait_for(folder / "paused", lines)
                    break
            else:
                assert process.wait() == 0, "".join(lines)[-5000:]
                assert end is None, f"the life that was to end at {end} came to its own end"
        finally:
            kill({cpu_ray.MARK: mark})
            process.wait()
    return Life("".join(lines))


def wait_for(path: Path, lines: list[str]) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, "".join(lines)[-5000:]
        time.sleep(0.02)


def drawn(folder: Path) -> dict[int, list[list[str]]]:
    """Return step -> the prompts drawn for it, once for each life that came so far."""
    found = defaultdict(list)
    for line in (folder / "drawn.jsonl").read_text().splitlines():
        step, prompts = json.loads(line)
        found[step].append(prompts)
    return found


def tags(root: Path) -> set[str]:
    """Return the tags of the checkpoints under root: OpenRLHF's are folders, ours are files."""
    return {path.name for path in root.iterdir() if path.is_dir()} | {path.stem for path in root.glob("*.safetensors")}


def test_a_run_killed_at_any_moment_draws_and_learns_what_an_uninterrupted_one_does(tmp_path):
    """Seven kills. The next 200 prompts and the estimator's whole state are equal bit for bit."""
    encoder = tiny_encoder.write(tmp_path / "encoder")
    rng = np.random.default_rng(11)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert live(whole, encoder).start == {"step": 0, "updates": 0, "weight": pytest.approx(0, abs=1)}
    ours, theirs = killed / "checkpoints" / "depo", killed / "checkpoints" / "_actor"
    lives = []
    for end, expected in [*LIVES, (None, None)]:
        lives.append(live(killed, encoder, end, rng.uniform(0, 0.3)))
        latest = (theirs / "latest").read_text()
        if end and end.endswith(":ours"):
            assert (ours / f"{end.partition(':')[0]}.safetensors{checkpoint.PARTIAL}").exists()
            assert expected in tags(ours)
        elif end and ":" in end:
            assert end.partition(":")[0] in tags(ours)
        if expected:
            assert latest == expected
    starts = [life.start for life in lives]
    for start, life, before in zip(starts[1:], lives[1:], LIVES, strict=True):
        assert start["step"] > 0
        assert start["step"] == start["updates"] == start["weight"] == int(life.resumed.rpartition("step")[2])
        assert life.resumed == (before[1] or life.resumed)

    # Every time a step was drawn, the same prompts were: in each life, and in the one without an end.
    expected, found = drawn(whole), drawn(killed)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert [len(batches) for batches in expected.values()] == [1] * STEPS
    assert sum(map(len, found.values())) > STEPS + 3  # steps that had to be done again
    assert all(batch == expected[step][0] for step, batches in found.items() for batch in batches)
    assert max(step for step, batches in found.items() if len(batches) > 1) <= FIRST_CHECKED

    tag = f"global_step{STEPS}"
    mine, its = (checkpoint.load(folder / "checkpoints" / "depo" / tag) for folder in (killed, whole))
    assert its["updates"] == STEPS
    assert len(its["text"]["optimizer"]) >= 10
    assert len(its["belief"]["history"]["keys"]) > 60  # most of the pool was met
    tiny_encoder.assert_same_state(mine, its)

    # Ours followed OpenRLHF's rotation through all that; the one that its last save threw out goes with our next save.
    assert tags(theirs) == {"best_global_step16", *(f"global_step{STEPS - i}" for i in range(3))}
    assert tags(ours) == tags(theirs) | {f"global_step{STEPS - 3}"}


# ── The real stack ──


class BetweenTheSaves:
    """Says yes, as stack.launch() asks at each line, once the estimator has saved this step and OpenRLHF has not.

    The policy's process is stopped while the estimator still writes, so that OpenRLHF's save waits for the kill.
    """

    def __init__(self, step: int, checkpoints: Path):
        self.step, self.ours, self.policy = step, checkpoints / "depo", None

    def __call__(self, line: str) -> bool:
        if found := re.search(r"PolicyModelActor pid=(\d+)", line):
            self.policy = int(found[1])
        if f"Global step {self.step - 1}:" not in line:
            return False
        deadline = time.monotonic() + 120
        while not [*self.ours.glob(f"global_step{self.step}*")]:
            assert time.monotonic() < deadline, f"step {self.step} was not saved"
            time.sleep(0.005)
        os.kill(self.policy, signal.SIGSTOP)
        wait_for(self.ours / f"global_step{self.step}.safetensors", [line])
        return True


SETTINGS = ["--train.num_episodes", "1", "--eval.steps", "-1", "--ckpt.save_steps", "3"]
WARMUP = ["--depo.filter.warmup_steps", "2"]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """A launch that was killed after step 6, when the estimator was saved and the policy was not; the next one, with
    the estimator in a DeepSpeed engine; and what OpenRLHF had saved of its loop in between."""
    folder = tmp_path_factory.mktemp("lives")
    out, root = folder / "killed", folder / "killed" / "checkpoints"
    settings = [*SETTINGS, *WARMUP, "--ckpt.path", str(root)]
    killed = launch(out, base_flags(out, *settings), kill_when=BetweenTheSaves(6, root))
    assert killed.status == -signal.SIGKILL
    assert (root / "_actor" / "latest").read_text() == "global_step3"
    assert tags(root / "depo") == {"global_step3", "global_step6"}
    saved = client_states(out, "global_step3")
    on_a_gpu = [*settings, "--ckpt.load_enable", "--depo.estimator.num_gpus", "0.5"]
    resumed = launch(folder / "resumed", base_flags(folder / "resumed", *on_a_gpu), num_gpus=3)
    assert resumed.status == 0, resumed.output[-5000:]
    return killed, resumed, saved


def test_the_real_stack_killed_between_both_saves_goes_on_from_the_older_checkpoint(killed_and_resumed):
    """kill -9 of every process after step 6, when the estimator was saved and the policy was not: on from step 3.

    The batches of steps 1 to 3 were trained for good. The next is the one that the killed run trained, and from there
    on the stream of prompts goes on without a gap: vLLM's samples are not repeatable, so what is kept may differ.
    """
    killed, resumed, saved = killed_and_resumed
    out, root = killed.out, killed.out / "checkpoints"
    assert "DEPO: estimator resumed from global_step3" in resumed.output
    assert [row["step"] for row in resumed.steps] == [*range(4, 11)]
    first, same = resumed.metrics[0], killed.metrics[3]
    assert first["depo/updates"] == saved["global_step"] == 3
    for name in ("depo/scanned", "depo/kept", "depo/explored", "depo/forced", "depo/distinct"):
        assert first[name] == same[name], name  # the decisions of step 4
    assert first["depo/pred_mean"] == pytest.approx(same["depo/pred_mean"], abs=1e-4)
    for step in (6, 9):
        assert checkpoint.load(root / "depo" / f"global_step{step}")["updates"] == step
        assert client_states(out, f"global_step{step}")["total_consumed_prompts"] == step * BATCH

    stream = PromptStream(problems(out / "data" / "train.jsonl"), SEED)
    before, after = (batches_of(run.asked, BATCH, GROUP) for run in (killed, resumed))
    most = config.FilterConfig().max_scan * BATCH
    cursor = saved["data_loader_state_dict"]["depo"]["cursor"]
    assert len(before) == 6  # no more was asked of vLLM than was trained before the kill
    assert len(places(stream, before, most, known={3: cursor})) == 6
    assert after[0] == before[3]
    later = client_states(out, "global_step9")["data_loader_state_dict"]["depo"]["cursor"]
    again = places(stream, after, most, start=cursor, known={6: later})
    assert len(again) == 7
    assert again[-1][1] - cursor > 7 * BATCH  # the filter did something


PARTS = ("settings", *(f"settings.{name}" for name in ("config", "value_kinds", "resources", "yaml_io")))
LIGHT = {"depo_plugin", *(f"depo_plugin.{name}" for name in ("hooks", "advantage", "rules", *PARTS))}


@pytest.fixture(scope="module")
def switched_off(killed_and_resumed, tmp_path_factory):
    """The launch that comes next, without the flag and with twice the batch; its checkpoint flags; and a file of each
    depo_plugin module that one of its processes imported (an audit hook in sitecustomize)."""
    folder = tmp_path_factory.mktemp("off")
    spy, seen, out = folder / "spy", folder / "imports.txt", folder / "run"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def note(event, args):\n"
        "    if event == 'import' and str(args[0]).startswith('depo_plugin'):\n"
        f"        with open({str(seen)!r}, 'a') as out: out.write(f'{{os.getpid()}} {{args[0]}}\\n')\n"
        "sys.addaudithook(note)\n"
    )
    root = shutil.copytree(killed_and_resumed[0].out / "checkpoints", folder / "checkpoints")
    settings = [*SETTINGS, "--ckpt.path", str(root), "--ckpt.load_enable"]
    larger = ["--rollout.batch_size", str(2 * BATCH), "--train.batch_size", str(2 * BATCH * GROUP)]
    head_env = {"PYTHONPATH": os.pathsep.join([str(spy), WITH_QUICKSTART])}
    run = launch(out, base_flags(out, *settings, *larger, method="grpo"), head_env=head_env)
    assert run.status == 0, run.output[-5000:]
    return run, settings, seen


def test_depo_is_switched_off_and_on_again_from_launch_to_launch(switched_off, tmp_path):
    """Off after step 9: OpenRLHF's own loader passes once over the pool in five steps. On again after step 12, in the
    middle of that pass: the rest of the episode, with what the estimator, on the CPU again, knew at step 9."""
    off, settings, _ = switched_off
    assert [row["step"] for row in off.steps] == [*range(10, 15)]
    assert Counter(off.asked) == Counter(GROUP * problems(off.out / "data" / "train.jsonl"))
    assert not [name for row in off.steps for name in row if name.startswith("depo")]

    on = launch(tmp_path / "on", base_flags(tmp_path / "on", *settings, *WARMUP))
    assert on.status == 0, on.output[-5000:]
    assert f"written without DEPO: its episode goes on after {3 * 2 * BATCH} prompts" in on.output
    assert "estimator checkpoint global_step12 is missing or damaged, global_step9 is used instead" in on.output
    assert [row["step"] for row in on.steps] == [*range(13, 17)]
    assert on.metrics[0]["depo/updates"] == 9
    assert on.metrics[-1]["depo/keep_rate"] < 1


def test_no_process_loads_the_core_without_the_flag(switched_off):
    """Not even one that takes up a checkpoint of a launch with it."""
    imports = [line.split() for line in switched_off[2].read_text().splitlines()]
    assert len({pid for pid, _ in imports}) >= 2  # the driver and the trainer at least: the spy works
    assert {module for _, module in imports} <= LIGHT
