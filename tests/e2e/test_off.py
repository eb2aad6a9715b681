"""Without the flag, and in shadow mode, training steps are identical to the bit."""

import json
import subprocess
from pathlib import Path

from safetensors.torch import load_file
from stack import BATCH, HELPERS, base_flags, cpu_ray
from summary import read_rows


def replayed(env, flags, rollouts, out: Path):
    """Train one step on the recorded rollouts on this head, with its OpenRLHF; return status and weights."""
    out.mkdir()
    command = [cpu_ray.PYTHON, HELPERS / "replay_step.py", rollouts, out, "--", *flags]
    command += ["--ckpt.output_dir", out / "model"]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / "status.json").read_text()), load_file(out / "model" / "model.safetensors")


SHADOW = ["--advantage_estimator", "depo", "--depo.shadow"]


def test_one_training_step_is_bit_identical_without_the_seam_with_it_and_in_shadow_mode(tmp_path, plain_copy):
    flags = base_flags(tmp_path / "data", method="grpo")
    rollouts = tmp_path / "rollouts.pt"
    with cpu_ray.ray_head(cpu_ray.stack_env(plain_copy)) as env:
        without, weights_without = replayed(env, flags, rollouts, tmp_path / "without")
    assert without["actor_grad_norm"] > 0
    assert len(set(without["drawn"])) == BATCH
    with cpu_ray.ray_head(cpu_ray.stack_env()) as env:
        with_seam, weights_with = replayed(env, flags, rollouts, tmp_path / "with")
        shadow, weights_shadow = replayed(env, [*flags, *SHADOW], rollouts, tmp_path / "shadow")
    for status, weights in ((with_seam, weights_with), (shadow, weights_shadow)):
        assert status == without
        assert weights.keys() == weights_without.keys()
        assert all(weight.equal(weights_without[name]) for name, weight in weights.items())
    (row,) = read_rows(tmp_path / "shadow" / "model" / "depo" / "metrics.jsonl")
    assert row["depo/scanned"] == row["depo/kept"] + row["depo/unmatched"] == BATCH  # the estimator saw them all
