"""The launch scripts: what they would run goes through OpenRLHF's real parser and validation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_parser import launches
from release_parser import launch

from depo_plugin.commands import patching
from depo_plugin.estimator.encoder import bundled_encoder
from depo_plugin.settings import config

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("train_depo_*.sh"))
BY_NAME = {path.name: path for path in SCRIPTS}
TRAINER = ["-m", "openrlhf.cli.train_ppo_ray"]

# Stand-ins for what a script calls. Each writes its name and words into a file of its own, because some run at the
# same time; srun and ray then run what they were given.
STAND_IN = """#!/bin/bash
printf '%s\\37' "${0##*/}" "$@" >"$CALLS/$EPOCHREALTIME.$$"
"""
STAND_INS = {
    "python3": 'case "$*" in *openrlhf.cli*) exit "${STATUS:-0}" ;; *) exec "$PYTHON" "$@" ;; esac',
    "srun": 'while [[ $1 = --* ]]; do shift; done; "$@"',
    "ray": '[ "$1" = job ] || exit 0; while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "scontrol": "printf 'node-a\\nnode-b\\n'",
}
# Variables that a script needs, in all runs of it.
NEEDED = {
    "train_depo_paper_7b.sh": {"ENCODER": str(bundled_encoder())},  # its own is looked for on the hub
    "train_depo_slurm.sh": {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_ON_NODE": "64",
    },
}


def run(script, folder, *more, **variables):
    """The finished process of a script in `folder`, and the words of each command that it called, in that order.

    more: the script's own arguments; variables: of the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"{STAND_IN}{body}\n")
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    shutil.rmtree(calls, ignore_errors=True)
    calls.mkdir()
    env = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "CALLS": str(calls),
        "OUT": str(folder / "out"),
        **NEEDED.get(script.name, {}),
        **variables,
    }
    done = subprocess.run(
        ["bash", str(script), *more], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    return done, [call.read_text().split("\37")[:-1] for call in sorted(calls.iterdir())]


def trained(calls):
    """The flags of the trainer's call."""
    (flags,) = [words[3:] for words in calls if words[:3] == ["python3", *TRAINER]]
    return flags


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(script, which) -> its process and its calls. OUT has a space. The script's own arguments come last, and win."""
    folder = tmp_path_factory.mktemp("launch scripts")
    found = {}
    for name, script in BY_NAME.items():
        found[name, "as it is"] = run(script, folder / name, OUT=str(folder / name / "a folder"))
        more = ["--train.seed", "7", "--advantage_estimator", "group_norm"]
        found[name, "plain"] = run(script, folder / name, *more, DOCTOR="0")
    return found


@pytest.fixture(scope="module")
def outcomes(runs, patched_copy):
    """(script, which) -> what OpenRLHF makes of it."""
    return dict(zip(runs, launches([trained(calls) for _, calls in runs.values()], patched_copy), strict=True))


def test_scripts_are_found():
    kinds = ("agent", "async", "dapo", "hybrid_engine", "paper_7b", "ray_job", "slurm")
    assert list(BY_NAME) == [f"train_depo_{kind}.sh" for kind in kinds]


def test_bash_and_shellcheck_find_nothing():
    files = [*map(str, sorted((ROOT / "scripts").glob("*.sh"))), str(ROOT / ".ci" / "run")]
    assert len(files) >= 13
    for file in files:
        parsed = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
        assert (parsed.returncode, parsed.stderr) == (0, "")
    shellcheck = [str(Path(sys.executable).with_name("shellcheck")), "-s", "bash", "-x", "-P", "SCRIPTDIR"]
    done = subprocess.run([*shellcheck, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", BY_NAME)
def test_it_starts_with_the_doctor_and_ends_by_naming_report_and_metrics(name, runs):
    done, calls = runs[name, "as it is"]
    assert done.returncode == 0, done.stderr
    (doctor,) = [words for words in calls if words[:5] == ["python3", "-m", "depo_plugin", "doctor", "--"]]
    flags = trained(calls)
    assert doctor[5:] == ["python3", *TRAINER, *flags]
    assert calls.index(doctor) < calls.index(["python3", *TRAINER, *flags])
    out = flags[flags.index("--ckpt.output_dir") + 1]
    assert out.endswith("/a folder/model")
    quoted = out.replace(" ", "\\ ")
    assert done.stdout.splitlines()[-3:] == [
        "exit status: 0",
        f"report:      depo report {quoted}",
        f"metrics:     {out}/depo/metrics.jsonl",
    ]
    done, calls = runs[name, "plain"]
    assert done.returncode == 0
    assert not any("doctor" in words for words in calls)


def test_a_training_that_fails_is_named_with_its_status_and_a_doctor_that_fails_starts_none(tmp_path):
    script = BY_NAME["train_depo_hybrid_engine.sh"]
    done, calls = run(script, tmp_path, DOCTOR="0", STATUS="3")
    assert done.returncode == 3
    assert "exit status: 3\nreport:      depo report " in done.stdout
    done, calls = run(script, tmp_path, STATUS="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "DOCTOR=0" in done.stderr
    assert [words[1:4] for words in calls] == [["-m", "depo_plugin", "doctor"]]


@pytest.mark.parametrize("name", BY_NAME)
def test_openrlhf_takes_the_flags(name, outcomes):
    outcome = outcomes[name, "as it is"]
    assert (outcome.status, outcome.error) == (None, None), outcome.err[-2000:]
    args = outcome.args
    assert args["depo"]["enabled"] is True
    assert args["algo"]["advantage"]["estimator"] == args["depo"]["advantage"]["base"]
    assert args["ckpt"]["path"].endswith("/a folder/ckpt")
    assert args["ckpt"]["output_dir"].endswith("/a folder/model")
    # OpenRLHF changes settings that do not fit, and prints that it did.
    (line,) = outcome.out.splitlines()
    assert line.startswith("DEPO is on: advantages by group_norm (the launch names none); ")


def test_every_supported_release_takes_the_flags(pristine, runs, tmp_path, monkeypatch):
    copied = shutil.copytree(pristine, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    patching.apply(copied, {"depo"})
    for name in BY_NAME:
        args, said = launch(copied, trained(runs[name, "as it is"][1]), monkeypatch)
        assert args is not None, (name, said[-500:])
        assert args.depo.enabled
        (line,) = said.splitlines()
        assert line.startswith("DEPO is on: ")


@pytest.mark.parametrize("name", BY_NAME)
def test_reward_function_or_agent_is_there(name, runs, outcomes):
    args = outcomes[name, "as it is"].args
    file = args["train"]["agent_func_path"] or args["reward"]["remote_url"][0]
    stage = Path(runs[name, "as it is"][1][0][-1]) if "ray_job" in name else Path()  # it is sent along
    assert (stage / file).is_file()


@pytest.mark.parametrize("name", BY_NAME)
def test_flags_given_to_the_script_win(name, outcomes):
    args = outcomes[name, "plain"].args
    assert (args["train"]["seed"], args["algo"]["advantage"]["estimator"]) == (7, "group_norm")
    assert "depo" not in args


@pytest.mark.parametrize("name", BY_NAME)
def test_the_recipe_fits_together(name, outcomes):
    args = outcomes[name, "as it is"].args
    assert args["actor"]["eps_clip_low_high"] == [0.2, 0.28]
    assert args["actor"]["loss_agg_mode"] == "token-mean"
    assert args["algo"]["kl"]["init_coef"] == 0
    assert not args["algo"]["dynamic_filtering_enable"]
    assert (args["rollout"]["batch_size"], args["rollout"]["n_samples_per_prompt"]) == (128, 8)
    assert 1024 % args["train"]["batch_size"] == 0
    # Longest prompt and response fit into the context, and one of those into a GPU's token budget.
    assert args["rollout"]["max_new_tokens"] < args["data"]["max_len"] <= args["train"]["max_tokens_per_gpu"]
    assert args["data"]["max_len"] <= args["rollout"]["max_tokens_per_gpu"]
    gpus = args["actor"]["num_nodes"] * args["actor"]["num_gpus_per_node"]
    if args["train"]["async_enable"]:
        assert not args["train"]["colocate_all"]
    else:
        assert args["train"]["colocate_all"]
        assert args["vllm"]["num_engines"] == gpus


def test_each_script_is_what_its_header_says(outcomes):
    args = {name: outcomes[name, "as it is"].args for name in BY_NAME}
    assert args["train_depo_async.sh"]["train"]["partial_rollout_enable"]
    assert not args["train_depo_ray_job.sh"]["train"]["partial_rollout_enable"]
    slurm = args["train_depo_slurm.sh"]
    assert (slurm["actor"]["num_nodes"], slurm["vllm"]["num_engines"]) == (2, 16)
    dapo = args["train_depo_dapo.sh"]
    buffer, longest = dapo["reward"]["overlong_buffer_len"], dapo["rollout"]["max_new_tokens"]
    assert (buffer * 5, dapo["reward"]["overlong_penalty_factor"]) == (longest, 1.0)  # 4096 of 20480, as DAPO
    paper = args["train_depo_paper_7b.sh"]
    assert paper["actor"]["model_name_or_path"] == "Qwen/Qwen2.5-7B"
    assert paper["depo"]["filter"]["warmup_steps"] == 100
    assert paper["depo"]["estimator"]["mode"] == "finetune"
    own = config.load_config("depo_paper", {}).estimator.model
    assert f"ENCODER=${{ENCODER:-{own}}} " in BY_NAME["train_depo_paper_7b.sh"].read_text()
    for name in set(BY_NAME) - {"train_depo_paper_7b.sh"}:
        assert args[name]["depo"]["filter"]["warmup_steps"] == 5
    assert args["train_depo_agent.sh"]["reward"]["remote_url"] == ["agent"]


def test_without_flash_attention_nothing_is_packed(tmp_path):
    for name in ("train_depo_async.sh", "train_depo_ray_job.sh"):
        flags = trained(run(BY_NAME[name], tmp_path / name, DOCTOR="0", FLASH_ATTN="0")[1])
        assert not {"--ds.packing_samples", "--train.dynamic_batch_enable"} & set(flags)
        assert "--rollout.batch_size" in flags


def test_slurm_starts_ray_on_each_node_and_the_launch_on_the_first(runs, tmp_path):
    _, calls = runs["train_depo_slurm.sh", "as it is"]
    steps = [words[1:] for words in calls if words[0] == "srun"]
    node = {}  # node -> what is run there, without Ray's status
    for words in steps:
        options = [word for word in words if word.startswith("--")][:6]
        assert {"--overlap", "--nodes=1", "--ntasks=1", "--cpus-per-task=64", "--gpus-per-node=8"} <= set(options)
        (host,) = [word.removeprefix("--nodelist=") for word in words if word.startswith("--nodelist=")]
        rest = words[words.index(f"--nodelist={host}") + 1 :]
        if rest != ["ray", "status"]:
            node.setdefault(host, []).append(rest)
    assert ["ray", "start", "--head", "--port=6379", "--block"] in node["node-a"]
    assert node["node-b"] == [["ray", "start", "--address=node-a:6379", "--block"]]
    assert [rest[2] for rest in node["node-a"] if rest[0] == "python3"] == [
        "depo_plugin",
        "openrlhf.cli.train_ppo_ray",
    ]
    _, calls = run(BY_NAME["train_depo_slurm.sh"], tmp_path, IMAGE="an image", MOUNTS="/a b:/c")
    for words in (words for words in calls if words[0] == "srun"):
        assert {"--container-image=an image", "--container-mounts=/a b:/c"} <= set(words)


def test_ray_job_sends_all_that_the_nodes_need(runs):
    _, calls = runs["train_depo_ray_job.sh", "as it is"]
    stage = Path(calls[0][-1])
    assert " " in str(stage)
    jobs = [words for words in calls if words[0] == "ray"]
    for words in jobs:
        assert words[1:4] == ["job", "submit", "--address=http://127.0.0.1:8265"]
        assert json.loads(words[4].removeprefix("--runtime-env-json=")) == {"working_dir": str(stage)}
    assert [words[words.index("--") + 3] for words in jobs] == ["depo_plugin", "openrlhf.cli.train_ppo_ray"]
    assert patching.inspect(stage).applied == ("depo",)
    code = (
        "import openrlhf, depo_plugin; from depo_plugin.estimator.encoder import bundled_encoder as encoder;"
        "from depo_plugin.settings import config; config.load_config('depo_paper', {});"
        "print(openrlhf.__file__, depo_plugin.__file__, encoder(), sep='\\n')"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=stage, capture_output=True, text=True, check=True)
    assert all(Path(line).is_relative_to(stage) for line in done.stdout.splitlines()), done.stdout


# ── The reward function and the agent ──


def in_copy(copy, code, *words, given=None):
    """What a piece of Python prints last, run with the openrlhf of `copy`."""
    env = os.environ | {"PYTHONPATH": str(copy), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, input=given, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_math_reward(patched_copy):
    cases = [
        ("Q Answer: 5", r" 2+2. \boxed{3} Answer: 4", "4", 1.0),  # the prompt's own "Answer:" is not the response's
        ("Q", "Answer: 3\nAnswer: **4**", "4", 1.0),  # the last one counts
        ("Q", r"so \boxed{\frac{1}{2}}", "1/2", 1.0),
        ("Q", "Answer: $0.5$", r"\frac{1}{2}", 1.0),
        *(("Q", f"Answer: 4{end}", "4", 1.0) for end in ("<|im_end|>", "<|endoftext|>\n", "</s>", "<eos><eos>")),
        ("Q", "**Answer: 4**<|im_end|>", "4", 1.0),
        ("Q", r"Answer: \boxed{4}<|im_end|>", "4", 1.0),
        ("Q", r"Answer: \frac{1}{2}<\uff5cend\u2581of\u2581sentence\uff5c>", "1/2", 1.0),
        ("Q", "Answer: 5<|im_end|>", "4", 0.0),
        ("Q", "Answer: 5", "4", 0.0),
        ("Q Answer: 4", "no idea", "4", 0.0),
    ]
    code = (
        "import json, runpy, sys; cases = json.load(sys.stdin); f = runpy.run_path(sys.argv[1])['reward_func'];"
        "r = f([p + a for p, a, *_ in cases], [c[0] for c in cases], [c[2] for c in cases]);"
        "assert r['scores'] is r['rewards']; print(r['rewards'].tolist())"
    )
    said = in_copy(patched_copy, code, str(ROOT / "scripts" / "math_reward.py"), given=json.dumps(cases))
    assert said == str([case[-1] for case in cases])


def test_math_agent_in_openrlhfs_own_loop_of_turns(patched_copy):
    """OpenRLHF loads it, runs its turns and marks what the policy wrote. The engine gives texts from a list."""
    script = ROOT / "tests" / "helpers" / "agent_turns.py"
    talks = {
        "right at once": ["Answer: 4"],
        "right at last": ["Answer: 5", r"so \boxed{4}"],
        "never right": ["Answer: 5", "Answer: 6"],
    }
    agent = ROOT / "scripts" / "math_agent.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    found = json.loads(in_copy(patched_copy, code, str(agent), given=json.dumps(talks)))
    values = {name: (one["reward"], one["scores"], one["turns"]) for name, one in found.items()}
    assert values == {"right at once": (1.0, 1.0, 1), "right at last": (0.5, 1.0, 2), "never right": (0.0, 0.0, 2)}
    assert [one["actions"] for one in found.values()] == list(talks.values())
    assert "<|im_start|>user" in found["never right"]["feedback"]
    assert found["right at once"]["feedback"] == ""


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_a_cdpath_of_the_user_leads_nowhere_else(path):
    """With CDPATH set, cd prints the folder that it went to, which may be another one of that name."""
    inside = [line for line in path.read_text().splitlines() if "$(" in line and "cd " in line.split("#")[0]]
    assert [line for line in inside if "CDPATH='' cd " not in line] == []


def test_setup_finds_its_folder_whatever_the_users_cdpath():
    script = 'source scripts/setup_cpu.sh; printf "%s" "$root"'
    env = os.environ | {"CDPATH": "."}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == str(ROOT)
