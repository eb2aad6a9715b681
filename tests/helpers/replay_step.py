"""Runs one real train_step on recorded rollouts; `python replay_step.py ROLLOUTS OUT -- FLAGS`, a test's helper.

The first call, when ROLLOUTS does not exist, generates them with vLLM and writes them. OUT gets the step's status and
the prompts that the loader gives out as status.json, and the trained weights. PYTHONPATH says which OpenRLHF runs.
"""

import itertools
import json
import runpy
import sys
from pathlib import Path

import openrlhf.utils
import ray
import torch

from depo_plugin import hooks

SEED = 5


class Parsed(Exception):
    """Carries the validated arguments out of OpenRLHF's train()."""


def parsed_args(flags):
    """Return the arguments that OpenRLHF's own parser and validation make of the flags; see tests/real_parser.py."""

    def stop(args):
        raise Parsed(args)

    get_strategy, is_initialized = openrlhf.utils.get_strategy, ray.is_initialized
    sys.argv = ["train_ppo_ray.py", *flags]
    openrlhf.utils.get_strategy, ray.is_initialized = stop, lambda: True
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        openrlhf.utils.get_strategy, ray.is_initialized = get_strategy, is_initialized


def build(args):
    """Return what the trainer is built from: strategy, tokenizer and prompt loader."""
    from openrlhf.trainer.ppo_trainer import prepare_datasets
    from openrlhf.utils.utils import get_tokenizer

    strategy = openrlhf.utils.get_strategy(args)
    tokenizer = get_tokenizer(args.actor.model_name_or_path, None, "left", strategy)
    torch.manual_seed(SEED)
    prompts, _, max_steps = prepare_datasets(strategy, tokenizer)
    return strategy, tokenizer, prompts, max_steps


def record(args, path: Path) -> None:
    """Generate one batch with vLLM and write its samples."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from openrlhf.trainer.ray import create_vllm_engines

    strategy, tokenizer, prompts, _ = build(args)
    model, max_len = args.actor.model_name_or_path, args.data.max_len
    settings = {"gpu_memory_utilization": 0.5, "remote_rm_url": args.reward.remote_url}
    engines = create_vllm_engines(1, 1, model, SEED, False, False, True, max_len, **settings)
    generator = SamplesGenerator(strategy, prompts, None, tokenizer, engines)
    samples, *_ = generator.generate_samples(
        max_new_tokens=args.rollout.max_new_tokens, max_len=max_len, temperature=1.0, top_p=1.0
    )
    torch.save(samples, path)
    for engine in engines:
        ray.kill(engine)


def replay(args, path: Path, out: Path) -> None:
    """Train on the recorded samples; write status and weights."""
    from openrlhf.trainer.ppo_trainer import BasePPOTrainer
    from openrlhf.trainer.ray.launcher import RayActorGroup
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    if hooks.enabled(args):
        hooks.start_estimator(openrlhf.utils.get_strategy(args), None)
    strategy, tokenizer, prompts, max_steps = build(args)
    drawn = [batch[1][0] for batch in itertools.islice(prompts, args.rollout.batch_size)]
    group = RayActorGroup(1, 1, PolicyModelActor, num_gpus_per_actor=1)
    ray.get(group.async_init_model_from_pretrained(strategy, args.actor.model_name_or_path, max_steps, None))
    trainer = BasePPOTrainer(strategy, group, None, None, None, None, tokenizer)
    samples = torch.load(path, weights_only=False)  # written by record(), in this test
    status, _ = trainer.train_step(samples, 1)
    ray.get(group.async_save_model())
    plain = {name: value for name, value in status.items() if not name.startswith(("timing/", "depo/"))}
    plain["drawn"] = drawn
    (out / "status.json").write_text(json.dumps(plain, sort_keys=True))


def main() -> None:
    """Record if there is nothing recorded, then replay."""
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    args = parsed_args(sys.argv[4:])
    ray.init()
    if not path.exists():
        record(args, path)
    replay(args, path, out)


if __name__ == "__main__":
    main()
