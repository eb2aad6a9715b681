"""A run with the estimator's real actor: its arguments, its groups, what its processes say, and waiting for them."""

import logging
import os
import time
from pathlib import Path

import numpy as np
import ray
from depo_launch import nested
from numbered_pool import ACCEPT_ALL, inner_loader, number, stream
from ray.exceptions import RayError
from rollouts import micro_batch

from depo_plugin import hooks
from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.messages import Label
from depo_plugin.settings import config

BATCH, GROUP, POOL = 4, 4, 24
PROMPTS = [f"{i}+{i * 7}=" for i in range(6)]
ANSWERS = [str(i * 8) for i in range(6)]
DEADLINE_S = 120  # how long anything may take on a busy machine; most of it takes seconds
ANSWERS_AGAIN = "DEPO: the difficulty estimator answers again; prompts are filtered as before."


def until(condition, pause_s=0.2):
    """Call condition() until it returns something true, for DEADLINE_S at most, and return that."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain for {condition.__qualname__}"
        time.sleep(pause_s)
    return found


def arguments(encoder, root, **settings):
    """OpenRLHF's arguments, as far as the estimator's actor and the hooks of a step read them."""
    cfg = config.load_config(None, {"estimator.model": encoder, "estimator.lr": 1e-3} | settings)
    args = nested(
        {
            "algo.advantage.estimator": "group_norm",
            "algo.dynamic_filtering_enable": False,
            "train.seed": 3,
            "train.agent_func_path": None,
            "ckpt.path": str(root),
            "ckpt.output_dir": str(Path(root).with_name("model")),
            "ds.use_universal_ckpt": False,
            "reward.remote_url": "reward.py",
            "rollout.n_samples_per_prompt": GROUP,
        }
    )
    args.depo = config.to_namespace(cfg)
    args.depo.shadow = False
    return args


def openrlhf_saved(args, tag, file="latest"):
    """Write what OpenRLHF writes beside its checkpoint `tag`: the tag's folder, and its name in `latest`."""
    folder = Path(args.ckpt.path) / "_actor" / tag
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / file).write_text(tag)


# ── Groups ──


def label(i, y, d=0.5):
    return Label(PROMPTS[i], ANSWERS[i], y, d, GROUP, 0 < y < 1)


def draw(loader):
    """The number of the loader's next prompt, over the ends of episodes."""
    try:
        return number(next(loader))
    except StopIteration:
        return number(next(iter(loader)))


def rolled_out(numbers):
    """The micro-batch of these prompts' groups. The policy solves i % 5 of 4 responses to prompt i."""
    rewards = [float(response < i % (GROUP + 1)) for i in numbers for response in range(GROUP)]
    made = micro_batch(range(len(rewards)), rewards, group_size=GROUP)
    made.prompts = [f"prompt {i}" for i in numbers for _ in range(GROUP)]
    made.labels = [f"label {i}" for i in numbers for _ in range(GROUP)]
    return made


# ── The estimator ──


def score(handle):
    return handle.score_async(PROMPTS, ANSWERS).result()


def learn(handle, *labels):
    """Take these labels through one step, as the hooks do; return its metrics, or None without an answer."""
    found = judged(handle, *labels)
    return None if found is None else found.metrics


def judged(handle, *labels):
    """The same; return the whole Judgement."""
    call = handle.judge(list(labels))
    if call is not None:
        handle.learn()
    return handle.wait(call)


def same(one, other):
    """Whether two Scores are equal."""
    return one.updates == other.updates and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)


def on(actor, function):
    """Call function(host) in the actor's process."""
    return ray.get(actor.__ray_call__.remote(function), timeout=DEADLINE_S)


def slow_down(actor, method, seconds, flag=None):
    """Let a method of the actor's estimator write `flag` and sleep before it does its work."""

    def patch(host):
        work = getattr(host.estimator, method)

        def slow(*args):
            if flag:
                Path(flag).write_text("")
            time.sleep(seconds)
            return work(*args)

        setattr(host.estimator, method, slow)

    on(actor, patch)


def restore(actor, *methods):
    """Give the actor's estimator its own methods back."""

    def patch(host):
        for method in methods:
            delattr(host.estimator, method)

    on(actor, patch)


def pid_of(actor):
    """The actor's process id; waits while Ray restarts it."""

    def pid():
        try:
            return on(actor, lambda host: os.getpid())
        except RayError:
            return None

    return until(pid)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ── A run ──


class Run:
    """A training run as OpenRLHF drives it: real loader, hooks and actor; the policy is rolled_out()'s."""

    def __init__(self, args):
        self.args, self.drawn, self.steps = args, [], []
        hooks._process.loader = DifficultyFilteredLoader(
            inner_loader(POOL),
            hooks._process.handle,
            config.FilterConfig(**ACCEPT_ALL),
            batch_size=BATCH,
            group_size=GROUP,
            seed=0,
            num_episodes=1000,
        )

    def step(self) -> dict:
        """Draw a batch, roll it out, send its groups, log; return the step's metrics without their prefix."""
        batch, number, status = [draw(hooks._process.loader) for _ in range(BATCH)], len(self.steps) + 2, {}
        hooks.observe(self.args, [rolled_out(batch)], number)
        hooks.log(self.args, status, number)
        self.drawn += batch
        self.steps.append({name.removeprefix("depo/"): value for name, value in status.items()})
        return self.steps[-1]

    def filters(self) -> bool:
        """Take a step; return whether its batch was planned with scores."""
        step = self.step()
        return step.get("kept") == BATCH and step["unscored"] == 0

    def assert_back(self, caplog):
        """After one warning: take steps until the estimator answers again, then prompts are filtered."""
        until(lambda: self.step() and len(warnings_of(caplog)) > 1)
        assert warnings_of(caplog)[1:] == [ANSWERS_AGAIN]
        assert self.filters()

    def assert_nothing_lost_or_doubled(self):
        """Every prompt of the pool in its turn: whatever became of the estimator, the stream goes on."""
        assert self.drawn == stream(POOL, 0, len(self.drawn))
        assert len(self.drawn) == BATCH * len(self.steps)
