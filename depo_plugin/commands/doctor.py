"""Check a launch with DEPO on this machine, before a minute of the cluster is spent.

  depo doctor -- python3 -m openrlhf.cli.train_ppo_ray ... --advantage_estimator depo
  depo doctor --json -- ray job submit ... -- python3 -m openrlhf.cli.train_ppo_ray ...

Everything after the first -- is the launch's own command line. Run this in the launch's folder, with its Python. One
line per check says OK, WARN or FAIL, and how to mend it: the copy of OpenRLHF, flags (through OpenRLHF's own parser
and validation), the data set (a row through the chat template), the reward (called once on that row), GPUs, CPUs, the
checkpoint folder and its disk, the encoder and its speed. Nothing is trained, and Ray is not started.

Exit status: 0 if nothing fails, 1 if a check fails, 2 if the options are wrong.
"""

import argparse
import json
import sys
from dataclasses import asdict

from depo_plugin.commands import checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON list of checks")
    parser.add_argument("launch", nargs="+", metavar="COMMAND", help="after --: the launch's own command line")


def run(args: argparse.Namespace) -> int:
    """Run `depo doctor` and return the exit status."""
    flags = checks.flags_of(args.launch)
    if flags is None:
        print(
            f"depo doctor: after --, give the launch's command line, with {checks.TRAINER} or train_ppo_ray.py in it.",
            file=sys.stderr,
        )
        return 2
    found = []
    for check in checks.all_of(flags):
        found.append(check)
        if not args.json:
            print(f"{check.status:<5} {check.name:<9} {check.said}", flush=True)
            if check.fix:
                print(f"{'':<15} fix: {check.fix}", flush=True)
    if args.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
    return int(any(check.status == checks.FAIL for check in found))
