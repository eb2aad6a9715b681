"""Runs a script on a copy of OpenRLHF, in a process of its own: the test process must not import OpenRLHF itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in_copy(copy, *arguments):
    """`python ARGUMENTS` where openrlhf is the one in the folder `copy`; return the JSON of its last printed line."""
    paths = os.pathsep.join([str(copy), str(ROOT), str(ROOT / "tests/helpers")])
    env = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=copy, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
