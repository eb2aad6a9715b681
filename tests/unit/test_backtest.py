"""`depo backtest`: logs of every format, the judge's figures by hand, the baselines, and the command on a real log."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_encoder

from depo_plugin.backtest import judge, predictors
from depo_plugin.backtest.judge import Predicted, play, truth_of
from depo_plugin.backtest.logs import Group, read
from depo_plugin.commands import cli
from depo_plugin.estimator.embedding_cache import EmbeddingCache
from depo_plugin.filter import signal_probability
from depo_plugin.json_lines import LineError

LOG = Path(__file__).resolve().parents[1] / "data" / "tiny_log.jsonl.gz"  # the first 6 steps of a quickstart's run
OPTIONS = {"group_size": 8, "batch": 2, "passes": 1, "seed": 0}


def written(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ── Logs ──


def test_an_event_log_has_its_steps(tmp_path):
    rows = [
        {"step": 3, "prompt": "a", "label": "1", "k": 2, "n": 8, "source": "s"},
        {"step": 3, "prompt": "b", "k": 0, "n": 3},
        {"step": 5, "prompt": "a", "label": "1", "k": 8, "n": 8},
    ]
    steps = read(written(tmp_path / "log.jsonl", *rows), **OPTIONS)
    assert steps == [[Group("a", "1", "s", 2.0, 8), Group("b", "", "", 0.0, 3)], [Group("a", "1", "", 8.0, 8)]]
    with gzip.open(tmp_path / "log.jsonl.gz", "wt") as out:
        out.write((tmp_path / "log.jsonl").read_text())
    assert read(tmp_path / "log.jsonl.gz", **OPTIONS) == steps


def test_groups_of_a_run_have_their_text_in_a_keys_first_line_and_a_resume_begins_anew(tmp_path):
    rows = [
        {"step": 1, "key": "aa", "source": "s", "y": 0.25, "n": 8, "prompt": "a", "label": "1"},
        {"step": 2, "key": "bb", "source": "s", "y": 1.0, "n": 8, "prompt": "b", "label": "2"},
        {"step": 3, "key": "aa", "source": "s", "y": 0.5, "n": 8},
        {"step": 2, "key": "aa", "source": "s", "y": 0.75, "n": 8},  # resumed after step 1
    ]
    steps = read(written(tmp_path / "groups.jsonl", *rows), **OPTIONS)
    assert steps == [[Group("a", "1", "s", 2.0, 8)], [Group("a", "1", "s", 6.0, 8)]]


def test_of_a_step_that_is_written_twice_the_last_line_of_a_key_counts(tmp_path):
    """A run that was killed one step after its checkpoint."""
    rows = [
        {"step": 1, "key": "aa", "y": 0.5, "n": 8, "prompt": "a"},
        {"step": 2, "key": "bb", "y": 0.5, "n": 8, "prompt": "b"},
        {"step": 2, "key": "bb", "y": 0.25, "n": 8},
    ]
    steps = read(written(tmp_path / "groups.jsonl", *rows), **OPTIONS)
    assert steps == [[Group("a", "", "", 4.0, 8)], [Group("b", "", "", 2.0, 8)]]


def test_groups_whose_text_was_not_written_are_left_out(tmp_path, caplog):
    """A full disk, or an answer that came too late: docs/metrics.md. The text may come in a later line."""
    rows = [
        {"step": 1, "key": "aa", "y": 0.5, "n": 8},
        {"step": 1, "key": "bb", "y": 0.5, "n": 8},
        {"step": 2, "key": "bb", "y": 0.25, "n": 8, "prompt": "b"},
    ]
    steps = read(written(tmp_path / "groups.jsonl", *rows), **OPTIONS)
    assert steps == [[Group("b", "", "", 4.0, 8)], [Group("b", "", "", 2.0, 8)]]
    assert "1 groups are left out: no line has the prompt of their key" in caplog.text


def test_single_responses_become_groups_as_they_are_completed(tmp_path):
    rows = [{"prompt": name, "label": "", "reward": reward} for name, reward in zip("abab", (1, 0, 0, 0), strict=True)]
    rows += [{"prompt": "c", "reward": 1.0}, {"prompt": "c", "reward": 3.0}, {"prompt": "c", "reward": 1.0}]
    steps = read(written(tmp_path / "rollouts.jsonl", *rows), **OPTIONS | {"group_size": 2})
    assert steps == [[Group("a", "", "", 1.0, 2), Group("b", "", "", 0.0, 2)], [Group("c", "", "", 2.0, 2)]]


def test_a_pool_is_met_in_random_order_pass_after_pass(tmp_path):
    rows = [{"prompt": f"p{i}", "pass_rate": i / 40} for i in range(41)]
    path = written(tmp_path / "pool.jsonl", *rows)
    steps = read(path, **OPTIONS | {"passes": 2, "batch": 41})
    assert [sorted(group.prompt for group in step) for step in steps] == [sorted(row["prompt"] for row in rows)] * 2
    assert [group.prompt for group in steps[0]] != [group.prompt for group in steps[1]]
    k = {group.prompt: group.k for group in steps[0]}
    assert (k["p0"], k["p40"]) == (0.0, 8.0)
    assert read(path, **OPTIONS | {"passes": 2, "batch": 41}) == steps


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no line"),
        ("{oops\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not an object"),
        ('{"prompt": "a", "score": 1}\n', "none of the known formats"),
        ('{"step": 1, "prompt": "a", "k": 9, "n": 8}\n', "line 1: k 9 of n 8"),
        ('{"step": 1, "prompt": "a", "k": 1, "n": 8}\n{"step": 1, "k": 1, "n": 8}\n', "line 2: no field 'prompt'"),
        ('{"prompt": "a", "pass_rate": 1.5}\n', "line 1: pass_rate 1.5"),
        ('{"prompt": "a", "reward": "good"}\n', "line 1: could not convert string to float: 'good'"),
        ('{"step": 1, "key": "aa", "y": 0.5, "n": 8}\n', "no group's prompt is in the file"),
        ('{"prompt": "a", "reward": NaN}\n', "line 1: reward nan is no number"),
        (
            '{"prompt": "a", "reward": 1}\n',
            "no prompt has 8 responses, the most is 1. Give their number with --group-size",
        ),
    ],
)
def test_a_log_that_cannot_be_used_says_where_and_why(tmp_path, capsys, text, reason):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(LineError, match=reason.replace("[", r"\[")) as caught:
        read(path, **OPTIONS)
    assert str(path) in str(caught.value)
    assert cli.main(["backtest", str(path)]) == 1
    assert reason in capsys.readouterr().err


# ── The judge ──


class Said:
    """A predictor that says what it was given and notes what it learns."""

    def __init__(self, p):
        self.p, self.learned = p, []

    def predict(self, groups):
        p = np.array([self.p[group.prompt] for group in groups])
        return 8 * p, 8 * (1 - p)

    def learn(self, groups):
        self.learned.append([group.prompt for group in groups])


def window(beliefs):
    return 1.0 * (np.abs(beliefs.p - 0.5) < 0.4)


def played(steps, predictor, **changes):
    options = {"epsilon": 0.0, "warmup": 1, "closed": False, "seed": 0, "tick": lambda: None}
    return play(steps, predictor, window, **options | changes)


STEPS = [[Group("a", "", "", 0, 8), Group("b", "", "", 4, 8)], [Group("a", "", "", 1, 8), Group("b", "", "", 8, 8)]]


def test_groups_are_predicted_before_they_are_learned_and_kept_by_the_rule_after_the_warm_up():
    predictor = Said({"a": 0.05, "b": 0.6})
    found = played(STEPS, predictor)
    assert found.p_N.tolist() == pytest.approx([0.05, 0.6, 0.05, 0.6])
    assert found.kept_N.tolist() == [True, True, False, True]
    assert predictor.learned == [["a", "b"], ["a", "b"]]
    closed = Said({"a": 0.05, "b": 0.6})
    played(STEPS, closed, closed=True)
    assert closed.learned == [["a", "b"], ["b"]]
    explored = played(STEPS, Said({"a": 0.05, "b": 0.6}), epsilon=1.0)
    assert explored.kept_N.all()


def test_v_is_for_each_groups_own_size():
    steps = [[Group("a", "", "", 1, 3), Group("a", "", "", 1, 8)]]
    found = played(steps, Said({"a": 0.25}))
    assert found.v_N.tolist() == [signal_probability(2.0, 6.0, n).item() for n in (3, 8)]


def test_scores_by_hand():
    truth = truth_of(STEPS)
    found = Predicted(
        np.array([0.1, 0.5, 0.1, 0.5]), np.array([0.3, 0.9, 0.4, 0.2]), np.array([False, True, True, True])
    )
    row = judge.scores(truth, found, np.ones(4, bool))
    losses = [-math.log(0.9), -math.log(0.5), -(math.log(0.1) + 7 * math.log(0.9)) / 8, -math.log(0.5)]
    assert row["log_loss"] == pytest.approx(np.mean(losses))
    assert row["brier"] == pytest.approx(np.mean([0.01, 0.25, (0.01 * 7 + 0.81) / 8, 0.25]))
    assert row["auc_v"] == 1.0  # the two groups with a signal have the highest V
    assert (row["keep_rate"], row["signal_all"], row["signal_found"]) == (0.75, 0.5, 1.0)
    assert row["signal_kept"] == pytest.approx(2 / 3)
    assert math.isnan(row["calibration_p"])  # fewer groups than bins


def test_the_calibration_error_is_a_mean_over_bins_of_equal_size():
    predicted = np.repeat(np.arange(10) / 10, 3)
    assert judge.calibration_error(predicted, predicted) == 0
    assert judge.calibration_error(predicted, predicted + np.tile([0.0, 0.0, 0.3], 10)) == pytest.approx(0.1)


def test_a_difference_has_the_error_of_a_mean_over_prompts():
    """Ten prompts of four groups that are all alike: ten observations, not forty."""
    rng = np.random.default_rng(0)
    better = np.repeat(rng.normal(0.01, 0.02, 10), 4)
    steps = [[Group(f"p{i}", "", "", 8, 8) for i in range(10) for _ in range(4)]]
    truth = truth_of(steps)
    one = Predicted(np.full(40, 0.5), np.zeros(40), np.ones(40, bool))
    other = one._replace(p_N=0.5 * np.exp(-better))
    mean, error = judge.paired(truth, one, other, np.ones(40, bool))
    assert mean == pytest.approx(-better.mean())
    assert error == pytest.approx(better[::4].std(ddof=1) / math.sqrt(10))


# ── The baselines ──

INDEX = {("a", ""): 0, ("b", ""): 1}


def test_counts_fade_at_each_visit():
    """Beta(1, 1), decay .5: after 8 of 8 and 2 of 8 the evidence is 0.5 · 8 + 2 of 0.5 · 8 + 8."""
    counted = predictors.Counted(INDEX, [0.5], [2.0], flat=True)
    for k in (8, 2):
        counted.learn([Group("a", "", "", k, 8)])
    a, b = counted.predict([Group("a", "", "", 0, 8), Group("b", "", "", 0, 8)])
    assert a.tolist() == [1 + 6, 1]
    assert b.tolist() == [1 + 6, 1]


def test_a_fitted_beta_binomial_finds_how_much_prompts_differ():
    rng = np.random.default_rng(0)
    index = {(f"p{i}", ""): i for i in range(600)}
    for kappa, low, high in ((0.5, 0.25, 1.0), (16.0, 8.0, 16.0)):
        counted = predictors.Counted(index, [1.0], predictors.KAPPAS, flat=False)
        p = rng.beta(kappa / 2, kappa / 2, 600)
        for start in range(0, 600, 30):
            counted.learn([Group(f"p{i}", "", "", rng.binomial(8, p[i]), 8) for i in range(start, start + 30)])
        a, b = predictors.Counted.predict(counted, [Group("p0", "", "", 0, 8)])
        assert low <= (a + b).item() - 8 <= high


def test_hindsight_knows_the_groups_around_but_not_the_one_it_predicts():
    steps = [[Group("a", "", "", k, 8)] for k in (8, 0, 8, 8)]
    hindsight = predictors.Hindsight(steps)
    rates = []
    for step in steps:
        a, b = hindsight.predict(step)
        rates.append((a / (a + b)).item())
    assert rates[1] > rates[0] == rates[2] == rates[3]


def test_the_history_alone_learns_a_prompts_rate():
    history = predictors.HistoryOnly(predictors.default_config({}).history)
    groups = [Group("a", "", "", 7, 8), Group("b", "", "", 1, 8)]
    for _ in range(6):
        history.learn(groups)
    a, b = history.predict(groups)
    p = a / (a + b)
    assert p[0] > 0.75
    assert p[1] < 0.25


# ── The command ──


@pytest.mark.slow
def test_the_command_judges_a_real_log(tmp_path, capsys):
    encoder = tiny_encoder.write(tmp_path / "encoder")
    argv = ["backtest", str(LOG), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]
    flags = ["--depo.estimator.model", encoder, "--depo.estimator.depth", "1", "--depo.filter.warmup_steps", "2"]
    assert cli.main([*argv, *flags]) == 0
    said = capsys.readouterr().out
    assert "tiny_log.jsonl.gz: 192 groups of 192 prompts, 6 steps" in said
    assert "On this log DEPO would have rolled out " in said
    (rows,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert {"depo", "depo, closed", "share=false", "hindsight", "Beta-binomial, fitted"} <= set(rows)
    assert rows["depo"]["all"]["log_loss"] < rows["running mean"]["all"]["log_loss"]  # the text tells something
    assert rows["depo, closed"]["all"]["log_loss"] != rows["depo"]["all"]["log_loss"]  # it learned from other groups
    assert rows["Beta(1,1)"]["all"]["log_loss"] == pytest.approx(math.log(2))  # no prompt is met twice
    assert (tmp_path / "out" / "tiny_log.png").stat().st_size > 10_000


@pytest.mark.slow
def test_two_logs_of_one_name_have_two_pictures_and_figures_that_are_json(tmp_path, capsys):
    """A log without any signal, whose figures are partly undefined, and a folder that cannot be written to."""
    encoder = tiny_encoder.write(tmp_path / "encoder")
    rows = [{"step": step, "prompt": f"p{i}", "k": 0, "n": 8} for step in range(4) for i in range(4)]
    paths = [tmp_path / name / "groups.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        written(path, *rows)
    argv = ["backtest", *map(str, paths), "--only", "running mean", "--json", str(tmp_path / "out.json")]
    argv += ["--depo.estimator.model", encoder, "--depo.estimator.depth", "1"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "On this log no group has a signal" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"groups-1.png", "groups-2.png"}

    def no_constant(name):
        raise ValueError(name)

    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=no_constant)
    assert list(found) == list(map(str, paths))
    assert None in found[str(paths[0])]["depo, closed"]["all"].values()
    (tmp_path / "file").touch()
    assert cli.main([*argv, "--out", str(tmp_path / "file" / "below")]) == 0
    assert "(no picture: " in capsys.readouterr().err
    assert cli.main([*argv, "--only", "rnning mean"]) == 2
    assert "--only rnning mean: must be of depo, " in capsys.readouterr().err


@pytest.mark.slow
def test_embeddings_are_kept_in_the_folder_that_is_named(tmp_path):
    """Later runs find them there, instead of a temporary folder of their own."""
    encoder, cache = tiny_encoder.write(tmp_path / "encoder"), tmp_path / "embeddings"
    argv = ["backtest", str(LOG), "--out", str(tmp_path / "out"), "--only", "depo", "--depo.estimator.model", encoder]
    assert cli.main([*argv, "--depo.estimator.depth", "1", "--depo.estimator.cache_dir", str(cache)]) == 0
    (folder,) = cache.iterdir()
    assert len(EmbeddingCache(folder, 1)) == 192


def test_options_that_cannot_be_used_are_refused(capsys):
    assert cli.main(["backtest", str(LOG), "--depo.filter.low", "2"]) == 2
    assert "--depo.filter.low 2" in capsys.readouterr().err
    assert cli.main(["backtest", str(LOG), "--group-size", "1"]) == 2
    assert "--group-size 1: too small" in capsys.readouterr().err
    assert cli.main(["backtest", str(LOG), "--seed", "-1"]) == 2
    assert "--seed -1: too small" in capsys.readouterr().err
    assert cli.main(["backtest", str(LOG), "--depo.estimator.model", "/nowhere"]) == 1
    assert "depo backtest: --depo.estimator.model /nowhere: cannot be loaded" in capsys.readouterr().err
