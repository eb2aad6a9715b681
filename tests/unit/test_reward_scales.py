"""Whatever scale its rewards have, a run's true pass rates are learned: labels, estimator and loader in a loop."""

import numpy as np
import pytest
import tiny_encoder
import torch
from numbered_pool import InProcess, draw, inner_loader
from rollouts import Sample

from depo_plugin import labels
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, FilterConfig

POOL, BATCH, GROUP, STEPS = 48, 16, 8, 60
TRUE = np.linspace(0.05, 0.95, POOL)  # the policy's pass rate of prompt i
FORMAT = 0.7  # how often a response keeps to the format, right or wrong


# What a reward function gives: (rewards, scores or None) of responses that are right and well formatted or not.
FUNCTIONS = {
    "0 and 1": ((0.0, 1.0), lambda right, formatted: (right, None)),
    "-1 and 1": ((0.0, 1.0), lambda right, formatted: (2 * right - 1, None)),  # the default range
    "-1 and 1, with their range": ((-1.0, 1.0), lambda right, formatted: (2 * right - 1, None)),
    "0.1 and 1.1": ((0.1, 1.1), lambda right, formatted: (right + 0.1, None)),
    "accuracy as scores, and format in the rewards": (
        (0.0, 1.0),
        lambda right, formatted: (right + 0.5 * formatted, right),
    ),
    "accuracy plus a small bonus": ((0.0, 1.1), lambda right, formatted: (right + 0.1 * formatted, None)),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_pass_rates_of_a_run_are_learned_whatever_its_rewards_are(name, encoder):
    reward_range, reward = FUNCTIONS[name]
    cfg = DepoConfig(estimator=EstimatorConfig(model=encoder, dtype="fp32"), filter=FilterConfig(warmup_steps=5))
    made = DifficultyEstimator(cfg, GROUP, 0)
    handle = InProcess(made)
    loader = DifficultyFilteredLoader(
        inner_loader(POOL), handle, cfg.filter, batch_size=BATCH, group_size=GROUP, seed=0, num_episodes=STEPS
    )
    rng = np.random.default_rng(1)
    clipped = 0
    for _ in range(STEPS):
        batch = draw(loader, handle, BATCH, BATCH, 0)
        right = torch.tensor(rng.random((BATCH, GROUP)) < TRUE[batch][:, None], dtype=torch.float32).flatten()[:, None]
        formatted = torch.tensor(rng.random((BATCH * GROUP, 1)) < FORMAT, dtype=torch.float32)
        rewards, scores = reward(right, formatted)
        sample = Sample(
            index=list(range(BATCH * GROUP)),
            prompts=[f"prompt {i}" for i in batch for _ in range(GROUP)],
            labels=[f"label {i}" for i in batch for _ in range(GROUP)],
            rewards=rewards,
            scores=scores,
            action_log_probs=torch.full((BATCH * GROUP, 1), -1.0),
            action_mask=torch.ones(BATCH * GROUP, 1, dtype=torch.bool),
        )
        found = labels.from_experiences([sample], GROUP, reward_range)
        assert (len(found.labels), found.dropped) == (BATCH, 0), "no group is left out"
        clipped += found.clipped
        made.judge(found.labels)
        made.learn(found.labels)
    true = TRUE
    if name == "accuracy plus a small bonus":  # its labels' own truth: the mean score in its range
        true = (TRUE + 0.1 * FORMAT) / 1.1
    scores = made.score([f"prompt {i}" for i in range(POOL)], [f"label {i}" for i in range(POOL)])
    predicted = scores.a / (scores.a + scores.b)
    inside = (true > 0.2) & (true < 0.8)  # what the window keeps is met again and again
    assert abs(predicted.mean() - true.mean()) < 0.05
    assert abs(predicted - true)[inside].mean() < 0.05
    assert (clipped > 0) == (name == "-1 and 1")
