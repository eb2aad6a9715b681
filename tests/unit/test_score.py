"""Pass rates out of a checkpoint (`depo score`) and into another run (`--depo.history.prior`)."""

import json

import numpy as np
import pytest
import tiny_encoder

from depo_plugin.commands import cli
from depo_plugin.estimator import checkpoint, prior
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.messages import Label
from depo_plugin.settings.config import ConfigError, load_config

PROMPTS = [f"{i} + {i * i % 7} =" for i in range(40)]
RATES = np.array([0.0, 0.3, 0.7, 1.0] * 10)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


def made(encoder, **changes):
    settings = {"estimator.model": encoder, "estimator.depth": 1.0}
    return DifficultyEstimator(load_config(None, settings | changes), 8, seed=0)


def labels_of(rates, rng=None):
    rng = rng or np.random.default_rng(0)
    k = rng.binomial(8, rates)
    rows = zip(PROMPTS, k.tolist(), strict=True)
    return [Label(prompt, "l", right / 8, None, 8, 0 < right < 8, None) for prompt, right in rows]


@pytest.fixture(scope="module")
def scored(encoder, tmp_path_factory):
    """A run of eight steps, its checkpoint, and what `depo score` says of its prompts and of a new one."""
    folder = tmp_path_factory.mktemp("scored")
    estimator, rng = made(encoder), np.random.default_rng(0)
    for _ in range(8):
        estimator.learn(labels_of(RATES, rng))
    checkpoint.save(folder / "global_step8", estimator.state_dict())
    asked = folder / "prompts.jsonl"
    rows = [{"prompt": prompt, "label": "l"} for prompt in [*PROMPTS, "new one"]]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:3]))
    out = folder / "out" / "scores.jsonl"
    flags = ["--depo.estimator.model", encoder, "--depo.estimator.depth", "1"]
    argv = ["score", str(folder / "global_step8.safetensors"), str(asked), "--out", str(out), *flags]
    assert cli.main(argv) == 0
    return estimator, out, argv


ODD = "half a pair \ud800, a line\u2028separator"  # the first is no UTF-8, the second ends a line for str.splitlines()


@pytest.mark.slow
def test_any_text_goes_out_and_in_again(scored, encoder, tmp_path):
    _, _, argv = scored
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text(json.dumps({"prompt": ODD}) + "\n")
    assert cli.main([*argv[:2], str(asked), "--out", str(out), *argv[5:]]) == 0
    assert [known.prompt for known in prior.read(str(out))] == [ODD]
    made(encoder, **{"history.prior": str(out)})


@pytest.mark.slow
def test_what_the_run_believes_is_written_beside_each_prompt(scored):
    estimator, out, _ = scored
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [*PROMPTS, "new one"]
    scores = estimator.score([*PROMPTS, "new one"], ["l"] * 41)
    p = scores.a / (scores.a + scores.b)
    np.testing.assert_allclose([row["pass_rate"] for row in rows], p, atol=1e-5)
    np.testing.assert_allclose([row["n"] for row in rows], scores.a + scores.b, rtol=1e-3, atol=1e-3)
    spread = np.sqrt(p * (1 - p) / (scores.a + scores.b + 1))  # of a Beta distribution
    np.testing.assert_allclose([row["spread"] for row in rows], spread, atol=1e-4)
    assert [row["visits"] for row in rows] == [8] * 40 + [0]
    sure = {"never solved": RATES == 0, "always solved": RATES == 1}
    for verdict, expected in sure.items():
        assert [row.get("verdict") == verdict for row in rows] == [*expected.tolist(), False]


@pytest.mark.slow
def test_groups_of_a_run_are_prompts_too(scored, tmp_path, capsys):
    _, _, argv = scored
    groups = tmp_path / "groups.jsonl"
    rows = [{"step": 1, "key": "aa", "prompt": PROMPTS[0], "label": "l"}, {"step": 2, "key": "aa"}]
    groups.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main([*argv[:2], str(groups), "--out", str(tmp_path / "out"), *argv[5:]]) == 0
    assert "1 prompts, 1 never solved, 0 always solved" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_starts_from_another_runs_scores_predicts_better_from_the_first_step(scored, encoder):
    _, out, _ = scored
    cold, warm = made(encoder), made(encoder, **{"history.prior": str(out)})

    def error(estimator):
        scores = estimator.score(PROMPTS, ["l"] * 40)
        return np.abs(scores.a / (scores.a + scores.b) - RATES).mean()

    assert error(warm) < 0.1 < 0.25 < error(cold)
    assert warm.score(PROMPTS, ["l"] * 40).visits.tolist() == [0] * 40  # it has not met them itself
    # Half as able: what it sees of its own policy soon counts more than the prior.
    for _ in range(4):
        warm.learn(labels_of(0.5 * RATES))
    scores = warm.score(PROMPTS, ["l"] * 40)
    assert np.abs(scores.a / (scores.a + scores.b) - 0.5 * RATES).mean() < 0.11
    assert warm.updates == 4


@pytest.mark.slow
def test_the_weight_of_the_prior_is_how_much_it_counts(scored, encoder):
    _, out, _ = scored
    n = [
        np.add(
            *made(encoder, **{"history.prior": str(out), "history.prior_weight": weight}).score(PROMPTS, ["l"] * 40)[
                :2
            ]
        )
        for weight in (0.1, 1.0)
    ]
    assert np.median(n[1]) > 2 * np.median(n[0])


@pytest.mark.slow
def test_a_checkpoint_with_a_prior_goes_on_without_reading_it_again(scored, encoder, tmp_path):
    _, out, _ = scored
    fp32 = {"estimator.dtype": "fp32"}
    warm = made(encoder, **fp32, **{"history.prior": str(out)})
    warm.learn(labels_of(RATES))
    again = made(encoder, **fp32)
    again.load_state_dict(warm.state_dict())
    for one, other in zip(warm.score(PROMPTS, ["l"] * 40)[:2], again.score(PROMPTS, ["l"] * 40)[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)  # embedded in another batch: other last bits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "[Errno 2] No such file"),
        ("", "no line"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a", "pass_rate": 0.5}\n{"prompt": "b"}\n', "line 2: no field 'pass_rate'"),
        ('{"prompt": "a", "pass_rate": 1.5}\n', "line 1: pass_rate 1.5 must be from 0 to 1"),
        ('{"prompt": "a", "pass_rate": 0.5, "n": 0}\n', "n 0 above 0"),
        ("[1, 2]\n", "line 1: not an object"),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused_before_the_launch(tmp_path, text, reason):
    path = tmp_path / "prior.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"history.prior": str(path)})
    assert caught.value.faults[0].startswith(f"--depo.history.prior {path}: {reason}") or reason in str(caught.value)


def test_a_prior_says_eight_responses_if_it_does_not_say(tmp_path):
    path = tmp_path / "prior.jsonl"
    path.write_text('{"prompt": "a", "label": 3, "pass_rate": 0.5}\n')
    assert prior.read(str(path)) == [prior.KnownRate("a", "3", 0.5, 8.0)]


@pytest.mark.slow
def test_files_that_cannot_be_used_are_said(scored, tmp_path, capsys):
    _, _, argv = scored
    assert (
        cli.main(["score", str(tmp_path / "none.safetensors"), argv[2], "--out", str(tmp_path / "out"), *argv[5:]])
        == 1
    )
    assert "none.safetensors: cannot be read" in capsys.readouterr().err
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a"}\n')
    assert cli.main([*argv[:2], str(wrong), *argv[3:]]) == 1
    assert "wrong.jsonl, line 1: no field 'prompt'" in capsys.readouterr().err
    assert cli.main([*argv[:5], "--depo.estimator.model", argv[6], "--depo.estimator.depth", "0.5"]) == 1
    assert "belongs to another estimator" in capsys.readouterr().err
    assert cli.main([*argv[:4], str(wrong / "below"), *argv[5:]]) == 1  # a folder that is a file
    assert capsys.readouterr().err.splitlines()[-1].startswith("depo score: [Errno ")
