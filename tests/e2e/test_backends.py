"""The estimator's two backends, plain torch and a real DeepSpeed engine, give the same numbers within tolerance."""

import json
import subprocess

import pytest
from stack import HELPERS, base_flags, cpu_ray


def test_deepspeed_and_torch_learn_the_same(tmp_path):
    flags = base_flags(tmp_path / "data")
    script = HELPERS / "compare_backends.py"
    command = [cpu_ray.PYTHON, str(script), *flags]
    done = subprocess.run(command, env=cpu_ray.stack_env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rows"]) == 4
    for torch_side, deepspeed_side in found["rows"]:
        for name in ("loss", "loss_score", "loss_distill", "loss_rank", "grad_norm", "pred_mean"):
            assert deepspeed_side[name] == pytest.approx(torch_side[name], rel=1e-3, abs=1e-5), name
    assert found["rows"][0][0]["loss"] != found["rows"][3][0]["loss"]
    assert found["distance"] < 1e-3
    assert found["p"][1] == pytest.approx(found["p"][0], abs=1e-3)
