"""Rules of the user's own: what is checked at the start, and what happens if one fails later."""

from pathlib import Path

import numpy as np
import pytest

from depo_plugin import rules
from depo_plugin.rules import EXAMPLE, RULES, RuleError, own_rule, rule_of
from depo_plugin.settings.config import SETTINGS, ConfigError, FilterConfig, load_config

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "rules").glob("*.py"))


def written(folder, text: str) -> str:
    path = folder / "rule.py"
    path.write_text(text)
    return str(path)


def test_the_rules_are_those_of_the_setting():
    assert set(RULES) == set(SETTINGS["filter.rule"].kind.choices)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_probabilities(rule):
    q = rule_of(FilterConfig(rule=rule))(EXAMPLE)
    assert q.shape == EXAMPLE.p.shape
    assert ((q >= 0) & (q <= 1)).all()
    assert q[2] == 1.0  # p̂ = 0.5
    assert q[0] < 0.5  # p̂ = 0.01


def test_a_function_in_a_file_is_a_rule(tmp_path):
    path = written(tmp_path, "LIMIT = 0.5\ndef keep(beliefs):\n    return (beliefs.p > LIMIT) * beliefs.v\n")
    q = rule_of(load_config(None, {"filter.rule": path}).filter)(EXAMPLE)
    np.testing.assert_array_equal(q, np.where(EXAMPLE.p > 0.5, EXAMPLE.v, 0.0))


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    written(tmp_path, "def keep(beliefs):\n    return beliefs.v\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(None, {"filter.rule": "rule.py"}).filter.rule == str(tmp_path / "rule.py")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("def keep(beliefs) return 1", "cannot be imported: SyntaxError"),
        ("import surely_not_there", "cannot be imported: ModuleNotFoundError: No module named 'surely_not_there'"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("def reward(beliefs): return beliefs.v", r"defines no function keep\(beliefs\)"),
        ("def keep(beliefs): return beliefs.pass_rate", "raises AttributeError"),
        ("def keep(beliefs): return 1.0", r"returns shape \(\) for beliefs of shape \(5,\)"),
        ("def keep(beliefs): return beliefs.p * 2", "returns 1.6, which is not a probability"),
        ("def keep(beliefs): return beliefs.p * float('nan')", "returns nan, which is not a probability"),
        ("def keep(beliefs): return ['yes'] * len(beliefs.p)", "raises ValueError"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_before_the_launch(tmp_path, text, reason):
    path = written(tmp_path, text) if text else str(tmp_path / "rule.py")
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(None, {"filter.rule": path})
    assert caught.value.faults[0].startswith(f"--depo.filter.rule {path}: ")


def test_a_word_that_is_no_rule_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"must be one of window, utility, soft, or a FILE.py. Did you mean soft\?"):
        load_config(None, {"filter.rule": "sofft"})


def test_a_rule_may_fail_later_and_says_so(tmp_path):
    path = written(tmp_path, "def keep(beliefs):\n    return beliefs.p / (0 if beliefs.step == 3 else 1) ** -1\n")
    rule = own_rule(path)
    with pytest.raises(RuleError, match="ZeroDivisionError"):
        rule(rules.Beliefs(**{**vars(EXAMPLE), "step": 3}))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_examples_are_rules(path):
    q = own_rule(str(path))(EXAMPLE)
    assert q[0] < q.max()
    assert len(path.read_text().split("def keep")[1].splitlines()) <= 10


def test_the_curriculum_moves_from_easy_to_hard():
    path = next(path for path in SHIPPED if path.stem == "curriculum")
    rule = own_rule(str(path))
    start, end = (rule(rules.Beliefs(**{**vars(EXAMPLE), "step": step})) for step in (0, 500))
    assert start.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert end.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_the_quota_goes_by_data_source():
    path = next(path for path in SHIPPED if path.stem == "quota")
    sources = np.array(["add-2digit", "add-2digit", "sub-2digit", "other", "add-2digit"])
    q = own_rule(str(path))(rules.Beliefs(**{**vars(EXAMPLE), "datasource": sources}))
    assert q.tolist() == [0.0, 0.25, 1.0, 0.5, 0.0]


def test_a_rule_may_change_its_arrays_and_has_classes(tmp_path):
    """It gets copies: the numbers are logged, and kept for the ledger, after it."""
    path = written(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Limits:\n    low: float = 0.1\n\n"
        "def keep(beliefs):\n    p = beliefs.p\n    p -= 0.5\n    beliefs.v[:] = 0\n    return (abs(p) < 0.4) * 1.0\n",
    )
    before = {name: np.copy(value) for name, value in vars(EXAMPLE).items()}
    np.testing.assert_array_equal(own_rule(path)(EXAMPLE), [0, 1, 1, 1, 0])
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(EXAMPLE, name), value)


def test_a_rule_is_not_asked_about_nothing(tmp_path):
    path = written(tmp_path, "def keep(beliefs):\n    return (beliefs.v >= max(beliefs.v)) * 1.0\n")
    nothing = {name: value[:0] for name, value in vars(EXAMPLE).items() if isinstance(value, np.ndarray)}
    assert own_rule(path)(rules.Beliefs(**{**vars(EXAMPLE), **nothing})).shape == (0,)
