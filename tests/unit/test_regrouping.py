"""Groups stay whole in OpenRLHF's own micro-batches, which cut across them: labels, importance weights, each base.

split_rollout_samples, compute_advantages_and_returns and balance_experiences are OpenRLHF's, from a patched copy and
in a process of their own (this file, run as a script); between them runs our hook, on the way to an estimator that
only notes what it is sent.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUP, GROUPS, RANKS = 4, 12, 2
SAMPLES = range(GROUP * GROUPS)
# Of sample i: its response's length, its reward, and each token's log-prob; of group g: q and kept/scanned.
LENGTHS = [2 + (7 * i) % 23 for i in SAMPLES]
REWARDS = [float((i * i + i // GROUP) % 5 < 2) for i in SAMPLES]
LOG_PROBS = [-(i + 1) / 50 for i in SAMPLES]
CHANCES = [0.05 if g % 3 == 0 else 1.0 for g in range(GROUPS)]
SHARES = [0.5 + g / 40 for g in range(GROUPS)]
BASES = ["group_norm", "dr_grpo", "rloo", "reinforce_baseline"]
MODES = {"dynamic": None, "fixed": 5}  # micro-batches by tokens, or of 5 samples


# ── In the process of its own ──


def _sample(i):
    """A response as SamplesGenerator makes it; its one prompt token is its number."""
    import torch
    from openrlhf.trainer.ppo_utils.experience import Experience

    length = 1 + LENGTHS[i]
    mask = torch.ones(1, length, dtype=torch.long)
    return Experience(
        sequences=torch.full((1, length), i + 1),
        attention_mask=mask,
        action_mask=mask[:, 1:],
        prompts=[f"p{i // GROUP}"],
        labels=[f"a{i // GROUP}"],
        images=[None],
        mm_train_inputs=[None],
        rewards=torch.tensor([REWARDS[i]]),
        scores=torch.tensor([REWARDS[i]]),
        response_length=torch.tensor([LENGTHS[i]]),
        truncated=torch.tensor([False]),
        total_length=torch.tensor([float(length)]),
        info={"reward": torch.tensor([REWARDS[i]])},
    )


def _step(mode, base):
    """Take a step up to what the ranks are given; return micro-batches' indices, labels, and each rank's samples."""
    import torch
    from openrlhf.trainer.ppo_utils.experience import balance_experiences
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from test_config import nested

    from depo_plugin import hooks
    from depo_plugin.settings import config

    settings = {"advantage.base": base, "advantage.importance_rescale": base != "reinforce_baseline"}
    args = nested(
        {
            "actor.num_nodes": 1,
            "actor.num_gpus_per_node": RANKS,
            "algo.advantage.estimator": base,
            "algo.advantage.gamma": 1.0,
            "algo.advantage.no_std_norm": False,
            "ds.ring_attn_size": 1,
            "ds.tensor_parallel_size": 1,
            "reward.clip_range": None,
            "reward.overlong_buffer_len": None,
            "reward.stop_properly_penalty_coef": None,
            "rollout.max_tokens_per_gpu": 60,
            "rollout.micro_batch_size": MODES[mode],
            "rollout.n_samples_per_prompt": GROUP,
            "train.dynamic_batch_enable": mode == "dynamic",
        }
    )
    args.depo = config.to_namespace(config.load_config(None, settings))
    strategy, tokenizer = SimpleNamespace(args=args), SimpleNamespace(pad_token_id=0)
    maker = RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), strategy, tokenizer)
    experiences = maker.split_rollout_samples([_sample(i) for i in SAMPLES])
    for one in experiences:
        rows = torch.tensor([LOG_PROBS[i] for i in one.index])[:, None].expand(one.action_mask.shape)
        one.action_log_probs = torch.where(one.action_mask.bool(), rows, -99.0)
        one.kl = torch.zeros_like(rows)
    experiences = maker.compute_advantages_and_returns(experiences)
    cut = [list(one.index) for one in experiences]
    sent = []
    hooks._process.handle = SimpleNamespace(
        keep_weights=lambda prompts, labels: sent.append([prompts, labels]) or (CHANCES, SHARES),
        observe=lambda labels: sent.append([[vars(label) for label in labels]]),
        tally=Counter(),
    )
    hooks.observe(args, experiences, 1)
    if mode == "dynamic":
        experiences = balance_experiences(experiences, args)
    ranks = []
    for one in experiences:
        rows = zip(one.sequences[:, 0].tolist(), one.advantages.tolist(), one.action_mask.tolist(), strict=True)
        ranks.append([(n - 1, [x for x, on in zip(row, mask, strict=True) if on]) for n, row, mask in rows])
    return {"cut": cut, "sent": sent, "ranks": ranks}


def _main():
    json.dump({f"{mode} {base}": _step(mode, base) for mode in MODES for base in BASES}, sys.stdout)


# ── What it must give ──


@pytest.fixture(scope="module")
def steps(patched_copy):
    paths = os.pathsep.join([str(patched_copy), str(ROOT), str(Path(__file__).parent)])
    env = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, __file__], env=env, cwd=patched_copy, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def base_advantages(base):
    """Each sample's advantage before any weight, from its group's rewards."""
    advantages = []
    for start in range(0, len(REWARDS), GROUP):
        rewards = REWARDS[start : start + GROUP]
        mean = fmean(rewards)
        if base == "rloo":  # against the mean of the others
            advantages += [r - (sum(rewards) - r) / (GROUP - 1) for r in rewards]
        elif base == "group_norm":
            advantages += [(r - mean) / (stdev(rewards) + 1e-9) for r in rewards]
        else:
            advantages += [r - mean for r in rewards]
    if base == "reinforce_baseline":  # whitened over all tokens
        mean = sum(a * n for a, n in zip(advantages, LENGTHS, strict=True)) / sum(LENGTHS)
        variance = sum((a - mean) ** 2 * n for a, n in zip(advantages, LENGTHS, strict=True)) / sum(LENGTHS)
        advantages = [(a - mean) / math.sqrt(variance) for a in advantages]
    return advantages


@pytest.mark.wheel
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", MODES)
def test_each_group_is_labelled_and_weighted_as_one_though_micro_batches_cut_across_it(mode, base, steps):
    step = steps[f"{mode} {base}"]
    assert sorted(i for part in step["cut"] for i in part) == list(SAMPLES)
    parts = [
        {k for k, part in enumerate(step["cut"]) if {g * GROUP + j for j in range(GROUP)} & set(part)}
        for g in range(GROUPS)
    ]
    assert sum(len(places) > 1 for places in parts) > GROUPS / 2  # groups in several micro-batches
    prompts, answers = [f"p{g}" for g in range(GROUPS)], [f"a{g}" for g in range(GROUPS)]
    rescaled = base != "reinforce_baseline"  # with which the settings refuse it
    assert step["sent"][:-1] == ([[prompts, answers]] if rescaled else [])
    (labels,) = step["sent"][-1]
    assert [label["prompt"] for label in labels] == prompts
    for g, label in enumerate(labels):
        own = slice(g * GROUP, (g + 1) * GROUP)
        assert (label["label"], label["n"], label["y"]) == (f"a{g}", GROUP, fmean(REWARDS[own]))
        assert label["d"] == pytest.approx(math.exp(fmean(LOG_PROBS[own])), rel=1e-5)
        assert label["signal"] == (len(set(REWARDS[own])) == 2)
    weights = [share / q if rescaled else 1.0 for share, q in zip(SHARES, CHANCES, strict=True)]
    expected = [a * weights[i // GROUP] for i, a in enumerate(base_advantages(base))]
    assert len({round(abs(a), 6) for a in expected}) > 3
    given = [pair for rank in step["ranks"] for pair in rank]
    assert sorted(i for i, _ in given) == list(SAMPLES)
    for i, advantages in given:
        assert advantages == pytest.approx([expected[i]] * LENGTHS[i], rel=1e-5, abs=1e-6)
    if mode == "dynamic":
        assert [len(rank) for rank in step["ranks"]] == [len(SAMPLES) // RANKS] * RANKS


if __name__ == "__main__":
    _main()
