"""What OpenRLHF's real parser and validation make of our flags, patched and not."""

import itertools

import pytest
from example_launches import LAUNCHES
from real_parser import launches

from depo_plugin.estimator.encoder import bundled_encoder
from depo_plugin.settings import config

pytestmark = pytest.mark.wheel

BASE = (
    "--actor.model_name_or_path m --reward.remote_url reward.py --data.prompt_dataset d"
    " --rollout.n_samples_per_prompt 8 --actor.num_gpus_per_node 1 --vllm.num_engines 1"
).split()
DEPO = ["--advantage_estimator", "depo"]
ONE_RESPONSE = ["--rollout.n_samples_per_prompt", "1"]
NO_REWARD = ["--reward.remote_url", ""]
ENCODER = str(bundled_encoder())  # the paper's is looked for on the hub
IMAGES = ["--data.max_images_per_prompt", "2"]

# name -> flags. All go through one process per copy, for importing vLLM takes seconds.
PATCHED = {
    "switch": [*BASE, *DEPO],
    "one word": [*BASE, "--advantage_estimator=depo"],
    "as a value": [*BASE, "--algo.advantage.estimator", "depo"],
    "rloo": [*BASE, *DEPO, "--depo.advantage.base", "rloo"],
    "preset and flag": [
        *[*BASE, *DEPO, "--depo.config", "depo_paper", "--depo.filter.low", "0.3"],
        *["--depo.estimator.model", ENCODER],
    ],
    "agent": [*BASE, *NO_REWARD, *DEPO, "--train.agent_func_path", "agent.py"],
    "unknown": [*BASE, *DEPO, "--depo.filter.hihg", "0.9", "--depo.lwo=1"],
    "unknown without depo": [*BASE, "--depo.filter.hihg", "0.9"],
    "abbreviated": [*BASE, *DEPO, "--depo.filter.hi", "0.9"],
    "wrong values": [*BASE, *DEPO, "--depo.filter.low", "0.9", "--depo.estimator.lr", "fast"],
    "no file": [*BASE, *DEPO, "--depo.config", "nowhere.yaml"],
    "conflicts": [*BASE, *DEPO, *ONE_RESPONSE, *NO_REWARD, *IMAGES],
    "one response": [*BASE, *DEPO, *ONE_RESPONSE],
    "no reward": [*BASE, *DEPO, *NO_REWARD],
    "images": [*BASE, *DEPO, *IMAGES],
    "flags without depo": [
        *BASE,
        "--advantage_estimator",
        "rloo",
        "--depo.filter.low",
        "0.3",
        "--depo.config",
        "no.yaml",
    ],
}
BOTH = {
    "bare": [],
    "gae": BASE,
    "group_norm": [*BASE, "--algo.advantage.estimator", "group_norm"],
    "rloo": [*BASE, "--algo.advantage.estimator", "rloo"],
    "no choice": [*BASE, "--algo.advantage.estimator", "grpo"],
    "unknown flag": [*BASE, "--actor.colour", "red"],
    "one response": [*BASE, "--algo.advantage.estimator", "rloo", *ONE_RESPONSE],
    "async": [*BASE, "--train.async_enable", "--algo.advantage.estimator", "dr_grpo", "--train.seed", "7"],
    "depo is off": [*BASE, "--algo.advantage.estimator", "reinforce_baseline", "--algo.kl.init_coef", "0"],
}


def run(flag_lists, copy):
    return dict(zip(flag_lists, launches(list(flag_lists.values()), copy), strict=True))


@pytest.fixture(scope="module")
def patched(patched_copy):
    outcomes = run({("depo", name): flags for name, flags in PATCHED.items()} | BOTH, patched_copy)
    return {name: outcomes[name] for name in BOTH}, {name: outcomes["depo", name] for name in PATCHED}


@pytest.fixture(scope="module")
def depo(patched):
    return patched[1]


@pytest.fixture(scope="module")
def plain(plain_copy):
    return run(BOTH, plain_copy)


def same_args(args):
    """Arguments without the default run name, which holds the minute."""
    return args and {name: part for name, part in args.items() if name != "logger"}


def without_usage(err):
    return [line for line in err.splitlines() if "error: " in line]


@pytest.mark.parametrize("name", BOTH)
def test_without_the_flag_the_arguments_are_openrlhfs(name, patched, plain):
    ours, theirs = patched[0][name], plain[name]
    assert same_args(ours.args) == same_args(theirs.args)
    assert "depo" not in (ours.args or {})
    assert (ours.status, ours.error, ours.out) == (theirs.status, theirs.error, theirs.out)
    if name == "no choice":  # the list of choices is longer by one
        assert "'flash_reinforce', 'depo')" in ours.err
    else:
        assert without_usage(ours.err) == without_usage(theirs.err)


def test_the_comparison_sees_launches_that_work_and_others(plain):
    assert sorted(name for name in plain if plain[name].args) == ["async", "depo is off", "gae", "group_norm", "rloo"]
    assert plain["gae"].args["critic"]["model_name_or_path"] == "m"
    assert plain["one response"].error.startswith("AssertionError: rloo requires n_samples_per_prompt > 1")


@pytest.mark.parametrize("name", ["switch", "one word", "as a value"])
def test_depo_is_group_norm_and_settings(name, depo, plain):
    args = dict(depo[name].args)
    settings = args.pop("depo")
    assert (settings.pop("enabled"), settings.pop("shadow")) == (True, False)
    assert settings == config.to_dict(config.with_base(config.DepoConfig(), None))
    # What OpenRLHF decides by the estimator's name is as for a plain launch: no critic, its checks, its branches.
    assert same_args(args) == same_args(plain["group_norm"].args)


def test_the_base_advantage_takes_its_place(depo, plain):
    assert depo["rloo"].args["algo"] == plain["rloo"].args["algo"]
    assert depo["rloo"].args["depo"]["advantage"]["base"] == "rloo"


def test_preset_and_flag_reach_the_arguments(depo):
    settings = depo["preset and flag"].args["depo"]
    assert (settings.pop("enabled"), settings.pop("shadow")) == (True, False)
    flags = {"filter.low": 0.3, "estimator.model": ENCODER}
    assert settings == config.to_dict(config.with_base(config.load_config("depo_paper", flags), None))


def test_an_agent_is_a_source_of_rewards(depo):
    assert depo["agent"].args["depo"]["enabled"] is True


REFUSED = {
    "unknown": [
        "--depo.filter.hihg: unknown setting. Did you mean --depo.filter.high?",
        "--depo.lwo: unknown setting. Did you mean --depo.filter.low?",
    ],
    "unknown without depo": ["--depo.filter.hihg: unknown setting. Did you mean --depo.filter.high?"],
    "abbreviated": ["--depo.filter.hi: unknown setting. Did you mean --depo.filter.high?"],
    "wrong values": [
        "--depo.filter.low 0.9: must be below --depo.filter.high 0.85 (default). Lower it, or ",
        "--depo.estimator.lr fast: must be a number above 0. The default is 0.0005.",
    ],
    "no file": [
        "--depo.config nowhere.yaml: no such file. Give the path of a YAML file, or a preset: depo, depo_paper, "
        "depo_wide."
    ],
    "conflicts": [
        "--rollout.n_samples_per_prompt 1: must be at least 2,",
        "--reward.remote_url none: must be given,",
        "--data.max_images_per_prompt 2: must be 0,",
    ],
    "one response": ["--rollout.n_samples_per_prompt 1: must be at least 2,"],
    "no reward": ["--reward.remote_url none: must be given,"],
    "images": ["--data.max_images_per_prompt 2: must be 0,"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_ray_with_every_reason(name, depo):
    outcome = depo[name]
    assert (outcome.args, outcome.status, outcome.error, outcome.ray_wanted) == (None, 2, None, False)
    for fault in REFUSED[name]:
        assert fault in outcome.err
    assert outcome.err.count(": must be ") + outcome.err.count("unknown setting") + outcome.err.count(
        "no such file"
    ) == len(REFUSED[name])


def test_flags_without_depo_run_with_a_warning_that_names_them(depo, plain):
    outcome = depo["flags without depo"]
    assert outcome.ray_wanted
    assert same_args(outcome.args) == same_args(plain["rloo"].args)
    (warning,) = [line for line in outcome.out.splitlines() if "DEPO" in line]
    assert warning.startswith("[Warning] DEPO is off (--advantage_estimator rloo)")
    assert "--depo.filter.low" in warning
    assert "--depo.config" in warning


# ── OpenRLHF's own example launches, with the switch first, last and in the middle ──


def flag_of(flags, name, default=None):
    """The value of the last `name` among these flags."""
    return next((value for flag, value in reversed([*itertools.pairwise(flags)]) if flag == name), default)


def between(flags):
    """A place in the middle of a launch, in front of a flag."""
    return next(i for i in range(len(flags) // 2, len(flags)) if flags[i].startswith("--"))


def with_switch(flags):
    """The launch with the switch first, in the middle, last."""
    middle = between(flags)
    return [[*DEPO, *flags], [*flags[:middle], *DEPO, *flags[middle:]], [*flags, *DEPO]]


def reasons(flags):
    """Why DEPO must refuse a launch: the beginnings of the lines."""
    found = []
    if flag_of(flags, "--algo.advantage.estimator") == "gae":
        found.append("--algo.advantage.estimator gae: cannot go with --advantage_estimator depo, which has no critic.")
    if int(flag_of(flags, "--rollout.n_samples_per_prompt", 1)) < 2:
        found.append("--rollout.n_samples_per_prompt 1: must be at least 2, ")
    if int(flag_of(flags, "--data.max_images_per_prompt", 0)):
        found.append("--data.max_images_per_prompt 1: must be 0, ")
    return found


@pytest.fixture(scope="module")
def examples(patched_copy):
    """(name, place of the switch) -> outcome; place None: the launch as it is."""
    calls = {(name, None): flags for name, flags in LAUNCHES.items()}
    calls |= {(name, i): flags for name in LAUNCHES for i, flags in enumerate(with_switch(LAUNCHES[name]))}
    return run(calls, patched_copy)


def test_the_examples_show_every_kind():
    assert len(LAUNCHES) >= 30
    refused = {name for name, flags in LAUNCHES.items() if reasons(flags)}
    assert 12 <= len(refused) <= len(LAUNCHES) - 12
    bases = {flag_of(flags, "--algo.advantage.estimator") for flags in LAUNCHES.values()}
    assert bases == {*config.BASES, "gae", None}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_an_example_launch_is_depo_over_its_own_base_or_refused_with_the_reason(name, examples):
    flags, plain = LAUNCHES[name], examples[name, None]
    assert plain.error is None
    assert "depo" not in plain.args
    for place in range(3):
        outcome = examples[name, place]
        if wrong := reasons(flags):
            assert (outcome.args, outcome.status, outcome.ray_wanted) == (None, 2, False)
            head, *faults = outcome.err.splitlines()
            assert head == "DEPO: this launch cannot work as it is set:"
            assert len(faults) == len(wrong)
            assert all(fault.startswith(start) for fault, start in zip(faults, wrong, strict=True)), faults
            continue
        assert outcome.error is None, outcome.error
        args = dict(outcome.args)
        settings = args.pop("depo")
        assert settings["enabled"] is True
        base = flag_of(flags, "--algo.advantage.estimator", "group_norm")
        assert args["algo"]["advantage"]["estimator"] == settings["advantage"]["base"] == base
        if flag_of(flags, "--algo.advantage.estimator"):
            assert same_args(args) == same_args(plain.args), "all else is the launch's own"
        first = outcome.out.splitlines()[0]
        assert first.startswith(f"DEPO is on: advantages by {base}; ")


@pytest.mark.slow
def test_with_more_samples_the_other_examples_run_too(patched_copy):
    """The fix that the refusal names, on every launch that samples once."""
    more = ["--rollout.n_samples_per_prompt", "8", *DEPO]
    once = {
        name: [*flags, *more]
        for name, flags in LAUNCHES.items()
        if reasons(flags) and not reasons([*flags, "--rollout.n_samples_per_prompt", "8"])
    }
    assert len(once) >= 10
    for name, outcome in run(once, patched_copy).items():
        assert outcome.error is None, (name, outcome.err, outcome.error)
        base = flag_of(once[name], "--algo.advantage.estimator", "group_norm")
        assert outcome.args["algo"]["advantage"]["estimator"] == base
        if base == "group_norm" and not flag_of(once[name], "--algo.advantage.estimator"):
            assert "DEPO is on: advantages by group_norm (the launch names none); " in outcome.out
