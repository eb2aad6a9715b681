"""A fast simulator of the outer loop of RL: which filter finds the prompts worth a rollout? No language model.

from benchmarks import replay; replay.run("mixed", "depo", 8, 0, overrides={"history.discount": 1.0})
"""

from benchmarks.replay.judge import run

__all__ = ["run"]
