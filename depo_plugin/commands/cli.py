"""`depo`: one module of `depo_plugin.commands` per command, imported only when that command runs.

A command module has `add_arguments(parser)` and `run(args) -> int` (0 done, 1 refused or failed, 2 wrong usage);
its docstring is the text of `depo COMMAND --help`.
"""

import argparse
import sys
from importlib import import_module

from depo_plugin import __version__

# Command (also the name of its module) -> its line in `depo --help`.
COMMANDS = {
    "backtest": "predict the groups of a log, then reveal them: would DEPO have helped?",
    "doctor": "check a launch on this machine before it starts",
    "embed": "embed a launch's prompts ahead of the run",
    "score": "write what an estimator's checkpoint believes of each prompt's pass rate",
    "route": "send each request to a small or a large model, by its difficulty",
    "config": "print the effective DEPO settings",
    "patch": "put the DEPO call sites into OpenRLHF, check them, take them out",
    "report": "write a page with figures about one run or several",
    "watch": "show a run in progress in the terminal",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="depo", description="DEPO for OpenRLHF", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"openrlhf-depo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # The options before a command take no value, so the first other word is the command.
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            module = import_module(f"depo_plugin.commands.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
