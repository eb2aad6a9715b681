"""A fast simulator of the outer loop of RL, without a language model: which filter finds prompts worth a rollout?

from benchmarks import replay; replay.run("mixed", "depo", 8, 0, overrides={"history.discount": 1.0})
"""

from benchmarks.replay.judge import run

__all__ = ["run"]
