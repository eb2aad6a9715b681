"""The one long launch that the end-to-end tests look at, run once."""

from pathlib import Path

import pytest
from stack import WARMUP, Launch, base_flags, launch


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items):
    """Mark everything in this folder: it is end to end. Tests of one file, or of the long launch, share a worker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.xdist_group("depo_run" if "depo_run" in item.fixturenames else item.path.name))


@pytest.fixture(scope="session")
def depo_run(tmp_path_factory) -> Launch:
    """DEPO switched on: 20 steps with a warm-up of 4 and a checkpoint after steps 8 and 16."""
    out = tmp_path_factory.mktemp("depo run")
    flags = base_flags(out, "--ckpt.save_steps", "8", "--depo.filter.warmup_steps", str(WARMUP))
    run = launch(out, flags)
    assert run.status == 0, run.output[-5000:]
    return run
