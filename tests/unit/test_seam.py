"""Attach or refuse: what DEPO uses of OpenRLHF is there, and the patched files call the hooks as they are."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from in_copy import run_in_copy

from depo_plugin import hooks, seam
from depo_plugin.commands.patching import releases

PATCH = Path(__file__).resolve().parents[2] / "patches" / "0001-depo.patch"


# ── Signatures ──


def test_the_estimator_is_not_started_on_an_openrlhf_that_does_not_fit_and_all_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(seam, "SIGNATURES", {"json": {"dumps": ["obj", "indent"], "JSONDecoder.decode": []}})
    seam.check_signatures()
    changed = {
        "json": {"dumps": ["obj", "objekt"], "JSONDecoder.decode": ["s"], "JSONDecoder.gone": ["s"]},
        "textwrap": {"indent": ["text", "prefix", "suffix", "colour"]},
    }
    monkeypatch.setattr(seam, "SIGNATURES", changed)
    with pytest.raises(seam.SeamError) as error:
        hooks.start_estimator(SimpleNamespace(args=None), None)
    assert str(error.value) == (
        "dumps has no 'objekt'; json has no 'JSONDecoder.gone'; indent has no 'suffix'; indent has no 'colour'. "
        f"Supported: OpenRLHF {', '.join(releases())}. Run: depo patch --check"
    )


# Real OpenRLHF, whole and then with three things changed as another release might.
REAL = """
import dataclasses, json
from depo_plugin import seam
seam.check_signatures()
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils import experience, samples_generator
samples_generator.SamplesGenerator._generate_vllm = lambda self, dataloader_iter, num_prompts, **kwargs: None
del ppo_trainer.BasePPOTrainer.save_best_checkpoint
fields = "index prompts labels rewards advantages action_log_probs action_mask"
experience.Experience = dataclasses.make_dataclass("Experience", fields.split())
try:
    seam.check_signatures()
except seam.SeamError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.wheel
def test_the_real_openrlhf_has_what_the_call_sites_take(patched_copy):
    assert run_in_copy(patched_copy, "-c", REAL) == (
        "openrlhf.trainer.ppo_trainer has no 'BasePPOTrainer.save_best_checkpoint'; "
        "SamplesGenerator._generate_vllm has no 'dynamic_filtering'; Experience has no 'scores'. "
        f"Supported: OpenRLHF {', '.join(releases())}. Run: depo patch --check"
    )


# ── The patch ──

OFF = {"add_arguments": "depo_hooks", "resolve": "depo_hooks"}  # the two that run without DEPO, if it is installed
ON = {"depo_hooks and depo_hooks.enabled(args)", "depo_hooks and depo_hooks.enabled(self.args)"}


def added_lines():
    return [line[1:] for line in PATCH.read_text().splitlines() if line.startswith("+") and line[:3] != "+++"]


def guard_of(call, parents):
    """The condition of the nearest `if` that this call is in the body of; None if there is none."""
    child, node = call, parents.get(call)
    while node is not None:
        if (isinstance(node, ast.If) and child in node.body) or (isinstance(node, ast.IfExp) and child is node.body):
            return ast.unparse(node.test)
        child, node = node, parents.get(node)
    return None


@pytest.fixture(scope="module")
def calls(patched_copy):
    """Each call of a hook in the patched files: (its name, the call, its guard or None)."""
    files = [line.split(" b/", 1)[1] for line in PATCH.read_text().splitlines() if line.startswith("diff --git ")]
    assert len(files) == 3
    found = []
    for file in files:
        tree = ast.parse((patched_copy / file).read_text())
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("depo_hooks."):
                found.append((node.func.attr, node, guard_of(node, parents)))
    return found


@pytest.mark.wheel
def test_every_hook_is_called_and_every_call_fits_its_signature(calls):
    assert len(calls) == sum(line.count("depo_hooks.") for line in added_lines()) == 30
    own = {name for name, value in vars(hooks).items() if getattr(value, "__module__", "") == hooks.__name__}
    assert {name for name in own if name.islower() and name[0] != "_"} == {name for name, _, _ in calls}
    for name, call, _ in calls:
        assert not any(isinstance(arg, ast.Starred) for arg in call.args), ast.unparse(call)
        inspect.signature(getattr(hooks, name)).bind(
            *[None] * len(call.args), **{part.arg: None for part in call.keywords}
        )


@pytest.mark.wheel
def test_every_call_is_behind_the_one_question(calls):
    work = [(name, guard) for name, _, guard in calls if name != "enabled"]
    assert len(work) == 16
    for name, guard in work:
        assert guard == OFF[name] if name in OFF else guard in ON, name
    assert len(calls) - len(work) == len(work) - len(OFF), "each asks it once"


def test_the_patch_is_short():
    assert 30 < len([line for line in added_lines() if line.strip()]) < 55
