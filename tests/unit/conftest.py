"""A real Ray of our own and the estimator's actor on it, for the tests of remote.py and of faults.

Each module has one actor, for starting one takes seconds; its tests count from the updates they find.
"""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import handle as remote_handle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster():
    """A Ray of our own, whose workers find this checkout. A short path: Ray's sockets take at most 107 characters."""
    import ray

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="depo-ray-") as folder:
        paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """OpenRLHF's arguments of a run with the tiny encoder."""
    import tiny_encoder
    from test_remote import arguments

    folder = tmp_path_factory.mktemp("remote")
    return arguments(tiny_encoder.write(folder / "encoder"), folder / "ckpt")


@pytest.fixture(scope="module")
def actor(cluster, args):
    """The estimator's actor of this module's tests."""
    from test_remote import GROUP

    from depo_plugin import hooks

    return remote_actor.create(args, GROUP, hooks._snapshot_root(args))


@pytest.fixture
def handle(actor):
    """A new handle of this job's estimator, found by its name, as another process finds it."""
    from test_remote import DEADLINE_S

    return remote_handle.connect(DEADLINE_S)


@pytest.fixture
def process(monkeypatch, actor, handle):
    """A process of hooks whose way to the estimator is `handle`."""
    from depo_plugin import hooks

    fresh = SimpleNamespace(**vars(hooks._process) | {"driver_actor": actor, "handle": handle})
    monkeypatch.setattr(hooks, "_process", fresh)
    return fresh
