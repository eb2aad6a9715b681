"""A launch script as a user runs it: train_depo_ray_job.sh on a Ray head of our own, with small sizes.

The head knows neither the patched OpenRLHF nor this checkout: the job has to bring both to every process.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from stack import LIMIT_S, QUICKSTART, cpu_ray
from summary import read_rows

from depo_plugin.commands import cli

STEPS, BATCH, GROUP = 4, 8, 4
# What a CPU cannot do, and sizes. The variables GPUS, VLLM_GPUS and FLASH_ATTN do the rest.
SMALL = f"""
    --vllm.sync_backend gloo --vllm.enforce_eager --ds.attn_implementation eager --ds.adam_offload --ds.zero_stage 2
    --ds.param_dtype {cpu_ray.param_dtype()} --data.max_len 64 --rollout.max_new_tokens 12 --actor.adam.lr 1e-4
    --rollout.batch_size {BATCH} --rollout.n_samples_per_prompt {GROUP} --rollout.micro_batch_size 8
    --train.batch_size {BATCH * GROUP} --train.micro_batch_size 8 --train.num_episodes 1
    --depo.filter.warmup_steps 1 --depo.estimator.threads 1
"""
REWARD = f"""
import os, runpy
import depo_plugin, openrlhf
good = runpy.run_path({str(QUICKSTART / "reward_func.py")!r})

def reward_func(queries, prompts, labels):
    good["log"]([{{"openrlhf": openrlhf.__file__, "depo_plugin": depo_plugin.__file__, "cwd": os.getcwd()}}])
    return good["reward_func"](queries, prompts, labels)
"""


def prepare(folder: Path) -> dict[str, str]:
    """Write a model with a chat template, data and reward into the folder; return the script's variables."""
    model = shutil.copytree(QUICKSTART / "tiny", folder / "the model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[-1]['content'] }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tasks = [cpu_ray.PYTHON, QUICKSTART / "tasks.py", "--out", folder / "data"]
    subprocess.run([*tasks, "--train", str(STEPS * BATCH), "--eval", "8"], check=True)
    for name in ("train", "eval"):
        file = folder / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{"prompt": [{"role": "user", "content": row["input"]}], "label": row["label"]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my reward.py").write_text(REWARD)
    return {
        "MODEL": str(model),
        "DATASET": str(folder / "data" / "train.jsonl"),
        "EVAL_DATASET": str(folder / "data" / "eval.jsonl"),
        "REWARD": str(folder / "my reward.py"),
        "OUT": str(folder / "out"),
        "STAGE": str(folder / "the stage"),
        "GPUS": "1",
        "VLLM_GPUS": "1",
        "FLASH_ATTN": "0",
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The script's folder, its exit status and its output."""
    folder = tmp_path_factory.mktemp("launch script")
    assert " " in str(folder)
    variables = prepare(folder)
    assert cli.main(["patch", "--target", variables["STAGE"], "--cpu"]) == 0  # the script keeps a copy that is there
    env = cpu_ray.stack_env(QUICKSTART, DEPO_REWARD_LOG=str(folder / "rollouts.jsonl"))
    script = cpu_ray.ROOT / "scripts" / "train_depo_ray_job.sh"
    with cpu_ray.ray_head(env, dashboard=True) as env:
        done = subprocess.run(
            ["bash", str(script), *SMALL.split()],
            env=env | variables | {"ADDRESS": env["RAY_ADDRESS"]},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * LIMIT_S,
            check=False,
        )
    (folder / "job.log").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    return folder, done.stdout


def test_the_doctor_looks_at_the_launch_where_it_will_run(job):
    _, said = job
    (copy,) = re.findall(r"^OK    openrlhf  (.*): 0.11.2, patches applied: depo, cpu$", said, re.MULTILINE)
    assert "/working_dir_files/_ray_pkg_" in copy
    assert re.findall(r"^(\w+) +reward +reward.py gives the label as a response reward 1, score 1", said, re.MULTILINE)
    assert not re.findall(r"^FAIL", said, re.MULTILINE)


def test_the_job_brings_the_patched_openrlhf_and_depo_plugin_to_the_workers(job):
    folder, _ = job
    rows = [row for row in read_rows(folder / "rollouts.jsonl") if "depo_plugin" in row]
    assert len(rows) >= STEPS * BATCH * GROUP
    for row in rows:
        assert "/working_dir_files/_ray_pkg_" in row["cwd"]
        assert row["openrlhf"] == f"{row['cwd']}/openrlhf/__init__.py"
        assert row["depo_plugin"] == f"{row['cwd']}/depo_plugin/__init__.py"


def test_it_trains_and_its_last_lines_name_the_report_and_the_metrics(job):
    folder, said = job
    status, report, metrics = [line.partition(":")[2].strip() for line in said.splitlines()[-3:]]
    assert status == "0"
    assert metrics == str(folder / "out" / "model" / "depo" / "metrics.jsonl")
    rows = read_rows(Path(metrics))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all((row["depo/kept"], row["depo/unmatched"]) == (BATCH, 0) for row in rows)
    assert (folder / "out" / "model" / "config.json").is_file()
    env = cpu_ray.stack_env()
    page = subprocess.run(
        shlex.split(report), env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert page.returncode == 0, page.stderr
