"""benchmarks.replay: the world, the methods written from formulas, the metrics, and one small run of all of them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_encoder

from benchmarks.replay import bandits, judge, learners, report, texts, world
from benchmarks.replay.__main__ import main
from benchmarks.replay.methods import METHODS, paper_config
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label
from depo_plugin.settings.config import load_config, to_dict


def make_pool(size=400, batch=16, steps=60, spread=2.0, noise=1.5, seed=0, **changes):
    rng = np.random.default_rng(seed)
    text = spread * rng.normal(size=size) - 0.5
    prompts = [f"problem {i}" for i in range(size)]
    return world.Pool("tiny", prompts, text + noise * rng.normal(size=size), text, noise, 0.5, steps, batch, **changes)


def label(pool, index, successes, samples):
    return Label(pool.prompts[index], "", successes / samples, 0.5, samples, 0 < successes < samples)


# ── The world ──


def test_ability_grows_with_effective_groups_and_hardly_with_wasted_ones():
    policy = world.Policy(make_pool(batch=10), 8, 0)
    policy.train(effective=10, wasted=0)
    assert policy.ability == pytest.approx(world.GAIN)
    policy.train(effective=0, wasted=10)
    assert policy.ability == pytest.approx(world.GAIN + world.WASTED_GAIN)
    assert world.WASTED_GAIN < world.GAIN / 10
    policy.train(effective=5, wasted=5)
    assert policy.ability == pytest.approx(1.5 * (world.GAIN + world.WASTED_GAIN))


def test_ability_jumps_at_its_steps():
    policy = world.Policy(make_pool(jumps=((1, 2.0), (3, -0.5))), 8, 0)
    seen = []
    for _ in range(5):
        policy.begin_step()
        seen.append(policy.ability)
    assert seen == [0.0, 2.0, 2.0, 1.5, 1.5]


def test_rates_follow_the_item_response_model():
    pool = make_pool()
    policy = world.Policy(pool, 8, 0)
    policy.ability = 0.7
    expected = [1 / (1 + math.exp(-(pool.logit_N[i] + 0.7))) for i in (3, 5)]
    assert policy.rates(np.array([3, 5])) == pytest.approx(expected)


def test_a_family_gains_at_its_own_pace():
    pool = make_pool(pace_N=np.linspace(0, 2, 400))
    policy = world.Policy(pool, 8, 0)
    policy.ability = 0.7
    expected = [1 / (1 + math.exp(-(pool.logit_N[i] + pool.pace_N[i] * 0.7))) for i in (3, 5)]
    assert policy.rates(np.array([3, 5])) == pytest.approx(expected)


def test_each_prompt_walks_and_the_path_is_the_same_for_every_method():
    pool = make_pool(size=4000, walk=0.05)
    one, other = world.Policy(pool, 8, 3), world.Policy(pool, 8, 3)
    index = np.arange(4000)
    for step in range(26):
        one.begin_step(), other.begin_step()
        if step == 0:
            assert (one.logits(index) == pool.logit_N).all()
            other.rollout(index)  # no draw of the policy's changes the walk
    walked = one.logits(index) - pool.logit_N
    assert walked.std() == pytest.approx(0.05 * 25**0.5, rel=0.04)
    assert abs(walked.mean()) < 0.015
    assert (walked == other.logits(index) - pool.logit_N).all()


def test_binomial_quantile():
    # Binomial(2, 1/2): P(K ≤ 0) = 0.25, P(K ≤ 1) = 0.75.
    luck = np.array([0.0, 0.2, 0.25, 0.5, 0.75, 0.999])
    assert world.binomial_quantile(luck, np.full(6, 0.5), 2).tolist() == [0, 0, 1, 1, 2, 2]
    luck = np.random.default_rng(0).random(20000)
    drawn = world.binomial_quantile(luck, np.full(20000, 0.3), 8)
    assert drawn.mean() == pytest.approx(2.4, abs=0.03)
    assert drawn.var() == pytest.approx(8 * 0.3 * 0.7, abs=0.05)


def test_the_same_luck_for_every_method_and_new_luck_each_call():
    pool = make_pool()
    one, other = world.Policy(pool, 8, 3), world.Policy(pool, 8, 3)
    for policy in (one, other):
        policy.begin_step()
    index = np.arange(100)
    first = one.rollout(index)
    assert (first.successes_B == other.rollout(index).successes_B).all()
    assert (first.successes_B[7:9] == world.Policy.rollout(_at_step_0(pool), np.array([7, 8])).successes_B).all()
    assert (first.successes_B != one.rollout(index).successes_B).any()


def _at_step_0(pool):
    policy = world.Policy(pool, 8, 3)
    policy.begin_step()
    return policy


def test_labels_of_groups():
    pool = make_pool()
    policy = _at_step_0(pool)
    groups = policy.rollout(np.arange(200))
    labels = policy.labels(groups)
    assert [one.y * 8 for one in labels] == groups.successes_B.tolist()
    assert [one.signal for one in labels] == [0 < one.y < 1 for one in labels]
    assert all(0 < one.d < 1 for one in labels)
    rates = policy.rates(np.arange(200))
    assert np.corrcoef(rates, [one.d for one in labels])[0, 1] > 0.5
    assert {one.d for one in policy.labels(groups, rejected=True)} == {None}


@pytest.fixture
def known_embeddings(monkeypatch):
    """Embeddings that say the family and the level, so that no encoder is needed."""

    def encode(prompts, cache):
        rng = np.random.default_rng(0)
        _, family_N, level_N = texts.gym_texts(len(prompts), cache)
        columns = np.eye(len(texts.FAMILIES))[family_N]
        rows_NE = np.hstack([columns, columns * level_N[:, None], rng.normal(size=(len(prompts), 4))])
        return np.stack([rows_NE, rows_NE])

    monkeypatch.setattr(texts, "_encode", encode)


@pytest.mark.usefixtures("known_embeddings")
def test_default_pools_reach_their_text_spearman(tmp_path):
    for target, seed in ((0.3, 0), (0.57, 1)):
        spec = world.PoolSpec(0, mean=-1.0, spread=2.5, text_spearman=target, size=400, steps=10)
        pool = world.build_pool("mixed", seed, tmp_path, spec)
        assert pool.text_spearman == pytest.approx(target, abs=0.01)
        assert pool.logit_N.mean() == pytest.approx(-1.0)
        assert pool.logit_N.std() == pytest.approx(2.5)
        assert (pool.logit_N - pool.text_N).std() == pytest.approx(pool.noise)
        assert len(set(pool.prompts)) == 400
    assert pool.prompts == world.build_pool("mixed", 0, tmp_path, spec).prompts


def test_ridge_predicts_each_prompt_without_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 7))
    y = x @ rng.normal(size=7) + rng.normal(size=60)
    found = texts.Ridge(x).predict(y, 10.0)
    z = (x - x.mean(0)) / x.std(0)
    fold = np.random.default_rng(60).permutation(60) % texts.FOLDS
    for i in (0, 31):
        train = fold != fold[i]
        weights = np.linalg.solve(z[train].T @ z[train] + 10 * np.eye(7), z[train].T @ (y[train] - y[train].mean()))
        assert found[i] == pytest.approx(y[train].mean() + z[i] @ weights)


# ── Pool files ──


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (b"\xff", "not UTF-8"),
        ('{"prompt": "x"}', "pass_rate missing"),
        ("{}", "prompt and pass_rate missing"),
        ('{"prompt": "x", "pass_rate": 1.5}', "pass_rate 1.5 must be a number from 0 to 1"),
        ('{"prompt": "x", "pass_rate": NaN}', "pass_rate nan must be a number"),
        ('{"prompt": "x", "pass_rate": "0.5"}', "pass_rate '0.5' must be a number"),
        ('{"prompt": "x", "pass_rate": true}', "pass_rate True must be a number"),
        ('{"prompt": "", "pass_rate": 0.5}', "prompt must be a text"),
    ],
)
def test_pool_file_errors_name_file_and_line(tmp_path, line, said):
    path = tmp_path / "pool.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "a", "pass_rate": 0.5}\n\n' + line + b"\n")
    with pytest.raises(world.PoolFileError) as error:
        world.read_pool_file(path, batch=1)
    assert str(error.value).startswith(f"{path}, line 3: {said}")


def test_pool_file_smaller_than_a_batch(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"prompt": "a", "pass_rate": 0.5}\n{"prompt": "a", "pass_rate": 0.7}\n')
    with pytest.raises(world.PoolFileError, match=r"pool\.jsonl: 1 different prompts, fewer than a batch \(2\)"):
        world.read_pool_file(path, batch=2)


def test_pool_file_averages_repeated_prompts(tmp_path):
    path = tmp_path / "pool.jsonl"
    rows = [("a", 0.5), ("b", 0), ("a", 1)]
    path.write_text("".join(json.dumps({"prompt": p, "pass_rate": r, "id": 7}) + "\n" for p, r in rows))
    prompts, rates, merged = world.read_pool_file(path, batch=2)
    assert (prompts, rates.tolist(), merged) == (["a", "b"], [0.75, 0.0], 1)


@pytest.mark.slow
def test_pool_file_from_the_command_line(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    rates = world.sigmoid(x[:, 0] * 2 + rng.normal(size=200))
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "pass_rate": float(r)}) + "\n" for i, r in enumerate(rates))
    )
    monkeypatch.setattr(texts, "_encode", lambda prompts, cache: np.stack([x, x]))
    out = tmp_path / "out" / "rows.json"
    names = "grpo,dynamic,history_only,ideal,oracle"
    options = ["--methods", names, "--seeds", "1", "--quick", "--json", str(out), "--cache", str(tmp_path)]
    assert main(["--pool-file", str(path), *options]) == 0
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == names.split(",")
    assert all(list(row) == list(judge.KEYS) for row in rows)
    assert all(row["pool"] == "mine.jsonl" for row in rows)
    assert rows[0]["oracle_share"] == 0
    assert rows[0]["mae_true"] is None
    assert 0 < rows[3]["mae_true"] < 0.3
    assert (out.parent / "rows-mine.jsonl-G8.png").stat().st_size > 10000
    said = capsys.readouterr()
    assert "mine.jsonl, G = 8" in said.out
    assert f"wrote {out.parent / 'rows-mine.jsonl-G8.png'}" in said.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--pools", "mixde"], "--pools mixde: unknown. Choose from easy,"),
        (["--methods", "grpo,foo"], "--methods foo: unknown. Choose from grpo,"),
        (["--set", "history.discuont=1"], "Did you mean --depo.history.discount?"),
        (["--set", "history.discount"], "must be KEY=VALUE"),
        (["--group-size", "1"], "--group-size 1: must be at least 2"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--pool-file", "no/such.jsonl"], "no/such.jsonl"),
    ],
)
def test_command_line_errors(argv, said, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert said in capsys.readouterr().err


# ── Ideal ──


def test_ideal_equals_a_brute_force_posterior():
    pool = make_pool(size=20)
    policy = world.Policy(pool, 8, 0)
    ideal = learners.Ideal(policy)
    groups = [(0.0, 3, 2, 8), (0.4, 3, 8, 8), (1.1, 5, 0, 8), (1.1, 3, 5, 8)]  # ability, prompt, k, n
    for ability, index, k, n in groups:
        policy.ability = ability
        ideal.learn([label(pool, index, k, n)])
    policy.ability = 1.5
    scores = ideal._beliefs(np.array([3, 5, 6]))
    for place, index in enumerate((3, 5, 6)):
        total = p_sum = v_sum = 0.0
        for step in range(-16000, 16001):
            noise = step / 16000 * 8 * pool.noise
            logit = pool.text_N[index] + noise
            weight = math.exp(-0.5 * (noise / pool.noise) ** 2)
            for ability, other, k, n in groups:
                if other == index:
                    p = 1 / (1 + math.exp(-logit - ability))
                    weight *= p**k * (1 - p) ** (n - k)
            p = 1 / (1 + math.exp(-logit - 1.5))
            total, p_sum, v_sum = total + weight, p_sum + weight * p, v_sum + weight * (1 - p**8 - (1 - p) ** 8)
        assert scores[0][place] == pytest.approx(p_sum / total, abs=3e-5)
        assert scores[1][place] == pytest.approx(v_sum / total, abs=3e-5)


def test_ideal_counts_a_prompt_twice_where_it_is_twice_in_a_batch():
    pool = make_pool(size=20)
    both, apart = (learners.Ideal(world.Policy(pool, 8, 0)) for _ in range(2))
    both.learn([label(pool, 3, 2, 8), label(pool, 3, 4, 8)])
    apart.learn([label(pool, 3, 2, 8)])
    apart.learn([label(pool, 3, 4, 8)])
    assert both._beliefs(np.array([3]))[0] == pytest.approx(apart._beliefs(np.array([3]))[0])


@pytest.mark.parametrize("size", [0.0, 0.01, 0.5])
def test_the_walk_on_the_grid_has_the_walks_variance(size):
    chances = learners.walk_matrix(size)
    assert chances.sum(1) == pytest.approx(np.ones(len(chances)))
    assert (chances >= 0).all()
    middle = chances[len(chances) // 2]
    assert middle @ learners.GRID == pytest.approx(0.0, abs=1e-12)
    assert middle @ learners.GRID**2 == pytest.approx(size**2, rel=1e-6)


@pytest.mark.slow
def test_ideal_knows_the_walk_but_not_its_path(monkeypatch):
    pool = make_pool(size=400, batch=400, walk=0.3)
    knows = learners.Ideal(policy := world.Policy(pool, 8, 0))
    monkeypatch.setattr(learners, "walk_matrix", lambda size: np.eye(len(learners.GRID)))
    believes_it_stands = learners.Ideal(policy)
    index, errors, expected = np.arange(400), [], []
    for _ in range(40):
        policy.begin_step()
        true = policy.rates(index)
        errors.append([np.mean((one._beliefs(index)[0] - true) ** 2) for one in (knows, believes_it_stands)])
        p = knows._rates(index)
        expected.append(np.mean((knows._weight_NK * (p - knows._beliefs(index)[0][:, None]) ** 2).sum(1)))
        groups = policy.labels(policy.rollout(index))
        for one in (knows, believes_it_stands):
            one.learn(groups)
    knowing, standing = np.mean(errors[20:], axis=0)
    assert knowing < 0.8 * standing
    assert knowing == pytest.approx(np.mean(expected[20:]), rel=0.1)


def test_ridge_is_told_the_logits_of_prompts_met_and_reads_the_others_from_their_embeddings():
    angle = np.random.default_rng(0).uniform(-1.5, 1.5, 400)
    text, embedding_NE = 5 * np.sin(angle), 3 * np.c_[np.cos(angle), np.sin(angle)]
    noise = np.random.default_rng(1).normal(size=400)
    pool = world.Pool("line", [f"problem {i}" for i in range(400)], text + noise, text, 1.0, 0.5, steps=1, batch=16)
    ridge = learners.Ridge(world.Policy(pool, 8, 0), embedding_NE)
    unmet = np.arange(200, 400)
    assert np.ptp(ridge._text_N) == 0
    ridge.learn([label(pool, i, 4, 8) for i in range(200)])
    error = ridge._text_N[unmet] - text[unmet]
    assert np.std(error) < 0.2 < 0.9 < np.std(ridge._text_N[unmet] - pool.logit_N[unmet])
    assert ridge._noise == pytest.approx(1.0, abs=0.05)


def test_beliefs_that_are_no_beta_reach_the_loader_with_their_mean_and_signal():
    p, v = np.array([0.3, 0.3, 0.999]), np.array([0.5, 0.94, 0.001])
    scores = learners.make_scores(p, v, 7, 8)
    if scores._fields[0] == "p":
        assert (scores.p.tolist(), scores.v.tolist()) == (p.tolist(), v.tolist())
    else:
        assert scores.a / (scores.a + scores.b) == pytest.approx(p)
        assert signal_probability(scores.a, scores.b, 8) == pytest.approx(v, rel=1e-3)
    assert scores.updates == 7


# ── History only ──


def test_history_only_by_hand():
    pool = make_pool(size=20)
    learner = learners.HistoryOnly(world.Policy(pool, 8, 0))
    learner.learn([label(pool, 3, 2, 8), label(pool, 4, 8, 8)])
    # Mean (0.5 + 0.25 + 1) / 3; prompt 3's two successes and six failures faded once.
    mean, kappa = 1.75 / 3, learner.kappa
    a, b = learner._belief(np.array([3, 5]), kappa)
    assert a == pytest.approx([kappa * mean + 0.98 * 2, kappa * mean])
    assert b == pytest.approx([kappa * (1 - mean) + 0.98 * 6, kappa * (1 - mean)])
    # Log-likelihoods of 2 of 8 and 8 of 8 under Beta(κ/2, κ/2), by the gamma function.
    g = math.lgamma
    for place in (0, 20, 40):
        half = learner.KAPPAS[place] / 2
        both = g(half + 2) + g(half + 6) + g(half + 8) + g(half) - 2 * g(2 * half + 8) - 4 * g(half) + 2 * g(2 * half)
        assert learner._likelihood_K[place] == pytest.approx(both)


def test_history_only_fits_kappa():
    pool = make_pool(size=2000)
    rng = np.random.default_rng(0)
    learner = learners.HistoryOnly(world.Policy(pool, 8, 0))
    rates = rng.beta(2.0, 3.0, size=2000)
    for start in range(0, 2000, 50):
        some = range(start, start + 50)
        learner.learn([label(pool, i, int(rng.binomial(8, rates[i])), 8) for i in some])
    assert 3.5 < learner.kappa < 7


# ── Bandits ──


def test_mopps_by_hand():
    pool = make_pool(size=20)
    mopps = bandits.Mopps(world.Policy(pool, 8, 0), 0, decay=0.5)
    mopps.learn([label(pool, 4, 6, 8)])
    assert (mopps.a_N[4], mopps.b_N[4]) == (7.0, 3.0)  # 0.5 + 0.5 + 6, 0.5 + 0.5 + 2
    mopps.learn([label(pool, 4, 0, 8)])
    assert (mopps.a_N[4], mopps.b_N[4]) == (4.0, 10.0)  # 3.5 + 0.5 + 0, 1.5 + 0.5 + 8
    assert (mopps.a_N[5], mopps.b_N[5]) == (1.0, 1.0)


def test_mopps_takes_the_draws_nearest_one_half():
    pool = make_pool(size=300, batch=4)
    mopps = bandits.Mopps(world.Policy(pool, 8, 0), 0, decay=1.0)
    mopps.a_N[:], mopps.b_N[:] = 1e6, 1.0  # all surely solved
    mopps.b_N[::3] = 1e6  # a third of them surely half
    chosen = mopps.draw(4)
    [(candidates, p_C, v_C, kept_C)] = mopps.scanned()
    assert len(candidates) == len(set(candidates)) == 64
    assert set(candidates[kept_C]) == set(chosen)
    assert (chosen % 3 == 0).all()
    assert sorted(set(p_C.round(3))) == [0.5, 1.0]
    assert v_C[p_C < 0.6] == pytest.approx(1 - 2 / 2**8, abs=1e-4)


def test_dps_by_hand():
    pool = make_pool(size=20)
    dps = bandits.Dps(world.Policy(pool, 8, 0), 0)
    dps.learn([label(pool, 4, 3, 8)])
    # ξ: a third from each state to "some", so every row is 1, 4/3, 1.
    assert dps.counts_NSS[4] == pytest.approx(np.array([[1, 4 / 3, 1]] * 3))
    assert dps.predicted_NS[4] == pytest.approx(np.array([0.3, 0.4, 0.3]))
    assert dps.predicted_NS[5] == pytest.approx(np.full(3, 1 / 3))
    dps.learn([label(pool, 5, 0, 8)])
    # Not seen: rows 0.7·4/3 + 0.3 = 1.2333 in the middle.
    assert dps.counts_NSS[4] == pytest.approx(np.array([[1, 0.7 * 4 / 3 + 0.3, 1]] * 3))
    assert dps.predicted_NS[4] == pytest.approx(np.array([1, 1.23333, 1]) / 3.23333, abs=1e-5)
    dps.learn([label(pool, 4, 8, 8)])
    # ξ(s, all) = belief before, 0.3, 0.4, 0.3; the row of "all" is 1, 0.7·1.23333 + 0.3, 1.3.
    assert dps.counts_NSS[4][:, 2] == pytest.approx([1.3, 1.4, 1.3])
    assert dps.predicted_NS[4] == pytest.approx(np.array([1, 1.163333, 1.3]) / 3.463333, abs=1e-5)


def test_dps_takes_the_top_of_the_whole_pool():
    pool = make_pool(size=50)
    dps = bandits.Dps(world.Policy(pool, 8, 0), 0)
    dps.predicted_NS[[7, 9, 30], 1] = 0.9
    assert set(dps.draw(3)) == {7, 9, 30}
    assert len(dps.scanned()[0][0]) == 50


def test_a_fresh_pool_gives_a_bandit_no_prompt_twice():
    pool = make_pool(size=100, batch=16, fresh=True)
    dps = bandits.Dps(world.Policy(pool, 8, 0), 0)
    drawn = np.concatenate([dps.draw(16) for _ in range(6)])
    assert len(set(drawn)) == 96


# ── The verdict ──


def test_rate_metrics_by_hand():
    predicted, true = np.array([0.1, 0.12, 0.9, 1.0]), np.array([0.2, 0.0, 0.95, 0.8])
    found = judge.rate_metrics(predicted, true)
    assert found["mae_true"] == pytest.approx((0.1 + 0.12 + 0.05 + 0.2) / 4)
    noise = 0.16 + 0 + 0.95 * 0.05 + 0.16
    assert found["brier"] == pytest.approx((0.01 + 0.0144 + 0.0025 + 0.04 + noise) / 4)
    # Bins of 1/15: 0.1 and 0.12 share one (|0.22 − 0.2|), 0.9 is in bin 13 (0.05), 1.0 in the last (0.2).
    assert found["ece"] == pytest.approx((0.02 + 0.05 + 0.2) / 4)
    assert found["spearman"] == pytest.approx(0.6)  # ranks 1 2 3 4 and 2 1 4 3: 1 − 6·4 / (4·15)


def test_window_coverage_by_hand():
    met = [np.array([0, 1, 2]), np.array([2, 3]), np.array([4]), np.array([5])]
    trained = [np.array([0, 9]), np.array([1]), np.array([9]), np.array([4])]
    # Windows of two steps: {0, 1, 2, 3} with 0 and 1 trained, {4, 5} with 4 trained.
    windows = list(zip(met, trained, strict=True))
    assert judge.window_coverage(windows, 2) == pytest.approx(3 / 6)
    assert judge.window_coverage(windows, 3) == pytest.approx(2 / 5)  # the last step is no whole window
    assert judge.window_coverage(windows, 5) is None


class Fixed:
    """A method that scans two prompts a step and rolls out the first."""

    resample, streams, seconds = False, True, 1.5

    def __init__(self, policy):
        self.policy, self.observed = policy, 0

    def draw(self, count):
        self.index = np.array([0, 1])
        return self.index[:count]

    def scanned(self):
        return [(self.index, np.array([0.5, 0.25]), np.array([0.9, 0.1]), np.array([True, False]))]

    def learn(self, labels):
        self.observed += len(labels)


def test_a_run_by_hand(monkeypatch):
    # Prompt 0 always has a signal nearly surely (p = 1/2, G = 64), prompt 1 never (p ≈ 1).
    logit = np.array([0.0, 40.0])
    monkeypatch.setattr(world, "GAIN", 0.0)
    pool = world.Pool("two", ["a", "b"], logit, logit, 1.0, 0.5, steps=judge.JUDGED_FROM + 5, batch=1)
    row = judge.play(pool, lambda setup: Fixed(setup.policy), 64, 0).row
    assert row["effective_ratio"] == 1
    assert row["rollouts_per_effective_group"] == 64
    assert row["coverage"] == 1
    assert row["zero_auc"] == 1
    assert row["mae_true"] == pytest.approx((0 + 0.75) / 2)
    assert row["brier"] == pytest.approx((0.25 + 0.75**2) / 2)
    assert row["estimator_seconds"] == 1.5
    assert row["final_ability"] == 0


def test_dynamic_pays_for_what_it_rejects():
    pool = make_pool(steps=judge.JUDGED_FROM + 20)
    played = judge.play(pool, METHODS["dynamic"][0], 8, 0)
    # Every batch is full of effective groups, so ability grows by GAIN each step, and no rollout is free.
    assert played.row["final_ability"] == pytest.approx(pool.steps * world.GAIN)
    assert 0.3 < played.row["effective_ratio"] < 0.9
    assert played.row["rollouts_per_effective_group"] == pytest.approx(8 / played.row["effective_ratio"])
    assert played.row["coverage"] < 1


@pytest.mark.slow
def test_reward_unfiltered_is_the_streams_true_mean_where_the_filtered_one_is_not(tmp_path):
    """Most of the pool is too hard: what is kept is solved twice as often as the stream it comes from.

    The metric is an average that fades by 0.9 a step, so the truth is faded alike; about 19 steps in a row (1.9 / 0.1)
    count as one independent value.
    """
    rows = []

    def factory(setup):
        method = METHODS["depo"][0](setup)
        judged = method._learner.judge
        method._learner.judge = lambda labels: rows.append(judged(labels).metrics)
        return method

    pool = make_pool(size=300, steps=160, spread=2.5)
    hard = pool.logit_N - 2.0
    pool = world.Pool("hard", pool.prompts, hard, pool.text_N - 2.0, pool.noise, 0.5, pool.steps, pool.batch)
    overrides = {"estimator.model": tiny_encoder.write(tmp_path / "encoder"), "filter.epsilon": 0.1}
    true = judge.play(pool, factory, 8, 0, overrides=overrides).series["true"]
    judged = slice(judge.JUDGED_FROM, None)
    names = ("reward_unfiltered", "target_mean", "scanned")
    found, filtered, scanned = (np.array([row[name] for row in rows]) for name in names)
    faded = [0.9 ** np.arange(i, -1, -1) * scanned[: i + 1] for i in range(len(true))]
    expected = np.array([np.average(true[: len(part)], weights=part) for part in faded])[judged]
    found, filtered = found[judged], filtered[judged]
    assert len(found) == 140
    error = np.std(found - expected) * np.sqrt(19 / len(found))
    assert error < 0.01
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=3 * error)
    assert np.abs(found - expected).max() < 0.05
    assert np.mean(filtered) > np.mean(true[judged]) + 0.1


def test_random_keeps_the_given_rate():
    played = judge.play(make_pool(size=2000), METHODS["random"][0], 8, 0, keep_rate=0.5)
    assert played.keep_rate == pytest.approx(0.5, abs=0.05)
    assert played.row["mae_true"] is None


@pytest.mark.slow
def test_methods_in_a_small_world_stand_in_order():
    bench = judge.Bench(make_pool(), 4, 0)
    names = ("grpo", "dynamic", "history_only", "mopps", "dps", "ideal", "oracle")
    rows = {name: bench.run(name).row for name in names}
    ratio = {name: row["effective_ratio"] for name, row in rows.items()}
    assert ratio["oracle"] >= ratio["ideal"] >= ratio["history_only"] - 0.02
    assert ratio["ideal"] >= ratio["grpo"] + 0.05
    assert rows["oracle"]["oracle_share"] == 1
    assert rows["grpo"]["coverage"] == 1
    assert rows["ideal"]["mae_true"] < min(rows[name]["mae_true"] for name in ("history_only", "mopps"))
    assert rows["ideal"]["ece"] < 0.03
    assert rows["dps"]["mae_true"] is None
    assert rows["dps"]["zero_auc"] is not None
    again = judge.Bench(make_pool(), 4, 0).run("ideal").row
    same = [key for key in judge.KEYS if key not in ("estimator_seconds",)]
    assert [again[key] for key in same] == [rows["ideal"][key] for key in same]


def test_goals_are_judged_in_words():
    def row(method, ratio, coverage=0.9, mae=0.1, auc=0.9, ece=0.01):
        values = {"effective_ratio": ratio, "coverage": coverage, "mae_true": mae, "zero_auc": auc, "ece": ece}
        return dict.fromkeys(judge.KEYS) | {"pool": "mixed", "group_size": 8, "seed": 0, "method": method} | values

    rows = [row("grpo", 0.41), row("ideal", 0.8), row("mopps", 0.5), row("dps", 0.9, 0.1)]
    rows.append(row("depo", 0.75, coverage=0.87, mae=0.12, auc=0.88, ece=0.04))
    found = {text.split(" (")[0]: met for *_, text, met in report.goals(rows)}
    assert found == {
        "gain in effective ratio over grpo 0.872 of ideal's": False,  # 0.34 / 0.39
        "coverage -3.0 points beside ideal's": False,
        "error of p̂ 1.200 of ideal's": False,
        "zero AUC above one half 0.950 of ideal's": True,  # 0.38 / 0.40
        "calibration error 0.040": False,
        "margin over mopps 0.833 of ideal's": True,  # 0.25 / 0.30
        "effective ratio 0.750 beside mopps's 0.500": True,
        "effective ratio 0.750 beside dps's 0.900": False,
    }
    narrow = row("depo_narrow", 0.91, coverage=0.47)
    beside = [text for *_, text, met in report.goals([*rows, narrow]) if "dps" in text and met]
    assert beside == ["effective ratio 0.910 beside dps's 0.900 (not behind) at coverage 0.47, dps at 0.10"]
    middle = [*rows[:3], row("dps", 0.8, 0.67), rows[-1], narrow]  # halfway between 0.87 and 0.47: 0.83
    assert report.goals(middle)[-1][2:] == (
        "effective ratio 0.830 beside dps's 0.800 (not behind) at coverage 0.67, dps at 0.67",
        True,
    )
    said = report.goals_text(report.goals(rows))
    assert "MISSED  coverage -3.0 points" in said
    assert said.endswith("3 of 8 goals met.")
    assert report.goals(rows[:-1]) == []


def test_the_table_has_medians_and_spreads():
    rows = [
        dict.fromkeys(judge.KEYS) | {"pool": "p", "group_size": 4, "method": "grpo", "seed": seed, "brier": brier}
        for seed, brier in enumerate((0.1, 0.5, 0.2))
    ]
    said = report.table(rows, {"p": [(0.5, 0.6), (0.4, 0.7)]})
    assert "p, G = 4   (Spearman of the text: ridge on embeddings 0.50, 0.40; ideal 0.60, 0.70)" in said
    assert "0.200 ±0.200" in said


def test_the_paper_is_overridden_in_its_encoder_alone():
    paper, ours = to_dict(load_config("depo_paper", {})), to_dict(paper_config())
    assert ours["estimator"]["model"] is None
    assert ours == paper | {"estimator": paper["estimator"] | {"model": None}}


def test_settings_of_depo_reach_depo_alone(monkeypatch):
    seen = {}

    def spy(name):
        def factory(setup):
            seen[name] = setup.overrides
            return Fixed(setup.policy)

        return (factory,)

    monkeypatch.setattr(judge, "METHODS", {name: spy(name) for name in ("grpo", "oracle", "depo")})
    logit = np.array([0.0, 40.0])
    pool = world.Pool("two", ["a", "b"], logit, logit, 1.0, 0.5, steps=25, batch=1)
    judge.Bench(pool, 8, 0, {"history.discount": 1.0}).run("depo")
    assert seen["depo"] == {"history.discount": 1.0}
    assert SimpleNamespace(**METHODS).depo  # a name is looked up in one dict
