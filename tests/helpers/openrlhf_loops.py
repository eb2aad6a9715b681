"""OpenRLHF's own loops, compiled from its files without importing vLLM. root: another release's folder.

drawing      SamplesGenerator.generate_samples and _collect_prompt_batch
training     PPOTrainer.fit and, in asynchronous training, GenerateSamplesActor.fit
"""

import ast
import copy
import functools
import importlib.util
import logging
import math
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import torch

FRESH = {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "data_loader_state_dict": {}}


def _source(root, *parts):
    package = root / "openrlhf" if root else Path(importlib.util.find_spec("openrlhf").origin).parent
    return package.joinpath(*parts)


def _compile(nodes, names):
    exec(compile(ast.Module(nodes, []), "openrlhf", "exec"), names)
    return names


@functools.cache
def _drawing_code(root):
    """_collect_prompt_batch and SamplesGenerator."""
    wanted = ("_collect_prompt_batch", "SamplesGenerator")
    tree = ast.parse(_source(root, "trainer", "ppo_utils", "samples_generator.py").read_text())
    names = vars(typing) | {"torch": torch, "Experience": object, "logger": logging.getLogger("openrlhf")}
    _compile([node for node in tree.body if getattr(node, "name", "") in wanted], names)
    return [names[name] for name in wanted]


class Bar:
    """Stands where OpenRLHF makes its progress bar."""

    made: typing.ClassVar[list] = []

    def __init__(self, iterable, desc, initial):
        self.total, self.initial, self.n = len(iterable), initial, initial
        self.made.append(self)

    def update(self, n):
        self.n += n

    def close(self):
        pass


@functools.cache
def _training_loop(root, file, owner):
    (node,) = [
        n for n in ast.parse(_source(root, "trainer", file).read_text()).body if getattr(n, "name", "") == owner
    ]
    (loop,) = [n for n in node.body if getattr(n, "name", "") == "fit"]
    return _compile([loop], {"tqdm": Bar, "time": time, "logger": logging.getLogger("openrlhf.test")})["fit"]


def prompt_dataset(count):
    """OpenRLHF's own PromptDataset over `count` rows."""
    spec = importlib.util.spec_from_file_location("prompts", _source(None, "datasets", "prompts_dataset.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = SimpleNamespace(input_key="prompt", label_key="label", apply_chat_template=False)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), is_rank_0=lambda: False)
    rows = [{"prompt": f"prompt {i}", "label": f"label {i}", "datasource": f"source {i % 2}"} for i in range(count)]
    return module.PromptDataset(rows, None, strategy)


def generator(loader, rollout_batch_size, generate_batch_size=None, accept=None, root=None):
    """OpenRLHF's SamplesGenerator with one sample a prompt, whose rollouts come back at once.

    accept: whether dynamic filtering keeps a prompt's group; None: it is off.
    """
    collect, base = _drawing_code(root)

    class Generator(base):
        def _generate_vllm(self, dataloader_iter, num_prompts, dynamic_filtering, **kwargs):
            prompts, _, _, exhausted = collect(dataloader_iter, num_prompts)
            if not prompts:
                return [], 0, True
            todo, accepted, consumed = list(prompts), [], len(prompts)
            while todo:
                prompt = todo.pop(0)
                if accept is None or accept(int(prompt.split()[1])):
                    accepted.append(prompt)
                    continue
                loader.refund(1)
                replacement, _, _, exhausted = collect(dataloader_iter, 1)
                todo += replacement
                consumed += len(replacement)
            return accepted, consumed, exhausted

    rollout = SimpleNamespace(
        batch_size=rollout_batch_size, n_samples_per_prompt=1, vllm_generate_batch_size=generate_batch_size
    )
    args = SimpleNamespace(
        rollout=rollout,
        vllm=SimpleNamespace(enable_sleep=False),
        algo=SimpleNamespace(dynamic_filtering_enable=accept is not None),
    )
    return Generator(SimpleNamespace(args=args), loader, None, None, [])


class Run(typing.NamedTuple):
    """What a training loop did: batches of prompt numbers by episode, what it saved after each step, its bars."""

    trained: list
    saved: list
    bars: list


def fit(loader, generator, episodes, start=FRESH, after_step=lambda: None, asynchronous=False, root=None):
    """Let OpenRLHF's loop train so many episodes, from what it saved (start); rollouts are trained as they come.

    asynchronous: the loop of the process that makes the rollouts.
    """
    run = Run([[] for _ in range(episodes)], [], [])

    def step(samples, states):
        run.trained[states["episode"]].append([int(prompt.split()[1]) for prompt in samples])
        run.saved.append(copy.deepcopy(states | {"global_step": len(run.saved) + start["global_step"] + 1}))
        after_step()

    trainer = SimpleNamespace(
        args=SimpleNamespace(
            train=SimpleNamespace(num_episodes=episodes),
            eval=SimpleNamespace(steps=math.inf),
            algo=SimpleNamespace(dynamic_filtering_enable=False),
        ),
        prompts_dataloader=loader,
        samples_generator=generator,
        generate_kwargs={},
        wandb_logger=None,
        tensorboard_logger=None,
    )
    Bar.made = run.bars
    if asynchronous:
        if start["global_step"]:
            loader.load_state_dict(start["data_loader_state_dict"])
        trainer._should_eval = lambda step: False
        trainer._partial_rollout = True  # no lock around the rollouts
        trainer.rollout_slots = SimpleNamespace(get=lambda block: 0, put=lambda step, block: None)
        trainer.rollout_queue = SimpleNamespace(put=lambda row, block: row == "done" or step(*row[:2]))
        loop = _training_loop(root, "ppo_trainer_async.py", "GenerateSamplesActor")
        loop(trainer, start["episode"], start["total_consumed_prompts"])
    else:
        held = []
        trainer.init_checkpoint_states = lambda: start
        trainer.restore_best_checkpoint_state = lambda states: None
        trainer.broadcast_to_vllm = lambda: None
        trainer.train_step = lambda samples, step: (held.append(samples) or {}, step + 1)
        trainer.save_logs_and_checkpoints = lambda number, status, states: step(held.pop(), states)
        _training_loop(root, "ppo_trainer.py", "PPOTrainer")(trainer)
    return run
