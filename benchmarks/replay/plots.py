"""The plots of a run, one file per pool and group size."""

from pathlib import Path

import numpy as np

from benchmarks.replay import report
from benchmarks.replay.judge import JUDGED_FROM, Played


def draw(played: list[Played], beside: Path) -> list[Path]:
    """Draw effective ratio, coverage, p̂ and p over steps, and calibration. Return the files, named after `beside`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for pool, group_size in report.settings_of(one.row for one in played):
        runs = [one for one in played if (one.row["pool"], one.row["group_size"]) == (pool, group_size)]
        figure, axes = pyplot.subplots(2, 2, figsize=(14, 10))
        seeds = sorted({one.row["seed"] for one in runs})
        figure.suptitle(f"{pool}, G = {group_size}, seeds {', '.join(map(str, seeds))}")
        for panel, draw_panel in zip(axes.flat, (_bars, _coverage, _lines, _calibration), strict=True):
            draw_panel(panel, runs)
        figure.tight_layout()
        path = beside.with_name(f"{beside.stem}-{pool}-G{group_size}.png")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _by_method(runs: list[Played]) -> dict[str, list[Played]]:
    found: dict[str, list[Played]] = {}
    for one in runs:
        found.setdefault(one.row["method"], []).append(one)
    return found


def _colour(name: str) -> str:
    return {"depo": "C1", "ideal": "C0", "oracle": "C0"}.get(name, "0.6")


def _bars(axes, runs):
    """Draw effective groups / groups rolled out by method: median over seeds, with a line from minimum to maximum."""
    methods = _by_method(runs)
    values = [[one.row["effective_ratio"] for one in found] for found in methods.values()]
    middle = np.array([np.median(found) for found in values])
    reach = np.array([[m - min(v), max(v) - m] for m, v in zip(middle, values, strict=True)]).T
    bars = axes.barh(list(methods), middle, xerr=reach, color=[_colour(name) for name in methods])
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.set(xlabel="effective groups / groups rolled out, after warm-up", xlim=(0, 1.08))


def _coverage(axes, runs):
    """Draw effective ratio against coverage, the share of learnable prompts that are trained in a pass."""
    for name, found in _by_method(runs).items():
        points = [(one.row["coverage"], one.row["effective_ratio"]) for one in found]
        points = [point for point in points if point[0] is not None]
        if points:
            x, y = np.median(points, axis=0)
            axes.plot(x, y, "o", color=_colour(name))
            axes.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="coverage: learnable prompts trained in a pass / met", ylabel="effective ratio", xlim=(0, 1.1))


def _lines(axes, runs):
    """Draw mean p̂ and mean p of the prompts scanned in each step (the paper's Figure 4), for the first seed."""
    for name in ("depo", "ideal"):
        if found := _by_method(runs).get(name):
            series = found[0].series
            axes.plot(series["predicted"], color=_colour(name), label=f"{name}: mean p̂ of scanned prompts")
            axes.plot(series["true"], color=_colour(name), ls="--", alpha=0.7, label=f"{name}: mean true pass rate")
    axes.axvline(JUDGED_FROM, color="0.7", lw=1)
    axes.set(xlabel=f"step, seed {runs[0].row['seed']}; judged from the line on", ylim=(0, 1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _calibration(axes, runs):
    """Draw the mean true pass rate against the mean p̂ in bins of p̂, over all seeds."""
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    axes.set_prop_cycle(color=["tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink"])
    for name, found in _by_method(runs).items():
        if found[0].calibration is None or name == "oracle":
            continue
        predicted, true, count = sum(one.calibration for one in found)
        some = count > 0
        colour = _colour(name) if name in ("depo", "ideal") else None  # None: the next colour of the cycle
        x, y = predicted[some] / count[some], true[some] / count[some]
        axes.plot(x, y, ".-", color=colour, lw=2 if name == "depo" else 1, label=name)
    axes.set(xlabel="mean p̂ of scanned prompts", ylabel="mean true pass rate", xlim=(0, 1), ylim=(0, 1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
