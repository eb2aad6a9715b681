"""What OpenRLHF calls: every line that the patches add is a call of a function here.

One prompt, from pool to gradient (-> is a call, who waits for whom in brackets):

    pool -> loader -> score -> keep? -> [rollout x G -> reward] -> observe -> [gradient] -> log
            |         (waits at most estimator.timeout_s for       |
            |          scores asked for one batch earlier)         (judged at once, learned behind the gradient;
            '-- plans whole batches                                 log waits for the judgement alone)

Driver: add_arguments, resolve, start_estimator, check_attached. The process with the loader: wrap_loader, attach,
dispatched, received, reject. The process that trains: attach, load, check_rewards, observe, log, save. In synchronous
training the last two are one process. All of them reach the estimator, a Ray actor, through remote.EstimatorHandle.

Importing this module loads the standard library alone. What it needs of depo_plugin is imported by the function that
needs it: the settings by add_arguments and resolve, everything else only when DEPO is on.
"""

import argparse
import importlib.util
import inspect
import logging
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

ATTACH_TIMEOUT_S = 1800  # how long the constructors of OpenRLHF's trainer may take; they read the data sets

# The sites that must report before the first rollout, with the file each runs from.
SITES = {
    "prepare_datasets": "trainer/ppo_trainer.py",
    "BasePPOTrainer": "trainer/ppo_trainer.py",
    "SamplesGenerator": "trainer/ppo_utils/samples_generator.py",
}

# What the call sites take from OpenRLHF: module -> function or class -> its parameters (a dataclass has its fields).
SIGNATURES = {
    "openrlhf.trainer.ppo_trainer": {
        "prepare_datasets": ["strategy", "tokenizer"],
        "BasePPOTrainer.train_step": ["rollout_samples", "global_step"],
        "BasePPOTrainer.save_logs_and_checkpoints": ["global_step", "client_states"],
        "BasePPOTrainer.save_best_checkpoint": ["global_step", "client_states"],
        "BasePPOTrainer.init_checkpoint_states": [],
    },
    "openrlhf.trainer.ppo_utils.samples_generator": {
        "SamplesGenerator._generate_vllm": ["dataloader_iter", "num_prompts", "dynamic_filtering"],
        "SamplesGenerator._dispatch_prompts_to_vllm": ["prompts", "labels"],
    },
    "openrlhf.trainer.ppo_utils.experience": {
        "Experience": "index prompts labels scores rewards advantages action_log_probs action_mask".split(),
    },
}

# What one process holds between two calls. driver_actor: the actor's owner; handle: the way to the estimator;
# loader: this process's DifficultyFilteredLoader; reports: of the hooks that ran here (see attach); in_flight: what
# was sent to vLLM, Ray reference -> (prompt, label); pending_metrics: of the step; dropped: total of groups without a
# label; warned: what was warned of once.
_process = SimpleNamespace(
    driver_actor=None,
    handle=None,
    loader=None,
    reports=(),
    in_flight=None,
    pending_metrics=None,
    dropped=0,
    warned=frozenset(),
)


class SeamError(RuntimeError):
    """DEPO and this OpenRLHF do not fit together: a signature is another, or a process runs an unpatched copy."""


# ── Driver: flags ──


class _NoteEstimator(argparse.Action):
    """Store --algo.advantage.estimator as OpenRLHF does, and note each (flag, value) of it and of the switch."""

    def __call__(self, parser, namespace, value, option_string=None):
        noted = getattr(namespace, "depo.chosen", None) or []
        setattr(namespace, "depo.chosen", [*noted, (option_string, value)])
        if value != "depo":
            setattr(namespace, self.dest, value)


def add_arguments(parser) -> None:
    """Add DEPO's flags to OpenRLHF's parser, and `depo` to the advantage estimators that it knows.

    Exits with status 2 as argparse does, one line per fault: a --depo.* flag that does not exist or is abbreviated, or
    DEPO asked for although depo_plugin cannot be imported. Without DEPO that is a warning.
    """
    try:
        from depo_plugin import config
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
    config.add_arguments(parser)
    if faults := config.check_depo_flags(sys.argv[1:]):
        parser.error("\n".join(faults))


def resolve(args) -> None:
    """Settle args.depo before OpenRLHF validates its arguments: gone without DEPO, every effective setting with it.

    With DEPO, the base advantage stands in algo.advantage.estimator, so that each of OpenRLHF's branches and checks
    applies to it, and one line says what DEPO does. Exits with status 2 and all faults at once if the launch cannot
    work: settings, OpenRLHF's own flags, the encoder.
    """
    flags = getattr(args, "depo", None)
    if flags is None:  # add_arguments could not import the settings
        return
    from depo_plugin import config

    on, named = config.estimator_choice(getattr(flags, "chosen", []))
    if not on:
        ignored = sorted(config.overrides_from_namespace(flags))
        if ignored or flags.config:
            print(  # noqa: T201
                f"[Warning] DEPO is off (--advantage_estimator {args.algo.advantage.estimator}), so these settings do "
                f"nothing: {', '.join('--depo.' + key for key in [*ignored, *(['config'] if flags.config else [])])}"
            )
        del args.depo
        return
    cfg, faults = config.DepoConfig(), []
    try:
        cfg = config.load_config(flags.config, config.overrides_from_namespace(flags))
    except config.ConfigError as error:
        faults += error.faults
    faults += config.conflicts(cfg, args, named)
    faults += [] if faults else _encoder_faults(cfg, args)
    if faults:
        print("DEPO: this launch cannot work as it is set:\n" + "\n".join(faults), file=sys.stderr)  # noqa: T201
        sys.exit(2)
    for line in config.summary(cfg, args, named):
        print(line)  # noqa: T201
    cfg = config.with_base(cfg, named)
    args.depo = config.to_namespace(cfg)
    args.depo.enabled = True
    args.algo.advantage.estimator = cfg.advantage.base


def _encoder_faults(cfg, args) -> list[str]:
    """Return why the encoder cannot be used, found before Ray and vLLM start; nothing if it can."""
    from depo_plugin import model

    settings = cfg.estimator
    if args.use_ms and settings.model is not None and not os.path.isdir(settings.model):
        return []  # a name of ModelScope's hub, which OpenRLHF switches to only after its validation
    try:
        model.check_encoder(settings.model, settings.depth, settings.max_length)
    except model.EncoderError as error:
        return [str(error)]
    return []


def enabled(args) -> bool:
    """Return whether DEPO is on in this launch; every call site asks here."""
    return getattr(getattr(args, "depo", None), "enabled", False)


# ── Driver: start ──


def _snapshot_root(args) -> str:
    return os.path.join(os.path.abspath(args.ckpt.path), "depo")


def check_signatures() -> None:
    """Raise SeamError, naming all that is missing, where OpenRLHF has not what the call sites take from it."""
    from depo_plugin import patching

    faults = []
    for module, targets in SIGNATURES.items():
        for name, needed in targets.items():
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is None:
                faults.append(f"{module} has no {name!r}")
            else:
                given = inspect.signature(found).parameters
                faults += [f"{name} has no {parameter!r}" for parameter in needed if parameter not in given]
    if faults:
        supported = ", ".join(patching.releases())
        raise SeamError(f"{'; '.join(faults)}. Supported: OpenRLHF {supported}. Run: depo patch --check")


def start_estimator(strategy, placement_group) -> None:
    """Start the estimator's actor before the trainer's. placement_group: the one that all models share, or None."""
    check_signatures()
    from depo_plugin import remote

    args = strategy.args
    _process.driver_actor = remote.create(
        args, args.rollout.n_samples_per_prompt, _snapshot_root(args), placement_group
    )


def attach(args, site: str, path: str) -> None:
    """Note that the hook at `site` runs in this process, from the OpenRLHF file `path`; check_attached asks for it."""
    import ray

    from depo_plugin.patching import sha256_of

    report = {"site": site, "node": ray.util.get_node_ip_address(), "path": path, "sha256": sha256_of(path)}
    _process.reports = (*_process.reports, report)


def check_attached(args, trainer) -> None:
    """Stop the run before its first rollout if a process runs another OpenRLHF than the driver's patched one.

    trainer: the PPOTrainer or PPOTrainerAsync actor. Its processes are asked themselves, so the proof does not depend
    on the estimator, and each is waited for until its constructor is done. Raises SeamError naming site, node and
    path, and RuntimeError if a process does not answer in ATTACH_TIMEOUT_S.
    """
    from depo_plugin.patching import sha256_of

    root = Path(importlib.util.find_spec("openrlhf").origin).parent
    answers = [_ask_attached(trainer)]
    answers += [_ask_attached(part) for part in answers[0]["parts"]]
    reports = {report["site"]: report for answer in answers for report in answer["reports"]}
    faults = []
    for site, file in SITES.items():
        expected = sha256_of(root / file)
        report = reports.get(site)
        if report is None:
            faults.append(f"{site}: no report; {'; '.join(answer['where'] for answer in answers)}")
        elif report["sha256"] != expected:
            faults.append(f"{site}: node {report['node']} runs {report['path']}, which differs from {root / file}")
    if faults:
        raise SeamError(
            "DEPO is on, but not every process runs the patched OpenRLHF; the run would silently be plain "
            f"{args.algo.advantage.estimator}.\n  " + "\n  ".join(faults) + "\nPatch every node the same way (`depo "
            "patch`, then `depo patch --check` there), or put the patched copy on PYTHONPATH before `ray start`."
        )


def _ask_attached(actor) -> dict:
    """Return what an actor's process says: `reports` of its hooks, `where` OpenRLHF is, `parts`: actors it made."""
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
    """Return this process's way to the estimator, made once."""
    if _process.handle is None:
        from depo_plugin import remote

        _process.handle = remote.connect(args.depo.estimator.timeout_s)
    return _process.handle


def wrap_loader(args, prompts_dataloader, max_steps: int, path: str):
    """Return the loader that draws only prompts worth a rollout, and the steps the schedule is made for.

    prompts_dataloader: OpenRLHF's StatefulDataLoader of one prompt a batch; max_steps: OpenRLHF's; path: the calling
    file. With budget `steps` they are OpenRLHF's, and an episode makes at least one full batch, also from a smaller
    pool; with budget `data` they are fewer, by expected_keep_rate.
    """
    from depo_plugin import config
    from depo_plugin.loader import DifficultyFilteredLoader

    attach(args, "prepare_datasets", path)
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
    samples = _process.loader.expected(args.train.num_episodes) * args.rollout.n_samples_per_prompt
    steps = max(1, samples // args.train.batch_size) * args.train.max_epochs
    return _process.loader, steps if cfg.filter.budget == "data" else max(max_steps, steps)


def dispatched(refs, prompts, labels) -> None:
    """Note what was sent to vLLM: refs[i] will be the responses to prompts[i] with labels[i]."""
    _process.in_flight = (_process.in_flight or {}) | dict(zip(refs, zip(prompts, labels, strict=True), strict=True))


def received(ref, experiences) -> None:
    """Give the responses of `ref` the prompt and label that were sent.

    They are the identity by which a group finds its decision and its history, but user code may hand back others: an
    agent that rewrites the prompt, a reward function that changes a label in place.
    """
    prompt, label = _process.in_flight.pop(ref)
    for experience in experiences:
        experience.prompts, experience.labels = [prompt], [label]


def reject(args, experiences) -> None:
    """Take a group that dynamic filtering throws away: its label is still learned, its place is given back."""
    from depo_plugin import labels

    check_rewards(args, experiences)
    _check_finite(args, experiences)
    found = labels.from_rejected(experiences, args.depo.labels.reward_range)
    _count(args, found)
    for label in found.labels:
        _handle(args).reject(label)
    _process.loader.refund(1)


# ── The process that trains ──


def load(args, checkpoint_states: dict) -> None:
    """Load the estimator's checkpoint that belongs to the one OpenRLHF resumed from (its `latest`).

    Raises CheckpointError if that is of another estimator: another encoder, group size or mode.
    """
    if not checkpoint_states.get("global_step"):
        return
    from depo_plugin.checkpoint import step_of

    # What DeepSpeed read; its converter makes global_step16_universal of global_step16, and ours stays as it is.
    latest = "latest_universal" if args.ds.use_universal_ckpt else "latest"
    folder = (Path(args.ckpt.path) / "_actor" / latest).read_text().strip()
    found = re.match(r"(best_)?global_step\d+", folder)
    tag = found[0] if found else f"global_step{checkpoint_states['global_step']}"
    loaded = _handle(args).load(tag)
    if loaded is None:
        logger.warning("DEPO: the estimator takes up its checkpoint %s as soon as it answers.", tag)
    elif loaded.tag == tag:
        logger.info("DEPO: estimator resumed from %s", tag)
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
    """Stop before any gradient where a response has no reward although a reward function or agent was to give one.

    OpenRLHF logs the function's exception and leaves the reward None; a micro-batch with one None loses all its
    rewards. Raises RuntimeError naming the reward function or agent.
    """
    if not (args.reward.remote_url or args.train.agent_func_path):
        return
    missing = [sample for sample in rollout_samples if sample.rewards is None]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(rollout_samples)} responses have no reward: {_rewarder(args)} raised or returned "
            f"none (see 'Failed to fetch reward' in the rollout actors' log). First such prompt: "
            f"{missing[0].prompts[0][:200]!r}. No gradient was taken from this batch."
        )


def _rewarder(args) -> str:
    """Return what gives the rewards, as its flag and value."""
    if args.train.agent_func_path:  # OpenRLHF then sets reward.remote_url to "agent"
        return f"--train.agent_func_path {args.train.agent_func_path}"
    if args.reward.remote_url:  # OpenRLHF makes a list of it
        urls = args.reward.remote_url
        return f"--reward.remote_url {urls if isinstance(urls, str) else ','.join(urls)}"
    return f"--reward.model_name_or_path {args.reward.model_name_or_path}"


def _check_finite(args, experiences) -> None:
    """Stop if a reward is NaN or infinite: all its group's advantages would be so, too."""
    from depo_plugin import labels

    bad = [
        (prompt, reward)
        for experience in experiences
        for prompt, reward in zip(experience.prompts, labels.per_response(experience, "rewards"), strict=True)
        if not math.isfinite(reward)
    ]
    if bad:
        prompt, reward = bad[0]
        total = sum(len(experience.prompts) for experience in experiences)
        raise RuntimeError(
            f"{len(bad)} of {total} responses have a reward that is NaN or infinite: {_rewarder(args)} gave {reward} "
            f"to the prompt {prompt[:200]!r}. No gradient was taken from this batch."
        )


def observe(args, experiences, step: int) -> None:
    """Send the step's groups to the estimator, to be learned behind the policy's training; weight their advantages.

    experiences: after make_experience_batch, before balance_experiences; step: the step these rollouts train. Raises
    RuntimeError if a reward is not finite.
    """
    from depo_plugin import advantage, labels

    _check_finite(args, experiences)
    group_size = args.rollout.n_samples_per_prompt
    found = labels.from_experiences(experiences, group_size, args.depo.labels.reward_range)
    _count(args, found)
    if args.depo.advantage.importance_rescale:
        weights = _handle(args).keep_weights(*labels.group_prompts(experiences, group_size))
        if weights is not None:  # without the estimator every weight is 1
            advantage.rescale(experiences, advantage.weights(*weights, args.depo.advantage.clip), group_size)
    _process.pending_metrics = _handle(args).observe(found.labels)


def _count(args, found) -> None:
    """Count scores that were clipped and groups that were dropped (a labels.Groups), and warn of each once."""
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
        _process.warned |= {kind}


def log(args, status: dict, step: int) -> None:
    """Add the step's depo/* metrics to OpenRLHF's status and to <ckpt.output_dir>/depo/metrics.jsonl."""
    from depo_plugin.metrics import MetricsFile

    handle = _handle(args)
    metrics = Counter(handle.wait(_process.pending_metrics, handle.timeout_s) or {})
    metrics.update(handle.take_tally())
    _process.dropped += metrics["labels_dropped"]
    metrics["labels_dropped"] = _process.dropped
    status.update({f"depo/{name}": float(value) for name, value in metrics.items()})
    row = {"step": step} | {k: v for k, v in status.items() if isinstance(v, int | float)}
    file = MetricsFile(Path(args.ckpt.output_dir) / "depo" / "metrics.jsonl")
    try:
        file.append(row)
    except OSError as error:
        _warn_once(
            "metrics",
            "DEPO: %s cannot be written (%s); training goes on, steps are missing in it.",
            *(file.path, error),
        )


def save(args, tag: str) -> None:
    """Write the estimator's checkpoint <ckpt.path>/depo/<tag>, before OpenRLHF writes its own of that tag."""
    actor_root = Path(args.ckpt.path) / "_actor"
    live_tags = {folder.name for folder in actor_root.iterdir() if folder.is_dir()} if actor_root.exists() else set()
    seconds = _handle(args).save(tag, live_tags)
    if not isinstance(seconds, float):
        logger.warning(
            "DEPO: the estimator's checkpoint %s could not be written (%s); training goes on.",
            tag,
            "the estimator does not answer" if seconds is None else seconds,
        )
