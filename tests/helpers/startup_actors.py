"""The actors that play OpenRLHF's trainer in test_startup.py; a module of its own, because Ray's workers import it."""

import importlib.util
import logging
import time
from pathlib import Path

from numbered_pool import inner_loader
from remote_run import BATCH, POOL, draw, rolled_out

from depo_plugin import hooks, seam
from depo_plugin.remote import handle as remote_handle

OPENRLHF = Path(importlib.util.find_spec("openrlhf").origin).parent


class Site:
    """An actor of OpenRLHF's whose constructor runs the hook of some sites; late: seconds until it begins."""

    def __init__(self, args, sites, late=0.0, **parts):
        time.sleep(late)
        for site, path in sites.items():
            hooks.attach(args, site, str(path))
        vars(self).update(parts)


class Process:
    """A process of OpenRLHF's: calls by name, in its own copy of hooks. What it logs at warning level is kept."""

    def __init__(self, args, name):
        self.args, self.said = args, []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())
        logging.getLogger("openrlhf").addHandler(handler)
        remote_handle.actor_name = lambda: name

    def prepare(self):
        path = OPENRLHF / seam.SITES["prepare_datasets"]
        self.loader, _ = hooks.wrap_loader(self.args, inner_loader(POOL), 60, str(path))

    def attach(self, site):
        hooks.attach(self.args, site, str(OPENRLHF / seam.SITES[site]))

    def load(self, step):
        hooks.load(self.args, {"global_step": step})

    def draw(self):
        """Return the prompt numbers of the next batch."""
        return [draw(self.loader) for _ in range(BATCH)]

    def train(self, batch, step):
        """Take the training step of a batch of prompt numbers; return its status."""
        status = {}
        hooks.observe(self.args, [rolled_out(batch)], step)
        hooks.log(self.args, status, step)
        return status

    def warnings(self):
        """Return what was logged at warning level."""
        return self.said
