"""The launch scripts: what they would run goes through OpenRLHF's real parser and validation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_parser import launches

pytestmark = pytest.mark.wheel

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts").glob("train_depo_*.sh"))
BY_NAME = {path.name: path for path in SCRIPTS}


def command(script, tmp_path, *more, **variables):
    """The words of the `python3` command that a script ends in; `more` are the script's own arguments."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    stub, words = tmp_path / "python3", tmp_path / "words"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$WORDS"\n')
    stub.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORDS": str(words)} | variables
    subprocess.run(["bash", str(script), *more], env=env, cwd=tmp_path, check=True, capture_output=True)
    return words.read_text().split("\0")[:-1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, patched_copy):
    """(script, which) -> what OpenRLHF makes of it."""
    folder = tmp_path_factory.mktemp("launch")
    words = {}
    for name, script in BY_NAME.items():
        # OUT is one of every script's variables; flags given to the script are appended, so they win.
        words[name, "as it is"] = command(script, folder / name, OUT="a folder/b")
        more = ["--train.seed", "7", "--advantage_estimator", "group_norm"]
        words[name, "plain"] = command(script, folder / name, *more)
    for call in words.values():
        assert call[:2] == ["-m", "openrlhf.cli.train_ppo_ray"]
    return dict(zip(words, launches([call[2:] for call in words.values()], patched_copy), strict=True))


def test_scripts_are_found():
    assert "train_depo_hybrid_engine.sh" in BY_NAME


@pytest.mark.parametrize("name", BY_NAME)
def test_openrlhf_takes_the_flags(name, outcomes):
    outcome = outcomes[name, "as it is"]
    assert (outcome.status, outcome.error) == (None, None), outcome.err[-2000:]
    args = outcome.args
    assert args["depo"]["enabled"] is True
    assert args["algo"]["advantage"]["estimator"] == args["depo"]["advantage"]["base"]
    assert args["ckpt"]["path"].startswith("a folder/b/")
    assert args["ckpt"]["output_dir"].startswith("a folder/b/")
    # OpenRLHF changes settings that do not fit, and prints that it did.
    (line,) = outcome.out.splitlines()
    assert line.startswith("DEPO is on: advantages by group_norm (the launch names none); ")


@pytest.mark.parametrize("name", BY_NAME)
def test_reward_function_is_there(name, outcomes):
    (reward,) = outcomes[name, "as it is"].args["reward"]["remote_url"]
    assert Path(reward).is_file()


@pytest.mark.parametrize("name", BY_NAME)
def test_flags_given_to_the_script_win(name, outcomes):
    args = outcomes[name, "plain"].args
    assert (args["train"]["seed"], args["algo"]["advantage"]["estimator"]) == (7, "group_norm")
    assert "depo" not in args


def test_hybrid_engine_is_the_recipe_that_its_header_names(outcomes):
    args = outcomes["train_depo_hybrid_engine.sh", "as it is"].args
    assert args["train"]["colocate_all"]
    assert args["actor"]["eps_clip_low_high"] == [0.2, 0.28]
    assert args["actor"]["loss_agg_mode"] == "token-mean"
    assert args["algo"]["kl"]["init_coef"] == 0
    responses = args["rollout"]["batch_size"] * args["rollout"]["n_samples_per_prompt"]
    assert responses % args["train"]["batch_size"] == 0
    # Longest prompt and response fit into the context, and one of those into a GPU's token budget.
    assert args["rollout"]["max_new_tokens"] < args["data"]["max_len"] <= args["train"]["max_tokens_per_gpu"]


def test_math_reward(patched_copy):
    script = BY_NAME["train_depo_hybrid_engine.sh"].with_name("math_reward.py")
    cases = [
        ("Q Answer: 5", r" 2+2. \boxed{3} Answer: 4", "4", 1.0),  # the prompt's own "Answer:" is not the response's
        ("Q", "Answer: 3\nAnswer: **4**", "4", 1.0),  # the last one counts
        ("Q", r"so \boxed{\frac{1}{2}}", "1/2", 1.0),
        ("Q", "Answer: $0.5$", r"\frac{1}{2}", 1.0),
        ("Q", "Answer: 5", "4", 0.0),
        ("Q Answer: 4", "no idea", "4", 0.0),
    ]
    code = (
        "import json, runpy, sys; cases = json.load(sys.stdin); f = runpy.run_path(sys.argv[1])['reward_func'];"
        "r = f([p + a for p, a, *_ in cases], [c[0] for c in cases], [c[2] for c in cases]);"
        "assert r['scores'] is r['rewards']; print(r['rewards'].tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(script)],
        input=json.dumps(cases),
        env=os.environ | {"PYTHONPATH": str(patched_copy), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines()[-1] == str([case[-1] for case in cases])
