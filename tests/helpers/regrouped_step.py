"""One training step of OpenRLHF up to what the ranks are given; `python regrouped_step.py` prints it as JSON.

split_rollout_samples, compute_advantages_and_returns and balance_experiences are OpenRLHF's; between them runs our
hook, with a stand-in for the estimator that only notes what it is sent.
"""

import json
import sys
from types import SimpleNamespace

from depo_launch import Recorder, nested

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
    args.depo.shadow = False
    strategy, tokenizer = SimpleNamespace(args=args), SimpleNamespace(pad_token_id=0)
    maker = RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), strategy, tokenizer)
    experiences = maker.split_rollout_samples([_sample(i) for i in SAMPLES])
    for one in experiences:
        rows = torch.tensor([LOG_PROBS[i] for i in one.index])[:, None].expand(one.action_mask.shape)
        one.action_log_probs = torch.where(one.action_mask.bool(), rows, -99.0)
        one.kl = torch.zeros_like(rows)
    experiences = maker.compute_advantages_and_returns(experiences)
    cut = [list(one.index) for one in experiences]
    hooks._process.handle = Recorder(weights=(CHANCES, SHARES))
    hooks.observe(args, experiences, 1)
    sent = {name: parts for name, *parts in hooks._process.handle.calls}
    sent["judge"] = [vars(label) for label in sent["judge"][0]]
    if mode == "dynamic":
        experiences = balance_experiences(experiences, args)
    ranks = []
    for one in experiences:
        rows = zip(one.sequences[:, 0].tolist(), one.advantages.tolist(), one.action_mask.tolist(), strict=True)
        ranks.append([(n - 1, [x for x, on in zip(row, mask, strict=True) if on]) for n, row, mask in rows])
    return {"cut": cut, "sent": sent, "ranks": ranks}


def _main():
    from openrlhf.trainer.ppo_utils.experience import Experience

    from depo_plugin import labels

    found = {f"{mode} {base}": _step(mode, base) for mode in MODES for base in BASES}
    found["rejected"] = [
        vars(label) for label in labels.from_rejected([_sample(i) for i in range(GROUP)], (0, 1)).labels
    ]
    found["fields"] = list(Experience.__dataclass_fields__)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
