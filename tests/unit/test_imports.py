"""Light things import light: what runs on a login node or in a script loads no torch, ray or vllm."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from depo_plugin.commands.cli import COMMANDS

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "openrlhf"}
# Module -> what it may not even use of our own declared dependencies.
LIGHT = {
    "commands.cli": {"numpy", "yaml"},
    "commands.patching": {"numpy", "yaml"},
    "settings.resources": {"numpy", "yaml"},
    "remote.breaker": {"numpy", "yaml"},
    "settings.config": set(),
    "messages": {"yaml"},
    "labels": {"yaml"},
    "advantage": {"yaml"},
    "filter": {"yaml"},
    "stream": {"yaml"},
    "loader": set(),
    "estimator.metrics": set(),
    "estimator.history": set(),
    "estimator.belief": set(),
    "estimator.ledger": set(),
    "estimator.embedding_cache": set(),
}


def modules_after(*lines):
    """Names in sys.modules after some lines of Python, in a new interpreter; what they print is dropped."""
    code = ["import contextlib, io, json, sys", "with contextlib.redirect_stdout(io.StringIO()):"]
    code += [f"    {line}" for line in lines] + ["print(json.dumps([*sys.modules]))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def run_depo(*words):
    return [
        "from depo_plugin.commands.cli import main",
        "with contextlib.suppress(SystemExit):",
        f"    main({list(words)})",
    ]


def tops(modules):
    return {name.split(".")[0] for name in modules}


def test_the_probe_sees_what_is_imported():
    assert {"yaml", "json", "yaml.loader"} <= modules_after("import yaml")


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_imports_nothing_heavy(name):
    loaded = modules_after(f"import depo_plugin.{name}")
    assert f"depo_plugin.{name}" in loaded
    assert not tops(loaded) & (HEAVY | LIGHT[name])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_nothing_heavy(command):
    loaded = modules_after(*run_depo(command, "--help"))
    modules = {name for name in loaded if name.startswith("depo_plugin.commands.")}
    assert modules - {"depo_plugin.commands.patching", "depo_plugin.commands.checks"} == {
        "depo_plugin.commands.cli",
        f"depo_plugin.commands.{command}",
    }
    assert not tops(loaded) & HEAVY


def test_depo_config_runs_without_anything_heavy():
    loaded = modules_after(*run_depo("config"))
    assert "depo_plugin.settings.config" in loaded
    assert not tops(loaded) & HEAVY


def test_depo_help_imports_no_command_and_is_quick():
    loaded = modules_after(*run_depo("--help"))
    assert not {f"depo_plugin.commands.{name}" for name in COMMANDS} & loaded
    times = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "depo_plugin.commands.cli", "--help"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert all(f"    {name} " in done.stdout for name in COMMANDS)
    assert min(times) < 1.0  # seconds, the interpreter's own start included
