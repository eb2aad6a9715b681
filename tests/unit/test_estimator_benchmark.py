"""benchmarks/estimator.py still runs: it is used rarely, and a change of the estimator can break it unseen."""

from pathlib import Path

import pytest
import tiny_encoder
import torch

from benchmarks import estimator as bench
from depo_plugin.estimator import encoder

CPU = torch.device("cpu")


@pytest.mark.slow
def test_each_row_and_goal_is_measured(tmp_path, monkeypatch):
    folder = Path(tiny_encoder.write(tmp_path / "encoder"))
    monkeypatch.setattr(encoder, "bundled_encoder", lambda: folder)
    prompts = bench.mixed_prompts(8)
    rows = bench.finetune(CPU, {"score": prompts, "update": bench.labels_of(prompts)})
    rows += bench.frozen(CPU, 40, steps=1) + bench.frozen(CPU, 80, steps=1)
    assert all(row["per_s"] > 0 for row in rows)
    goals = bench.goals(rows)
    assert len(goals) == 8
    assert all(goal["figure"] > 0 for goal in goals)
