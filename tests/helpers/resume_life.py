"""One life of the run that test_resume.py kills again and again: `python resume_life.py FOLDER ENCODER STEPS [PAUSE]`.

Real are the loader, the estimator's actor, Ray, and OpenRLHF's own saving, rotation and loading (BasePPOTrainer with
our calls in it, DeepspeedStrategy, a DeepSpeed engine). The policy is one weight, the number of the step; rewards are
recorded: a function of prompt and step. Each step's prompts go to FOLDER/drawn.jsonl.

PAUSE, such as `global_step6:ours`, is where this life makes the file FOLDER/paused and waits to be killed: "ours", in
the middle of the estimator's save of that tag; "between" that and OpenRLHF's; "theirs", in the middle of OpenRLHF's.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ray

POOL, BATCH, GROUP, EVAL_STEPS = 90, 20, 4, 4
EVALUATIONS = {4: 0.3, 8: 0.5, 12: 0.4, 16: 0.6}  # by step; the third is no best one


def recorded(prompt: str, step: int) -> float:
    """Return the pass rate that this prompt has at this step."""
    digest = hashlib.blake2b(f"{prompt} {step}".encode(), digest_size=4).digest()
    return round(GROUP * int.from_bytes(digest, "big") / 2**32) / GROUP


class Prompts:
    """The interface of OpenRLHF's PromptDataset."""

    def __len__(self):
        return POOL

    def __getitem__(self, i):
        return f"source {i % 2}", f"{i}+{7 * i}=", str(8 * i), None


def say(text: str) -> None:
    """Tell the test."""
    print(f"LIFE {text}", flush=True)


def stop(said: str) -> None:
    """Wait to be killed."""
    Path(said).touch()
    time.sleep(600)


def stop_in_save(host, said: str) -> None:
    """In the actor: stop in the next save when its file is written and not yet renamed."""
    sync = os.fsync

    def then_stop(descriptor):
        sync(descriptor)
        stop(said)

    os.fsync = then_stop


class Policy:
    """The policy's one rank, as OpenRLHF's actor group shows it."""

    def __init__(self, strategy, actor, root: Path, pause: str):
        import deepspeed
        import torch

        self.strategy, self.actor, self.root, self.pause = strategy, actor, root, pause
        model = torch.nn.Linear(1, 1)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            config=strategy.get_ds_train_config(max_norm=1.0),
            dist_init_required=False,
        )

    def async_run_method(self, method_name: str, **arguments):
        """Run a method; return the references that OpenRLHF waits for."""
        return [ray.put(getattr(self, method_name)(**arguments))]

    def save_checkpoint(self, tag, client_states, metric_value, metric_key):
        """Do what PolicyModelActor.save_checkpoint does."""
        said = str(self.root / "paused")
        if self.pause == f"{tag}:between":
            stop(said)
        if self.pause == f"{tag}:theirs":
            self.engine.checkpoint_engine.save = lambda *_, **__: stop(said)
        args = self.strategy.args.ckpt
        root = os.path.join(args.path, "_actor")
        metric = {"metric_value": metric_value, "metric_key": metric_key}
        self.strategy.save_ckpt(self.engine, root, tag, args.max_num, args.max_mem, client_states, **metric)

    def get_checkpoint_states(self):
        """Do what PolicyModelActor does on its start and in the method of this name."""
        _, states = self.strategy.load_ckpt(self.engine, os.path.join(self.strategy.args.ckpt.path, "_actor"))
        return states


def arguments(folder: Path, encoder: str) -> SimpleNamespace:
    """Return OpenRLHF's arguments, as far as the parts of this run read them."""
    from depo_plugin.settings import config

    args = SimpleNamespace(
        train=SimpleNamespace(seed=3, num_episodes=99, max_epochs=1, batch_size=BATCH * GROUP),
        rollout=SimpleNamespace(n_samples_per_prompt=GROUP, vllm_generate_batch_size=BATCH),
        ckpt=SimpleNamespace(path=str(folder / "checkpoints"), output_dir=str(folder / "model"), save_steps=1),
        logger=SimpleNamespace(logging_steps=1),
        ds=SimpleNamespace(use_universal_ckpt=False),
        algo=SimpleNamespace(dynamic_filtering_enable=False),
    )
    vars(args.ckpt).update(max_num=3, max_mem=float("inf"), load_enable=True)
    settings = {
        "estimator.model": encoder,
        "estimator.dtype": "fp32",
        "estimator.lr": 5e-3,
        "estimator.timeout_s": 600.0,
    }
    settings |= {"filter.rule": "utility", "filter.min_utility": 0.8, "filter.epsilon": 0.2, "filter.warmup_steps": 2}
    args.depo = config.to_namespace(config.load_config(None, settings))
    args.depo.enabled, args.depo.shadow = True, False
    return args


def check_loaded(args, actor, loader, states: dict) -> None:
    """What was loaded is what had been saved, bit for bit: the loader's state and all that the estimator is."""
    from tiny_encoder import assert_same_state

    from depo_plugin.estimator import checkpoint

    assert loader.state_dict() == states["data_loader_state_dict"]
    tag = (Path(args.ckpt.path) / "_actor" / "latest").read_text()
    loaded = ray.get(actor.__ray_call__.remote(lambda host: host.estimator.state_dict()))
    assert_same_state(loaded, checkpoint.load(Path(args.ckpt.path) / "depo" / tag))


def main() -> None:
    """Go on from the newest checkpoint there is, up to the step asked for."""
    folder, encoder, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    pause = sys.argv[4] if len(sys.argv) > 4 else ""
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100_000_000)
    from depo_plugin import hooks
    from depo_plugin.estimator.backends import deepspeed_strategy
    from depo_plugin.messages import Label
    from depo_plugin.remote import actor as remote_actor

    args = arguments(folder, encoder)
    actor = remote_actor.create(args, GROUP, hooks._snapshot_root(args))
    from openrlhf.trainer.ppo_trainer import BasePPOTrainer

    class Trainer(BasePPOTrainer):
        """What OpenRLHF's trainers save and load with."""

        def __init__(self, args, policy):
            self.args, self.actor_model_group, self.critic_model_group = args, policy, None
            self.wandb_logger = self.tensorboard_logger = None
            self.best_eval_metric_value, self.best_eval_metric_key = float("-inf"), ""
            self._latest_eval_metric_value = None

    policy = Policy(deepspeed_strategy(args), actor, folder, pause)
    trainer = Trainer(args, policy)
    inner = SimpleNamespace(
        dataset=Prompts(), collate_fn=lambda items: tuple(map(list, zip(*items, strict=True))), num_workers=0
    )
    loader, _ = hooks.wrap_loader(args, inner, steps, __file__)

    states = trainer.init_checkpoint_states()
    trainer.restore_best_checkpoint_state(states)
    done = states["global_step"]
    if done:
        loader.load_state_dict(states["data_loader_state_dict"])
        check_loaded(args, actor, loader, states)
    updates = ray.get(actor.__ray_call__.remote(lambda host: host.estimator.updates))
    say(json.dumps({"step": done, "updates": updates, "weight": policy.engine.module.weight.item()}))

    handle = hooks._handle(args)
    iterator = iter(loader)
    for step in range(done + 1, steps + 1):
        batch = []
        while len(batch) < BATCH:
            try:
                batch.append(next(iterator))
            except StopIteration:
                iterator = iter(loader)  # the next episode
        pairs = [(prompts[0], labels[0]) for _, prompts, labels, _ in batch]
        with (folder / "drawn.jsonl").open("a") as drawn:
            drawn.write(json.dumps([step, [prompt for prompt, _ in pairs]]) + "\n")
        say(f"drawn {step}")
        rates = [recorded(prompt, step) for prompt, _ in pairs]
        groups = [Label(*pair, y, 0.25 + y / 2, GROUP, 0 < y < 1) for pair, y in zip(pairs, rates, strict=True)]
        assert handle.wait(handle.judge(groups)) is not None
        handle.learn()
        policy.engine.module.weight.data.fill_(step)
        if pause in (f"global_step{step}:ours", f"best_global_step{step}:ours"):
            ray.get(actor.__ray_call__.remote(stop_in_save, str(folder / "paused")))
        state = {"episode": 0, "global_step": step, "total_consumed_prompts": step * BATCH}
        state["data_loader_state_dict"] = loader.state_dict()
        trainer.save_logs_and_checkpoints(step, {}, state)
        if step in EVALUATIONS:
            trainer.save_best_checkpoint({"eval_pass1": EVALUATIONS[step]}, step, state)
    say("done")
    ray.shutdown()


if __name__ == "__main__":
    main()
