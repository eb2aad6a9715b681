"""An agent for `--train.agent_func_path`: a wrong answer to a problem is shown the problem once more.

Right at the first try is worth 1.0, at the second 0.5. Graded and logged as the quickstart's reward function does.
"""

import reward_func
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

WORTH = {1: 1.0, 2: 0.5}  # of a right answer, by turn


class AgentInstance(AgentInstanceBase):
    """One problem, at most two answers."""

    def __init__(self, *args, **kwargs):
        self.turn = 0

    async def reset(self, states, **kwargs):
        """Take the problem."""
        self.problem = states["observation"]
        return states

    async def step(self, states, **kwargs):
        """Grade an answer; after a wrong first one, ask again."""
        self.turn += 1
        answer = reward_func.last_integer(reward_func.answer_of(states["action_text"], self.problem))
        right = answer == str(states["label"])
        done = right or self.turn == len(WORTH)
        reward = WORTH[self.turn] if right else 0.0
        reward_func.log([{"prompt": self.problem, "reward": reward, "turn": self.turn}])
        return {
            "rewards": torch.tensor(reward),
            "scores": reward,
            "environment_feedback": "" if done else self.problem,
            "done": done,
            "sampling_params": states["sampling_params"],
            "extra_logs": {"turns": float(self.turn)},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    """What OpenRLHF loads."""

    def __init__(self):
        super().__init__(AgentInstance)
