"""Rewards to labels: what the estimator learns from a group of responses, and which rewards stop the run.

OpenRLHF's experiences are regrouped here, once. Suffix: A = response tokens.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

from depo_plugin.messages import Label

D_MIN = 1e-4  # d is clamped to [1e-4, 1 - 1e-4], so that its BCE target is never exactly 0 or 1
ROUNDING = 2**-8  # of bf16, relative: a score that is outside the range by so much is an end of it, rounded


class Groups(NamedTuple):
    """The groups of some experiences, and what was found in their scores.

    labels: in rollout order, without the dropped groups.
    prompts, answers: of every group, in rollout order; answers as text.
    dropped: groups without a label, because a score is NaN or infinite.
    clipped: scores outside reward_range.
    scores: finite scores in all.
    lowest, highest: the extreme ones, 0.0 if there is none.
    """

    labels: list[Label]
    prompts: list[str]
    answers: list[str]
    dropped: int
    clipped: int
    scores: int
    lowest: float
    highest: float


def per_response(experience: Any, field: str) -> list[float]:
    """Return one number per response from a field of an Experience: "rewards" or "scores", a tensor.

    Reward functions and servers answer with numbers, lists or arrays; OpenRLHF makes tensors of shape (B,), (B, 1) or
    deeper of them. Raises ValueError if there are more or fewer numbers than responses.
    """
    values, count = getattr(experience, field), len(experience.prompts)
    if values.numel() != count:
        raise ValueError(
            f"{field} of shape {tuple(values.shape)} for {count} responses: each response needs one number. Correct "
            "what the reward function or server returns."
        )
    return values.float().flatten().tolist()


def group_label(prompt, label, scores, rewards, log_probs, reward_range, tokens=None) -> Label | None:
    """Return the label of one group, or None if a score is not finite.

    scores, rewards: n floats each (scores are raw, rewards are what the advantage is computed from); log_probs: n mean
    token log-probs (<= 0), None for a response without a token, or no list but None; reward_range: (LO, HI); tokens: n
    numbers of response tokens, or None. y is the mean of (score - LO) / (HI - LO), each score clipped to the range.
    """
    low, high = reward_range
    if not all(map(math.isfinite, scores)):
        return None
    y = sum((min(max(s, low), high) - low) / (high - low) for s in scores) / len(scores)
    d = None
    if known := [one for one in log_probs or () if one is not None]:
        d = min(max(math.exp(sum(known) / len(known)), D_MIN), 1 - D_MIN)
        d = d if math.isfinite(d) else None
    signal = max(rewards) > min(rewards)
    return Label(prompt, str(label), y, d, len(scores), signal, None if tokens is None else sum(tokens))


def from_rejected(experiences: list, reward_range: tuple[float, float]) -> Groups:
    """Return the group that dynamic filtering threw away: one Experience of a single sample per response.

    Its log-probs were never computed, so d is None.
    """
    scores = [score for experience in experiences for score in per_response(experience, "scores")]
    tokens = [count for experience in experiences for count in _tokens(experience)]
    prompt, answer = experiences[0].prompts[0], experiences[0].labels[0]
    return _groups([(prompt, answer, scores, scores, None, tokens)], reward_range)


def from_experiences(experiences: list, group_size: int, reward_range: tuple[float, float]) -> Groups:
    """Regroup a step's micro-batches by prompt.

    experiences: OpenRLHF's list after make_experience_batch and before balance_experiences, each with `index` (the
    sample's place in the rollout, groups are contiguous), prompts, labels, rewards and scores (as in per_response;
    scores may be None), action_log_probs (samples, A) and action_mask (samples, A).
    """
    samples_by_group = defaultdict(list)
    for experience in experiences:
        mask, log_probs = experience.action_mask.bool(), experience.action_log_probs.float()
        sums = log_probs.where(mask, 0.0).sum(-1).tolist()  # not log_probs * mask: -inf * 0 is NaN
        tokens = _tokens(experience)
        means = [total / count if count else None for total, count in zip(sums, tokens, strict=True)]
        rewards = per_response(experience, "rewards")
        scores = rewards if experience.scores is None else per_response(experience, "scores")
        fields = experience.prompts, experience.labels, scores, rewards, means, tokens
        for index, *sample in zip(experience.index, *fields, strict=True):
            samples_by_group[index // group_size].append(sample)
    groups = []
    for _, samples in sorted(samples_by_group.items()):
        prompts, answers, *columns = zip(*samples, strict=True)
        groups.append((prompts[0], answers[0], *columns))
    return _groups(groups, reward_range)


def _tokens(experience: Any) -> list[int]:
    """Return the number of response tokens of each response: what its action_mask (samples, A) marks."""
    return experience.action_mask.long().sum(-1).tolist()


def _groups(groups: list[tuple], reward_range: tuple[float, float]) -> Groups:
    """Return the labels of groups (prompt, label, scores, rewards, log_probs, tokens), and what their scores are."""
    low, high = reward_range
    slack = ROUNDING * max(abs(low), abs(high))
    finite = [score for _, _, scores, *_ in groups for score in scores if math.isfinite(score)]
    made = [
        group_label(prompt, answer, scores, rewards, log_probs, reward_range, tokens)
        for prompt, answer, scores, rewards, log_probs, tokens in groups
    ]
    labels = [label for label in made if label is not None]
    return Groups(
        labels=labels,
        prompts=[group[0] for group in groups],
        answers=[str(group[1]) for group in groups],
        dropped=len(made) - len(labels),
        clipped=sum(not low - slack <= score <= high + slack for score in finite),
        scores=len(finite),
        lowest=min(finite, default=0.0),
        highest=max(finite, default=0.0),
    )


# ── What stops the run ──


def check_given(args: Any, samples: list) -> None:
    """Stop before any gradient if a response has no reward although a reward function or agent was to give one.

    OpenRLHF logs the function's exception and leaves the reward None; a micro-batch with one None loses all its
    rewards. Raises RuntimeError naming the reward function or agent.
    """
    if not (args.reward.remote_url or args.train.agent_func_path):
        return
    missing = [sample for sample in samples if sample.rewards is None]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(samples)} responses have no reward: {_rewarder(args)} raised or returned "
            f"none (see 'Failed to fetch reward' in the rollout actors' log). First such prompt: "
            f"{missing[0].prompts[0][:200]!r}. No gradient was taken from this batch."
        )


def check_finite(args: Any, experiences: list) -> None:
    """Stop before any gradient if a reward is NaN or infinite: all advantages of its group would be, too.

    Raises RuntimeError naming what gave it.
    """
    bad = [
        (prompt, reward)
        for experience in experiences
        for prompt, reward in zip(experience.prompts, per_response(experience, "rewards"), strict=True)
        if not math.isfinite(reward)
    ]
    if bad:
        prompt, reward = bad[0]
        total = sum(len(experience.prompts) for experience in experiences)
        raise RuntimeError(
            f"{len(bad)} of {total} responses have a reward that is NaN or infinite: {_rewarder(args)} gave {reward} "
            f"to the prompt {prompt[:200]!r}. No gradient was taken from this batch."
        )


def _rewarder(args: Any) -> str:
    """Return what gives the rewards, as its flag and value."""
    if args.train.agent_func_path:  # OpenRLHF then sets reward.remote_url to "agent"
        return f"--train.agent_func_path {args.train.agent_func_path}"
    if args.reward.remote_url:  # OpenRLHF makes a list of it
        urls = args.reward.remote_url
        return f"--reward.remote_url {urls if isinstance(urls, str) else ','.join(urls)}"
    return f"--reward.model_name_or_path {args.reward.model_name_or_path}"
