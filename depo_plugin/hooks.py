"""What OpenRLHF calls: every line that the patches add is a call of a function here.

One prompt, from pool to gradient (-> is a call; who waits for whom is in brackets):

    pool -> loader -> score -> keep? -> [rollout x G -> reward] -> observe -> [gradient] -> log
            |         (waits at most estimator.timeout_s for       |
            |          scores asked for one batch earlier)         (judged at once, learned during the gradient;
            '-- plans whole batches                                 log waits for judge() only)

Driver: add_arguments, resolve, start_estimator, check_attached. The process with the loader: wrap_loader, attach,
dispatched, received, reject. The process that trains: attach, load, check_rewards, observe, log, save. In synchronous
training the last two are one process. All of them reach the estimator, a Ray actor, through remote/handle.py.

Importing this module loads only the standard library. Each function imports the parts of depo_plugin that it needs:
the settings in add_arguments and resolve, everything else only if DEPO is on.
"""

import argparse
import atexit
import contextlib
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

SAY_EVERY = 10  # steps from one line on the console to the next
ATTACH_TIMEOUT_S = 1800  # longest time for the constructors of OpenRLHF's trainer, which read the data sets


@dataclass
class Process:
    """The state that one process keeps between two calls."""

    driver_actor: Any = None  # the estimator's Ray actor, in the process that owns it
    handle: Any = None  # this process's RemoteEstimator
    loader: Any = None  # this process's DifficultyFilteredLoader
    reports: list[dict[str, str]] = field(default_factory=list)  # of the hooks that ran here (see seam.report)
    in_flight: dict[Any, tuple[str, Any]] = field(default_factory=dict)  # sent to vLLM: Ray reference -> prompt, label
    pending_metrics: Any = None  # the judge() call of this step
    unsaid: list[dict[str, float]] = field(default_factory=list)  # metrics of the steps since the console's last line
    logged_at: float | None = None  # when the last step was logged
    bases: tuple[str, ...] = ()  # advantage estimators that this OpenRLHF has, of the process that parsed the flags
    filters: bool = False  # whether a group came back that was planned after the warm-up
    warned: set[str] = field(default_factory=set)  # kinds of warnings that were given once


_process = Process()


# ── Driver: flags ──


class _NoteEstimator(argparse.Action):
    """Store --algo.advantage.estimator as OpenRLHF does. Record each (flag, value) of it and --advantage_estimator."""

    def __call__(self, parser, namespace, value, option_string=None):
        noted = getattr(namespace, "depo.chosen", None) or []
        setattr(namespace, "depo.chosen", [*noted, (option_string, value)])
        if value != "depo":
            setattr(namespace, self.dest, value)


def add_arguments(parser) -> None:
    """Add DEPO's flags to OpenRLHF's parser, and `depo` to the advantage estimators that it knows.

    Exit with status 2, one line per fault, if a --depo.* flag does not exist or is abbreviated, or if the launch uses
    DEPO and depo_plugin cannot be imported. If the launch does not use DEPO, a failed import is only a warning.
    """
    try:
        from depo_plugin.settings import config
    except ImportError as error:
        reason = f"openrlhf-depo is installed but cannot be imported ({error}). Reinstall it with what it depends on."
        if any(word.startswith(("--depo.", "--advantage_estimator")) or word == "depo" for word in sys.argv[1:]):
            parser.error(reason)
        print(f"[Warning] DEPO: {reason}", file=sys.stderr)  # noqa: T201
        return
    known = next(action for action in parser._actions if config.BASE_FLAG in action.option_strings)
    switch = parser.add_argument_group("advantage estimator", conflict_handler="resolve")  # takes OpenRLHF's place
    switch.add_argument(
        *(config.BASE_FLAG, config.SWITCH_FLAG),
        action=_NoteEstimator,
        choices=[*known.choices, "depo"],
        default=known.default,
        help=known.help,
    )
    _process.bases = tuple(known.choices)
    config.add_arguments(parser)
    if faults := config.check_depo_flags(sys.argv[1:]):
        parser.error("\n".join(faults))


def resolve(args) -> None:
    """Set args.depo to all effective settings if DEPO is on, else delete it. Runs before OpenRLHF's validation.

    If DEPO is on, algo.advantage.estimator becomes the base advantage, so that OpenRLHF's branches and checks apply to
    it, and one line says what DEPO does. Exit with status 2 and print all faults if the launch cannot work, because of
    DEPO's settings, OpenRLHF's own flags or the encoder.
    """
    flags = getattr(args, "depo", None)
    if flags is None:  # add_arguments could not import the settings
        return
    from depo_plugin.settings import config

    on, named = config.estimator_choice(getattr(flags, "chosen", []))
    if not on:
        ignored = sorted(config.overrides_from_namespace(flags))
        ignored += [name for name in ("config", "shadow") if getattr(flags, name)]
        if ignored:
            print(  # noqa: T201
                f"[Warning] DEPO is off (--advantage_estimator {args.algo.advantage.estimator}), so these settings do "
                f"nothing: {', '.join('--depo.' + key for key in ignored)}"
            )
        del args.depo
        return
    from depo_plugin import seam

    cfg, faults = config.DepoConfig(), []
    try:
        cfg = config.load_config(flags.config, config.overrides_from_namespace(flags))
    except config.ConfigError as error:
        faults += error.faults
    faults += seam.conflicts(cfg, args, named)
    if cfg.advantage.base and _process.bases and cfg.advantage.base not in _process.bases:
        faults.append(
            f"--depo.advantage.base {cfg.advantage.base}: this OpenRLHF does not know it. Name another one, or use a "
            "newer release."
        )
    faults += [] if faults else _encoder_faults(cfg, args)
    if faults:
        print("DEPO: this launch cannot work as it is set:\n" + "\n".join(faults), file=sys.stderr)  # noqa: T201
        sys.exit(2)
    for line in config.summary(cfg, args, named):
        print(line)  # noqa: T201
    cfg = config.with_base(cfg, named)
    args.depo = config.to_namespace(cfg)
    args.depo.enabled, args.depo.shadow = True, bool(flags.shadow)
    args.algo.advantage.estimator = cfg.advantage.base


def _encoder_faults(cfg, args) -> list[str]:
    """Return the reasons why the encoder cannot be used, [] if it can. Checked before Ray and vLLM start."""
    from depo_plugin.estimator import encoder

    settings = cfg.estimator
    if args.use_ms and settings.model is not None and not os.path.isdir(settings.model):
        return []  # a name of ModelScope's hub, which OpenRLHF switches to only after its validation
    try:
        encoder.check_encoder(settings.model, settings.depth, settings.max_length)
    except encoder.EncoderError as error:
        return [str(error)]
    return []


def enabled(args) -> bool:
    """Return whether DEPO is on in this launch. Every call site asks this function."""
    return getattr(getattr(args, "depo", None), "enabled", False)


# ── Driver: start ──


def _snapshot_root(args) -> str:
    return os.path.join(args.ckpt.path, "depo")


def start_estimator(strategy, placement_group) -> None:
    """Start the estimator's actor before the trainer's.

    placement_group: shared by all models, or None.
    """
    from depo_plugin import seam
    from depo_plugin.remote import actor

    seam.check_signatures()
    args = strategy.args
    _process.driver_actor = actor.create(
        args, args.rollout.n_samples_per_prompt, _snapshot_root(args), placement_group
    )
    if args.depo.shadow:
        atexit.register(_say_shadow)


def _say_shadow() -> None:
    """Say at the end of the driver what the filter would have done in the whole run."""
    import ray

    with contextlib.suppress(Exception):  # the run is over, whatever became of the estimator
        line = ray.get(_process.driver_actor.shadow_line.remote(), timeout=10)
        print(f"DEPO: shadow mode: {line}")  # noqa: T201


def attach(args, site: str, path: str) -> None:
    """Record that the hook at `site` runs in this process, from OpenRLHF's file `path`; check_attached reads it.

    The process that trains also writes the launch's settings beside its metrics, for `depo report`.
    """
    from depo_plugin import seam
    from depo_plugin.settings import launch

    _process.reports.append(seam.report(site, path))
    if site == "BasePPOTrainer":
        settings = Path(args.ckpt.output_dir) / "depo" / "settings.json"
        try:
            launch.write(settings, args)
        except OSError as error:
            _warn_once("settings", "DEPO: %s cannot be written (%s); training goes on without it.", settings, error)


def check_attached(args, trainer) -> None:
    """Stop the run before its first rollout if a process runs another OpenRLHF than the driver's patched one.

    trainer: the PPOTrainer or PPOTrainerAsync actor. Its processes are asked directly, so that the check does not
    depend on the estimator. Each process answers after its constructor is done. Raise seam.SeamError with site, node
    and path, or RuntimeError if a process does not answer within ATTACH_TIMEOUT_S.
    """
    from depo_plugin import seam

    answers = [_ask_attached(trainer)]
    answers += [_ask_attached(part) for part in answers[0]["parts"]]
    reports = [report for answer in answers for report in answer["reports"]]
    seam.check_reports(reports, [answer["where"] for answer in answers], args.algo.advantage.estimator)


def _ask_attached(actor) -> dict:
    """Return the answer of an actor's process: `reports` of its hooks, `where` OpenRLHF is, `parts`: its actors."""
    import ray

    def probe(actor):  # a nested function travels by value: the node may not have this package
        import importlib.util
        import sys

        import ray

        places = []
        for name in ("openrlhf", "depo_plugin"):
            spec = importlib.util.find_spec(name)
            places.append(f"{name} is {spec.origin if spec else 'not importable'}")
        hooks = sys.modules.get("depo_plugin.hooks")
        return {
            "reports": list(hooks._process.reports) if hooks else [],
            "where": f"on node {ray.util.get_node_ip_address()} " + " and ".join(places),
            "parts": [getattr(actor, part) for part in ("generator_actor", "trainer_actor") if hasattr(actor, part)],
        }

    try:
        return ray.get(actor.__ray_call__.remote(probe), timeout=ATTACH_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise RuntimeError(
            f"DEPO: a process of OpenRLHF's trainer was not ready within {ATTACH_TIMEOUT_S} s, so it is unknown "
            "whether it runs the patched OpenRLHF. Its own log says what it waits for (`ray logs`)."
        ) from None


# ── The process with the loader ──


def _handle(args):
    """Return this process's handle of the estimator. It is made once."""
    if _process.handle is None:
        from depo_plugin.remote import handle

        _process.handle = handle.connect(args.depo.estimator.timeout_s)
    return _process.handle


def wrap_loader(args, prompts_dataloader, max_steps: int, path: str):
    """Return the loader that draws only prompts worth a rollout, and the number of steps for the schedule.

    prompts_dataloader: OpenRLHF's StatefulDataLoader, one prompt per batch; max_steps: OpenRLHF's number of steps;
    path: the calling file. The number grows only if the pool is smaller than a batch: each episode fills one batch. In
    shadow mode the loader gives out what OpenRLHF's own does.
    """
    from depo_plugin.loader import DifficultyFilteredLoader
    from depo_plugin.settings import config

    attach(args, "prepare_datasets", path)
    if args.depo.shadow:
        from depo_plugin.shadow import ShadowLoader

        batch_size = args.rollout.vllm_generate_batch_size
        _process.loader = ShadowLoader(prompts_dataloader, _handle(args), batch_size)
        return _process.loader, max_steps
    cfg = config.from_namespace(args.depo)
    _process.loader = DifficultyFilteredLoader(
        prompts_dataloader,
        _handle(args),
        cfg.filter,
        batch_size=args.rollout.vllm_generate_batch_size,
        group_size=args.rollout.n_samples_per_prompt,
        seed=args.train.seed,
        num_episodes=args.train.num_episodes,
    )
    samples = args.train.num_episodes * len(_process.loader) * args.rollout.n_samples_per_prompt
    steps = max(1, samples // args.train.batch_size) * args.train.max_epochs
    return _process.loader, max(max_steps, steps)


def dispatched(refs, prompts, labels) -> None:
    """Record what was sent to vLLM: refs[i] will return the responses to prompts[i] with labels[i]."""
    _process.in_flight |= dict(zip(refs, zip(prompts, labels, strict=True), strict=True))


def received(ref, experiences) -> None:
    """Set prompt and label of the responses of `ref` to those that were sent.

    They identify a group's decision and history, but user code may change them: an agent may rewrite the prompt, a
    reward function may change a label in place.
    """
    prompt, label = _process.in_flight.pop(ref)
    for experience in experiences:
        experience.prompts, experience.labels = [prompt], [label]


def reject(args, experiences) -> None:
    """Handle a group that dynamic filtering throws away: learn from its label, and let the loader draw another one.

    Raise RuntimeError if a response has no reward or a reward is not finite.
    """
    from depo_plugin import labels

    if not args.depo.shadow:
        labels.check_given(args, experiences)
        labels.check_finite(args, experiences)
    found = labels.from_rejected(experiences, args.depo.labels.reward_range)
    _count(args, found)
    for label in found.labels:
        _handle(args).reject(label)
    _process.loader.refund(1)


# ── The process that trains ──


def load(args, checkpoint_states: dict) -> None:
    """Load the estimator's checkpoint that belongs to the one OpenRLHF resumed from (its `latest`).

    Raise CheckpointError if it was saved with another encoder, group size or mode.
    """
    if not checkpoint_states.get("global_step"):
        return
    from depo_plugin.estimator.checkpoint import step_of
    from depo_plugin.loader import STATE

    # DeepSpeed read this file. Its converter renames global_step16 to global_step16_universal; our tag stays the same.
    latest = "latest_universal" if args.ds.use_universal_ckpt else "latest"
    folder = (Path(args.ckpt.path) / "_actor" / latest).read_text().strip()
    found = re.match(r"(best_)?global_step\d+", folder)
    tag = found[0] if found else f"global_step{checkpoint_states['global_step']}"
    loaded = _handle(args).load(tag)
    if loaded is None:
        logger.warning("DEPO: the estimator takes up its checkpoint %s as soon as it answers.", tag)
    elif loaded.tag == tag:
        logger.info("DEPO: estimator resumed from %s", tag)
    elif loaded.tag is None and STATE not in checkpoint_states["data_loader_state_dict"]:
        logger.warning("DEPO: %s was written without DEPO: the estimator starts from the beginning.", tag)
    elif loaded.tag is None:
        logger.warning(
            "DEPO: no estimator checkpoint for %s; the estimator starts from the beginning: %d steps of its learning "
            "are lost.",
            tag,
            step_of(tag),
        )
    else:
        logger.warning(
            "DEPO: estimator checkpoint %s is missing or damaged, %s is used instead: %d steps of its learning are "
            "lost.",
            tag,
            loaded.tag,
            step_of(tag) - step_of(loaded.tag),
        )


def check_rewards(args, rollout_samples) -> None:
    """Stop the run before any gradient if a response has no reward (RuntimeError, see labels.check_given).

    Not in shadow mode, which only watches; nor do reject and observe check rewards then.
    """
    from depo_plugin import labels

    if not args.depo.shadow:
        labels.check_given(args, rollout_samples)


def observe(args, experiences, step: int) -> None:
    """Send the step's groups to the estimator, which learns while the policy trains, and weight their advantages.

    experiences: after make_experience_batch, before balance_experiences; step: the step that these rollouts train.
    Raise RuntimeError if a reward is not finite.
    """
    from depo_plugin import advantage, labels

    if not args.depo.shadow:
        labels.check_finite(args, experiences)
    group_size = args.rollout.n_samples_per_prompt
    groups = labels.from_experiences(experiences, group_size, args.depo.labels.reward_range)
    _count(args, groups)
    handle = _handle(args)
    if args.depo.shadow:
        if _process.loader is not None:  # in this process: it may have prompts that were not shown yet
            _process.loader.show()
    elif args.depo.advantage.importance_rescale:
        found = handle.keep_weights(groups.prompts, groups.answers)
        if found is not None:  # if the estimator does not answer, every weight is 1
            q_B, share_B = found
            advantage.rescale(experiences, advantage.weights(q_B, share_B, args.depo.advantage.clip), group_size)
    _process.pending_metrics = handle.judge(groups.labels)
    if _process.pending_metrics is not None:
        handle.learn()


def _count(args, found) -> None:
    """Count the scores that were clipped and the groups that were dropped, and warn of each once. found: a Groups."""
    tally = _handle(args).tally
    tally["clipped"] += found.clipped
    tally["labels_dropped"] += found.dropped
    low, high = args.depo.labels.reward_range
    if found.clipped:
        _warn_once(
            "clipped",
            "DEPO: %.0f%% of the scores (%d of %d, from %.4g to %.4g) are outside --depo.labels.reward_range %g %g "
            "and are clipped to it: the estimator takes %g for a wrong response and %g for a right one. Set the range "
            "to your scores (`scores`, if the reward function returns them, else `rewards`).",
            *(100 * found.clipped / found.scores, found.clipped, found.scores, found.lowest, found.highest),
            *(low, high, low, high),
        )
    if found.dropped:
        _warn_once(
            "dropped",
            "DEPO: %d of %d groups have a score that is NaN or infinite: they are not learned from.",
            *(found.dropped, found.dropped + len(found.labels)),
        )


def _warn_once(kind: str, text: str, *args) -> None:
    """Log a warning if none of its kind was logged before in this process."""
    if kind not in _process.warned:
        logger.warning(text, *args)
        _process.warned.add(kind)


def log(args, status: dict, step: int) -> None:
    """Add the step's depo/* metrics to OpenRLHF's status, and metrics and groups to files in <ckpt.output_dir>/depo.

    Every SAY_EVERY steps, and at the first one whose batch was planned after the warm-up, one line on the console says
    what the filter does.
    """
    from depo_plugin.estimator.metrics import Judgement

    handle = _handle(args)
    metrics, groups = handle.wait(_process.pending_metrics) or Judgement({}, [])
    for name, value in handle.take_tally().items():  # the loader may run in another process, with its own tally
        metrics[name] = metrics.get(name, 0.0) + value
    now = time.monotonic()
    if _process.logged_at is not None:
        metrics["time_step"] = now - _process.logged_at
    _process.logged_at = now
    status.update({f"depo/{name}": float(value) for name, value in metrics.items()})
    numbers = {k: v for k, v in status.items() if isinstance(v, int | float)}
    _append(args, "metrics.jsonl", [{"step": step} | numbers])
    _append(args, "groups.jsonl", [{"step": step} | group for group in groups])
    _say(step, metrics, groups)
    if "read_rate" in metrics and "read_rate" not in _process.warned:
        _process.warned.add("read_rate")
        logger.info(
            "DEPO: the encoder reads %.0f new prompts/s. Until each prompt was met once, a batch needs about %d; what "
            "is not read in time is kept unseen. `depo embed` reads a pool ahead.",
            metrics["read_rate"],
            2 * args.rollout.vllm_generate_batch_size,
        )


def _append(args, name: str, rows: list[dict]) -> None:
    """Append rows to a file in <ckpt.output_dir>/depo; if that fails, warn once and go on."""
    from depo_plugin.estimator.metrics import MetricsFile

    file = MetricsFile(Path(args.ckpt.output_dir) / "depo" / name)
    try:
        file.append(*rows)
    except OSError as error:
        text = "DEPO: %s cannot be written (%s); training goes on, steps are missing in it."
        _warn_once(name, text, file.path, error)


def _say(step: int, metrics: dict[str, float], groups: list[dict]) -> None:
    """Write the console's line every SAY_EVERY steps, and at the first step that was planned after the warm-up."""
    from depo_plugin.estimator.metrics import said
    from depo_plugin.messages import Reason

    _process.unsaid.append(metrics)
    unfiltered = (None, Reason.WARMUP.value, Reason.UNSCORED.value)
    begins = not _process.filters and any(group["reason"] not in unfiltered for group in groups)
    _process.filters |= begins
    if begins or step % SAY_EVERY == 0:
        logger.info("%s", said(step, _process.unsaid))
        _process.unsaid = []


def save(args, tag: str) -> None:
    """Write the estimator's checkpoint <ckpt.path>/depo/<tag>, before OpenRLHF writes its own of that tag."""
    actor_root = Path(args.ckpt.path) / "_actor"
    live_tags = {folder.name for folder in actor_root.iterdir() if folder.is_dir()} if actor_root.exists() else set()
    seconds = _handle(args).save(tag, live_tags)
    if isinstance(seconds, float) and not (Path(_snapshot_root(args)) / f"{tag}.safetensors").exists():
        _warn_once(
            "local",
            "DEPO: --ckpt.path %s is not the same folder on all nodes: the estimator's checkpoints lie in that of its "
            "own node, and a resume finds them only if the estimator runs there again. Put --ckpt.path on a file "
            "system that the nodes share.",
            args.ckpt.path,
        )
    if not isinstance(seconds, float):
        logger.warning(
            "DEPO: the estimator's checkpoint %s could not be written (%s); training goes on.",
            tag,
            "the estimator does not answer" if seconds is None else seconds,
        )
