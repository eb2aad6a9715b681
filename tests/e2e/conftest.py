"""The one long launch that the end-to-end tests look at, run once."""

from pathlib import Path

import pytest
from stack import WARMUP, Launch, base_flags, launch
from xdist.scheduler import LoadScopeScheduling

LONG_LAUNCH = "test_depo.py", "test_route.py"  # the files that look at depo_run


class ByLaunch(LoadScopeScheduling):
    """Tests of one file share a worker, as with --dist loadfile, and those of the long launch, too: it is run once."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return "depo_run" if file.endswith(LONG_LAUNCH) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Called by pytest-xdist."""
    return ByLaunch(config, log)


def pytest_collection_modifyitems(items):
    """Mark everything in this folder: it is end to end."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def depo_run(tmp_path_factory) -> Launch:
    """DEPO switched on: 20 steps with a warm-up of 4 and a checkpoint after steps 8 and 16."""
    out = tmp_path_factory.mktemp("depo run")
    flags = base_flags(out, "--ckpt.save_steps", "8", "--depo.filter.warmup_steps", str(WARMUP))
    run = launch(out, flags)
    assert run.status == 0, run.output[-5000:]
    return run
