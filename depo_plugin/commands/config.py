"""Print the DEPO settings that a launch with the same file and flags would have.

  depo config                                    print the defaults
  depo config --config my.yaml                   print the settings of a file, and defaults for the rest
  depo config --config depo_paper                print the settings of a shipped preset
  depo config --depo.filter.low 0.2 > my.yaml    a flag overrides the file; the output can be used as a file

Exit status: 0 if done, 2 if the settings cannot be used (all faults are printed, one line each).
"""

import argparse
import json
import sys

from depo_plugin.settings import config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo config`: the --depo.* flags of a launch, and two more."""
    parser.add_argument("--config", dest="depo.config", metavar="FILE", help="the same as --depo.config")
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    config.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `depo config` and return the exit status."""
    try:
        cfg = config.load_config(getattr(args, "depo.config"), config.overrides_from_namespace(args))
    except config.ConfigError as err:
        print(err, file=sys.stderr)
        return 2
    text = json.dumps(config.to_dict(cfg), indent=2) + "\n" if args.json else config.to_yaml(cfg)
    print(text, end="")
    return 0
