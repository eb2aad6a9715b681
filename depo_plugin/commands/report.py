"""Write one page about a run, or about several side by side: what the filter did, and how good its predictions were.

The summary that stands on top of the page is printed, too.

  depo report runs/tiny-depo                    write report/report.html beside the run's metrics.jsonl
  depo report runs/a runs/b --out compared      write compared/report.html with both runs in each figure

RUN is a folder with depo/metrics.jsonl in it, or in exactly one folder below it. The page needs no network; its
figures lie beside it as PNG files. It can be written while a run goes on.
Needs: pip install 'openrlhf-depo[report]'

Exit status: 0 if written, 1 if a RUN has no data or a package is missing, 2 if the options are wrong.
"""

import argparse
import sys
from pathlib import Path

EXTRA = "pip install 'openrlhf-depo[report]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    text = "folder to write to (default: report beside metrics.jsonl, for several runs ./depo-report)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Run `depo report` and return the exit status."""
    try:
        from depo_plugin.report import page
    except ModuleNotFoundError as error:
        print(f"depo report: the package {error.name} is missing. Run: {EXTRA}", file=sys.stderr)
        return 1
    from depo_plugin.report.numbers import Numbers
    from depo_plugin.report.runs import NoRunError, RunFiles, find, names_of
    from depo_plugin.report.summary import sentences

    try:
        folders = [find(path) for path in args.runs]
        runs = []
        for folder, name in zip(folders, names_of(args.runs), strict=True):
            files = RunFiles(folder)
            files.update()
            if not files.steps and not len(files.groups):
                raise NoRunError(f"{folder}: metrics.jsonl and groups.jsonl have no step yet.")
            runs.append(Numbers(files, name))
    except (NoRunError, OSError) as error:
        print(f"depo report: {error}", file=sys.stderr)
        return 1
    out = args.out or (folders[0] / "report" if len(runs) == 1 else Path("depo-report"))
    try:
        path = page.write(runs, out)
    except OSError as error:
        print(f"depo report: {out} cannot be written ({error}). Name another folder: --out DIR", file=sys.stderr)
        return 1
    for one in runs:
        print(f"{one.name}:")
        for sentence in sentences(one):
            print(f"  {'[Warning] ' if sentence.warning else ''}{sentence.text}")
    print(f"\n{path}")
    return 0
