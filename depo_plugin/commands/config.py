"""Print the DEPO settings that a launch with the same file and flags would have.

  depo config                                    the defaults
  depo config --config my.yaml                   a file's, completed by the defaults
  depo config --config depo_paper                a shipped preset's
  depo config --depo.filter.low 0.2 > my.yaml    flags win over the file; the output is a file again

Exit status: 0 done, 2 where settings are impossible: all faults, one line each.
"""

import argparse
import json
import sys

from depo_plugin.settings import config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `depo config`: a launch's own --depo.* flags, and two more."""
    parser.add_argument("--config", dest="depo.config", metavar="FILE", help="the same as --depo.config")
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    config.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `depo config`; returns the exit status."""
    try:
        cfg = config.load_config(getattr(args, "depo.config"), config.overrides_from_namespace(args))
    except config.ConfigError as err:
        print(err, file=sys.stderr)
        return 2
    text = json.dumps(config.to_dict(cfg), indent=2) + "\n" if args.json else config.to_yaml(cfg)
    print(text, end="")
    return 0
