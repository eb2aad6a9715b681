"""`depo doctor`: a launch that is right, one with planted mistakes, and each check by itself."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from nested_args import nested

from depo_plugin.commands import checks
from depo_plugin.commands.cli import main
from depo_plugin.estimator.text_model import TextModel
from depo_plugin.settings import config
from depo_plugin.settings.config import EstimatorConfig

ROOT = Path(__file__).resolve().parents[2]
OK, WARN, FAIL = checks.OK, checks.WARN, checks.FAIL


# ── Whole launches, through the real OpenRLHF ──


def words(tmp_path, *more):
    """The command line of a small launch: the quickstart's policy and reward on four problems."""
    rows = [{"input": f"{i}+{i}=", "label": str(2 * i)} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "--actor.model_name_or_path": ROOT / "scripts/quickstart/tiny",
        "--reward.remote_url": ROOT / "scripts/quickstart/reward_func.py",
        "--data.prompt_dataset": tmp_path / "train.jsonl",
        "--data.input_key": "input",
        "--data.label_key": "label",
        "--ckpt.path": tmp_path / "checkpoints",
        "--ckpt.output_dir": tmp_path / "model",
        "--rollout.batch_size": 8,
        "--rollout.n_samples_per_prompt": 8,
        "--train.batch_size": 64,
        "--actor.num_gpus_per_node": 1,
        "--vllm.num_engines": 1,
        "--vllm.tensor_parallel_size": 1,
        "--algo.kl.init_coef": 0,
        "--advantage_estimator": "depo",
    }
    launch = ["ray", "job", "submit", "--", "python3", "-m", "openrlhf.cli.train_ppo_ray"]
    return [*launch, *(str(word) for pair in flags.items() for word in pair), *more]


def examined(copy, tmp_path, *more):
    """The exit status, and name -> check of `depo doctor` in a process whose OpenRLHF is the one in `copy`."""
    paths = os.pathsep.join([str(copy), str(ROOT), str(ROOT / "scripts/quickstart")])
    env = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "depo_plugin.commands.cli", "doctor", "--json", "--", *words(tmp_path, *more)]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = [checks.Check(**row) for row in json.loads(run.stdout)]
    return run.returncode, {check.name: check for check in found}


@pytest.mark.wheel
@pytest.mark.slow
def test_a_launch_that_is_right(patched_copy, tmp_path):
    status, found = examined(patched_copy, tmp_path)
    assert list(found) == ["openrlhf", "flags", "data", "reward", "gpus", "cpus", "folder", "disk", "encoder"]
    assert status == 0, found
    assert {check.status for check in found.values()} <= {OK, WARN}
    assert found["flags"].said.startswith("DEPO is on: advantages by group_norm")
    assert found["data"] == checks.Check("data", OK, "40 prompts; the first is '0+0='")
    assert "reward 1, score 1" in found["reward"].said
    assert "the launch takes 2, here are 0" in found["gpus"].said
    assert "new prompts/s" in found["encoder"].said
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.wheel
@pytest.mark.slow
def test_a_launch_with_five_planted_mistakes(patched_copy, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import torch\ndef reward_func(queries, prompts, labels):\n    return {'rewards': torch.ones(2)}\n"
    )
    (tmp_path / "a file").write_text("")
    status, found = examined(
        patched_copy,
        tmp_path,
        *("--data.label_key", "answer"),
        *("--reward.remote_url", str(tmp_path / "reward.py")),
        *("--train.colocate_all", "--vllm.num_engines", "3"),
        *("--ckpt.path", str(tmp_path / "a file" / "checkpoints")),
        *("--rollout.batch_size", "64", "--train.batch_size", "512", "--depo.estimator.timeout_s", "0.001"),
    )
    assert status == 1
    assert {name for name, check in found.items() if check.status == FAIL} == {"data", "reward", "gpus", "folder"}
    assert found["data"].said.endswith("has the columns input, label, not answer")
    assert found["reward"].said.endswith("reward.py returned 2 rewards for one response")
    assert found["gpus"].said == "--train.colocate_all with 1 GPUs for training and 3 for vLLM"
    assert "a file" in found["folder"].said
    assert found["encoder"].status == WARN
    assert all(check.fix for check in found.values() if check.status != OK)


@pytest.mark.wheel
@pytest.mark.slow
def test_prompts_are_embedded_ahead_into_the_folder_of_the_launch(patched_copy, tmp_path):
    """The second time there is nothing to do; the launch's estimator finds every row."""
    paths = os.pathsep.join([str(patched_copy), str(ROOT), str(ROOT / "scripts/quickstart")])
    env = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    template = ("--data.input_template", "Q: {}", "--depo.estimator.dtype", "fp32")
    command = [sys.executable, "-m", "depo_plugin.commands.cli", "embed", "--", *words(tmp_path, *template)]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    folder = tmp_path / "checkpoints" / "depo_embeddings"
    assert run.stdout.splitlines()[-1] == f"{folder}: 40 prompts are embedded"
    model = TextModel(EstimatorConfig(dtype="fp32"), 7, cache_dir=folder)
    model._encode = None  # not called: every row is there
    assert len(model.embed([f"Q: {i}+{i}=" for i in range(40)])) == 40


@pytest.mark.wheel
@pytest.mark.slow
def test_flags_that_openrlhf_refuses_end_it(patched_copy, plain_copy, tmp_path):
    status, found = examined(patched_copy, tmp_path, "--depo.filter.hihg", "0.9")
    assert (status, list(found)) == (1, ["openrlhf", "flags"])
    assert "Did you mean --depo.filter.high" in found["flags"].said
    status, found = examined(patched_copy, tmp_path, "--advantage_estimator", "group_norm")
    assert (status, found["flags"].fix) == (1, "add --advantage_estimator depo")
    status, found = examined(plain_copy, tmp_path)
    assert (status, list(found), found["openrlhf"].fix) == (1, ["openrlhf"], "depo patch")


def test_the_command_line_must_start_the_trainer(capsys):
    assert main(["doctor", "--", "python3", "train.py", "--advantage_estimator", "depo"]) == 2
    assert "openrlhf.cli.train_ppo_ray" in capsys.readouterr().err
    assert checks.flags_of(["python3", "x/train_ppo_ray.py", "--a", "1"]) == ["--a", "1"]


def test_the_lines_that_it_prints(monkeypatch, capsys):
    found = [checks.Check("data", OK, "40 prompts"), checks.Check("reward", FAIL, "none", "name one")]
    monkeypatch.setattr(checks, "all_of", lambda flags: iter(found))
    assert main(["doctor", "--", "-m", "openrlhf.cli.train_ppo_ray"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "OK    data      40 prompts",
        "FAIL  reward    none",
        "                fix: name one",
    ]


# ── Each check ──


def arguments(**changes):
    """The flags that the checks of rewards, GPUs and disk read."""
    flags = {
        "actor.num_nodes": 1,
        "actor.num_gpus_per_node": 4,
        "actor.model_name_or_path": "hub/name",
        "ref.num_nodes": 1,
        "ref.num_gpus_per_node": 2,
        "vllm.num_engines": 2,
        "vllm.tensor_parallel_size": 2,
        "algo.kl.init_coef": 0.0,
        "reward.remote_url": "reward.py",
        "reward.num_nodes": 1,
        "reward.num_gpus_per_node": 1,
        "train.agent_func_path": None,
        "train.colocate_all": False,
        "train.colocate_actor_ref": False,
        "train.async_enable": False,
        "depo.estimator.num_gpus": 0.0,
        "depo.estimator.num_cpus": 1,
        "depo.labels.reward_range": [0.0, 1.0],
        "ckpt.path": ".",
        "ckpt.save_steps": 10,
        "ckpt.max_num": 3,
    }
    return nested(flags | changes)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, 8),
        ({"algo.kl.init_coef": 0.1}, 10),
        ({"algo.kl.init_coef": 0.1, "train.colocate_actor_ref": True}, 8),
        ({"train.colocate_all": True, "algo.kl.init_coef": 0.1}, 4),
        ({"train.colocate_all": True, "train.async_enable": True}, 8),
        ({"reward.remote_url": None}, 9),
        ({"reward.remote_url": None, "train.agent_func_path": "agent.py"}, 8),
        ({"depo.estimator.num_gpus": 0.5}, 8.5),
    ],
)
def test_the_gpus_of_a_launch(changes, needed):
    assert checks.gpus_needed(arguments(**changes)) == needed


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"rewards": [1.0]}, OK, "reward 1, score 1"),
        ({"rewards": [[0.5]], "scores": [1]}, OK, "reward 0.5, score 1"),
        ({"rewards": [-1.0]}, WARN, "outside --depo.labels.reward_range 0 1"),
        ({"rewards": [5.0], "scores": [0.0]}, OK, "score 0"),
        ({"rewards": [1.0, 0.0]}, FAIL, "2 rewards for one response"),
        ({"rewards": [float("nan")]}, FAIL, "reward nan"),
        ([1.0], FAIL, "list without 'rewards'"),
        ({"scores": [1.0]}, FAIL, "dict without 'rewards'"),
    ],
)
def test_what_a_reward_function_may_return(answer, status, words):
    found = checks._judge_reward(arguments(), "reward.py", answer)
    assert found.status == status
    assert words in found.said


def test_a_reward_file_may_import_a_module_that_has_the_name_of_openrlhfs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "quickstart")
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import reward_func as graded\n\ndef reward_func(*told):\n    return graded.reward_func(*told)\n"
    )
    args = arguments()
    args.train, args.reward = SimpleNamespace(agent_func_path=None), SimpleNamespace(remote_url=[str(wrapper)])
    found = checks.check_reward(args, "1 + 1 =", "2")
    assert (found.status, found.said) == (OK, f"{wrapper} gives the label as a response reward 1, score 1")


def test_a_reward_file_that_ends_the_process_is_a_fail(tmp_path):
    ends = tmp_path / "ends.py"
    ends.write_text("import sys\n\nsys.exit(2)\n")
    args = arguments(**{"reward.remote_url": str(ends)})
    found = checks.guarded("reward", lambda: checks.check_reward(args, "1 + 1 =", "2"))
    assert (found.status, found.said) == (FAIL, "SystemExit: 2")


@pytest.mark.wheel
@pytest.mark.slow
def test_embedding_ahead_that_cannot_be_done_ends_with_one_line(tmp_path, monkeypatch, capsys):
    """Data that cannot be read; prompts that are no text; a folder or encoder that cannot be used; mode finetune."""
    launch = nested(
        {
            "data.prompt_probs": None,
            "data.prompt_split": "train",
            "data.max_samples": 100,
            "data.input_key": "input",
            "data.label_key": None,
            "data.apply_chat_template": False,
            "data.input_template": None,
            "data.disable_fast_tokenizer": False,
            "actor.model_name_or_path": str(ROOT / "scripts/quickstart/tiny"),
            "rollout.vllm_generate_batch_size": 8,
            "train.seed": 7,
            "ckpt.path": str(tmp_path / "checkpoints"),
        }
    )
    monkeypatch.setattr(checks, "check_flags", lambda flags: (checks.Check("flags", OK, ""), launch))

    def said(rows, **estimator):
        launch.depo = config.load_config(None, {f"estimator.{name}": value for name, value in estimator.items()})
        launch.data.prompt_dataset = str(tmp_path / "train.jsonl")
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = main(["embed", "--", "-m", "openrlhf.cli.train_ppo_ray"])
        told = capsys.readouterr()
        return status, (told.err if status else told.out).splitlines()[-1]

    fine, file = [{"input": "1 + 1 ="}], tmp_path / "file"
    file.touch()
    status, line = said([{"text": "a"}])
    assert (status, "train.jsonl has the columns text, not input. To mend it: set" in line) == (1, True)
    assert said([{"input": [{"role": "user", "content": "a"}]}])[1].startswith("depo embed: a prompt is not text.")
    status, line = said(fine, cache_dir=str(file / "below"))
    assert (status, line) == (
        1,
        f"depo embed: {file / 'below'} cannot keep the embeddings; the warning above says why.",
    )
    status, line = said(fine, model=str(tmp_path / "nowhere"))
    assert (status, line.startswith("depo embed: --depo.estimator.model")) == (1, True)
    assert said(fine, mode="finetune") == (
        0,
        "depo embed: --depo.estimator.mode finetune keeps no embeddings: nothing to do.",
    )
    assert said(fine) == (0, f"{tmp_path / 'checkpoints' / 'depo_embeddings'}: 1 prompts are embedded")
    launch.data.prompt_dataset = str(tmp_path / "none.jsonl")
    assert main(["embed", "--", "-m", "openrlhf.cli.train_ppo_ray"]) == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_a_reward_server_is_asked_as_openrlhf_asks_it():
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"rewards": [0.25]}).encode())

        def log_message(self, *args):
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = checks.check_reward(arguments(**{"reward.remote_url": [url]}), "1+1=", "2")
        server.shutdown()
    assert asked == [{"query": ["1+1=2"], "prompts": ["1+1="], "labels": ["2"]}]
    assert (found.status, "0.25" in found.said) == (OK, True)
    gone = checks.guarded("reward", lambda: checks.check_reward(arguments(**{"reward.remote_url": url}), "a", "b"))
    assert (gone.status, "refused" in gone.said) == (FAIL, True)


@pytest.mark.parametrize("what", ["rename", "fsync", "locks", "memory maps", "SQLite"])
def test_a_file_system_that_lacks_something(tmp_path, monkeypatch, what):
    assert checks.check_folder(tmp_path / "new" / "checkpoints").status == OK

    def refused(folder):
        raise OSError(38, "Function not implemented")

    monkeypatch.setitem(checks._FILE_SYSTEM, what, refused)
    found = checks.check_folder(tmp_path / "new" / "checkpoints")
    assert found.status == WARN
    assert f"lacks {what} ([Errno 38] Function not implemented)" in found.said
    assert list(tmp_path.iterdir()) == []


def test_the_disk_that_a_policys_checkpoints_take(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 1000 * 4 - 1))
    args = arguments(**{"actor.model_name_or_path": str(tmp_path)})
    assert checks.check_disk(args).status == WARN
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 1000 * 4))
    assert checks.check_disk(args).status == OK
    args.ckpt.save_steps = -1
    assert "checkpoints" not in checks.check_disk(args).said
