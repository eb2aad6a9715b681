"""The actors that play OpenRLHF's trainer in test_startup.py; a module of its own, for Ray's workers import it."""

import importlib.util
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from depo_plugin import hooks
from depo_plugin.remote import handle as remote_handle

POOL, BATCH, GROUP = 24, 4, 4
OPENRLHF = Path(importlib.util.find_spec("openrlhf").origin).parent


class Site:
    """An actor of OpenRLHF's whose constructor runs the hook of some sites; late: seconds until it begins."""

    def __init__(self, args, sites, late=0.0, **parts):
        time.sleep(late)
        for site, path in sites.items():
            hooks.attach(args, site, str(path))
        vars(self).update(parts)


class Prompts:
    """A pool; prompt i is "prompt i", its label "label i"."""

    def __len__(self):
        return POOL

    def __getitem__(self, i):
        return "source", f"prompt {i}", f"label {i}", None

    def collate_fn(self, items):
        return tuple(list(column) for column in zip(*items, strict=True))


class Process:
    """A process of OpenRLHF's: calls by name, in its own copy of hooks. What it logs at warning level is kept."""

    def __init__(self, args, name):
        self.args, self.said = args, []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())
        logging.getLogger("openrlhf").addHandler(handler)
        remote_handle.actor_name = lambda: name

    def prepare(self):
        dataset = Prompts()
        inner = SimpleNamespace(dataset=dataset, collate_fn=dataset.collate_fn)
        path = OPENRLHF / hooks.SITES["prepare_datasets"]
        self.loader, _ = hooks.wrap_loader(self.args, inner, 60, str(path))

    def attach(self, site):
        hooks.attach(self.args, site, str(OPENRLHF / hooks.SITES[site]))

    def load(self, step):
        hooks.load(self.args, {"global_step": step})

    def draw(self):
        """Return the prompts of the next batch."""
        batch = []
        while len(batch) < BATCH:
            try:
                _, prompts, _, _ = next(self.loader)
                batch += prompts
            except StopIteration:
                iter(self.loader)
        return batch

    def train(self, batch, step):
        """Take the training step of a batch whose policy solves i % 5 of 4 of prompt i; return its status."""
        numbers = [int(prompt.split()[1]) for prompt in batch for _ in range(GROUP)]
        rewards = [float(place % GROUP < i % (GROUP + 1)) for place, i in enumerate(numbers)]
        experience = SimpleNamespace(
            index=list(range(len(numbers))),
            prompts=[f"prompt {i}" for i in numbers],
            labels=[f"label {i}" for i in numbers],
            rewards=torch.tensor(rewards),
            scores=None,
            action_log_probs=torch.full((len(numbers), 1), -1.0),
            action_mask=torch.ones(len(numbers), 1, dtype=torch.bool),
        )
        status = {}
        hooks.observe(self.args, [experience], step)
        hooks.log(self.args, status, step)
        return status

    def warnings(self):
        """Return what was logged at warning level."""
        return self.said
