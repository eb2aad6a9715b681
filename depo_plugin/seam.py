"""Attach or refuse: does DEPO fit this OpenRLHF, these flags, and the copy that every process runs?

Nothing here changes the run. Each check either passes or names every fault, with the fix.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any

from depo_plugin.advantage import BASES, DEFAULT_BASE
from depo_plugin.settings.config import BASE_FLAG, SWITCH_FLAG, DepoConfig, whitened

# The sites that must report before the first rollout, with the file that each runs from.
SITES = {
    "prepare_datasets": "trainer/ppo_trainer.py",
    "BasePPOTrainer": "trainer/ppo_trainer.py",
    "SamplesGenerator": "trainer/ppo_utils/samples_generator.py",
}

# What the call sites use of OpenRLHF: module -> function or class -> its parameters (of a dataclass: its fields).
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


class SeamError(RuntimeError):
    """DEPO and this OpenRLHF do not fit together: a signature has changed, or a process runs an unpatched copy."""


def check_signatures() -> None:
    """Raise SeamError, naming all that is missing, if OpenRLHF lacks a function or parameter that a call site uses."""
    from depo_plugin.commands import patching

    faults = []
    for module, targets in SIGNATURES.items():
        for name, needed in targets.items():
            found: Any = importlib.import_module(module)
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


def report(site: str, path: str) -> dict[str, str]:
    """Return what the process of a hook says of itself: its site and node, and the OpenRLHF file that called it."""
    import ray

    from depo_plugin.commands.patching import sha256_of

    return {"site": site, "node": ray.util.get_node_ip_address(), "path": path, "sha256": sha256_of(path)}


def check_reports(reports: list[dict[str, str]], where: list[str], base: str) -> None:
    """Raise SeamError, naming site, node and path, if a site did not report or its file is not the driver's.

    where: what each process said of its own imports, for a site that did not report; base: the advantage estimator
    that the run would silently train with.
    """
    from depo_plugin.commands.patching import sha256_of

    root = Path(inspect.getfile(importlib.import_module("openrlhf"))).parent
    by_site = {one["site"]: one for one in reports}
    faults = []
    for site, file in SITES.items():
        found = by_site.get(site)
        if found is None:
            faults.append(f"{site}: no report; {'; '.join(where)}")
        elif found["sha256"] != sha256_of(root / file):
            faults.append(f"{site}: node {found['node']} runs {found['path']}, which differs from {root / file}")
    if faults:
        raise SeamError(
            "DEPO is on, but not every process runs the patched OpenRLHF; the run would silently be plain "
            f"{base}.\n  " + "\n  ".join(faults) + "\nPatch every node the same way (`depo patch`, then `depo patch "
            "--check` there), or put the patched copy on PYTHONPATH before `ray start`."
        )


def conflicts(cfg: DepoConfig, args: Any, named: str | None = None) -> list[str]:
    """Return what in OpenRLHF's own flags cannot go with DEPO, one line each.

    args: OpenRLHF's arguments, nested (after `hierarchize`), before its own validation; named: the base that
    --algo.advantage.estimator names, None if it names none.
    """
    faults = []
    if not cfg.advantage.base and named:
        if named not in BASES:
            faults.append(
                f"{BASE_FLAG} {named}: cannot go with {SWITCH_FLAG} depo, which has no critic. Leave it out (DEPO "
                f"then uses {DEFAULT_BASE}), or name one of {', '.join(BASES)}."
            )
        elif cfg.advantage.importance_rescale and BASES[named]:
            faults.append(whitened("--depo.advantage.importance_rescale true", f"{BASE_FLAG} {named}"))
    group, batch = args.rollout.n_samples_per_prompt, args.rollout.batch_size
    if group < 2:
        faults.append(
            f"--rollout.n_samples_per_prompt {group}: must be at least 2, because DEPO predicts whether the responses "
            "to one prompt get different rewards. Set it to 8, for example."
        )
    if not (args.reward.remote_url or args.train.agent_func_path or args.reward.model_name_or_path):
        faults.append(
            "--reward.remote_url none: must be given, or there are no rewards to learn from. Set it to the file or "
            "URL of a reward function, or set --train.agent_func_path or --reward.model_name_or_path."
        )
    if args.data.max_images_per_prompt > 0:
        faults.append(
            f"--data.max_images_per_prompt {args.data.max_images_per_prompt}: must be 0, because the difficulty "
            "estimator reads text only. Train without images, or with another advantage estimator."
        )
    # In a shared placement group each model takes 0.2 of a GPU; the estimator has to fit into what is left of one.
    tenants = [args.vllm.num_engines and not args.train.async_enable, args.algo.kl.init_coef > 0]
    tenants.append(not (args.reward.remote_url or args.train.agent_func_path))
    free = round(1 - 0.2 * (1 + sum(map(bool, tenants))), 1)
    if args.train.colocate_all and cfg.estimator.num_gpus > free:
        faults.append(
            f"--depo.estimator.num_gpus {cfg.estimator.num_gpus}: must be at most {free} with --train.colocate_all, "
            "because the other models take the rest of each GPU. Lower it; 0.1 is enough for a small encoder."
        )
    # With dynamic batches OpenRLHF rounds the optimizer steps of a batch down, here to none: it would roll out and
    # never train. With fixed micro-batches it accumulates over several batches instead.
    if args.train.dynamic_batch_enable and batch * group < args.train.batch_size:
        faults.append(
            f"--train.batch_size {args.train.batch_size}: must be at most {batch * group} with "
            f"--train.dynamic_batch_enable, the responses of one batch (--rollout.batch_size {batch} * "
            f"--rollout.n_samples_per_prompt {group}), or nothing is ever trained. Lower it, or raise those."
        )
    return faults
