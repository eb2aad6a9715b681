"""The one long launch that the end-to-end tests look at, run once."""

from pathlib import Path

import pytest
from stack import WARMUP, Launch, base_flags, launch


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
