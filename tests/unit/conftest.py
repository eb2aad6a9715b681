"""What unit tests share: the pristine releases, and a real Ray of our own with the estimator's actor on it.

All tests of a module share one actor, because it takes seconds to start; each counts from the updates it finds.
"""

import os
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

from depo_plugin import hooks
from depo_plugin.commands import patching
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import handle as remote_handle

ROOT = Path(__file__).resolve().parents[2]


def pytest_terminal_summary(terminalreporter):
    """Print what each release of OpenRLHF passed: tests that are run for each of them."""
    releases = list(patching.releases())
    rows = defaultdict(dict)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            found = re.search(r"::(test_\w+)\[(\d+\.\d+\.\d+)(?:-.*)?\]$", report.nodeid)
            if found and found[2] in releases:
                rows[found[1]][found[2]] = outcome  # of several variants the worst: it comes last
    if rows:
        terminalreporter.section("Releases of OpenRLHF")
        width = max(map(len, rows))
        terminalreporter.write_line(" " * width + "".join(f"{release:>10}" for release in releases))
        for name, row in sorted(rows.items()):
            terminalreporter.write_line(name.ljust(width) + "".join(f"{row.get(one, '-'):>10}" for one in releases))


@pytest.fixture(scope="module", params=list(patching.releases()))
def pristine(request):
    """A folder with the release as it is on PyPI. scripts/test.sh puts it there."""
    folder = Path(sys.prefix) / "openrlhf-releases" / request.param
    assert (folder / "openrlhf").is_dir(), f"{folder} is missing: run bash scripts/test.sh once"
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray of our own, whose workers find this checkout. A short path: Ray's sockets take at most 107 characters."""
    import ray

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="depo-ray-") as folder:
        paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
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
    import remote_run
    import tiny_encoder

    folder = tmp_path_factory.mktemp("remote")
    return remote_run.arguments(tiny_encoder.write(folder / "encoder"), folder / "ckpt")


@pytest.fixture(scope="module")
def actor(cluster, args):
    """The estimator's actor of this module's tests."""
    return remote_actor.create(args, args.rollout.n_samples_per_prompt, hooks._snapshot_root(args))


@pytest.fixture
def handle(actor):
    """A new handle of this job's estimator, found by its name, as another process finds it."""
    from remote_run import DEADLINE_S

    return remote_handle.connect(DEADLINE_S)


@pytest.fixture
def process(monkeypatch, actor, handle):
    """A process of hooks that reaches the estimator through `handle`."""
    monkeypatch.setattr(hooks, "_process", hooks.Process(driver_actor=actor, handle=handle))
    return hooks._process


@pytest.fixture
def start(cluster, monkeypatch, request):
    """start(args): the actor and a handle of one more estimator, named after the test and killed at its end."""
    import ray
    from remote_run import DEADLINE_S

    actors = []
    monkeypatch.setattr(remote_handle, "actor_name", lambda: request.node.name)

    def start(args):
        actors.append(remote_actor.create(args, args.rollout.n_samples_per_prompt, hooks._snapshot_root(args)))
        return actors[-1], remote_handle.connect(DEADLINE_S)

    yield start
    for made in actors:
        ray.kill(made)
