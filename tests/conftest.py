"""What tests of several folders share: copies of the installed OpenRLHF, written by `depo patch`."""

import os

# Before torch is imported: small matrices on one thread; two that wait for each other are slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from depo_plugin.commands import cli


def _copy(tmp_path_factory, name, *options):
    folder = tmp_path_factory.mktemp(name)
    assert cli.main(["patch", "--target", str(folder), "--cpu", *options]) == 0
    return folder


@pytest.fixture(scope="session")
def patched_copy(tmp_path_factory):
    """A folder with an OpenRLHF that has the DEPO call sites and runs without a GPU."""
    return _copy(tmp_path_factory, "patched")


@pytest.fixture(scope="session")
def plain_copy(tmp_path_factory):
    """A folder with an OpenRLHF that runs without a GPU and knows nothing of DEPO."""
    return _copy(tmp_path_factory, "plain", "--no-seam")
