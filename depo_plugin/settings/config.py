"""Every setting of DEPO, as one tree of dataclasses. Flags, YAML files, `depo config` and the docs derive from it.

    default  <  YAML file (--depo.config)  <  flag            dataclass field == YAML key == --depo.<section>.<field>

A value is read and checked in one place, whichever way it came. All faults are collected and raised at once, one
line each: the flag, the value, what is allowed, the fix.
"""

import argparse
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from depo_plugin.advantage import BASES, DEFAULT_BASE
from depo_plugin.rules import RULES, RuleError, rule_of
from depo_plugin.settings.resources import resource_dir
from depo_plugin.settings.value_kinds import (
    DISCOUNT,
    FILE,
    FRACTION,
    KAPPA,
    NOT_NEGATIVE,
    POSITIVE,
    RANGE,
    SHARE,
    SWITCH,
    TEXT,
    Kind,
    choice,
    choice_or_file,
    integer,
    or_none,
)
from depo_plugin.settings.yaml_io import YamlError, dump, flag_value, read_file, show

SWITCH_FLAG, BASE_FLAG = "--advantage_estimator", "--algo.advantage.estimator"
# Removed setting -> error text for a launch or file that still uses it.
GONE = {
    "filter.budget": "is gone. An episode has as many steps as without DEPO; for fewer, lower --train.num_episodes.",
    "filter.expected_keep_rate": "is gone with the budget that it belonged to. For fewer steps, lower "
    "--train.num_episodes.",
    "estimator.weight_decay": "is gone: it is always 0.01, AdamW's usual value. Remove it.",
    "estimator.max_norm": "is gone: it is always 1.0, the paper's value. Remove it.",
    "estimator.rank_delta": "is gone: it is always 0.05, the paper's value. Remove it.",
    "estimator.rank_margin": "is gone: it is always 0.5, the paper's value. Remove it.",
}


class ConfigError(ValueError):
    """The settings cannot be used. `faults` holds every reason, one line each."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults


def setting(default: Any, help: str, kind: Kind) -> Any:
    """Return a dataclass field with its one-line help and the kind of values that it may have."""
    return field(default=default, metadata={"help": help, "kind": kind})


@dataclass(frozen=True)
class FilterConfig:
    """Which prompts are rolled out."""

    rule: str = setting(
        "window",
        "window (of predicted pass rates), utility or soft (by expected signal), or a FILE.py",
        choice_or_file(".py", *RULES),
    )
    low: float = setting(0.15, "window: lowest predicted pass rate that is kept", FRACTION)
    high: float = setting(0.85, "window: highest predicted pass rate that is kept", FRACTION)
    min_utility: float = setting(0.5, "utility: least chance that a group has any signal", FRACTION)
    soft_utility: float = setting(0.75, "soft: prompts with at least this chance of a signal are always kept", SHARE)
    epsilon: float = setting(0.02, "exploration: chance that a rejected prompt is kept anyway", FRACTION)
    warmup_steps: int = setting(5, "estimator updates during which every prompt is kept", integer(0))
    max_scan: int = setting(8, "most prompts scanned for one batch, as a multiple of the batch size", integer(1))


@dataclass(frozen=True)
class LabelsConfig:
    """What the estimator learns from."""

    reward_range: tuple[float, float] = setting(
        (0.0, 1.0), "score of a wrong and of a right response; scores outside are clipped", RANGE
    )


@dataclass(frozen=True)
class AdvantageConfig:
    """How advantages are computed and weighted."""

    base: str | None = setting(
        None,
        "the advantage estimator (none: --algo.advantage.estimator, else group_norm)",
        or_none(choice(*BASES)),
    )
    importance_rescale: bool = setting(False, "weight groups by (1/q) * kept/scanned, q: chance of being kept", SWITCH)
    clip: float | None = setting(None, "upper bound of that weight", or_none(POSITIVE))


@dataclass(frozen=True)
class EstimatorConfig:
    """The difficulty estimator: encoder, training, and where it runs."""

    mode: str = setting(
        "frozen", "embed each prompt once (frozen) or train the encoder, too (finetune)", choice("frozen", "finetune")
    )
    model: str | None = setting(None, "encoder, path or hub name (none: the bundled all-MiniLM-L6-v2)", or_none(TEXT))
    depth: float = setting(0.67, "share of the encoder's layers that is used; its last layers are dropped", SHARE)
    max_length: int = setting(256, "tokens of a prompt that are read, counted from its end", integer(8))
    lr: float = setting(5e-4, "learning rate of the heads", POSITIVE)
    encoder_lr_ratio: float = setting(0.2, "the encoder's learning rate, as a multiple of lr", NOT_NEGATIVE)
    w_distill: float = setting(0.5, "weight of the distillation loss", NOT_NEGATIVE)
    w_rank: float = setting(3.0, "weight of the ranking loss", NOT_NEGATIVE)
    micro_batch_tokens: int | None = setting(
        None, "padded tokens per forward pass (none: 1024 on a CPU, 8192 on a GPU)", or_none(integer(1))
    )
    dtype: str = setting(
        "auto",
        "precision of the encoder (auto: bf16 if the CPU or GPU has instructions for it)",
        choice("auto", "fp32", "bf16"),
    )
    num_gpus: float = setting(0.0, "share of one GPU for the estimator (0: CPU)", FRACTION)
    num_cpus: int = setting(1, "CPU cores that Ray reserves for the estimator", integer(1))
    threads: int | None = setting(
        None, "CPU threads of the estimator (none: half of its node's cores, at most 4)", or_none(integer(1))
    )
    timeout_s: float = setting(60.0, "seconds to wait for scores before going on unfiltered", POSITIVE)
    cache_dir: str | None = setting(
        None, "folder of the prompts' embeddings (none: depo_embeddings in --ckpt.path)", or_none(FILE)
    )
    updates_per_step: int = setting(1, "optimizer steps of the estimator per training step", integer(0))
    replay: int = setting(256, "recent groups that each update learns from again (0: none, the paper)", integer(0))


@dataclass(frozen=True)
class HistoryConfig:
    """How a prompt's own past groups count."""

    kappa: float | str = setting("fit", "weight of the text, in responses: fit, inf (text only), or a number", KAPPA)
    discount: float | str = setting(
        "fit", "a prompt's old groups count less: this factor for each update since then (fit: learned)", DISCOUNT
    )
    drift: bool = setting(True, "let all beliefs follow the policy's ability", SWITCH)
    prior: str | None = setting(
        None, "file of known pass rates to start from (lines of prompt, label, pass_rate, n)", or_none(FILE)
    )
    prior_weight: float = setting(0.25, "share of the evidence in prior that counts", SHARE)
    share: bool = setting(True, "let similar prompts share evidence (a regression on the text's embedding)", SWITCH)


@dataclass(frozen=True)
class DepoConfig:
    """All settings. Each part of the package is given only its own branch."""

    filter: FilterConfig = field(default_factory=FilterConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)


class Setting(NamedTuple):
    """One leaf of the tree."""

    key: str  # section and name: "filter.low"
    default: Any  # used if neither a flag nor a file sets it
    kind: Kind  # the values that it may have
    help: str  # one line, for --help and YAML comments

    @property
    def flag(self) -> str:
        """Its flag on the command line: "--depo.filter.low"."""
        return f"--depo.{self.key}"


SECTIONS: dict[str, Any] = {part.name: part.default_factory for part in fields(DepoConfig)}
_ALL = (
    Setting(f"{section}.{leaf.name}", leaf.default, leaf.metadata["kind"], leaf.metadata["help"])
    for section, part in SECTIONS.items()
    for leaf in fields(part)
)
SETTINGS = {leaf.key: leaf for leaf in _ALL}


# Reading values. Each one is (value, source): source is "" for a flag, else the name of the file.


def load_config(yaml_path: str | None, overrides: Mapping[str, Any]) -> DepoConfig:
    """Return the settings: the defaults, changed by the file, then by `overrides` ("filter.low": 0.2).

    yaml_path: a file, the bare name of a shipped preset ("depo_paper"), or None. Raise ConfigError with all faults.
    """
    faults: list[str] = []
    given: dict[str, tuple[Any, str]] = {}
    if yaml_path is not None:
        source = Path(yaml_path).name
        try:
            given.update({key: (value, source) for key, value in _leaves(_read(str(yaml_path)), source, faults)})
        except YamlError as err:
            faults.append(f"--depo.config {yaml_path}: {err}. Correct it there.")
        except OSError as err:
            faults.append(f"--depo.config {yaml_path}: {err}")
    faults += [_unknown_flag(f"--depo.{key}") for key in overrides if key not in SETTINGS]
    given.update({key: (value, "") for key, value in overrides.items()})
    return _build(given, faults)


def _read(config: str) -> dict:
    """Return the content of the file at that path, else of the shipped preset of that name."""
    path = Path(config)
    if path.exists() and not path.is_dir():  # not is_file(): a pipe is allowed
        return read_file(path)
    presets = {preset.stem: preset for preset in sorted(resource_dir("configs").glob("*.yaml"))}
    if (name := config.removesuffix(".yaml")) in presets:
        return read_file(presets[name])
    raise FileNotFoundError(f"no such file. Give the path of a YAML file, or a preset: {', '.join(presets)}.")


def _leaves(tree: Mapping, source: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each known setting in a nested mapping; add a line to `faults` for each unknown one."""
    for section, part in tree.items():
        if section not in SECTIONS:
            near = difflib.get_close_matches(str(section), SECTIONS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"A file sets {', '.join(SECTIONS)}; all else is a flag."
            faults.append(f"{source}: {section}: unknown section. {hint}")
        elif part is None:  # all its settings are commented out
            continue
        elif not isinstance(part, Mapping):
            faults.append(f"{source}: {section} {show(part)}: must hold settings. Indent them below `{section}:`.")
        else:
            for name, value in part.items():
                if (key := f"{section}.{name}") in SETTINGS:
                    yield key, value
                else:
                    faults.append(f"{source}: {key}: {_unknown(key, '')}")


def _unknown(key: str, prefix: str) -> str:
    """Return the error text for an unknown setting: that it was removed, or the most similar known setting."""
    if key in GONE:
        return GONE[key]
    return f"unknown setting. {_suggest(key, prefix)}"


def _suggest(key: str, prefix: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    keys = {known.split(".")[1]: known for known in SETTINGS}
    if leaf not in keys:
        near = difflib.get_close_matches(key, SETTINGS, n=1) or difflib.get_close_matches(leaf, keys, n=1)
        if not near:
            return "`depo config` lists all settings."
        leaf = near[0].rsplit(".", 1)[-1]
    return f"Did you mean {prefix}{keys[leaf]}?"


def _build(given: Mapping[str, tuple[Any, str]], faults: list[str]) -> DepoConfig:
    """Return the settings. Raise ConfigError with `faults` and all further ones, if there are any."""
    values, bad = {}, set()
    for key, leaf in SETTINGS.items():
        value, source = given.get(key, (leaf.default, "default"))
        try:
            values[key] = leaf.kind.read(value)
        except (ValueError, OverflowError):
            bad.add(key)
            values[key] = leaf.default
            origin = f" ({source})" if source else ""
            faults.append(f"{leaf.flag} {show(value)}{origin}: must be {leaf.kind.allowed}. {_fix(leaf, value)}")
    cfg = _assemble(values.__getitem__)

    def named(key: str) -> str:
        source = given.get(key, (None, "default"))[1]
        return f"--depo.{key} {show(values[key])}" + (f" ({source})" if source else "")

    faults += [text for keys, text in _clashes(cfg, named) if not bad & set(keys)]
    if faults:
        raise ConfigError(faults)
    return cfg


def _fix(leaf: Setting, value: Any) -> str:
    if isinstance(value, str):
        try:
            leaf.kind.read(flag_value(value))
            return "Remove the quotes."
        except (ValueError, OverflowError):
            pass
        if near := difflib.get_close_matches(value, leaf.kind.choices, n=1):
            return f"Did you mean {near[0]}?"
    return f"The default is {show(leaf.default)}."


def _clashes(cfg: DepoConfig, named: Callable[[str], str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys and the error text of each combination of settings that is not allowed."""
    keys = ("filter.low", "filter.high", "filter.rule")
    if cfg.filter.rule == "window" and not cfg.filter.low < cfg.filter.high:
        fix = "Lower it, or use --depo.filter.rule utility."
        yield keys, f"{named('filter.low')}: must be below {named('filter.high')}. {fix}"
    try:
        rule_of(cfg.filter)
    except RuleError as error:
        yield ("filter.rule",), f"{named('filter.rule')}: {error}. Correct the file, or use {' or '.join(RULES)}."
    if cfg.history.prior:
        from depo_plugin.estimator import prior  # only a launch that has such a file needs it

        try:
            prior.read(cfg.history.prior)
        except (OSError, ValueError) as error:  # also of a path that no file can have
            fix = "Correct the file, or leave the setting out."
            text = str(error).removeprefix(f"{cfg.history.prior}, ").rstrip(".")
            yield ("history.prior",), f"{named('history.prior')}: {text}. {fix}"
    keys = ("advantage.importance_rescale", "advantage.base")
    if cfg.advantage.importance_rescale and cfg.advantage.base and BASES[cfg.advantage.base]:
        yield keys, whitened(*map(named, keys))
    keys = ("advantage.clip", "advantage.importance_rescale")
    if cfg.advantage.clip is not None and not cfg.advantage.importance_rescale:
        fix = "Leave it at none, or add --depo.advantage.importance_rescale."
        yield keys, f"{named(keys[0])}: bounds a weight that is off with {named(keys[1])}. {fix}"


def whitened(rescale: str, base: str) -> str:
    """Return the error text for importance weights with a whitening base. rescale, base: flag and value of each."""
    fix = f"Turn it off, or use --depo.advantage.base {DEFAULT_BASE}."
    return f"{rescale}: cannot go with {base}, which whitens the advantages afterwards. {fix}"


def estimator_choice(chosen: list[tuple[str, str]]) -> tuple[bool, str | None]:
    """Return whether the command line turns DEPO on, and the base that it names (None if it names none).

    chosen: every (flag, value) of --advantage_estimator and --algo.advantage.estimator, in the order given. The value
    `depo` of either flag turns DEPO on; any other value names the base. A later --advantage_estimator with another
    value turns DEPO off again, because the last one of a repeated flag counts.
    """
    on, base = False, None
    for flag, value in chosen:
        if value == "depo":
            on = True
        else:
            base = value
            on = on and flag != SWITCH_FLAG
    return on, base


def with_base(cfg: DepoConfig, named: str | None) -> DepoConfig:
    """Return the settings with the base that the launch uses. named: by --algo.advantage.estimator; None if not."""
    return replace(cfg, advantage=replace(cfg.advantage, base=cfg.advantage.base or named or DEFAULT_BASE))


def summary(cfg: DepoConfig, args: Any, named: str | None) -> list[str]:
    """Return the lines a launch prints at its start: what DEPO does, and a warning if a reward model gives scores.

    cfg: before with_base; args, named: as in seam.conflicts.
    """
    base = with_base(cfg, named).advantage.base
    source = " (--depo.advantage.base)" if cfg.advantage.base else "" if named else " (the launch names none)"
    filter = cfg.filter
    rule = {
        "window": f"window {filter.low:g} to {filter.high:g}",
        "utility": f"utility of at least {filter.min_utility:g}",
        "soft": f"soft, all from a utility of {filter.soft_utility:g} on",
    }.get(filter.rule, filter.rule)
    est = cfg.estimator
    place = f"{est.num_gpus:g} of a GPU" if est.num_gpus else "the CPU"
    shadow = "in shadow mode (nothing is filtered or weighted; the log says what would be)"
    lines = [
        f"DEPO is {shadow if args.depo.shadow else 'on'}: advantages by {base}{source}; filter rule {rule}, after "
        f"{filter.warmup_steps} steps that keep every prompt; encoder {est.model or 'all-MiniLM-L6-v2 (bundled)'}, "
        f"mode {est.mode}, on {place}; metrics depo/* in {Path(args.ckpt.output_dir) / 'depo' / 'metrics.jsonl'}"
    ]
    if not (args.reward.remote_url or args.train.agent_func_path):
        low, high = cfg.labels.reward_range
        lines.append(
            f"[Warning] DEPO: the scores of --reward.model_name_or_path are logits, and --depo.labels.reward_range "
            f"{low:g} {high:g} clips them: {low:g} and below is a wrong response, {high:g} and above a right one. Set "
            "the range to the scores that your model gives to bad and to good responses."
        )
    return lines


# Flags.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register --depo.config and one flag per setting. A flag that is not given is None."""
    group = parser.add_argument_group(
        "DEPO",
        f"turned on by {SWITCH_FLAG} depo, anywhere in the launch; {BASE_FLAG} then names the base (not named: "
        f"{DEFAULT_BASE}). `depo config` shows the settings",
    )
    group.add_argument(
        "--depo.config", metavar="FILE", help="YAML file, or a shipped preset's name; flags win over it"
    )
    group.add_argument(
        "--depo.shadow",
        action="store_true",
        default=None,
        help="predict and log what the filter would do; filter and weight nothing",
    )
    for leaf in SETTINGS.values():
        text = f"{leaf.help} (default: {show(leaf.default)})"
        options: dict[str, Any] = {"metavar": leaf.kind.metavar, "help": text.replace("%", "%%"), "type": flag_value}
        if leaf.kind is SWITCH:
            options |= {"nargs": "?", "const": True}
        elif leaf.kind is RANGE:
            options["nargs"] = 2
        elif leaf.kind.metavar in (TEXT.metavar, FILE.metavar) or leaf.key == "filter.rule":
            options["type"] = str  # a folder may be called 2024
        group.add_argument(leaf.flag, **options)


def flag_names() -> list[str]:
    """Return every flag of DEPO."""
    return ["--depo.config", "--depo.shadow", *(leaf.flag for leaf in SETTINGS.values())]


def _unknown_flag(flag: str) -> str:
    return f"{flag}: {_unknown(flag.removeprefix('--depo').lstrip('._-'), '--depo.')}"


def check_depo_flags(argv: list[str]) -> list[str]:
    """Return one line for each --depo* in argv that is not exactly a flag; argparse would accept abbreviations."""
    known = set(flag_names())
    flags = [word.split("=", 1)[0] for word in argv if word.startswith("--depo")]
    return [_unknown_flag(flag) for flag in flags if flag not in known]


def overrides_from_namespace(ns: Any) -> dict[str, Any]:
    """Return the settings given as flags: key -> value.

    ns: argparse's own namespace (flat, "depo.filter.low"), or `args.depo` of OpenRLHF's nested one.
    """
    given = {}
    for key in SETTINGS:
        section, name = key.split(".")
        value = getattr(ns, f"depo.{key}", None)
        if value is None:
            value = getattr(getattr(ns, section, None), name, None)
        if value is not None:
            given[key] = value
    return given


# Writing values.


def _assemble(value_of: Callable[[str], Any]) -> DepoConfig:
    parts = {
        section: part(**{leaf.name: value_of(f"{section}.{leaf.name}") for leaf in fields(part)})
        for section, part in SECTIONS.items()
    }
    return DepoConfig(**parts)


def to_dict(cfg: DepoConfig) -> dict[str, dict[str, Any]]:
    """Return the settings as nested plain values, for JSON and YAML."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in part.items()}
        for section, part in asdict(cfg).items()
    }


def to_yaml(cfg: DepoConfig) -> str:
    """Return a YAML file that gives `cfg`: every setting, with its help as a comment."""
    lines = []
    for section, part in to_dict(cfg).items():
        lines += ["", f"{section}:"]
        for name, value in part.items():
            lines.append(f"{f'  {name}: {dump(value)}':<30}  # {SETTINGS[f'{section}.{name}'].help}")
    return "\n".join(lines[1:]) + "\n"


def to_namespace(cfg: DepoConfig) -> SimpleNamespace:
    """Return nested namespaces of plain values, for OpenRLHF's args: they unpickle without this package."""
    return SimpleNamespace(**{section: SimpleNamespace(**part) for section, part in asdict(cfg).items()})


def from_namespace(ns: Any) -> DepoConfig:
    """Return the settings that to_namespace wrote. Other attributes beside the sections are ignored."""
    return _assemble(lambda key: getattr(getattr(ns, key.split(".")[0]), key.split(".")[1]))
