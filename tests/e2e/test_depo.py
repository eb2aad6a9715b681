"""DEPO switched on in the real stack: it learns, filters before the rollout, refuses half a seam."""

import json
from collections import Counter, defaultdict
from statistics import fmean

import numpy as np
import pytest
from safetensors.torch import load_file
from stack import BATCH, EVAL, GROUP, POOL, QUICKSTART, STEPS, WARMUP, base_flags, cpu_ray, launch, problems
from summary import read_rows


def test_policy_weights_moved_and_stayed_finite(depo_run):
    before = load_file(QUICKSTART / "tiny" / "model.safetensors")
    after = load_file(depo_run.out / "model" / "model.safetensors")
    moved = [name for name, weight in before.items() if not weight.equal(after[name])]
    assert len(moved) > len(before) / 2
    assert all(weight.isfinite().all() for weight in after.values())


def test_steps_metrics_and_schedule_are_those_of_the_launch(depo_run):
    assert [row["step"] for row in depo_run.steps] == list(range(1, STEPS + 1))
    assert [row["step"] for row in depo_run.metrics] == list(range(1, STEPS + 1))
    for row in depo_run.metrics:
        assert row["depo/kept"] == BATCH
        assert row["depo/scanned"] >= BATCH
    assert all(row["depo/keep_rate"] == 1 for row in depo_run.metrics[:WARMUP])
    assert fmean(row["depo/keep_rate"] for row in depo_run.metrics[WARMUP:]) < 0.9


def test_groups_settings_and_the_consoles_line_tell_the_same_as_the_metrics(depo_run):
    folder = depo_run.out / "model" / "depo"
    by_step = defaultdict(list)
    for group in read_rows(folder / "groups.jsonl"):
        by_step[group["step"]].append(group)
    assert {step: len(groups) for step, groups in by_step.items()} == dict.fromkeys(range(1, STEPS + 1), BATCH)
    for row in depo_run.metrics:
        groups = by_step[row["step"]]
        assert fmean(group["y"] for group in groups) == pytest.approx(row["depo/target_mean"], abs=1e-5)
        assert fmean(group["p"] for group in groups) == pytest.approx(row["depo/pred_mean"], abs=1e-5)
        assert sum(group["signal"] for group in groups) == round(row["depo/effective_ratio"] * BATCH)
        mean_length = sum(group["tokens"] for group in groups) / (BATCH * GROUP)
        assert mean_length == pytest.approx(row["rollout/response_length_mean"], rel=1e-4)
    known = {group["key"]: group["prompt"] for groups in by_step.values() for group in groups if "prompt" in group}
    assert set(known.values()) <= set(problems(depo_run.out / "data" / "train.jsonl"))
    assert {group["key"] for groups in by_step.values() for group in groups} == set(known)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["depo"]["filter"]["warmup_steps"] == WARMUP
    assert settings["launch"]["rollout"]["batch_size"] == BATCH
    (line,) = [line for line in depo_run.output.splitlines() if line.startswith("DEPO is on")]
    assert "advantages by group_norm (the launch names none); filter rule window" in line
    said = [line for line in depo_run.output.splitlines() if "DEPO: step 20: rolled out" in line]
    assert len(said) == 1
    assert "of the groups had a signal (about" in said[0]


def log_loss(predicted, passed):
    return -np.mean(passed * np.log(predicted) + (1 - passed) * np.log1p(-predicted))


def test_estimator_learned(depo_run):
    rows = depo_run.metrics
    assert "depo/loss_score" not in rows[0]  # a step's row has the losses of the update before it
    groups = [group for group in read_rows(depo_run.out / "model" / "depo" / "groups.jsonl") if group["step"] > WARMUP]
    predicted, passed = (np.array([group[name] for group in groups]) for name in ("p", "y"))
    # Predictions must beat the best constant, although the filter keeps prompts near 1/2.
    assert log_loss(predicted, passed) < 0.97 * log_loss(np.full_like(passed, passed.mean()), passed)
    assert fmean(row["depo/spearman"] for row in rows[WARMUP:]) > 0.3  # easy and hard are told apart
    assert fmean(row["depo/zero_auc"] for row in rows[WARMUP:] if "depo/zero_auc" in row) > 0.55


def scanned_and_asked(run):
    """Yield (step, prompts scanned, prompts asked of vLLM) from the pool's known order and the reward log."""
    pool = problems(run.out / "data" / "train.jsonl")
    seed = 7
    order = [pool[i] for turn in range(20) for i in np.random.default_rng([seed, 0, turn]).permutation(POOL)]
    held_out = set(problems(run.out / "data" / "eval.jsonl"))
    asked = [prompt for prompt in run.asked if prompt not in held_out]
    position = 0
    for step, row in enumerate(run.metrics):
        scanned = order[position : position + int(row["depo/scanned"])]
        position += len(scanned)
        yield row, scanned, asked[step * BATCH * GROUP : (step + 1) * BATCH * GROUP]


def test_rejected_prompts_were_not_generated(depo_run):
    rejected = 0
    for row, scanned, asked in scanned_and_asked(depo_run):
        counts = Counter(asked)
        assert set(counts) <= set(scanned)
        assert sum(counts.values()) == row["depo/kept"] * GROUP
        rejected += len(scanned) - sum(counts.values()) // GROUP
    assert rejected > BATCH  # the filter did something
    held_out = set(problems(depo_run.out / "data" / "eval.jsonl"))
    assert sum(prompt not in held_out for prompt in depo_run.asked) == STEPS * BATCH * GROUP


def test_evaluation_was_not_filtered(depo_run):
    held_out = problems(depo_run.out / "data" / "eval.jsonl")
    counts = Counter(prompt for prompt in depo_run.asked if prompt in set(held_out))
    evaluations = [row for row in depo_run.rows if "eval" in row]
    assert len(held_out) == EVAL
    assert len(evaluations) == 2
    assert counts == {prompt: 4 * len(evaluations) for prompt in held_out}


def test_own_checkpoints_follow_openrlhfs(depo_run):
    root = depo_run.out / "checkpoints"
    tags = {folder.name for folder in (root / "_actor").iterdir() if folder.is_dir()}
    assert {"global_step8", "global_step16"} <= tags
    ours = {path.stem for path in (root / "depo").glob("*.safetensors")}
    assert tags <= ours
    # A best checkpoint that OpenRLHF has replaced since our last save goes with our next one.
    assert len(ours - tags) <= 1
    assert all(name.startswith("best_") for name in ours - tags)


def test_ray_head_started_without_the_seam_is_refused_before_the_first_rollout(tmp_path, plain_copy):
    """The driver has the patched copy; Ray's workers take the one of the head: a run that would be plain GRPO."""
    out = tmp_path / "unpatched head"
    run = launch(
        out,
        base_flags(out),
        head_env={"PYTHONPATH": str(plain_copy)},
        PYTHONPATH=cpu_ray.stack_env()["PYTHONPATH"],
    )
    assert run.status != 0
    assert "SeamError" in run.output
    assert str(plain_copy / "openrlhf") in run.output
    assert not run.steps
    assert not (out / "rollouts.jsonl").exists()
