"""Rules: which prompts are worth a rollout, as a keep probability for each belief.

A rule is a pure function from Beliefs to q_B in [0, 1]. filter.py raises q to the exploration ε and draws. A rule of
one's own is a Python file with a function `keep(beliefs)`. Suffix B: one entry per candidate.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the settings read RULES
    from depo_plugin.settings.config import FilterConfig


@dataclass(frozen=True)
class Beliefs:
    """What is believed of B candidates. Arrays have shape (B,) and are float64, except `datasource`.

    p: p̂, the mean of the believed pass rate, in [0, 1].
    v: V, the chance that a group of `group_size` responses has a signal, in [0, 1] (filter.signal_probability).
    a, b: the belief itself, Beta(a, b) over the pass rate.
    visits: number of training steps that had a group of this prompt; 0 for a prompt that was never met.
    datasource: the name of each prompt's data source, str.
    step: training steps that the estimator has learned from so far.
    group_size: responses per prompt (G).
    """

    p: np.ndarray
    v: np.ndarray
    a: np.ndarray
    b: np.ndarray
    visits: np.ndarray
    datasource: np.ndarray
    step: int
    group_size: int


Rule = Callable[[Beliefs], np.ndarray]


class RuleError(ValueError):
    """A rule of the user's own cannot be used; the text says why."""


def window(beliefs: Beliefs, cfg: FilterConfig) -> np.ndarray:
    """Return q_B: 1 if low <= p̂ <= high, else 0 (the paper's rule)."""
    return np.where((cfg.low <= beliefs.p) & (beliefs.p <= cfg.high), 1.0, 0.0)


def utility(beliefs: Beliefs, cfg: FilterConfig) -> np.ndarray:
    """Return q_B: 1 if V >= min_utility, else 0."""
    return np.where(beliefs.v >= cfg.min_utility, 1.0, 0.0)


def soft(beliefs: Beliefs, cfg: FilterConfig) -> np.ndarray:
    """Return q_B = √(V / soft_utility), at most 1.

    Importance sampling has the least variance per rollout if q is proportional to the root of the expected squared
    gradient (Owen, Monte Carlo, ch. 9). With group-normalised advantages that is √V: a group's gradient is zero
    without a signal, and of one scale with it.
    """
    return np.sqrt(np.minimum(beliefs.v / cfg.soft_utility, 1.0))


RULES = {"window": window, "utility": utility, "soft": soft}


def rule_of(cfg: FilterConfig) -> Rule:
    """Return the rule that the settings name. Raises RuleError if it is a file that cannot be used."""
    if cfg.rule in RULES:
        named = RULES[cfg.rule]
        return lambda beliefs: named(beliefs, cfg)
    return own_rule(cfg.rule)


def own_rule(path: str) -> Rule:
    """Return the function `keep` of a Python file; what it returns is checked at each call.

    The file is run here, and `keep` is tried once on an example. Raises RuleError if that fails. The returned rule
    raises RuleError, with the reason, if `keep` fails or returns anything but B numbers in [0, 1].
    """
    spec = spec_from_file_location("depo_rule", path)
    if spec is None or spec.loader is None:
        raise RuleError("it is not a Python file")
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses need to find it there
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise RuleError(f"there is no such file on {platform.node()}") from None
    except (Exception, SystemExit) as error:
        raise RuleError(f"it cannot be imported: {type(error).__name__}: {error}") from error
    keep = getattr(module, "keep", None)
    if not callable(keep):
        raise RuleError("it defines no function keep(beliefs)")

    def checked(beliefs: Beliefs) -> np.ndarray:
        if not len(beliefs.p):
            return np.empty(0)
        arrays = {name: value.copy() for name, value in vars(beliefs).items() if isinstance(value, np.ndarray)}
        try:
            q_B = np.asarray(keep(replace(beliefs, **arrays)), np.float64)  # copies, with which it may do as it likes
        except Exception as error:
            raise RuleError(f"keep(beliefs) raises {type(error).__name__}: {error}") from error
        if q_B.shape != beliefs.p.shape:
            raise RuleError(f"keep(beliefs) returns shape {q_B.shape} for beliefs of shape {beliefs.p.shape}")
        if not np.all((q_B >= 0) & (q_B <= 1)):
            wrong = q_B[~((q_B >= 0) & (q_B <= 1))][0]
            raise RuleError(f"keep(beliefs) returns {wrong:g}, which is not a probability from 0 to 1")
        return q_B

    checked(EXAMPLE)
    return checked


def _example() -> Beliefs:
    """Return the beliefs on which a rule of the user's own is tried: from never to always solved."""
    p = np.array([0.01, 0.2, 0.5, 0.8, 0.99])
    sources = np.array(["example"] * len(p))
    v = 1 - p**8 - (1 - p) ** 8
    return Beliefs(p, v, 10 * p, 10 * (1 - p), np.arange(5.0), sources, step=10, group_size=8)


EXAMPLE = _example()
