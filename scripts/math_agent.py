"""A multi-turn agent for OpenRLHF's --train.agent_func_path: a math problem, and one more try after a wrong answer.

math_reward.py grades an answer. The policy learns from `rewards`: 1 if the first answer is right, 0.5 if the second.
DEPO's estimator learns from `scores`: 1 if an answer is right, else 0.
"""

import asyncio
import runpy
from pathlib import Path

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

reward_func = runpy.run_path(str(Path(__file__).with_name("math_reward.py")))["reward_func"]

WORTH = {1: 1.0, 2: 0.5}  # of a right answer, by turn
# In Qwen's chat format. The policy's answer ended its own turn, so this opens the user's. Change it for other models.
FEEDBACK = (
    "\n<|im_start|>user\nThis is not right. Find the mistake and give the answer once more.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class AgentInstance(AgentInstanceBase):
    """One response to one problem: at most two answers."""

    def __init__(self, *args, **kwargs):
        self.turn = 0

    async def step(self, states: dict, **kwargs) -> dict:
        """Grade an answer; ask again if the first one is wrong."""
        self.turn += 1
        text, label = states["action_text"], states["label"]
        graded = await asyncio.to_thread(reward_func, [text], [""], [label])  # it takes time; others go on meanwhile
        right = graded["scores"].item()
        done = bool(right) or self.turn == len(WORTH)
        return {
            "rewards": torch.tensor(right * WORTH[self.turn]),
            "scores": right,
            "environment_feedback": "" if done else FEEDBACK,
            "done": done,
            "sampling_params": states["sampling_params"],
            "extra_logs": {"turns": float(self.turn)},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    """What OpenRLHF loads."""

    def __init__(self):
        super().__init__(AgentInstance)
