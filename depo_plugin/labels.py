"""Rollouts to labels: what the estimator learns from one group of responses."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

D_MIN = 1e-4  # d is clamped to [1e-4, 1 - 1e-4], so that its BCE target is never exactly 0 or 1
ROUNDING = 2**-8  # of bf16, relative: a score that far outside the range is an end of it, rounded


@dataclass(frozen=True)
class Label:
    """The outcome of one prompt's group.

    prompt, label: as the loader gave them out, the label as text; the pair is the prompt's identity.
    y: pass rate in [0, 1], the mean of the group's normalised scores.
    d: exp(mean token log-prob) of the group's responses in [1e-4, 1 - 1e-4], or None if it is not known.
    n: number of responses in the group.
    signal: whether the group's rewards differ, so that its advantages are not all zero.

    Limit: evidence is y·n successes of n and V takes rewards for 0 or 1, so that a prompt whose responses all get 0.5
    (y 0.5, signal False) is still believed to be as useful as one with as many right as wrong.
    """

    prompt: str
    label: str
    y: float
    d: float | None
    n: int
    signal: bool


class Groups(NamedTuple):
    """The labels of some groups, in rollout order, and what was found in their scores.

    dropped: groups without a label, because a score is NaN or infinite; clipped: scores outside reward_range; scores:
    how many there were; lowest, highest: the extreme finite ones (0.0 if there is none).
    """

    labels: list[Label]
    dropped: int
    clipped: int
    scores: int
    lowest: float
    highest: float


def per_response(experience, field: str) -> list[float]:
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


def group_label(prompt, label, scores, rewards, log_probs, reward_range) -> Label | None:
    """Return the label of one group, or None if a score is not finite.

    scores, rewards: n floats each (scores are raw, rewards are what the advantage is computed from).
    log_probs: n mean token log-probs (<= 0), or None.
    reward_range: (LO, HI); y = mean of (score - LO) / (HI - LO), each score clipped to the range.
    """
    low, high = reward_range
    if not all(map(math.isfinite, scores)):
        return None
    y = sum((min(max(s, low), high) - low) / (high - low) for s in scores) / len(scores)
    d = None
    if log_probs is not None:
        d = min(max(math.exp(sum(log_probs) / len(log_probs)), D_MIN), 1 - D_MIN)
        d = d if math.isfinite(d) else None
    return Label(prompt, str(label), y, d, len(scores), max(rewards) > min(rewards))


def _groups(labels: list[Label | None], scores: Iterable[float], reward_range) -> Groups:
    """Return the labels that there are, and what was found in the scores of all groups."""
    low, high = reward_range
    slack = ROUNDING * max(abs(low), abs(high))
    finite = [s for s in scores if math.isfinite(s)]
    clipped = sum(not low - slack <= s <= high + slack for s in finite)
    kept = [label for label in labels if label is not None]
    return Groups(
        kept, len(labels) - len(kept), clipped, len(finite), min(finite, default=0.0), max(finite, default=0.0)
    )


def from_rejected(experiences, reward_range) -> Groups:
    """Return the label of a group that dynamic filtering threw away: one single-sample Experience per response.

    Its log-probs were never computed, so d is None.
    """
    scores = [score for experience in experiences for score in per_response(experience, "scores")]
    first = experiences[0]
    label = group_label(first.prompts[0], first.labels[0], scores, scores, None, reward_range)
    return _groups([label], scores, reward_range)


def from_experiences(experiences, group_size: int, reward_range) -> Groups:
    """Regroup a step's micro-batches by prompt; return the groups' labels.

    experiences: OpenRLHF's list after make_experience_batch and before balance_experiences, each with `index` (the
    sample's place in the rollout, groups are contiguous), prompts, labels, rewards and scores (as in per_response;
    scores may be None), action_log_probs (B, A) and action_mask (B, A).
    """
    samples_by_group = defaultdict(list)
    for experience in experiences:
        mask = experience.action_mask.float()
        log_probs = (experience.action_log_probs.float() * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        rewards = per_response(experience, "rewards")
        scores = rewards if experience.scores is None else per_response(experience, "scores")
        rows = zip(
            experience.index,
            experience.prompts,
            experience.labels,
            scores,
            rewards,
            log_probs.tolist(),
            strict=True,
        )
        for index, *sample in rows:
            samples_by_group[index // group_size].append(sample)
    labels, seen = [], []
    for group in sorted(samples_by_group):
        prompts, answers, scores, rewards, log_probs = zip(*samples_by_group[group], strict=True)
        labels.append(group_label(prompts[0], answers[0], scores, rewards, log_probs, reward_range))
        seen += scores
    return _groups(labels, seen, reward_range)


def group_prompts(experiences, group_size: int) -> tuple[list[str], list[str]]:
    """Return each group's prompt and label, both as text, in rollout order; experiences as in from_experiences."""
    pairs = {}
    for experience in experiences:
        for index, prompt, label in zip(experience.index, experience.prompts, experience.labels, strict=True):
            pairs[index // group_size] = prompt, str(label)
    prompts, answers = zip(*(pairs[group] for group in sorted(pairs)), strict=True)
    return list(prompts), list(answers)
