"""Rollouts to labels: what the estimator learns from one group of responses."""

import math
from collections import defaultdict
from dataclasses import dataclass

D_MIN = 1e-4  # d is clamped to [1e-4, 1 - 1e-4], so that its BCE target is never exactly 0 or 1


@dataclass(frozen=True)
class Label:
    """The outcome of one prompt's group.

    prompt, label: as the policy saw them; the pair is the prompt's identity.
    y: pass rate in [0, 1], the mean of the group's normalised scores.
    d: exp(mean token log-prob) of the group's responses in [1e-4, 1 - 1e-4], or None where it is not known.
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


def group_label(prompt, label, scores, rewards, log_probs, reward_range) -> Label | None:
    """Return the label of one group, or None where a score is not finite or outside reward_range.

    scores, rewards: n floats each (scores are raw, rewards are what the advantage is computed from).
    log_probs: n mean token log-probs (<= 0), or None.
    reward_range: (LO, HI); y = mean of (score - LO) / (HI - LO).
    """
    low, high = reward_range
    if not all(math.isfinite(s) and low <= s <= high for s in scores):
        return None
    y = sum((s - low) / (high - low) for s in scores) / len(scores)
    d = None
    if log_probs is not None:
        d = min(max(math.exp(sum(log_probs) / len(log_probs)), D_MIN), 1 - D_MIN)
        d = d if math.isfinite(d) else None
    return Label(prompt, label, y, d, len(scores), max(rewards) > min(rewards))


def from_rejected(experiences, reward_range) -> Label | None:
    """Return the label of a group that dynamic filtering threw away: one single-sample Experience per response.

    Its log-probs were never computed, so d is None.
    """
    scores = [e.scores[0].item() for e in experiences]
    return group_label(experiences[0].prompts[0], experiences[0].labels[0], scores, scores, None, reward_range)


def from_experiences(experiences, group_size: int, reward_range) -> tuple[list[Label], int]:
    """Regroup a step's micro-batches by prompt; return the groups' labels in rollout order and how many were dropped.

    experiences: OpenRLHF's list after make_experience_batch and before balance_experiences, each with `index` (the
    sample's place in the rollout, groups are contiguous), prompts, labels, rewards (B,), scores (B,) or None,
    action_log_probs (B, A) and action_mask (B, A).
    """
    samples_by_group = defaultdict(list)
    for experience in experiences:
        mask = experience.action_mask.float()
        log_probs = (experience.action_log_probs.float() * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        rewards = experience.rewards.float()
        scores = rewards if experience.scores is None else experience.scores.float()
        rows = zip(
            experience.index,
            experience.prompts,
            experience.labels,
            scores.tolist(),
            rewards.tolist(),
            log_probs.tolist(),
            strict=True,
        )
        for index, *sample in rows:
            samples_by_group[index // group_size].append(sample)
    labels = []
    for group in sorted(samples_by_group):
        prompts, answers, scores, rewards, log_probs = zip(*samples_by_group[group], strict=True)
        labels.append(group_label(prompts[0], answers[0], scores, rewards, log_probs, reward_range))
    kept = [label for label in labels if label is not None]
    return kept, len(labels) - len(kept)


def group_prompts(experiences, group_size: int) -> tuple[list[str], list[str]]:
    """Return each group's prompt and label in rollout order; experiences as in from_experiences."""
    pairs = {}
    for experience in experiences:
        for index, *pair in zip(experience.index, experience.prompts, experience.labels, strict=True):
            pairs[index // group_size] = pair
    prompts, answers = zip(*(pairs[group] for group in sorted(pairs)), strict=True)
    return list(prompts), list(answers)
