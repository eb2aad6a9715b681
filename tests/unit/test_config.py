"""Settings: three ways in (default, file, flag), one reading, all faults at once."""

import argparse
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_args import nested

from depo_plugin import advantage, rules, seam
from depo_plugin.commands import cli
from depo_plugin.settings import config
from depo_plugin.settings.config import ConfigError, DepoConfig, load_config
from depo_plugin.settings.value_kinds import RANGE, SWITCH, TEXT
from depo_plugin.settings.yaml_io import flag_value

DEFAULT = DepoConfig()
PRIOR = Path(__file__).resolve().parents[1] / "data" / "prior.jsonl"
EPSILON = str(DEFAULT.filter.epsilon)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def faults_of(*args):
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    assert str(caught.value) == "\n".join(caught.value.faults)
    assert all("\n" not in fault for fault in caught.value.faults)
    return caught.value.faults


def parse(*argv):
    """A launch's flags, nested as OpenRLHF nests them: what the hooks see as args.depo."""
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    flat = parser.parse_args(argv)
    return flat, nested(vars(flat)).depo


# ---- The tree


def test_every_setting_has_help_a_kind_and_a_default_that_is_allowed():
    assert len(config.SETTINGS) == 35
    for leaf in config.SETTINGS.values():
        assert leaf.help
        assert "\n" not in leaf.help
        assert leaf.kind.read(leaf.default) == leaf.default


def test_leaf_names_are_unique_so_that_suggestions_are():
    names = [key.split(".")[1] for key in config.SETTINGS]
    assert sorted(set(names)) == sorted(names)


def test_defaults_are_the_designs():
    cfg = load_config(None, {})
    assert cfg == DepoConfig()
    assert (cfg.filter.low, cfg.filter.high) == (0.15, 0.85)
    assert (cfg.estimator.w_rank, cfg.estimator.num_gpus) == (3.0, 0.0)
    assert (cfg.estimator.mode, cfg.estimator.model) == ("frozen", None), "works without a network"
    assert (cfg.labels.reward_range, cfg.advantage.base) == ((0.0, 1.0), None)
    assert cfg.history == config.HistoryConfig(kappa="fit", drift=True, share=True)


def test_choices_are_the_tables_beside_their_functions():
    assert config.SETTINGS["filter.rule"].kind.choices == tuple(rules.RULES)
    assert config.SETTINGS["advantage.base"].kind.allowed.startswith(f"one of {', '.join(advantage.BASES)}")


# ---- Three ways in


def test_flags_win_over_file_and_file_over_defaults(yaml_file):
    path = yaml_file("filter:\n  low: 0.2\n  high: 0.7\n")
    flat, nested = parse("--depo.filter.high", "0.6", "--depo.config", path)
    assert nested.config == path
    for ns in (flat, nested):
        overrides = config.overrides_from_namespace(ns)
        assert overrides == {"filter.high": 0.6}
        cfg = load_config(path, overrides)
        assert (cfg.filter.low, cfg.filter.high, cfg.filter.epsilon) == (0.2, 0.6, DEFAULT.filter.epsilon)


def test_a_flag_that_equals_the_default_still_wins_over_the_file(yaml_file):
    path = yaml_file("filter: {epsilon: 0.5, warmup_steps: 7}\nadvantage: {clip: 3, importance_rescale: true}\n")
    _, nested = parse(
        "--depo.filter.epsilon", EPSILON, "--depo.filter.warmup_steps", "0", "--depo.advantage.clip", "none"
    )
    cfg = load_config(path, config.overrides_from_namespace(nested))
    assert (cfg.filter.epsilon, cfg.filter.warmup_steps) == (DEFAULT.filter.epsilon, 0)
    assert cfg.advantage == config.AdvantageConfig(importance_rescale=True, clip=None)


def test_every_flag_is_read():
    argv = {
        "filter.rule": ("utility", "utility"),
        "filter.low": ("0.25", 0.25),
        "filter.high": (".75", 0.75),
        "filter.min_utility": ("1", 1.0),
        "filter.soft_utility": ("0.5", 0.5),
        "filter.epsilon": ("1e-1", 0.1),
        "filter.warmup_steps": ("3", 3),
        "filter.max_scan": ("9", 9),
        "labels.reward_range": ("-1 1", (-1.0, 1.0)),
        "advantage.base": ("rloo", "rloo"),
        "advantage.importance_rescale": ("true", True),
        "advantage.clip": ("5", 5.0),
        "estimator.mode": ("finetune", "finetune"),
        "estimator.model": ("2024", "2024"),
        "estimator.depth": ("0.5", 0.5),
        "estimator.max_length": ("128", 128),
        "estimator.lr": ("1e-5", 1e-5),
        "estimator.encoder_lr_ratio": ("0", 0.0),
        "estimator.w_distill": ("0", 0.0),
        "estimator.w_rank": ("1.5", 1.5),
        "estimator.micro_batch_tokens": ("4", 4),
        "estimator.dtype": ("bf16", "bf16"),
        "estimator.num_gpus": ("0.1", 0.1),
        "estimator.num_cpus": ("2", 2),
        "estimator.threads": ("3", 3),
        "estimator.timeout_s": ("2.5", 2.5),
        "estimator.cache_dir": (str(PRIOR.parent), str(PRIOR.parent)),
        "estimator.updates_per_step": ("3", 3),
        "estimator.replay": ("64", 64),
        "history.kappa": ("8", 8.0),
        "history.discount": ("1", 1.0),
        "history.drift": ("false", False),
        "history.prior": (str(PRIOR), str(PRIOR)),
        "history.prior_weight": ("0.5", 0.5),
        "history.share": ("false", False),
    }
    assert list(argv) == list(config.SETTINGS)
    words = []
    for key, (text, _) in argv.items():
        words += [f"--depo.{key}", *(text.split() if key == "labels.reward_range" else [text])]
    for ns in parse(*words):
        cfg = load_config(None, config.overrides_from_namespace(ns))
        for key, (_, value) in argv.items():
            section, name = key.split(".")
            stored = getattr(getattr(cfg, section), name)
            assert stored == value
            assert type(stored) is type(value)
            assert stored != config.SETTINGS[key].default


@pytest.mark.parametrize("words", [["true"], [], ["yes"], ["True"]])
def test_a_switch_alone_is_on(words):
    flat, _ = parse("--depo.advantage.importance_rescale", *words, "--depo.filter.low", "0.2")
    assert load_config(None, config.overrides_from_namespace(flat)).advantage.importance_rescale is True


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002", "+2e-4", "20e-5", ".2e-3"])
def test_a_number_is_read_alike_in_a_file_and_as_a_flag(yaml_file, text):
    """PyYAML by itself reads 2e-4 as a text, for it has no dot."""
    expected = float(text)
    assert load_config(yaml_file(f"estimator: {{lr: {text}}}"), {}).estimator.lr == expected
    flat, _ = parse("--depo.estimator.lr", text)
    assert load_config(None, config.overrides_from_namespace(flat)).estimator.lr == expected


@pytest.mark.parametrize(
    ("text", "kappa"), [("inf", "inf"), (".inf", "inf"), ("fit", "fit"), ("8", 8.0), ("1e2", 100.0)]
)
def test_kappa(yaml_file, text, kappa):
    assert load_config(yaml_file(f"history: {{kappa: {text}}}"), {}).history.kappa == kappa


def test_none_of_a_file_and_a_section_without_settings(yaml_file):
    path = yaml_file("estimator: {model: null}\nadvantage: {clip: none}\nfilter:\n  # low: 0.2\n")
    assert load_config(path, {}) == DepoConfig()
    assert load_config(yaml_file("# nothing\n"), {}) == DepoConfig()


def test_a_file_beside_wins_over_a_preset_of_its_name(yaml_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("depo_paper", {}).filter.warmup_steps == 100
    (tmp_path / "depo_paper").write_text("filter: {warmup_steps: 3}")
    assert load_config("depo_paper", {}).filter.warmup_steps == 3


# ---- Faults

# key, value as YAML gives it, what the text must hold beside the flag and the value
WRONG = [
    ("filter.rule", "windw", "one of window, utility, soft, or a FILE.py. Did you mean window?"),
    ("filter.rule", True, "one of window, utility, soft, or a FILE.py. The default is window."),
    ("filter.low", 1.5, "a number from 0 to 1. The default is 0.15."),
    ("filter.low", True, "a number from 0 to 1"),
    ("filter.low", None, "a number from 0 to 1"),
    ("filter.low", math.nan, "a number from 0 to 1"),
    ("filter.low", "0.5", "a number from 0 to 1. Remove the quotes."),
    ("filter.low", [0.5], "a number from 0 to 1"),
    ("filter.epsilon", -0.1, f"a number from 0 to 1. The default is {EPSILON}."),
    ("filter.warmup_steps", 1.5, f"a whole number of at least 0. The default is {DEFAULT.filter.warmup_steps}."),
    ("filter.warmup_steps", -1, "a whole number of at least 0"),
    ("filter.warmup_steps", False, "a whole number of at least 0"),
    ("filter.max_scan", 0, "a whole number of at least 1"),
    ("labels.reward_range", [1, 0], "two numbers LO HI, LO below HI. The default is 0.0 1.0."),
    ("labels.reward_range", [1, 1], "two numbers LO HI, LO below HI"),
    ("labels.reward_range", [0], "two numbers LO HI"),
    ("labels.reward_range", 1, "two numbers LO HI"),
    ("labels.reward_range", [0, math.inf], "two numbers LO HI"),
    ("labels.reward_range", [0, "1"], "two numbers LO HI"),
    (
        "advantage.base",
        "gae",
        "one of group_norm, dr_grpo, rloo, reinforce_baseline, reinforce, flash_reinforce, or none. The default is ",
    ),
    ("advantage.base", "depo", "one of group_norm"),
    ("advantage.importance_rescale", 1, "true or false. The default is false."),
    ("advantage.importance_rescale", "true", "true or false. Remove the quotes."),
    ("advantage.clip", 0, "a number above 0, or none. The default is none."),
    ("advantage.clip", math.inf, "a number above 0, or none"),
    ("advantage.clip", "nnone", "a number above 0, or none. Did you mean none?"),
    ("estimator.model", 7, "a path or a hub name, or none. The default is none."),
    ("estimator.model", " ", "a path or a hub name"),
    ("estimator.depth", 0, "a number above 0, up to 1. The default is 0.67."),
    ("estimator.max_length", 2, "a whole number of at least 8"),
    ("estimator.lr", 0, "a number above 0"),
    ("estimator.lr", math.inf, "a number above 0"),
    ("estimator.lr", 10**400, "a number above 0"),
    ("estimator.encoder_lr_ratio", -1, "a number of at least 0"),
    ("estimator.num_gpus", 2, "a number from 0 to 1"),
    ("estimator.num_cpus", 0, "a whole number of at least 1"),
    ("estimator.timeout_s", 0, "a number above 0"),
    ("estimator.dtype", "fp16", "one of auto, fp32, bf16"),
    ("estimator.micro_batch_tokens", 0, "a whole number of at least 1, or none. The default is none."),
    ("history.kappa", 0, "fit, inf, or a number above 0. The default is fit."),
    ("history.kappa", "fitted", "fit, inf, or a number above 0. Did you mean fit?"),
    ("history.kappa", math.nan, "fit, inf, or a number above 0"),
    ("history.kappa", True, "fit, inf, or a number above 0"),
    ("history.kappa", ["fit"], "fit, inf, or a number above 0"),
    ("history.discount", 0, "fit, or a number above 0, up to 1"),
    ("history.discount", "inf", "fit, or a number above 0, up to 1"),
    ("history.drift", 1, "true or false. The default is true."),
    ("history.share", "maybe", "true or false. The default is true."),
    ("estimator.mode", "freeze", "one of frozen, finetune. Did you mean frozen?"),
]


@pytest.mark.parametrize(("key", "value", "text"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed_and_the_fix(key, value, text):
    (fault,) = faults_of(None, {key: value})
    assert re.fullmatch(rf"--depo\.{re.escape(key)} \S.*: must be .+\. [A-Z].+[.?]", fault)
    assert text in fault


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--depo.filter.low", "0.9x"], "--depo.filter.low 0.9x: must"),
        (["--depo.filter.low", ""], '--depo.filter.low "": must'),
        (["--depo.filter.low", "null"], "--depo.filter.low null: must"),
        (["--depo.filter.low", "nan"], "--depo.filter.low nan: must"),
        (["--depo.filter.warmup_steps", "010"], "--depo.filter.warmup_steps 010: must"),
        (["--depo.estimator.timeout_s", "1:30"], "--depo.estimator.timeout_s 1:30: must"),
        (["--depo.estimator.timeout_s", "{"], "--depo.estimator.timeout_s {: must"),
        (["--depo.advantage.importance_rescale", "1"], "--depo.advantage.importance_rescale 1: must"),
        (["--depo.labels.reward_range", "1", "x"], "--depo.labels.reward_range 1 x: must"),
        (["--depo.estimator.model", ""], '--depo.estimator.model "": must'),
    ],
)
def test_what_a_flag_cannot_be_is_a_fault_not_a_crash(words, shown):
    flat, _ = parse(*words)
    (fault,) = faults_of(None, config.overrides_from_namespace(flat))
    assert fault.startswith(shown)


def test_all_faults_come_at_once_and_name_where_they_are_from(yaml_file):
    path = yaml_file("filter:\n  hihg: 0.9\n  low: 'x'\nestimator: {lr: -1}\nactor: {lr: 1}\n")
    faults = faults_of(path, {"filter.max_scan": 0, "filter.lwo": 1})
    assert sorted(faults) == sorted(
        [
            "my.yaml: filter.hihg: unknown setting. Did you mean filter.high?",
            "my.yaml: actor: unknown section. A file sets filter, labels, advantage, estimator, history; "
            "all else is a flag.",
            "--depo.filter.lwo: unknown setting. Did you mean --depo.filter.low?",
            "--depo.filter.low x (my.yaml): must be a number from 0 to 1. The default is 0.15.",
            "--depo.filter.max_scan 0: must be a whole number of at least 1. The default is 8.",
            f"--depo.estimator.lr -1 (my.yaml): must be a number above 0. The default is {DEFAULT.estimator.lr}.",
        ]
    )


def test_faults_of_a_file_that_is_missing_and_of_flags_come_together():
    missing, flag = faults_of("nowhere.yaml", {"filter.low": 2})
    assert missing.startswith(
        "--depo.config nowhere.yaml: no such file. Give the path of a YAML file, or a preset: depo,"
    )
    assert flag.startswith("--depo.filter.low 2: must be")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            {"filter.low": 0.9},
            "--depo.filter.low 0.9: must be below --depo.filter.high 0.85 (default). "
            "Lower it, or use --depo.filter.rule utility.",
        ),
        (
            {"filter.low": 0.5, "filter.high": 0.5},
            "--depo.filter.low 0.5: must be below --depo.filter.high 0.5. "
            "Lower it, or use --depo.filter.rule utility.",
        ),
        (
            {"advantage.importance_rescale": True, "advantage.base": "reinforce_baseline"},
            "--depo.advantage.importance_rescale true: cannot go with --depo.advantage.base reinforce_baseline, which "
            "whitens the advantages afterwards. Turn it off, or use --depo.advantage.base group_norm.",
        ),
        (
            {"advantage.importance_rescale": True, "advantage.base": "reinforce"},
            "--depo.advantage.importance_rescale true: cannot go with --depo.advantage.base reinforce, which "
            "whitens the advantages afterwards. Turn it off, or use --depo.advantage.base group_norm.",
        ),
        (
            {"advantage.clip": 2},
            "--depo.advantage.clip 2.0: bounds a weight that is off with --depo.advantage.importance_rescale false "
            "(default). Leave it at none, or add --depo.advantage.importance_rescale.",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides, fault):
    assert faults_of(None, overrides) == [fault]


@pytest.mark.parametrize(
    "overrides",
    [
        {"filter.low": 0.9, "filter.rule": "utility"},
        {"filter.low": 0.0, "filter.high": 1.0},
        {"advantage.importance_rescale": True, "advantage.base": "dr_grpo", "advantage.clip": 2},
    ],
)
def test_settings_that_do_go_together(overrides):
    load_config(None, overrides)


def test_a_wrong_value_is_not_also_blamed_for_a_clash():
    assert len(faults_of(None, {"filter.low": 5, "filter.high": 0.1})) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("filter: {low: 0.2\nhigh", r"line 2: not valid YAML: .+\. Correct it there\."),
        ("filter:\n\tlow: 0.2", r"line 2: not valid YAML: .+"),
        ("filter:\n  low: 0.2\n  low: 0.3\n", r"line 3: not valid YAML: 'low' is set twice\. Correct it there\."),
        ("filter: {low: 0.2}\nfilter: {high: 0.7}\n", r"line 2: not valid YAML: 'filter' is set twice\."),
        ("a: 1\n---\nb: 2\n", r"line 2: not valid YAML: .+"),
        ("filter: !!python/object/apply:os.getcwd []", r"line 1: not valid YAML: could not determine a constructor.+"),
        ("- filter\n", r"holds filter where sections with settings belong.+"),
        ("7", r"holds 7 where sections with settings belong.+"),
        ("filter: \x00", r"cannot be read: .+ Correct it there\."),
    ],
)
def test_a_broken_file_is_one_clear_fault(yaml_file, text, told):
    path = yaml_file(text)
    (fault,) = faults_of(path, {})
    assert re.match(rf"--depo\.config {re.escape(path)}: {told}", fault)


def test_a_file_that_is_not_text_or_is_a_folder(tmp_path):
    (tmp_path / "raw.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in faults_of(str(tmp_path / "raw.yaml"), {})[0]
    assert "no such file" in faults_of(str(tmp_path), {})[0]
    (long,) = faults_of("x" * 5000, {})
    assert long.startswith("--depo.config xxx")


@pytest.mark.parametrize("section", ["filter: 0.2", "filter: [low, high]", "filter: low"])
def test_a_section_that_is_no_mapping(yaml_file, section):
    (fault,) = faults_of(yaml_file(section), {})
    assert re.fullmatch(r"my\.yaml: filter \S.*: must hold settings\. Indent them below `filter:`\.", fault)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("filter.hihg", "Did you mean --depo.filter.high?"),
        ("filter.h", "Did you mean --depo.filter.high?"),
        ("low", "Did you mean --depo.filter.low?"),
        ("lwo", "Did you mean --depo.filter.low?"),
        ("estimator.low", "Did you mean --depo.filter.low?"),
        ("max-scan", "Did you mean --depo.filter.max_scan?"),
        ("reward_rang", "Did you mean --depo.labels.reward_range?"),
        ("qqq", "`depo config` lists all settings."),
    ],
)
def test_suggestions(key, hint):
    assert config.check_depo_flags([f"--depo.{key}", "1"]) == [f"--depo.{key}: unknown setting. {hint}"]


@pytest.mark.parametrize("key", config.GONE)
def test_a_setting_that_is_gone_answers_with_what_to_do(yaml_file, key):
    section, name = key.split(".")
    assert config.check_depo_flags([f"--depo.{key}", "1"]) == [f"--depo.{key}: {config.GONE[key]}"]
    assert faults_of(yaml_file(f"{section}: {{{name}: 1}}"), {}) == [f"my.yaml: {key}: {config.GONE[key]}"]
    assert key not in config.SETTINGS


def test_flags_in_argv_are_taken_literally():
    argv = ["--train.seed", "1", "--depo.filter.low=0.2", "--depo.filter.high", "0.9", "--depo.config", "depo"]
    assert config.check_depo_flags(argv) == []
    # argparse would take both: an abbreviation that is unique today is another flag tomorrow
    assert len(config.check_depo_flags(["--depo.conf", "x", "--depo.filter.lo=0.2"])) == 2
    assert config.check_depo_flags(["--depo-filter.low=0.2"])[0].endswith("Did you mean --depo.filter.low?")


def test_every_flag_is_known_to_itself():
    assert config.check_depo_flags(config.flag_names()) == []


def test_help_names_every_default():
    parser = argparse.ArgumentParser(prog="x")
    config.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for leaf in config.SETTINGS.values():
        assert leaf.flag in text
    assert text.count("(default: ") == len(config.SETTINGS)


# ---- OpenRLHF's own flags


def launch(**changes):
    """The part of OpenRLHF's nested arguments that conflicts() reads, of a launch that can work."""
    values = {
        "rollout.n_samples_per_prompt": 8,
        "rollout.batch_size": 16,
        "train.batch_size": 128,
        "train.dynamic_batch_enable": False,
        "train.agent_func_path": None,
        "reward.remote_url": "reward.py",
        "reward.model_name_or_path": None,
        "data.max_images_per_prompt": 0,
        "train.colocate_all": True,
        "train.async_enable": False,
        "vllm.num_engines": 8,
        "algo.kl.init_coef": 0.01,
    } | changes
    return nested(values)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout.n_samples_per_prompt": 2},
        {"reward.remote_url": None, "train.agent_func_path": "agent.py"},
        {"reward.remote_url": None, "reward.model_name_or_path": "rm"},
        {"train.dynamic_batch_enable": True},  # 16 * 8 = 128 responses, a train batch
        {"train.batch_size": 129},
    ],
)
def test_launches_that_can_work(changes):
    assert seam.conflicts(DepoConfig(), launch(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"rollout.n_samples_per_prompt": 1},
            r"--rollout\.n_samples_per_prompt 1: must be at least 2, .*different rewards\. Set it",
        ),
        (
            {"reward.remote_url": None},
            r"--reward\.remote_url none: must be given, .*Set it .*--train\.agent_func_path",
        ),
        (
            {"data.max_images_per_prompt": 3},
            r"--data\.max_images_per_prompt 3: must be 0, .*text only\. Train without",
        ),
        (
            {"train.dynamic_batch_enable": True, "train.batch_size": 129},
            r"--train\.batch_size 129: must be at most 128 .*16 \* .*8\).*Lower it",
        ),
    ],
)
def test_launches_that_cannot_work(changes, told):
    (fault,) = seam.conflicts(DepoConfig(), launch(**changes))
    assert re.match(told, fault)


# A shared GPU holds the policy, and vLLM unless asynchronous, the reference where the KL counts, the reward model
# where no function gives rewards: 0.2 each.
@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, 0.4),
        ({"algo.kl.init_coef": 0}, 0.6),
        ({"algo.kl.init_coef": 0, "train.async_enable": True}, 0.8),
        ({"reward.remote_url": None, "reward.model_name_or_path": "rm"}, 0.2),
        ({"reward.remote_url": None, "train.agent_func_path": "agent.py"}, 0.4),
    ],
)
def test_the_estimators_share_of_a_shared_gpu(changes, free):
    fits = load_config(None, {"estimator.num_gpus": free})
    assert seam.conflicts(fits, launch(**changes)) == []
    too_much = load_config(None, {"estimator.num_gpus": free + 0.01})
    (fault,) = seam.conflicts(too_much, launch(**changes))
    assert fault.startswith(
        f"--depo.estimator.num_gpus {free + 0.01}: must be at most {free} with --train.colocate_all"
    )
    assert "Lower it" in fault
    assert seam.conflicts(too_much, launch(**changes, **{"train.colocate_all": False})) == []


def test_all_conflicts_come_at_once():
    args = launch(**{"rollout.n_samples_per_prompt": 1, "reward.remote_url": "", "data.max_images_per_prompt": 1})
    assert len(seam.conflicts(DepoConfig(), args)) == 3


# ---- Values out

AWKWARD = [
    "null",
    "~",
    "2e-4",
    "010",
    "1:30",
    "yes",
    "é",
    "a: b",
    "#c",
    "'",
    "- x",
    "2026-02-06",
    ".inf",
    "a\nb",
    "a " * 99 + "b",
]


def any_value(leaf):
    """Every value that a setting may have, by its kind."""
    kind = leaf.kind
    if leaf.key == "estimator.model":
        texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(AWKWARD)
        return st.none() | texts.filter(lambda text: text.strip() and text not in ("none", "null"))
    if leaf.key in ("history.prior", "estimator.cache_dir"):
        return st.none() | st.just(str(PRIOR))
    if leaf.key in ("estimator.micro_batch_tokens", "estimator.threads"):
        return st.none() | st.integers(1, 10**6)
    if leaf.key == "advantage.base":
        return st.none() | st.sampled_from(list(advantage.BASES))
    if kind is SWITCH:
        return st.booleans()
    if kind is RANGE:
        bound = st.floats(-1e9, 1e9)
        return st.tuples(bound, bound).filter(lambda pair: pair[0] < pair[1])
    if isinstance(leaf.default, bool | int):
        return st.integers(8, 10**6)
    if isinstance(leaf.default, str) and leaf.key != "history.kappa":
        return st.sampled_from(kind.choices)
    numbers = st.floats(0, 1, exclude_min=True)
    return {"advantage.clip": numbers | st.none(), "history.kappa": numbers | st.sampled_from(["fit", "inf"])}.get(
        leaf.key, numbers
    )


@st.composite
def configs(draw):
    values = {key: draw(any_value(leaf)) for key, leaf in config.SETTINGS.items()}
    values["filter.rule"] = "utility" if values["filter.low"] >= values["filter.high"] else values["filter.rule"]
    values["advantage.importance_rescale"] |= values["advantage.clip"] is not None
    if values["advantage.importance_rescale"] and advantage.BASES.get(values["advantage.base"]):
        values["advantage.base"] = "rloo"
    return load_config(None, values)


@pytest.mark.slow
@settings(deadline=None)  # a shared machine may stall
@given(configs())
def test_yaml_dict_and_namespace_give_the_settings_back(tmp_path_factory, cfg):
    path = tmp_path_factory.mktemp("config") / "my.yaml"
    path.write_text(config.to_yaml(cfg), encoding="utf-8", newline="")
    assert load_config(str(path), {}) == cfg
    assert config.from_namespace(config.to_namespace(cfg)) == cfg


@settings(deadline=None)  # a shared machine may stall
@given(st.sampled_from(list(config.SETTINGS)), st.text())
def test_any_text_of_a_flag_is_a_value_or_one_line(key, text):
    flat = argparse.Namespace(**{f"depo.{key}": flag_value(text)})
    assert getattr(flat, f"depo.{key}") is not None
    try:
        load_config(None, config.overrides_from_namespace(flat))
    except ConfigError as err:
        faults = err.faults
    else:
        faults = []
    assert all(fault.startswith(f"--depo.{key} ") and len(fault.splitlines()) == 1 for fault in faults)


def test_a_namespace_holds_plain_values_and_ignores_what_is_beside_the_sections():
    cfg = load_config(None, {"labels.reward_range": [-1, 1], "history.kappa": 3})
    ns = pickle.loads(pickle.dumps(config.to_namespace(cfg)))  # noqa: S301, as OpenRLHF's args travel
    assert type(ns) is type(ns.filter) is SimpleNamespace
    assert ns.labels.reward_range == (-1.0, 1.0)
    ns.enabled = True
    assert config.from_namespace(ns) == cfg
    del ns.filter.low
    with pytest.raises(AttributeError, match="low"):
        config.from_namespace(ns)


@pytest.mark.parametrize("text", AWKWARD[1:])
def test_texts_are_kept_as_they_are(yaml_file, text):
    assert config.SETTINGS["estimator.model"].kind.metavar == TEXT.metavar
    flat, _ = parse("--depo.estimator.model", text)
    cfg = load_config(None, config.overrides_from_namespace(flat))
    assert cfg.estimator.model == text
    assert load_config(yaml_file(config.to_yaml(cfg)), {}) == cfg
    assert all(re.match(r"$|\w+:$|  \w+: .+  # ", line) for line in config.to_yaml(cfg).splitlines())


def test_a_dict_holds_what_json_has():
    assert config.to_dict(DepoConfig())["labels"] == {"reward_range": [0.0, 1.0]}


# ---- depo config


def test_command_prints_yaml_that_it_reads_back(capsys, tmp_path):
    assert cli.main(["config", "--config", "depo_paper", "--depo.filter.low", "0.3"]) == 0
    path = tmp_path / "my.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(str(path), {}) == load_config("depo_paper", {"filter.low": 0.3})
    assert cli.main(["config", "--depo.config", str(path), "--json"]) == 0
    assert '"low": 0.3' in capsys.readouterr().out


def test_command_exits_2_with_all_faults(capsys):
    argv = ["config", "--config", "depo", "--depo.filter.low", "0.9", "--depo.estimator.lr", "0"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["--depo.estimator.lr", "--depo.filter.low"]


def test_command_refuses_abbreviations(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["config", "--depo.filter.lo", "0.2"])
    assert caught.value.code == 2
    assert "--depo.filter.lo" in capsys.readouterr().err


def test_a_home_folder_is_expanded_as_no_shell_does_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = config.load_config(None, {"estimator.cache_dir": "~/embeddings"})
    assert cfg.estimator.cache_dir == "/home/me/embeddings"
