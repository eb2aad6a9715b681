"""What OpenRLHF calls, as far as it needs no Ray (test_remote.py and tests/e2e have the rest), and the seam: that the
patched files call what hooks.py has, in the way it takes it, and only where DEPO is on.
"""

import argparse
import ast
import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_config import nested
from test_labels import micro_batch

from depo_plugin import hooks
from depo_plugin.commands.patching import releases
from depo_plugin.messages import Label
from depo_plugin.settings import config

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "patches" / "openrlhf-0.11.2" / "0001-depo.patch"


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process in which no hook has run yet."""
    fresh = SimpleNamespace(**vars(hooks._process))
    monkeypatch.setattr(hooks, "_process", fresh)
    assert fresh.handle is None
    return fresh


def launch(*flags, **others):
    """OpenRLHF's nested arguments of a launch that can work, with these flags of DEPO and other values by name."""
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    values = {
        "algo.advantage.estimator": "gae",
        "depo.chosen": [("--advantage_estimator", "depo")],
        "algo.kl.init_coef": 0.0,
        "ckpt.path": "checkpoints",
        "ckpt.output_dir": "out",
        "data.max_images_per_prompt": 0,
        "reward.model_name_or_path": None,
        "reward.remote_url": "reward.py",
        "rollout.batch_size": 16,
        "rollout.n_samples_per_prompt": 2,
        "train.agent_func_path": None,
        "train.async_enable": False,
        "train.batch_size": 32,
        "train.colocate_all": False,
        "train.dynamic_batch_enable": False,
        "use_ms": False,
        "vllm.num_engines": 1,
    }
    return nested(values | others | vars(parser.parse_args(flags)))


def resolved(*flags, **others):
    args = launch(*flags, **others)
    hooks.resolve(args)
    return args


# ---- Flags


def parser_of_openrlhf():
    """A parser with the one flag that add_arguments looks for; tests/unit/test_real_parser.py has the real one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train.seed", type=int)
    parser.add_argument("--algo.advantage.estimator", choices=["gae", *config.BASES], default="gae", help="choose")
    return parser


def parsed(monkeypatch, *words):
    parser = parser_of_openrlhf()
    monkeypatch.setattr(sys, "argv", ["train", *words])
    hooks.add_arguments(parser)
    return vars(parser.parse_args())


def test_add_arguments_adds_the_flags_and_keeps_openrlhfs(monkeypatch):
    args = parsed(monkeypatch, "--train.seed", "3", "--depo.filter.low", "0.3")
    assert (args["train.seed"], args["depo.filter.low"], args["depo.filter.high"]) == (3, 0.3, None)
    assert args["algo.advantage.estimator"] == "gae"


def test_add_arguments_names_every_flag_it_does_not_know(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, "--depo.filter.hihg", "0.9", "--depo.filter.lo=1")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--depo.filter.hihg: unknown setting. Did you mean --depo.filter.high?" in told
    assert "--depo.filter.lo: unknown setting. Did you mean --depo.filter.low?" in told


SWITCH, BASE = "--advantage_estimator", "--algo.advantage.estimator"


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
    """Where one of its own imports fails: an error if DEPO is asked for, else a warning, and the launch as it was."""
    monkeypatch.setitem(sys.modules, "depo_plugin.settings.config", None)
    monkeypatch.delattr("depo_plugin.settings.config")
    words = [SWITCH, "depo"] if asked else [BASE, "rloo"]
    if asked:
        with pytest.raises(SystemExit):
            parsed(monkeypatch, *words)
    else:
        assert parsed(monkeypatch, *words) == {"train.seed": None, "algo.advantage.estimator": "rloo"}
        hooks.resolve(SimpleNamespace())
    told = capsys.readouterr().err
    assert "openrlhf-depo is installed but cannot be imported (" in told
    assert "depo_plugin.settings.config" in told
    assert ("[Warning]" in told) is not asked


def test_resolve_puts_every_setting_and_the_base_advantage_in_place():
    args = resolved("--depo.filter.low", "0.3", "--depo.advantage.base", "rloo")
    cfg = config.load_config(None, {"filter.low": 0.3, "advantage.base": "rloo"})
    assert config.from_namespace(args.depo) == cfg
    assert args.algo.advantage.estimator == "rloo"
    assert hooks.enabled(args)


def resolved_with(chosen, *flags, **others):
    named = [value for _, value in chosen if value != "depo"] or ["gae"]
    return resolved(*flags, **{"depo.chosen": chosen, "algo.advantage.estimator": named[-1]}, **others)


@pytest.mark.parametrize("base", config.BASES)
def test_the_base_is_the_launchs_own(base):
    args = resolved_with([(SWITCH, "depo"), (BASE, base)])
    assert (args.algo.advantage.estimator, args.depo.advantage.base) == (base, base)
    args = resolved_with([(BASE, base), (SWITCH, "depo")], "--depo.advantage.base", "rloo")
    assert (args.algo.advantage.estimator, args.depo.advantage.base) == ("rloo", "rloo")


def test_without_a_base_it_is_group_norm():
    assert resolved().algo.advantage.estimator == "group_norm"


def test_gae_is_refused_with_the_fix_and_another_base_overrides_it(capsys):
    with pytest.raises(SystemExit):
        resolved_with([(BASE, "gae"), (SWITCH, "depo")])
    assert capsys.readouterr().err.splitlines()[1:] == [
        "--algo.advantage.estimator gae: cannot go with --advantage_estimator depo, which has no critic. Leave it out "
        "(DEPO then uses group_norm), or name one of group_norm, dr_grpo, rloo, reinforce_baseline, reinforce, "
        "flash_reinforce."
    ]
    args = resolved_with([(BASE, "gae"), (SWITCH, "depo")], "--depo.advantage.base", "rloo")
    assert args.algo.advantage.estimator == "rloo"


@pytest.mark.parametrize("base", ["reinforce", "reinforce_baseline"])
def test_importance_weights_are_refused_on_a_base_of_the_launch_that_whitens(base, capsys):
    with pytest.raises(SystemExit):
        resolved_with([(BASE, base), (SWITCH, "depo")], "--depo.advantage.importance_rescale")
    (fault,) = capsys.readouterr().err.splitlines()[1:]
    assert fault.startswith(
        f"--depo.advantage.importance_rescale true: cannot go with --algo.advantage.estimator {base}, which whitens"
    )


def test_one_line_says_what_depo_does(capsys):
    resolved()
    assert capsys.readouterr().out == (
        "DEPO is on: advantages by group_norm (the launch names none); filter rule window 0.15 to 0.85, after 5 steps "
        "that keep every prompt; encoder all-MiniLM-L6-v2 (bundled), mode frozen, on 1 CPU core; metrics depo/* in "
        "out/depo/metrics.jsonl\n"
    )
    flags = "--depo.filter.rule utility --depo.filter.warmup_steps 9 --depo.estimator.num_gpus 0.1".split()
    resolved_with([(BASE, "rloo"), (SWITCH, "depo")], *flags)
    assert capsys.readouterr().out == (
        "DEPO is on: advantages by rloo; filter rule utility of at least 0.5, after 9 steps that keep every prompt; "
        "encoder all-MiniLM-L6-v2 (bundled), mode frozen, on 0.1 of a GPU; metrics depo/* in "
        "out/depo/metrics.jsonl\n"
    )
    resolved("--depo.advantage.base", "dr_grpo", "--depo.estimator.num_cpus", "4")
    told = capsys.readouterr().out
    assert "advantages by dr_grpo (--depo.advantage.base); " in told
    assert "on 4 CPU cores; " in told


def test_a_reward_models_scores_are_logits_and_the_start_says_what_the_range_does(capsys):
    flags = {"reward.remote_url": None, "reward.model_name_or_path": "rm"}
    resolved("--depo.labels.reward_range", "-4", "4", **flags)
    _, warning = capsys.readouterr().out.splitlines()
    assert warning.startswith(
        "[Warning] DEPO: the scores of --reward.model_name_or_path are logits, and --depo.labels.reward_range -4 4 "
        "clips them: -4 and below is a wrong response, 4 and above a right one."
    )


def test_an_encoder_that_cannot_be_used_stops_the_launch_before_ray(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        resolved("--depo.estimator.model", str(tmp_path))
    assert stop.value.code == 2
    head, fault = capsys.readouterr().err.splitlines()
    assert head == "DEPO: this launch cannot work as it is set:"
    assert fault.startswith(f"--depo.estimator.model {tmp_path}: ")
    assert resolved("--depo.estimator.model", "a/b", use_ms=True).depo.enabled, "ModelScope's hub is asked later"


@pytest.mark.parametrize("flags", [[], ["--depo.filter.low", "0.3", "--depo.config", "nowhere.yaml"]])
def test_without_depo_nothing_is_left_of_it(flags, capsys):
    args = launch(*flags, **{"algo.advantage.estimator": "rloo", "depo.chosen": [(BASE, "rloo")]})
    hooks.resolve(args)
    assert not hasattr(args, "depo")
    assert args.algo.advantage.estimator == "rloo"
    assert not hooks.enabled(args)
    told = capsys.readouterr()
    warning = (
        "[Warning] DEPO is off (--advantage_estimator rloo), so these settings do nothing: "
        "--depo.filter.low, --depo.config\n"
    )
    assert (told.out, told.err) == (warning if flags else "", "")


def test_resolve_stops_with_every_fault_of_settings_and_launch(capsys):
    args = launch(
        *["--depo.filter.low", "0.9", "--depo.filter.epsilon", "2"],
        **{"rollout.n_samples_per_prompt": 1, "reward.remote_url": None},
    )
    with pytest.raises(SystemExit) as stop:
        hooks.resolve(args)
    assert stop.value.code == 2
    head, *faults = capsys.readouterr().err.splitlines()
    assert head == "DEPO: this launch cannot work as it is set:"
    starts = [
        "--depo.filter.low 0.9: must be below --depo.filter.high 0.85",
        "--depo.filter.epsilon 2:",
        "--rollout.n_samples_per_prompt 1: must be at least 2",
        "--reward.remote_url none: must be given",
    ]
    assert len(faults) == len(starts)
    for start in starts:
        assert [fault for fault in faults if fault.startswith(start)], start


@pytest.mark.parametrize(
    ("args", "on"),
    [
        (SimpleNamespace(), False),
        (nested({"depo.filter.low": 0.1}), False),
        (nested({"depo.enabled": False}), False),
        (nested({"depo.enabled": True}), True),
    ],
)
def test_enabled(args, on):
    assert hooks.enabled(args) is on


# ---- Start


def test_missing_signatures_are_all_named(monkeypatch):
    monkeypatch.setattr(
        hooks,
        "SIGNATURES",
        {
            "json": {"dumps": ["obj", "objekt"], "JSONDecoder.decode": ["s"], "JSONDecoder.gone": ["s"]},
            "textwrap": {"indent": ["text", "prefix", "suffix", "colour"]},
        },
    )
    with pytest.raises(hooks.SeamError) as error:
        hooks.check_signatures()
    assert str(error.value) == (
        "dumps has no 'objekt'; json has no 'JSONDecoder.gone'; indent has no 'suffix'; indent has no 'colour'. "
        "Supported: OpenRLHF 0.11.2. Run: depo patch --check"
    )


def test_what_is_there_passes(monkeypatch):
    monkeypatch.setattr(hooks, "SIGNATURES", {"json": {"dumps": ["obj", "indent"], "JSONDecoder.decode": []}})
    hooks.check_signatures()


def test_the_estimator_is_not_started_on_an_openrlhf_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(hooks, "SIGNATURES", {"json": {"dumps": ["objekt"]}})
    with pytest.raises(hooks.SeamError, match=r"^dumps has no 'objekt'"):
        hooks.start_estimator(SimpleNamespace(args=resolved()), None)


# Real OpenRLHF, whole and then with three things changed as another release might.
REAL = """
import dataclasses, json
from depo_plugin import hooks
hooks.check_signatures()
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils import experience, samples_generator
samples_generator.SamplesGenerator._generate_vllm = lambda self, dataloader_iter, num_prompts, **kwargs: None
del ppo_trainer.BasePPOTrainer.save_best_checkpoint
@dataclasses.dataclass
class Experience:
    index: list
    prompts: list
    labels: list
    rewards: list
    advantages: list
    action_log_probs: list
    action_mask: list
experience.Experience = Experience
try:
    hooks.check_signatures()
except hooks.SeamError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.wheel
def test_the_real_openrlhf_has_what_the_call_sites_take(patched_copy):
    env = os.environ | {"PYTHONPATH": f"{patched_copy}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", REAL], env=env, cwd=patched_copy, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == (
        "openrlhf.trainer.ppo_trainer has no 'BasePPOTrainer.save_best_checkpoint'; "
        "SamplesGenerator._generate_vllm has no 'dynamic_filtering'; Experience has no 'scores'. "
        "Supported: OpenRLHF 0.11.2. Run: depo patch --check"
    )


# ---- Steps


class Recorder:
    """Stands where a process has its way to the estimator; keeps what is sent and answers what it was given."""

    timeout_s = 7.0

    def __init__(self, metrics=None, weights=None, save_s=0.5):
        self.metrics, self.weights, self.save_s = metrics, weights, save_s
        self.calls = []
        self.tally = {"time_blocked": 0.25, "labels_unsent": 0.0, "labels_dropped": 0.0, "clipped": 0.0}

    def observe(self, labels):
        self.calls.append(("observe", labels))
        return "sent"

    def reject(self, label):
        self.calls.append(("reject", label))

    def keep_weights(self, prompts, labels):
        self.calls.append(("keep_weights", prompts, labels))
        return self.weights

    def wait(self, ref, timeout_s):
        self.calls.append(("wait", ref, timeout_s))
        return self.metrics

    def take_tally(self):
        tally, self.tally = self.tally, self.tally | dict.fromkeys(("labels_unsent", "labels_dropped", "clipped"), 0.0)
        return tally

    def save(self, tag, live_tags):
        self.calls.append(("save", tag, live_tags))
        return self.save_s


def response(prompt, rewarded):
    return SimpleNamespace(prompts=[prompt], rewards=torch.tensor([0.0]) if rewarded else None)


REWARDERS = {  # what the launch says and what the error names
    "function": ({"reward.remote_url": ["my/reward.py"]}, "--reward.remote_url my/reward.py"),  # OpenRLHF splits it
    "servers": ({"reward.remote_url": ["http://a", "http://b"]}, "--reward.remote_url http://a,http://b"),
    "agent": (
        {"reward.remote_url": "agent", "train.agent_func_path": "my/agent.py"},  # OpenRLHF sets remote_url so
        "--train.agent_func_path my/agent.py",
    ),
    "model": ({"reward.remote_url": None, "reward.model_name_or_path": "my/rm"}, "--reward.model_name_or_path my/rm"),
}


@pytest.mark.parametrize("rewarder", ["function", "agent"])
def test_a_response_without_reward_stops_the_run_and_names_the_reward_function(rewarder):
    flags, named = REWARDERS[rewarder]
    samples = [response("p0", True), response("what is 2+2?", False), response("p2", False)]
    with pytest.raises(RuntimeError) as error:
        hooks.check_rewards(resolved(**flags), samples)
    assert str(error.value) == (
        f"2 of 3 responses have no reward: {named} raised or returned none (see 'Failed to fetch reward' in the "
        "rollout actors' log). First such prompt: 'what is 2+2?'. No gradient was taken from this batch."
    )


@pytest.mark.parametrize("rewarder", REWARDERS)
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_before_any_gradient_and_names_its_source(rewarder, reward, process):
    flags, named = REWARDERS[rewarder]
    process.handle = Recorder()
    batches = [micro_batch(range(2), [0.0, 1.0]), micro_batch(range(2, 6), [0.0, 1.0, reward, 1.0])]
    with pytest.raises(RuntimeError) as error:
        hooks.observe(resolved(**flags), batches, 5)
    assert str(error.value) == (
        f"1 of 6 responses have a reward that is NaN or infinite: {named} gave {reward} to the prompt 'p2'. No "
        "gradient was taken from this batch."
    )
    assert process.handle.calls == []  # nothing is learned from it, either


def test_a_group_that_dynamic_filtering_threw_away_for_a_nan_reward_stops_the_run(process):
    process.handle, process.loader = Recorder(), SimpleNamespace(refund=None)
    group = [micro_batch([i], [reward], scores=[reward]) for i, reward in enumerate((1.0, math.nan))]
    with pytest.raises(
        RuntimeError, match=r"^1 of 2 responses .* NaN or infinite: --reward.remote_url reward.py gave"
    ):
        hooks.reject(resolved(), group)


def test_a_nan_score_beside_a_reward_costs_its_label_alone(process):
    """Scores are for us, rewards for the policy: its gradient is sound."""
    process.handle = Recorder()
    hooks.observe(resolved(), [micro_batch(range(4), [0.0, 1.0, 1.0, 0.0], scores=[0.0, 1.0, math.nan, 0.0])], 5)
    ((_, labels),) = process.handle.calls
    assert [label.prompt for label in labels] == ["p0"]
    assert process.handle.tally["labels_dropped"] == 1


def test_rewards_pass_and_a_reward_model_gives_them_later():
    hooks.check_rewards(resolved(), [response("p0", True)])
    args = resolved(**{"reward.remote_url": None, "reward.model_name_or_path": "rm"})
    hooks.check_rewards(args, [response("p0", False)])


def test_scores_outside_the_range_are_clipped_counted_and_warned_of_once(process, caplog):
    """Rewards of -1 and 1 in the default range: the labels are right, and the warning names flag, share and values."""
    process.handle, args = Recorder(), resolved()
    for step in (1, 2, 3):
        hooks.observe(args, [micro_batch(range(4), [-1.0, 1.0, 1.0, 1.0])], step)
    assert [[label.y for label in labels] for _, labels in process.handle.calls] == [[0.5, 1.0]] * 3
    assert process.handle.tally["clipped"] == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(
        "DEPO: 25% of the scores (1 of 4, from -1 to 1) are outside --depo.labels.reward_range 0 1 and are clipped"
    )
    assert "takes 0 for a wrong response and 1 for a right one. Set the range to your scores" in warning


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("reward", [1.0, math.nan])
def test_rewards_of_every_shape_are_observed_and_rejected(shape, reward, process):
    """As OpenRLHF makes them of a server's lists: NaN is found, the others are learned from."""
    process.handle, process.loader = Recorder(), SimpleNamespace(refund=lambda count: None)
    batch = micro_batch(range(4), [0.0, 1.0, 1.0, reward], scores=[0.0, 1.0, 1.0, reward])
    group = [micro_batch([i], [r], scores=[r]) for i, r in enumerate([0.0, reward])]
    for one in (batch, *group):
        one.rewards, one.scores = (x.reshape(len(x), *shape) for x in (one.rewards, one.scores))
    if math.isnan(reward):
        with pytest.raises(RuntimeError, match="1 of 4 responses have a reward that is NaN"):
            hooks.observe(resolved(), [batch], 2)
        with pytest.raises(RuntimeError, match="1 of 2 responses have a reward that is NaN"):
            hooks.reject(resolved(), group)
        return
    hooks.observe(resolved(), [batch], 2)
    hooks.reject(resolved(), group)
    (_, observed), (_, rejected) = process.handle.calls
    assert [label.y for label in [*observed, rejected]] == [0.5, 1.0, 0.5]


def test_responses_get_back_the_prompt_and_label_they_were_sent_with(process):
    """An agent rewrites the prompt, a reward function changes the label; two groups are in flight at once."""
    label = {"answer": 4}
    hooks.dispatched(["ref 0", "ref 1"], ["p0", "p1"], [label, "a1"])
    hooks.dispatched(["ref 2"], ["p0"], ["a2"])
    back = [micro_batch([i], [1.0]) for i in range(2)]
    for one in back:
        one.prompts, one.labels = ["p0 and a hint"], [{"answer": 4, "seen": True}]
    hooks.received("ref 0", back)
    assert [(one.prompts, one.labels) for one in back] == [(["p0"], [label])] * 2
    hooks.received("ref 2", back)
    assert [(one.prompts, one.labels) for one in back] == [(["p0"], ["a2"])] * 2
    assert list(process.in_flight) == ["ref 1"]


def test_observe_sends_the_labels_and_leaves_the_advantages_alone(process):
    process.handle = Recorder()
    batch = micro_batch(range(4), [0.0, 1.0, 1.0, 1.0])
    batch.advantages = torch.full((4, 1), 3.0)
    hooks.observe(resolved(), [batch], 1)
    ((name, labels),) = process.handle.calls
    assert (name, [(one.prompt, one.y, one.signal) for one in labels]) == (
        "observe",
        [("p0", 0.5, True), ("p1", 1.0, False)],
    )
    assert process.pending_metrics == "sent"
    assert batch.advantages.flatten().tolist() == [3.0] * 4


@pytest.mark.parametrize(
    ("weights", "clip", "expected"),
    [
        (([0.05, 1.0], [0.5, 0.5]), [], [30.0, 30.0, 1.5, 1.5]),  # 3 * 0.5 / 0.05 = 30, 3 * 0.5 / 1
        (([0.05, 1.0], [0.5, 0.5]), ["--depo.advantage.clip", "4"], [12.0, 12.0, 1.5, 1.5]),
        (None, [], [3.0] * 4),  # the estimator did not answer
    ],
)
def test_importance_weights_are_asked_before_learning_and_scale_the_advantages(weights, clip, expected, process):
    process.handle = Recorder(weights=weights)
    batch = micro_batch(range(4), [0.0, 1.0, 1.0, 0.0])
    batch.advantages = torch.full((4, 1), 3.0)
    hooks.observe(resolved("--depo.advantage.importance_rescale", *clip), [batch], 1)
    assert [call[0] for call in process.handle.calls] == ["keep_weights", "observe"]
    assert process.handle.calls[0][1:] == (["p0", "p1"], ["a0", "a1"])
    assert batch.advantages.flatten().tolist() == pytest.approx(expected)


def test_a_rejected_group_is_sent_and_its_place_given_back(process):
    refunds = []
    process.handle, process.loader = Recorder(), SimpleNamespace(refund=refunds.append)
    group = [micro_batch([i], [1.0], scores=[1.0]) for i in range(2)]
    hooks.reject(resolved(), group)
    assert process.handle.calls == [("reject", Label("p0", "a0", 1.0, None, 2, False))]
    hooks.reject(resolved("--depo.labels.reward_range", "-3", "-1"), group)
    assert process.handle.tally["clipped"] == 2
    assert process.handle.calls[1:] == [("reject", Label("p0", "a0", 1.0, None, 2, False))]
    group[0].scores = torch.tensor([math.nan])
    hooks.reject(resolved(), group)
    assert process.handle.tally["labels_dropped"] == 1
    assert (len(process.handle.calls), refunds) == (2, [1, 1, 1])


def test_log_adds_the_metrics_to_the_status_and_to_the_file(process, tmp_path):
    process.handle = Recorder(metrics={"kappa": 8.0, "updates": 3, "time_blocked": 0.5})
    process.pending_metrics, process.dropped = "sent", 4
    args = resolved(**{"ckpt.output_dir": str(tmp_path / "my model")})
    status = {"policy_loss": 0.125, "generated_samples": ["text", 1.0]}
    hooks.log(args, status, 6)
    depo = {
        "depo/kappa": 8.0,
        "depo/updates": 3.0,
        "depo/time_blocked": 0.75,
        "depo/labels_unsent": 0.0,
        "depo/labels_dropped": 4.0,
        "depo/clipped": 0.0,
    }
    assert status == {"policy_loss": 0.125, "generated_samples": ["text", 1.0]} | depo
    assert all(type(status[name]) is float for name in depo)
    assert process.handle.calls == [("wait", "sent", 7.0)]
    process.handle.metrics = None  # the estimator did not answer: what is known here is logged all the same
    process.handle.tally |= {"labels_unsent": 3.0, "labels_dropped": 1.0, "clipped": 6.0}
    hooks.log(args, {"policy_loss": 0.25}, 7)
    rows = [json.loads(line) for line in (tmp_path / "my model/depo/metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 6, "policy_loss": 0.125} | depo,
        {
            "step": 7,
            "policy_loss": 0.25,
            "depo/time_blocked": 0.25,
            "depo/labels_unsent": 3.0,  # of this step
            "depo/labels_dropped": 5.0,  # in all
            "depo/clipped": 6.0,  # of this step
        },
    ]


def test_save_names_the_tags_that_openrlhf_still_has(process, tmp_path):
    process.handle = Recorder()
    args = resolved(**{"ckpt.path": str(tmp_path)})
    hooks.save(args, "global_step2")
    for tag in ("global_step2", "best_global_step1"):
        (tmp_path / "_actor" / tag).mkdir(parents=True)
    (tmp_path / "_actor" / "latest").write_text("global_step2")
    hooks.save(args, "global_step4")
    assert process.handle.calls == [
        ("save", "global_step2", set()),
        ("save", "global_step4", {"global_step2", "best_global_step1"}),
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "the estimator does not answer"),
        (OSError(28, "No space left on device"), r"[Errno 28] No space left on device"),
    ],
)
def test_a_save_that_fails_is_a_warning_that_names_the_tag_and_the_reason(answer, reason, process, tmp_path, caplog):
    process.handle = Recorder(save_s=answer)
    hooks.save(resolved(**{"ckpt.path": str(tmp_path)}), "global_step2")
    assert [record.getMessage() for record in caplog.records] == [
        f"DEPO: the estimator's checkpoint global_step2 could not be written ({reason}); training goes on."
    ]


def test_a_run_that_does_not_resume_loads_nothing(process):
    hooks.load(resolved(), {"global_step": 0, "episode": 0})
    assert process.handle is None


# ---- The seam

OFF = {"add_arguments": "depo_hooks", "resolve": "depo_hooks"}  # the two that run without DEPO, behind its presence
ON = {"depo_hooks and depo_hooks.enabled(args)", "depo_hooks and depo_hooks.enabled(self.args)"}
INNER = {"check_signatures"}  # public, called by other hooks


def added_lines():
    return [line[1:] for line in PATCH.read_text().splitlines() if line.startswith("+") and line[:3] != "+++"]


def guard_of(call, parents):
    """The condition of the nearest `if` that this call is in the body of, None where there is none."""
    child, node = call, parents.get(call)
    while node is not None:
        if isinstance(node, ast.If) and child in node.body:
            return ast.unparse(node.test)
        if isinstance(node, ast.IfExp) and child is node.body:
            return ast.unparse(node.test)
        child, node = node, parents.get(node)
    return None


@pytest.fixture(scope="module")
def calls(patched_copy):
    """Each call of a hook in the patched files: (its name, the call, its guard or None)."""
    files = [line.split(" b/", 1)[1] for line in PATCH.read_text().splitlines() if line.startswith("diff --git ")]
    assert len(files) == 3
    found = []
    for file in files:
        tree = ast.parse((patched_copy / file).read_text())
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("depo_hooks."):
                found.append((node.func.attr, node, guard_of(node, parents)))
    return found


@pytest.mark.wheel
def test_every_call_in_the_patch_is_one_of_the_patched_files(calls):
    assert len(calls) == sum(line.count("depo_hooks.") for line in added_lines()) == 30


@pytest.mark.wheel
def test_every_call_fits_the_hooks_signature(calls):
    for name, call, _ in calls:
        hook = getattr(hooks, name)
        assert hook.__module__ == "depo_plugin.hooks"
        assert not any(isinstance(arg, ast.Starred) for arg in call.args), ast.unparse(call)
        inspect.signature(hook).bind(*[None] * len(call.args), **{part.arg: None for part in call.keywords})


@pytest.mark.wheel
def test_every_call_is_behind_the_one_question(calls):
    work = [(name, guard) for name, _, guard in calls if name != "enabled"]
    assert len(work) == 16
    for name, guard in work:
        assert guard == OFF[name] if name in OFF else guard in ON, name
    asked = [call for name, call, _ in calls if name == "enabled"]
    assert len(asked) == len([name for name, _ in work if name not in OFF])


@pytest.mark.wheel
def test_every_hook_is_called(calls):
    public = {
        name
        for name, value in vars(hooks).items()
        if inspect.isfunction(value) and value.__module__ == hooks.__name__ and not name.startswith("_")
    }
    assert INNER <= public
    assert public - INNER == {name for name, _, _ in calls}


def test_the_patch_is_short_and_of_the_supported_release():
    assert 30 < len([line for line in added_lines() if line.strip()]) < 55
    assert list(releases()) == ["0.11.2"]
