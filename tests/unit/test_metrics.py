"""The metrics against pairs counted one by one and numbers worked by hand."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depo_plugin.estimator import metrics


def pairwise_auc(scores, positives):
    """Count every positive-negative pair; ties are half."""
    pairs = [(p, n) for p, is_p in zip(scores, positives, strict=True) if is_p for n in _negatives(scores, positives)]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def _negatives(scores, positives):
    return [n for n, is_p in zip(scores, positives, strict=True) if not is_p]


def slow_ranks(values):
    """1 + how many are smaller + half of the other equal ones."""
    return [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def slow_spearman(x, y):
    rank_x, rank_y = slow_ranks(x), slow_ranks(y)
    mean = (len(x) + 1) / 2
    cov = sum((a - mean) * (b - mean) for a, b in zip(rank_x, rank_y, strict=True))
    return cov / (sum((a - mean) ** 2 for a in rank_x) * sum((b - mean) ** 2 for b in rank_y)) ** 0.5


# Few values, so that ties are common.
few_values = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.booleans()), min_size=2, max_size=40)


@settings(deadline=None)
@given(few_values)
def test_auc_and_spearman_equal_the_counts_over_pairs(rows):
    x, y, positive = (list(column) for column in zip(*rows, strict=True))
    found = metrics.auc(np.array(x), np.array(positive))
    if len(set(positive)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(pairwise_auc(x, positive), abs=1e-12)
    found = metrics.spearman(np.array(x), np.array(y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(slow_spearman(x, y), abs=1e-12)


def test_auc_by_hand():
    """Positives 0.9, 0.4; negatives 0.4, 0.1: wins 0.9>0.4, 0.9>0.1, 0.4>0.1 and one tie: 3.5 of 4."""
    assert metrics.auc(np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])) == 3.5 / 4


def test_undefined_is_none_not_nan():
    assert metrics.auc(np.array([]), np.array([], bool)) is None
    assert metrics.spearman(np.array([0.3]), np.array([0.5])) is None
    assert metrics.spearman(np.array([]), np.array([])) is None


def test_prediction_metrics_by_hand():
    """Errors 0.1, 0.5, 0: mae 0.2, brier 0.26/3. The one group without signal has the smallest V: AUC 1."""
    found = metrics.prediction_metrics(
        p_B=np.array([0.9, 0.5, 0.25]),
        v_B=np.array([0.3, 0.9, 0.8]),
        y_B=np.array([1.0, 0.0, 0.25]),
        signal_B=np.array([False, True, True]),
    )
    assert found == pytest.approx(
        {
            "pred_mean": 0.55,
            "target_mean": 1.25 / 3,
            "mae": 0.2,
            "brier": 0.26 / 3,
            "zero_auc": 1.0,
            # Ranks of p are 3, 2, 1 and of y 3, 1, 2: rho = 1 - 6 * (0 + 1 + 1) / (3 * 8)
            "spearman": 0.5,
            "effective_ratio": 2 / 3,
            "all_right": 1 / 3,
            "all_wrong": 0.0,
        }
    )
    assert set(found) <= set(metrics.NAMES)


def test_prediction_metrics_leave_out_what_is_undefined():
    found = metrics.prediction_metrics(np.array([0.4]), np.array([0.9]), np.array([0.5]), np.array([True]))
    assert "zero_auc" not in found
    assert "spearman" not in found
    assert found["effective_ratio"] == 1.0


def test_groups_without_a_signal_are_told_apart_by_their_pass_rate():
    """Of six, one has a signal; two of the others were all right, one of them at the limit of 0.5."""
    y, signal = np.array([1.0, 0.5, 0.49, 0.0, 0.0, 0.75]), np.array([False, False, False, False, False, True])
    found = metrics.prediction_metrics(np.full(6, 0.5), np.full(6, 0.5), y, signal)
    assert (found["all_right"], found["all_wrong"], found["effective_ratio"]) == (2 / 6, 3 / 6, 1 / 6)


STEP = {"scanned": 40.0, "kept": 8.0, "effective_ratio": 0.75, "effective_gain": 1.5, "time_blocked": 0.25}
STEP |= {"pred_mean": 0.5, "target_mean": 0.625}
# Kept 20 of 100; ratios 0.75 and 0.5; without the filter 0.5 and 0.25.
OTHER = {"scanned": 60.0, "kept": 12.0, "effective_ratio": 0.5, "effective_gain": 2.0, "time_blocked": 1.0}
OTHER |= {"pred_mean": 0.25, "target_mean": 0.125}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [STEP, OTHER],
            "rolled out 20% of the prompts it looked at; 62% of the groups had a signal "
            "(about 38% without the filter); "
            "predicted pass rate 0.38, observed 0.38; waited 0.6 s a step for the estimator",
        ),
        (
            [{"time_blocked": 0.0}, STEP],  # the estimator did not answer once
            "rolled out 20% of the prompts it looked at; 75% of the groups had a signal "
            "(about 50% without the filter); "
            "predicted pass rate 0.50, observed 0.62; waited 0.1 s a step for the estimator",
        ),
        (
            [{"effective_ratio": 0.0, "effective_gain": 0.0, "pred_mean": 0.5, "target_mean": 1.0, "kept": 0.0}],
            "0% of the groups had a signal; predicted pass rate 0.50, observed 1.00",
        ),
        (
            [{"scanned": 8.0, "kept": 8.0, "effective_ratio": 0.25, "target_mean": 0.5}],  # kept without scores
            "rolled out 100% of the prompts it looked at; 25% of the groups had a signal",
        ),
        ([{"time_blocked": 30.0}], "the estimator has judged no group; waited 30.0 s a step for the estimator"),
        ([{}], "the estimator has judged no group"),
    ],
    ids=["two steps", "one without an answer", "nothing scanned", "no scores", "no answer", "nothing known"],
)
def test_the_consoles_line_by_hand(rows, expected):
    assert metrics.said(40, rows) == f"DEPO: step 40: {expected}"


def test_rows_of_one_append_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    """The second of two writes fails, after the first took part of the lines."""
    file = metrics.MetricsFile(tmp_path / "depo" / "groups.jsonl")
    file.append()
    assert not file.path.exists(), "no rows, no file"
    file.append({"step": 1, "key": "a"}, {"step": 1, "key": "b", "p": float("nan")})
    before = file.path.read_text()
    expected = [{"step": 1, "key": "a"}, {"step": 1, "key": "b", "p": None}]
    assert [json.loads(line) for line in before.splitlines()] == expected

    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 60:
                raise OSError("No space left")
            return super().write(data[:20])

    with monkeypatch.context() as patch:
        patch.setattr(type(file.path), "open", lambda path, mode, buffering: Full(path, mode))
        with pytest.raises(OSError, match="No space left"):
            file.append(*({"step": 2, "key": "c"} for _ in range(3)))
    assert file.path.read_text() == before


def test_metrics_file_can_be_read_after_each_append(tmp_path):
    path = tmp_path / "depo" / "metrics.jsonl"
    file = metrics.MetricsFile(path)
    file.append({"step": 1, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 0.5}]
    metrics.MetricsFile(path).append({"step": 2, "loss": float("nan"), "reward": float("inf")})
    rows = path.read_text().splitlines()
    assert json.loads(rows[1]) == {"step": 2, "loss": None, "reward": None}
    assert len(rows) == 2
