"""What OpenRLHF calls, so far as it needs no Ray (test_remote.py, test_startup.py and tests/e2e have the rest).

test_real_parser.py puts flags through OpenRLHF's own parser.
"""

import argparse
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from depo_launch import Recorder, nested, resolved
from rollouts import micro_batch

import depo_plugin
from depo_plugin import hooks, seam
from depo_plugin.advantage import BASES
from depo_plugin.messages import Label
from depo_plugin.settings import config

SWITCH, BASE = config.SWITCH_FLAG, config.BASE_FLAG
WEIGHTS = ([0.05, 1.0], [0.5, 0.5])  # q and kept/scanned: 0.5 / 0.05 = 10, 0.5 / 1


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process in which no hook has run yet, but whose estimator is a Recorder and whose refunds are noted."""
    fresh = hooks.Process(handle=Recorder(), loader=SimpleNamespace(refunds=[]))
    fresh.loader.refund = fresh.loader.refunds.append
    monkeypatch.setattr(hooks, "_process", fresh)
    return fresh


# ── Flags ──


def parsed(monkeypatch, *words):
    """What a parser with the flag that add_arguments looks for makes of a launch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train.seed", type=int)
    parser.add_argument(BASE, choices=["gae", *BASES], default="gae", help="choose")
    monkeypatch.setattr(sys, "argv", ["train", *words])
    hooks.add_arguments(parser)
    return vars(parser.parse_args())


@pytest.mark.parametrize(
    ("words", "on", "base", "estimator"),
    [
        ([], False, None, "gae"),
        ([BASE, "rloo"], False, "rloo", "rloo"),
        ([SWITCH, "rloo"], False, "rloo", "rloo"),
        ([SWITCH, "depo"], True, None, "gae"),
        ([BASE, "depo"], True, None, "gae"),
        ([SWITCH, "depo", BASE, "rloo"], True, "rloo", "rloo"),
        ([BASE, "rloo", SWITCH, "depo"], True, "rloo", "rloo"),
        ([BASE, "gae", f"{SWITCH}=depo"], True, "gae", "gae"),
        ([BASE, "depo", BASE, "rloo"], True, "rloo", "rloo"),
        ([BASE, "rloo", BASE, "depo"], True, "rloo", "rloo"),
        ([BASE, "rloo", SWITCH, "depo", BASE, "dr_grpo"], True, "dr_grpo", "dr_grpo"),
        ([SWITCH, "depo", SWITCH, "rloo"], False, "rloo", "rloo"),  # the last of a repeated flag counts
        ([SWITCH, "rloo", SWITCH, "depo"], True, "rloo", "rloo"),
        (["--advantage_est", "depo", "--algo.advantage.est=rloo"], True, "rloo", "rloo"),  # argparse's abbreviations
    ],
)
def test_depo_is_a_switch_wherever_it_stands_and_the_launchs_own_flag_names_the_base(
    words, on, base, estimator, monkeypatch
):
    args = parsed(monkeypatch, *words)
    assert config.estimator_choice(args.get("depo.chosen", [])) == (on, base)
    assert args["algo.advantage.estimator"] == estimator, "what a launch without DEPO has"


@pytest.mark.parametrize("asked", [True, False])
def test_a_broken_depo_plugin_is_said(asked, monkeypatch, capsys):
    """If one of its own imports fails: an error if DEPO is asked for, else a warning, and the launch as it was."""
    monkeypatch.setitem(sys.modules, "depo_plugin.settings.config", None)
    monkeypatch.delattr("depo_plugin.settings.config")
    if asked:
        with pytest.raises(SystemExit):
            parsed(monkeypatch, SWITCH, "depo")
    else:
        assert parsed(monkeypatch, BASE, "rloo") == {"train.seed": None, "algo.advantage.estimator": "rloo"}
        hooks.resolve(SimpleNamespace())
    told = capsys.readouterr().err
    assert "openrlhf-depo is installed but cannot be imported (" in told
    assert "depo_plugin.settings.config" in told
    assert ("[Warning]" in told) is not asked


# ── The launch ──


def with_base(base, *flags, **others):
    """A resolved launch that names this base, or none, and asks for DEPO."""
    chosen = [(BASE, base)] if base else []
    values = {"depo.chosen": [*chosen, (SWITCH, "depo")], "algo.advantage.estimator": base or "gae"}
    return resolved(*flags, **values, **others)


def refused(capsys, *args, **others):
    """The faults by which such a launch is refused."""
    with pytest.raises(SystemExit) as stop:
        with_base(*args, **others)
    assert stop.value.code == 2
    head, *faults = capsys.readouterr().err.splitlines()
    assert head == "DEPO: this launch cannot work as it is set:"
    return faults


@pytest.mark.parametrize(
    ("named", "own", "base"), [(None, None, "group_norm"), ("gae", "rloo", "rloo"), *((b, None, b) for b in BASES)]
)
def test_resolve_puts_every_setting_and_the_base_advantage_in_place(named, own, base):
    """Our own flag for the base wins over the launch's; without either it is group_norm."""
    flags = ["--depo.advantage.base", own] if own else []
    args = with_base(named, "--depo.filter.low", "0.3", *flags)
    assert config.from_namespace(args.depo) == config.load_config(None, {"filter.low": 0.3, "advantage.base": base})
    assert args.algo.advantage.estimator == base
    assert hooks.enabled(args)


def test_an_encoder_that_cannot_be_used_stops_the_launch_before_ray(tmp_path, capsys):
    (fault,) = refused(capsys, None, "--depo.estimator.model", str(tmp_path))
    assert fault.startswith(f"--depo.estimator.model {tmp_path}: ")
    assert resolved("--depo.estimator.model", "a/b", use_ms=True).depo.enabled, "ModelScope's hub is asked later"


RESCALE = "--depo.advantage.importance_rescale"
WHITENS = f"{RESCALE} true: cannot go with {BASE} {{}}, which whitens"
WRONG = ["--depo.filter.low 0.9: must be below --depo.filter.high 0.85", "--depo.filter.epsilon 2:"]
ONE_RESPONSE = "--rollout.n_samples_per_prompt 1: must be at least 2"
NO_CRITIC = f"{BASE} gae: cannot go with {SWITCH} depo, which has no critic. Leave it out (DEPO then uses group_norm)"


@pytest.mark.parametrize(
    ("base", "responses", "flags", "starts"),
    [
        ("gae", 2, "", [NO_CRITIC]),
        ("reinforce", 2, RESCALE, [WHITENS.format("reinforce")]),
        ("reinforce_baseline", 2, RESCALE, [WHITENS.format("reinforce_baseline")]),
        (None, 1, "--depo.filter.low 0.9 --depo.filter.epsilon 2", [*WRONG, ONE_RESPONSE]),
    ],
)
def test_resolve_stops_with_every_fault_of_settings_and_launch(base, responses, flags, starts, capsys):
    faults = refused(capsys, base, *flags.split(), **{"rollout.n_samples_per_prompt": responses})
    assert len(faults) == len(starts)
    assert all(any(fault.startswith(start) for fault in faults) for start in starts), faults


UTILITY = "--depo.filter.rule utility --depo.filter.warmup_steps 9 --depo.estimator.num_gpus 0.1"
OWN_BASE = "--depo.advantage.base dr_grpo --depo.estimator.num_cpus 4"


@pytest.mark.parametrize(
    ("base", "flags", "advantage", "rule", "place"),
    [
        (None, "", "group_norm (the launch names none)", "window 0.15 to 0.85, after 5", "the CPU"),
        ("rloo", UTILITY, "rloo", "utility of at least 0.5, after 9", "0.1 of a GPU"),
        (None, OWN_BASE, "dr_grpo (--depo.advantage.base)", "window 0.15 to 0.85, after 5", "the CPU"),
    ],
)
def test_one_line_says_what_depo_does(base, flags, advantage, rule, place, capsys):
    with_base(base, *flags.split())
    assert capsys.readouterr().out == (
        f"DEPO is on: advantages by {advantage}; filter rule {rule} steps that keep every prompt; encoder "
        f"all-MiniLM-L6-v2 (bundled), mode frozen, on {place}; metrics depo/* in out/depo/metrics.jsonl\n"
    )


def test_a_reward_models_scores_are_logits_and_the_start_says_what_the_range_does(capsys):
    resolved("--depo.labels.reward_range", "-4", "4", **REWARDERS["model"][0])
    _, warning = capsys.readouterr().out.splitlines()
    assert warning.startswith(
        "[Warning] DEPO: the scores of --reward.model_name_or_path are logits, and --depo.labels.reward_range -4 4 "
        "clips them: -4 and below is a wrong response, 4 and above a right one."
    )


@pytest.mark.parametrize("values", [{}, {"depo.filter.low": 0.1}, {"depo.enabled": False}, {"depo.enabled": True}])
def test_enabled(values):
    assert hooks.enabled(nested(values)) is values.get("depo.enabled", False)


# ── Rewards that stop the run ──

REWARDERS = {  # the launch as OpenRLHF has set it, and what the error names
    "function": ({"reward.remote_url": ["my/reward.py"]}, "--reward.remote_url my/reward.py"),
    "servers": ({"reward.remote_url": ["http://a", "http://b"]}, "--reward.remote_url http://a,http://b"),
    "agent": ({"reward.remote_url": "agent", "train.agent_func_path": "a.py"}, "--train.agent_func_path a.py"),
    "model": ({"reward.remote_url": None, "reward.model_name_or_path": "my/rm"}, "--reward.model_name_or_path my/rm"),
}


@pytest.mark.parametrize("rewarder", ["function", "agent", "model"])
def test_a_response_without_reward_stops_the_run_and_names_the_reward_function(rewarder):
    """A reward model gives them later."""
    flags, named = REWARDERS[rewarder]
    rewards = {"p0": torch.tensor([0.0]), "what is 2+2?": None, "p2": None}
    samples = [SimpleNamespace(prompts=[prompt], rewards=reward) for prompt, reward in rewards.items()]
    args = resolved(**flags)
    hooks.check_rewards(args, samples[:1])
    if rewarder == "model":
        hooks.check_rewards(args, samples)
        return
    with pytest.raises(RuntimeError) as error:
        hooks.check_rewards(args, samples)
    assert str(error.value) == (
        f"2 of 3 responses have no reward: {named} raised or returned none (see 'Failed to fetch reward' in the "
        "rollout actors' log). First such prompt: 'what is 2+2?'. No gradient was taken from this batch."
    )


@pytest.mark.parametrize("rewarder", REWARDERS)
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_before_any_gradient_and_names_its_source(rewarder, reward, process):
    flags, named = REWARDERS[rewarder]
    batches = [micro_batch(range(2), [0.0, 1.0]), micro_batch(range(2, 6), [0.0, 1.0, reward, 1.0])]
    with pytest.raises(RuntimeError) as error:
        hooks.observe(resolved(**flags), batches, 5)
    assert str(error.value) == (
        f"1 of 6 responses have a reward that is NaN or infinite: {named} gave {reward} to the prompt 'p2'. No "
        "gradient was taken from this batch."
    )
    assert process.handle.calls == []  # nothing is learned from it, either


def test_a_group_that_dynamic_filtering_threw_away_for_a_nan_reward_stops_the_run(process):
    group = [micro_batch([i], [reward], scores=[reward]) for i, reward in enumerate((1.0, math.nan))]
    with pytest.raises(RuntimeError, match=r"^1 of 2 responses .* NaN or infinite: .* reward.py gave nan"):
        hooks.reject(resolved(), group)
    assert (process.handle.calls, process.loader.refunds) == ([], [])


# ── A step ──


def test_responses_get_back_the_prompt_and_label_they_were_sent_with(process):
    """An agent rewrites the prompt, a reward function changes the label; two groups are in flight at once."""
    label = {"answer": 4}
    hooks.dispatched(["ref 0", "ref 1"], ["p0", "p1"], [label, "a1"])
    hooks.dispatched(["ref 2"], ["p0"], ["a2"])
    back = [micro_batch([i], [1.0]) for i in range(2)]
    for one in back:
        one.prompts, one.labels = ["p0 and a hint"], [{"answer": 4, "seen": True}]
    for ref, sent in (("ref 0", label), ("ref 2", "a2")):
        hooks.received(ref, back)
        assert [(one.prompts, one.labels) for one in back] == [(["p0"], [sent])] * 2
    assert list(process.in_flight) == ["ref 1"]


@pytest.mark.parametrize(
    ("flags", "weights", "call", "advantages"),
    [
        ([], WEIGHTS, "sent", [3.0, 3.0]),  # without the flag they are not asked for
        ([], WEIGHTS, None, [3.0, 3.0]),  # the estimator is behind: these groups are not judged, so not learned from
        ([RESCALE], WEIGHTS, "sent", [30.0, 1.5]),
        ([RESCALE, "--depo.advantage.clip", "4"], WEIGHTS, "sent", [12.0, 1.5]),
        ([RESCALE], None, "sent", [3.0, 3.0]),  # the estimator did not answer
    ],
)
def test_observe_asks_for_importance_weights_before_the_labels_are_judged(flags, weights, call, advantages, process):
    process.handle = Recorder(weights=weights, call=call)
    batch = micro_batch(range(4), [0.0, 1.0, 1.0, 1.0])
    batch.advantages = torch.full((4, 1), 3.0)
    hooks.observe(resolved(*flags), [batch], 1)
    labels = [Label("p0", "a0", 0.5, pytest.approx(math.exp(-1)), 2, True, 2)]
    labels += [Label("p1", "a1", 1.0, pytest.approx(math.exp(-1)), 2, False, 2)]
    expected = [("keep_weights", ["p0", "p1"], ["a0", "a1"])] * bool(flags)
    assert process.handle.calls == expected + [("judge", labels)] + [("learn",)] * bool(call)
    assert process.pending_metrics == call
    assert batch.advantages.flatten().tolist() == pytest.approx(np.repeat(advantages, 2))


def test_a_nan_score_beside_a_reward_costs_its_label_alone(process, caplog):
    """Scores are for us, rewards for the policy: its gradient is sound."""
    batch = micro_batch(range(4), [0.0, 1.0, 1.0, 0.0], scores=[0.0, 1.0, math.nan, 0.0])
    for step in (5, 6):
        hooks.observe(resolved(), [batch], step)
    assert [[label.prompt for label in call[1]] for call in process.handle.calls if call[0] == "judge"] == [["p0"]] * 2
    assert process.handle.tally["labels_dropped"] == 2
    assert caplog.messages == ["DEPO: 1 of 2 groups have a score that is NaN or infinite: they are not learned from."]


def test_scores_outside_the_range_are_clipped_counted_and_warned_of_once(process, caplog):
    """Rewards of -1 and 1 in the default range: the labels are right, and the warning names flag, share and values."""
    for step in (1, 2, 3):
        hooks.observe(resolved(), [micro_batch(range(4), [-1.0, 1.0, 1.0, 1.0])], step)
    judged = [call[1] for call in process.handle.calls if call[0] == "judge"]
    assert [[label.y for label in labels] for labels in judged] == [[0.5, 1.0]] * 3
    assert process.handle.tally["clipped"] == 3
    (warning,) = caplog.messages
    assert warning.startswith(
        "DEPO: 25% of the scores (1 of 4, from -1 to 1) are outside --depo.labels.reward_range 0 1 and are clipped"
    )
    assert "takes 0 for a wrong response and 1 for a right one. Set the range to your scores" in warning


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_rewards_of_every_shape_are_observed_and_rejected(shape, process):
    """As OpenRLHF makes them of a server's lists: NaN is found, the others are learned from."""

    def shaped(index, rewards):
        one = micro_batch(index, rewards, scores=rewards)
        one.rewards, one.scores = (x.reshape(len(x), *shape) for x in (one.rewards, one.scores))
        return one

    hooks.observe(resolved(), [shaped(range(4), [0.0, 1.0, 1.0, 1.0])], 2)
    hooks.reject(resolved(), [shaped([0], [0.0]), shaped([1], [1.0])])
    (_, judged), _, (_, rejected) = process.handle.calls
    assert [label.y for label in [*judged, rejected]] == [0.5, 1.0, 0.5]
    with pytest.raises(RuntimeError, match="1 of 4 responses have a reward that is NaN"):
        hooks.observe(resolved(), [shaped(range(4), [0.0, 1.0, 1.0, math.nan])], 2)
    with pytest.raises(RuntimeError, match="1 of 2 responses have a reward that is NaN"):
        hooks.reject(resolved(), [shaped([0], [0.0]), shaped([1], [math.nan])])


def test_a_rejected_group_is_sent_and_its_place_given_back(process):
    group = [micro_batch([i], [1.0], scores=[1.0]) for i in range(2)]
    sent = ("reject", Label("p0", "a0", 1.0, None, 2, False, 2))
    hooks.reject(resolved(), group)
    hooks.reject(resolved("--depo.labels.reward_range", "-3", "-1"), group)
    assert process.handle.tally["clipped"] == 2
    group[0].scores = torch.tensor([math.nan])
    hooks.reject(resolved(), group)
    assert process.handle.tally["labels_dropped"] == 1
    assert (process.handle.calls, process.loader.refunds) == ([sent, sent], [1, 1, 1])


# ── Metrics and checkpoints ──


def test_log_adds_the_metrics_to_the_status_and_to_the_file(process, tmp_path):
    """Without the estimator's answer, what is known here is logged all the same."""
    process.handle = Recorder(metrics={"kappa": 8.0, "updates": 3, "time_blocked": 0.5, "labels_dropped": 4.0})
    process.handle.tally |= {"time_blocked": 0.25, "labels_dropped": 2.0}  # dropped groups: counted by the estimator
    process.pending_metrics = "sent"
    args = resolved(**{"ckpt.output_dir": str(tmp_path / "my model")})
    status = {"policy_loss": 0.125, "generated_samples": ["text", 1.0]}
    hooks.log(args, status, 6)
    mine = {"kappa": 8.0, "updates": 3.0, "time_blocked": 0.75, "labels_dropped": 4.0, "labels_unsent": 0.0}
    depo = {f"depo/{name}": value for name, value in mine.items()} | {"depo/clipped": 0.0}
    assert status == {"policy_loss": 0.125, "generated_samples": ["text", 1.0]} | depo
    assert all(type(status[name]) is float for name in depo)
    assert process.handle.calls == [("wait", "sent")]
    process.handle.metrics = None
    process.handle.tally |= {"labels_unsent": 3.0, "clipped": 6.0}
    hooks.log(args, {"policy_loss": 0.25}, 7)
    rows = [json.loads(line) for line in (tmp_path / "my model/depo/metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[1].pop("depo/time_step") < 60  # since the step before
    known = {"depo/time_blocked": 0.0, "depo/labels_unsent": 3.0, "depo/clipped": 6.0}
    assert rows == [{"step": 6, "policy_loss": 0.125} | depo, {"step": 7, "policy_loss": 0.25} | known]


LINES = [
    {"key": "00ff", "reason": "warmup", "p": 0.5, "prompt": "p0", "label": "a0"},
    {"key": "0100", "reason": None, "p": math.nan, "rejected": True},
]


def test_log_writes_a_line_for_each_group_with_its_step_first(process, tmp_path, caplog):
    """A step without an answer has no groups; a folder that cannot be written is one warning, and training goes on."""
    args = resolved(**{"ckpt.output_dir": str(tmp_path)})
    for step, groups in ((6, LINES), (7, None), (8, LINES[:1])):
        process.handle = Recorder(metrics=None if groups is None else {"kept": 2.0}, groups=groups or ())
        hooks.log(args, {}, step)
    path = tmp_path / "depo" / "groups.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 6} | LINES[0], {"step": 6} | LINES[1] | {"p": None}, {"step": 8} | LINES[0]]
    assert [list(row)[:2] for row in rows] == [["step", "key"]] * 3
    path.unlink()
    path.mkdir()
    for step in (9, 11):
        hooks.log(args, status := {}, step)
        assert status["depo/kept"] == 2.0
    (warning,) = caplog.messages
    assert warning.startswith(f"DEPO: {path} cannot be written (")
    assert warning.endswith("; training goes on, steps are missing in it.")
    steps = [json.loads(line)["step"] for line in (tmp_path / "depo" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [6, 7, 8, 9, 11], "the metrics are written all the same"


def test_one_line_on_the_console_every_ten_steps_and_at_the_first_after_the_warm_up(process, tmp_path, caplog):
    """Each is of the steps since the last one: 1 to 10, 11 to 13, 14 to 20; step 15 has no answer."""
    caplog.set_level("INFO", logger="openrlhf.depo_plugin.hooks")
    args = resolved(**{"ckpt.output_dir": str(tmp_path)})
    for step in range(1, 21):
        reasons = ["warmup", None, "unscored"] + ["explored"] * (step > 12)
        rate = {"effective_ratio": step / 100, "pred_mean": 0.5, "target_mean": 0.25}
        process.handle = Recorder(None if step == 15 else rate, groups=[{"reason": one} for one in reasons])
        process.handle.tally["time_blocked"] = 2.0
        hooks.log(args, {}, step)
    end = "predicted pass rate 0.50, observed 0.25; waited 2.0 s a step for the estimator"
    assert caplog.messages == [
        f"DEPO: step {step}: {ratio}% of the groups had a signal; {end}"
        for step, ratio in ((10, 6), (13, 12), (20, 17))
    ]


def test_the_process_that_trains_writes_the_settings_without_what_can_be_secret(monkeypatch, tmp_path, caplog):
    """OpenRLHF's sections as they are after resolve(); a name with key, token, secret or password is left out."""
    monkeypatch.setattr(hooks, "_process", hooks.Process())
    monkeypatch.setattr(seam, "report", lambda site, path: {"site": site})
    secrets = {
        "train.api_key": "hidden",
        "vllm.deep.HF_TOKEN": "hidden",
        "ds.dict": {"Password": "hidden", "rank": 8},
        "logger.wandb.name": "hidden",
        "reward.remote_url": "http://hidden",
        "ckpt.note": "hidden",
        "elsewhere": "hidden",
    }
    plain = {"actor.eps_clip_low_high": (0.2, 0.3), "actor.lr": 1e-6, "eval.dataset": None, "vllm.deep.path": tmp_path}
    folder = {"ckpt.output_dir": str(tmp_path / "my model")}
    args = resolved("--depo.filter.low", "0.3", **plain | {"algo.limit": math.inf} | secrets | folder)
    path = tmp_path / "my model" / "depo" / "settings.json"
    hooks.attach(args, "SamplesGenerator", "file")
    assert not path.exists()
    hooks.attach(args, "BasePPOTrainer", "file")
    text = path.read_text()
    assert "hidden" not in text
    found = json.loads(text)
    assert list(found) == ["version", "depo", "launch"]
    assert found["version"] == depo_plugin.__version__
    settings = config.load_config(None, {"filter.low": 0.3, "advantage.base": "group_norm"})
    assert found["depo"] == {"shadow": False} | config.to_dict(settings)
    assert set(found["launch"]) == {"actor", "algo", "data", "eval", "rollout", "train", "vllm", "ds"}
    assert found["launch"]["actor"] == {"eps_clip_low_high": [0.2, 0.3], "lr": 1e-6}
    assert found["launch"]["algo"]["limit"] == "inf"
    assert found["launch"]["algo"]["advantage"] == {"estimator": "group_norm"}
    assert found["launch"]["ds"] == {"dict": {"rank": 8}}
    assert found["launch"]["vllm"] == {"num_engines": 1, "deep": {"path": str(tmp_path)}}
    assert found["launch"]["train"]["colocate_all"] is False
    assert caplog.messages == []


def test_settings_that_cannot_be_written_are_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(hooks, "_process", hooks.Process())
    monkeypatch.setattr(seam, "report", lambda site, path: {"site": site})
    (tmp_path / "depo").write_text("a file where the folder should be")
    for _ in range(2):
        hooks.attach(resolved(**{"ckpt.output_dir": str(tmp_path)}), "BasePPOTrainer", "file")
    (warning,) = caplog.messages
    assert warning.startswith(f"DEPO: {tmp_path / 'depo' / 'settings.json'} cannot be written (")


def test_save_names_the_tags_that_openrlhf_still_has(process, tmp_path):
    args = resolved(**{"ckpt.path": str(tmp_path)})
    hooks.save(args, "global_step2")
    tags = {"global_step2", "best_global_step1"}
    for tag in tags:
        (tmp_path / "_actor" / tag).mkdir(parents=True)
    (tmp_path / "_actor" / "latest").write_text("global_step2")
    hooks.save(args, "global_step4")
    assert process.handle.calls == [("save", "global_step2", set()), ("save", "global_step4", tags)]


@pytest.mark.parametrize(
    ("answer", "reason"), [(None, "the estimator does not answer"), ("[Errno 28] full", "[Errno 28] full"), (0.5, "")]
)
def test_a_save_that_fails_is_a_warning_that_names_the_tag_and_the_reason(answer, reason, process, tmp_path, caplog):
    process.handle.save_s = answer
    (tmp_path / "depo").mkdir()
    (tmp_path / "depo" / "global_step2.safetensors").touch()
    hooks.save(resolved(**{"ckpt.path": str(tmp_path)}), "global_step2")
    warning = f"DEPO: the estimator's checkpoint global_step2 could not be written ({reason}); training goes on."
    assert caplog.messages == ([warning] if reason else [])


def test_a_checkpoint_folder_that_each_node_has_for_itself_is_told_once(process, tmp_path, caplog):
    """The estimator has written its file, and the process that trains does not see it."""
    process.handle.save_s = 0.5
    for tag in ("global_step2", "global_step4"):
        hooks.save(resolved(**{"ckpt.path": str(tmp_path)}), tag)
    (warning,) = caplog.messages
    assert f"--ckpt.path {tmp_path} is not the same folder on all nodes" in warning


def test_a_run_that_does_not_resume_loads_nothing(process):
    hooks.load(resolved(), {"global_step": 0, "episode": 0})
    assert process.handle.calls == []
