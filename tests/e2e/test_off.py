"""Without the flag nothing changes: bit-identical training steps, and no process loads the plugin's core."""

import json
import os
import subprocess
from pathlib import Path

from safetensors.torch import load_file
from stack import BATCH, HELPERS, base_flags, cpu_ray, launch
from summary import read_rows

SETTINGS = ("settings", *(f"settings.{name}" for name in ("config", "value_kinds", "resources", "yaml_io")))
LIGHT = {"depo_plugin", *(f"depo_plugin.{name}" for name in ("hooks", "advantage", "rules", *SETTINGS))}


def replayed(flags, rollouts, out: Path, copy: Path):
    """Train one step on the recorded rollouts with the OpenRLHF in `copy`; return status and weights."""
    out.mkdir()
    script = HELPERS / "replay_step.py"
    with cpu_ray.ray_head(cpu_ray.stack_env(copy)) as env:
        command = [cpu_ray.PYTHON, script, rollouts, out, "--", *flags, "--ckpt.output_dir", out / "model"]
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / "status.json").read_text()), load_file(out / "model" / "model.safetensors")


SHADOW = ["--advantage_estimator", "depo", "--depo.shadow"]


def test_one_training_step_is_bit_identical_without_the_seam_with_it_and_in_shadow_mode(tmp_path, plain_copy):
    flags = base_flags(tmp_path / "data", method="grpo")
    rollouts = tmp_path / "rollouts.pt"
    without, weights_without = replayed(flags, rollouts, tmp_path / "without", plain_copy)
    with_seam, weights_with = replayed(flags, rollouts, tmp_path / "with", cpu_ray.PATCHED)
    assert without["actor_grad_norm"] > 0
    assert len(set(without["drawn"])) == BATCH
    shadow, weights_shadow = replayed([*flags, *SHADOW], rollouts, tmp_path / "shadow", cpu_ray.PATCHED)
    for status, weights in ((with_seam, weights_with), (shadow, weights_shadow)):
        assert status == without
        assert weights.keys() == weights_without.keys()
        assert all(weight.equal(weights_without[name]) for name, weight in weights.items())
    (row,) = read_rows(tmp_path / "shadow" / "model" / "depo" / "metrics.jsonl")
    assert row["depo/scanned"] == row["depo/kept"] + row["depo/unmatched"] == BATCH  # the estimator saw them all


def test_no_process_loads_the_core_without_the_flag(tmp_path):
    """Every Python process of the launch notes each depo_plugin module it imports (an audit hook in sitecustomize)."""
    spy = tmp_path / "spy"
    spy.mkdir()
    seen = tmp_path / "imports.txt"
    (spy / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def note(event, args):\n"
        "    if event == 'import' and str(args[0]).startswith('depo_plugin'):\n"
        f"        with open({str(seen)!r}, 'a') as out: out.write(f'{{os.getpid()}} {{args[0]}}\\n')\n"
        "sys.addaudithook(note)\n"
    )
    out = tmp_path / "off"
    flags = base_flags(out, "--train.num_episodes", "1", "--data.max_samples", "64", method="grpo")
    head_env = {"PYTHONPATH": os.pathsep.join([str(spy), str(cpu_ray.PATCHED)])}
    run = launch(out, flags, head_env=head_env)
    assert run.status == 0, run.output[-5000:]
    assert len(run.steps) == 2
    assert not [name for row in run.steps for name in row if name.startswith("depo")]
    imports = [line.split() for line in seen.read_text().splitlines()]
    assert len({pid for pid, _ in imports}) >= 2  # the driver and the trainer at least: the spy works
    assert {module for _, module in imports} <= LIGHT
