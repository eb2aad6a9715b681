"""The proof's arithmetic, on rows made by hand; its launches are those of the quickstart."""

import json
import math

import pytest

from benchmarks.proof import __main__ as proof
from benchmarks.proof import compare, launch
from benchmarks.proof.methods import METHODS, QUICK, RECOMMENDED

GROUPS = {"one": "easy", "two": "learnable", "three": "learnable", "four": "hopeless"}


def row(method, seed, *learnable, easy=0.9, every=1000):
    """A run whose two learnable levels have these pass rates, one evaluation each `every` rollouts."""
    evals = [
        {"step": n, "rollouts": n * every, "levels": {"one": easy, "two": rate, "three": rate, "four": 0.0}}
        for n, rate in enumerate(learnable, start=1)
    ]
    for found in evals:
        found |= dict.fromkeys(("signal", "generated_tokens", "trained_tokens", "seconds"), found["rollouts"])
    return {"key": "", "method": method, "seed": seed, "evals": evals, "steps": {"groups": [8, 8], "signal": [2, 6]}}


def test_a_score_is_a_mean_over_levels_and_a_final_score_one_over_the_last_two_evaluations():
    run = row("grpo", 0, 0.1, 0.3, 0.5)
    assert compare.final(run, GROUPS, "learnable") == pytest.approx(0.4)
    assert compare.final(run, GROUPS, "easy") == pytest.approx(0.9)
    assert compare.final(run, GROUPS, "all") == pytest.approx((0.9 + 2 * 0.4 + 0.0) / 4)
    assert compare.final(run, GROUPS, "two") == pytest.approx(0.4)
    assert compare.signal_share(run) == 0.5


def test_differences_are_paired_by_seed():
    base = {seed: row("grpo", seed, rate, rate) for seed, rate in enumerate((0.1, 0.5, 0.9))}
    other = {seed: row("depo", seed, rate, rate) for seed, rate in enumerate((0.2, 0.6, 1.0, 0.0))}
    found = compare.paired(other, base, lambda run: compare.final(run, GROUPS, "learnable"))
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert str(found) == "+0.100 ± 0.000"
    assert math.isnan(compare.mean_error([0.3]).error)
    assert compare.mean_error([1.0, 2.0, 3.0]).error == pytest.approx(1 / math.sqrt(3))


def test_the_cost_of_a_score_is_where_the_curve_first_reaches_it():
    cost, score = [100.0, 200.0, 300.0, 400.0], [0.1, 0.3, 0.2, 0.6]
    reach = [compare.cost_to_reach(*map(compare.np.array, (cost, score)), target) for target in (0.05, 0.2, 0.5, 0.7)]
    assert reach[:3] == pytest.approx([100.0, 150.0, 375.0])
    assert math.isnan(reach[3])


def test_a_method_that_learns_twice_as_fast_costs_half():
    """GRPO climbs by 0.1 an evaluation, the other by 0.2. Smoothed over two evaluations, 0.85 is reached at 4.25."""
    base = {seed: row("grpo", seed, *(0.1 * n for n in range(1, 10))) for seed in range(3)}
    fast = {seed: row("depo", seed, *(0.2 * n for n in range(1, 10))) for seed in range(3)}
    found = compare.cost_ratio(fast, base, GROUPS, "learnable", "rollouts")
    assert found.mean == pytest.approx(4.25 / 8.5)
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert compare.cost_ratio(base, base, GROUPS, "learnable", "rollouts").mean == pytest.approx(1.0)
    slow = {0: row("depo", 0, *(0.05 * n for n in range(1, 10)))}
    assert math.isnan(compare.cost_ratio(slow, base, GROUPS, "learnable", "rollouts").mean)


def test_goals_say_what_is_missed():
    base = {seed: row("grpo", seed, *(0.1 * n for n in range(1, 10))) for seed in range(2)}
    good = {seed: row("depo", seed, *(0.2 * n for n in range(1, 6)), *[1.0] * 4) for seed in range(2)}
    decayed = {seed: row("depo", seed, *[0.2] * 9, easy=0.8) for seed in range(2)}
    dynamic = {seed: row("dynamic", seed, *[0.5] * 9) for seed in range(2)}
    rows = {"grpo": base, "dynamic": dynamic, "good": good, "bad": decayed}
    assert [met for met, _ in compare.goals(rows, GROUPS, "good")] == [True, True, True, True]
    found = compare.goals(rows, GROUPS, "bad")
    assert [met for met, _ in found] == [False, False, False, False]
    assert "worst is two with -0.650" in found[1][1]


def test_what_a_run_spent_until_an_evaluation():
    """Two steps of dynamic sampling: 2 of 4 and 2 of 2 groups are trained on; a rate of 400% is 8 · 2 / 4."""
    kept, thrown = launch.Group(10, True), launch.Group(7, False)
    status = {"rollout/num_samples": 16.0, "timing/step_total": 2.5}
    rows = [
        {"step": 1, **status, "dynamic_filtering_pass_rate": 400.0},
        {"step": 1, "eval": {"eval_one_pass1": 0.25}},
        {"step": 2, **status, "dynamic_filtering_pass_rate": 800.0},
        {"step": 2, "eval": {"eval_one_pass1": 0.5}},
    ]
    found = launch.row_of(rows, [kept, thrown, thrown, kept, kept, kept], ["one"])
    first, second = found["evals"]
    assert (first["rollouts"], first["signal"], first["seconds"], first["levels"]) == (32, 2, 2.5, {"one": 0.25})
    assert (first["generated_tokens"], first["trained_tokens"]) == (34, 20)
    assert (second["rollouts"], second["signal"], second["generated_tokens"]) == (48, 4, 54)
    assert found["steps"] == {"groups": [4, 2], "signal": [2, 2]}
    plain = launch.row_of([{"step": 1, **status}], [kept, thrown], ["one"])
    assert plain["steps"] == {"groups": [2], "signal": [1]}


def test_groups_are_those_of_training(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "eval.jsonl").write_text(json.dumps({"input": "2 + 2 ="}) + "\n")
    rewards = {"1 + 1 =": [0.0] * 8, "2 + 2 =": [1.0] * 8, "3 + 3 =": [0.0] * 7 + [1.0], "4 + 4 =": [1.0]}
    rows = [{"prompt": p, "response": "12<eos>", "reward": r} for p, group in rewards.items() for r in group]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))

    class Letters:
        def __call__(self, texts):
            return type("", (), {"input_ids": [list(text) for text in texts]})

    assert launch.groups_of(tmp_path, Letters()) == [launch.Group(56, False), launch.Group(56, True)]


@pytest.mark.slow
def test_a_run_that_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    """Nor is it lost if another one is made; a row of other settings counts as missing."""
    size = proof.SIZES["ladder"][8]
    made = []
    levels = launch.levels_of("ladder")

    def made_up(model, size, words, seed, out):
        made.append((words, seed))
        evals = [{"step": 1, **dict.fromkeys(proof.figures.COSTS, 8.0), "levels": dict.fromkeys(levels, 0.5)}] * 2
        return {"evals": evals, "steps": {"groups": [8], "signal": [4]}}

    monkeypatch.setattr(proof, "launch", made_up)
    argv = ["--prompts", "8", "--methods", "grpo", "window", "--seeds", "2", "--results", str(tmp_path)]
    for key in (launch.run_key("ladder", size, [], 0), "of other settings"):
        made.clear()
        (tmp_path / "ladder-8.jsonl").write_text(
            json.dumps({**made_up(*[None] * 5), "key": key, "method": "grpo", "seed": 0}) + "\n"
        )
        made.clear()
        assert proof.main(argv) == 0
        assert len(made) == (3 if key != "of other settings" else 4)
    assert len(proof.read(tmp_path / "ladder-8.jsonl")) == 4
    assert "| grpo | 2 | 0.50 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"ladder-8-{name}.png" for name in ("scores", "costs", "levels", "signal")
    }


def test_a_key_changes_with_what_a_run_is_made_of(monkeypatch):
    size = proof.SIZES["ladder"][8]
    key = launch.run_key("ladder", size, METHODS["window"].words, 0)
    assert key == launch.run_key("ladder", size, METHODS["window"].words, 0)
    others = [
        ("ladder", size, [], 0),
        ("ladder", size, METHODS["window"].words, 1),
        ("ladder", proof.SIZES["ladder"][32], [], 0),
    ]
    assert key not in {launch.run_key(*other) for other in others}
    assert set(RECOMMENDED) <= set(METHODS)
    assert set(QUICK) <= set(METHODS)
