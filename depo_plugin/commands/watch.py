"""Show a run in progress in the terminal: what the filter does, how good predictions are, what looks wrong.

  depo watch runs/tiny-depo            follow the run until Ctrl-C
  depo watch runs/tiny-depo --once     print one view and end

RUN is the run's folder, as for `depo report`; a run that has not written yet is waited for. Only what was added to the
files is read. In a pipe, a view is printed for each new step. Needs: pip install 'openrlhf-depo[report]'

Exit status: 0 when ended with Ctrl-C, or after --once; 1 if RUN holds several runs or a package is missing, and with
--once if there are no data yet; 2 if the options are wrong.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo watch`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="seconds between looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="print one view and end")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be from 0.1 to 3600 seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """Run `depo watch` and return the exit status."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        print(
            f"depo watch: the package {error.name} is missing. Run: pip install 'openrlhf-depo[report]'",
            file=sys.stderr,
        )
        return 1
    from depo_plugin.report.runs import NoRunError

    try:
        return _once(args, Console()) if args.once else _follow(args, Console())
    except KeyboardInterrupt:
        return 0
    except (NoRunError, OSError) as error:
        print(f"depo watch: {error}", file=sys.stderr)
        return 1


def _once(args: argparse.Namespace, console: "Console") -> int:
    from depo_plugin.report.live import view
    from depo_plugin.report.numbers import Numbers
    from depo_plugin.report.runs import NoRunError, RunFiles, find, names_of

    files = RunFiles(find(args.run_folder))
    if not files.update():
        raise NoRunError(f"{files.folder}: metrics.jsonl has no step yet.")
    console.print(view(Numbers(files, *names_of([args.run_folder])), time.time()))
    return 0


def _follow(args: argparse.Namespace, console: "Console") -> int:
    """Show the run until Ctrl-C (KeyboardInterrupt). On a terminal the view stays in place."""
    from rich.live import Live

    from depo_plugin.report.live import view
    from depo_plugin.report.numbers import Numbers
    from depo_plugin.report.runs import NoRunError, RunFiles, SeveralRunsError, find, names_of

    files = numbers = None
    waiting = f"Waiting: {args.run_folder} has no depo/metrics.jsonl with a whole step yet. Ctrl-C ends this."
    in_place = Live(waiting, console=console, auto_refresh=False) if console.is_terminal else None
    if in_place is None:
        print(waiting, flush=True)
    with in_place or contextlib.nullcontext():
        while True:
            if files is None:
                try:
                    files = RunFiles(find(args.run_folder))
                except SeveralRunsError:
                    raise
                except NoRunError:
                    pass
            new = files is not None and files.update()
            if files is not None and new:
                numbers = Numbers(files, *names_of([args.run_folder]))
            if numbers is not None and in_place is not None:
                in_place.update(view(numbers, time.time()), refresh=True)
            elif numbers is not None and new:
                console.print(view(numbers, time.time()))
                console.file.flush()
            time.sleep(args.interval)
