"""The report's figures: each is drawn for light and for dark pages, from the same numbers.

A figure is a function of a Canvas and the runs, and returns its message, one sentence that also is its alternative
text, or None if the runs do not have its data. Runs differ by colour and marker, kinds of lines by line style.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from depo_plugin.report.numbers import Numbers, Ratio
from depo_plugin.report.summary import number as plain
from depo_plugin.report.summary import percent, points, rate, short

WIDTH, DPI = 4.2, 200  # inches: text of 10 points is 11 px high on a phone, which shows it 340 px wide
PANELS = 6  # most data sources that are drawn


@dataclass(frozen=True)
class Theme:
    """Colours of a page. lines: told apart by people with any kind of colour vision (Okabe and Ito)."""

    name: str
    page: str
    ink: str
    faint: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#24292f", "#d0d7de", ("#0072b2", "#d55e00", "#00785a", "#b0508a", "#7a6000", "#444444")
)
DARK = Theme(
    "dark", "#161b22", "#e6edf3", "#3d444d", ("#56b4e9", "#f0a030", "#2ec4a0", "#e58fbf", "#f0e442", "#bbbbbb")
)
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")


class Canvas:
    """One figure to draw on, in the colours of a theme."""

    def __init__(self, theme: Theme):
        """Take the theme. axes() starts the figure."""
        self.theme = theme
        self.figure = Figure()

    def axes(self, rows: int = 1, columns: int = 1, height: float = 3.1, **options) -> list[Axes]:
        """Return rows x columns axes in a new figure of this height in inches."""
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        return list(self.figure.subplots(rows, columns, squeeze=False, **options).flat)

    def line(self, axes: Axes, run: Numbers, ratio: Ratio, color: int, style: int = 0, raw: bool = True) -> None:
        """Draw a ratio over the steps: smoothed, and single steps faintly."""
        smooth = ratio.smooth(run.window)
        if raw and run.window > 1:
            axes.plot(run.steps, ratio.raw(), color=self.color(color), alpha=0.28, lw=0.7)
        few = np.isfinite(smooth).sum() < 3
        marker = MARKERS[style] if few else ""
        axes.plot(run.steps, smooth, color=self.color(color), ls=STYLES[style], lw=1.9, marker=marker, ms=4)

    def color(self, number: int) -> str:
        """Return a line's colour."""
        return self.theme.lines[number % len(self.theme.lines)]

    def legend(self, axes: Axes, names: Sequence[str], runs: Sequence[Numbers]) -> None:
        """Name the kinds of lines (styles) above the axes and, if there are several, the runs (colours)."""
        several = len(runs) > 1
        entries = [
            (Line2D([], [], color=self.theme.ink if several else self.color(i), ls=STYLES[i], lw=1.9), name)
            for i, name in enumerate(names)
        ]
        if several:
            entries = entries if len(names) > 1 else []
            entries += [(Line2D([], [], color=self.color(i), lw=4), short(run.name, 20)) for i, run in enumerate(runs)]
        self.entries(axes, entries)

    def entries(self, axes: Axes, entries: Sequence[tuple]) -> None:
        """Put a legend above the axes."""
        if entries:
            handles, names = zip(*entries, strict=True)
            wide = max(map(len, names)) > 21
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 1 if wide else 2}
            axes.legend(handles, names, handlelength=2.2, columnspacing=1.2, borderaxespad=0.2, **place)

    def steps(self, axes: Axes, runs: Sequence[Numbers]) -> None:
        """Label the axis of steps, and shade the warm-up if there is one run."""
        axes.set_xlabel("Training step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(runs) == 1 and runs[0].warm_S.any():
            axes.axvspan(
                runs[0].steps[0] - 0.5,
                runs[0].steps[runs[0].warm_S][-1] + 0.5,
                color=self.theme.faint,
                alpha=0.45,
                lw=0,
            )


def _percents(axes: Axes, top: float | None = 1.0) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, top)


def _each(runs: Sequence[Numbers], say: Callable[[Numbers], str]) -> str:
    """Return what is said of each run, with its name if there are several."""
    if len(runs) == 1:
        return f"{say(runs[0])}."
    return "; ".join(f"{short(run.name)}: {say(run)}" for run in runs) + "."


def _known(ratio: Ratio) -> bool:
    return bool(np.isfinite(ratio.raw()).any())


# ── The figures ──


def outcome(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Prediction against outcome: how outcomes spread for each prediction."""
    found = [(run, run.calibration(run.ready_S)[0]) for run in runs]
    if not any(bins for _, bins in found):
        return None
    (axes,) = canvas.axes(height=3.4)
    axes.plot([0, 1], [0, 1], color=canvas.theme.ink, lw=1, ls=":")
    if len(runs) == 1:
        (run,) = runs
        chosen = run.in_steps(run.ready_S) & np.isfinite(run.p_N) & np.isfinite(run.y_N)
        edges = np.linspace(0, 1, 11), np.linspace(0, 1, 10)
        counts = np.histogram2d(run.p_N[chosen], run.y_N[chosen], bins=edges)[0]
        total = counts.sum(1, keepdims=True)
        share = np.where(total >= 5, counts / np.maximum(total, 1), np.nan)
        shades = LinearSegmentedColormap.from_list("shades", [canvas.theme.page, canvas.color(0)])
        mesh = axes.pcolormesh(*edges, share.T, cmap=shades, vmin=0)
        bar = canvas.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28, format=lambda value, _: f"{value:.0%}")
        bar.set_label("Share of the groups in a column")
        bar.outline.set_visible(False)
    entries = []
    for number, (run, bins) in enumerate(found):
        if bins:
            color = canvas.color(1 if len(runs) == 1 else number)
            style: dict[str, Any] = {
                "color": color,
                "marker": MARKERS[number % 6],
                "ms": 4.5,
                "lw": 1.6,
                "capsize": 2,
                "elinewidth": 0.9,
            }
            shift = 0.008 * (number - (len(runs) - 1) / 2)
            axes.errorbar(bins.predicted + shift, bins.observed, bins.spread, **style)
            name = "mean ± standard deviation" if len(runs) == 1 else short(run.name, 20)
            entries.append((Line2D([], [], color=color, marker=MARKERS[number % 6], ms=4.5, lw=1.6), name))
    entries.append((Line2D([], [], color=canvas.theme.ink, lw=1, ls=":"), "right on average"))
    canvas.entries(axes, entries)
    axes.set(xlabel="Predicted pass rate p̂", ylabel="Observed pass rate", xlim=(0, 1), ylim=(-0.02, 1.02))
    said = [run for run, bins in found if bins]

    def say(run: Numbers) -> str:
        bins = run.calibration(run.ready_S)[0]
        assert bins is not None
        return (
            f"groups predicted to pass {rate(bins.predicted[0])} of the time passed {rate(bins.observed[0])}, "
            f"those predicted to pass {rate(bins.predicted[-1])} passed {rate(bins.observed[-1])}"
        )

    return _each(said, say)


def calibration(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Calibration of p̂ and of V."""
    found = [(run, run.calibration(run.ready_S)) for run in runs]
    found = [(run, pair) for run, pair in found if pair[0] or pair[1]]
    if not found:
        return None
    (axes,) = canvas.axes(height=3.4)
    axes.plot([0, 1], [0, 1], color=canvas.theme.ink, lw=1, ls=":")
    for number, (_, pair) in enumerate(found):
        for kind, bins in enumerate(pair):
            if bins:
                color = canvas.color(kind if len(found) == 1 else number)
                style: dict[str, Any] = {
                    "color": color,
                    "marker": MARKERS[kind],
                    "ls": STYLES[kind],
                    "ms": 5,
                    "lw": 1.5,
                    "elinewidth": 1,
                }
                axes.errorbar(bins.predicted, bins.observed, 2 * bins.error, **style)
    canvas.legend(axes, ["pass rate (p̂)", "any signal (V)"], [run for run, _ in found])
    axes.set(xlabel="Predicted", ylabel="Observed, ± 2 standard errors", xlim=(0, 1), ylim=(-0.02, 1.05))
    names, texts = ("the predicted pass rate", "the predicted chance of a signal"), []
    for run, pair in found:
        parts = [f"{name} is off by {points(bins.off())}" for name, bins in zip(names, pair, strict=True) if bins]
        texts.append(f"{short(run.name)}: " * (len(runs) > 1) + " and ".join(parts) + " on average")
    return "; ".join(texts) + "."


def keep_rate(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Prompts rolled out, of those looked at."""
    if not any(_known(run.keep) for run in runs):
        return None
    (axes,) = canvas.axes()
    for number, run in enumerate(runs):
        canvas.line(axes, run, run.keep, number)
    canvas.legend(axes, [""], runs) if len(runs) > 1 else None
    _percents(axes, 1.03)
    axes.set_ylabel("Rolled out, of those looked at")
    canvas.steps(axes, runs)
    return _each(runs, lambda run: f"{percent(run.keep.over(run.ready_S))} of the prompts looked at were rolled out")


def signal(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Groups with a signal, with and without the filter."""
    if not any(_known(run.signal) for run in runs):
        return None
    (axes,) = canvas.axes()
    for number, run in enumerate(runs):
        canvas.line(axes, run, run.signal, number)
        canvas.line(axes, run, run.signal_without, number if len(runs) > 1 else 1, 1, raw=False)
    canvas.legend(axes, _with_without(runs), runs)
    _percents(axes, 1.03)
    axes.set_ylabel("Groups with a signal")
    canvas.steps(axes, runs)

    def say(run: Numbers) -> str:
        have, without = run.signal.over(run.ready_S), run.signal_without.over(run.ready_S)
        return f"{percent(have)} of the groups have a signal with the filter, {percent(without)} without it"

    return _each(runs, say)


def _with_without(runs: Sequence[Numbers]) -> list[str]:
    if all(run.shadow for run in runs):
        return ["with filter (estimate)", "without filter"]
    if any(run.shadow for run in runs):
        return ["with filter", "without filter"]
    return ["with filter", "without (estimate)"]


def reward(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Pass rate of all prompts, and of those that were rolled out."""
    if not any(_known(run.reward_all) or _known(run.reward) for run in runs):
        return None
    (axes,) = canvas.axes()
    for number, run in enumerate(runs):
        canvas.line(axes, run, run.reward_all, number)
        canvas.line(axes, run, run.reward, number if len(runs) > 1 else 1, 1, raw=len(runs) == 1)
    shadow = all(run.shadow for run in runs)
    canvas.legend(
        axes, ["all prompts", "with filter (estimate)"] if shadow else ["all (estimate)", "rolled out"], runs
    )
    axes.set(ylabel="Pass rate", ylim=(0, 1.03))
    canvas.steps(axes, runs)

    def say(run: Numbers) -> str:
        ends = [rate(run.reward_all.over(quarter)) for quarter in (run.quarters()[0], run.quarters()[-1])]
        return f"the pass rate of all prompts is {ends[0]} in the first quarter and {ends[1]} in the last"

    return _each(runs, say)


def sources(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Pass rate of all prompts of each data source."""
    names = {source.name: None for run in runs for source in run.sources()}
    if len(names) < 2:
        return None
    shown = list(names)[:PANELS]
    rows = (len(shown) + 1) // 2
    panels = canvas.axes(rows, 2, height=0.75 + 1.35 * rows, sharex=True, sharey=True)
    for axes, name in zip(panels, shown, strict=False):
        axes.set_title(short(name, 20), fontsize=9.5, loc="left", color=canvas.theme.ink)
        for number, run in enumerate(runs):
            if name in run.files.groups.sources:
                ratio = run.source_rates(run.files.groups.sources.index(name))
                smooth = ratio.smooth(max(1, len(run.steps) // 8) | 1)
                axes.plot(run.steps, smooth, color=canvas.color(number), ls=STYLES[number % 4], lw=1.9)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
        panels[len(shown) - 2].tick_params(labelbottom=True)
    canvas.figure.supxlabel("Training step", fontsize=10, color=canvas.theme.ink)
    canvas.figure.supylabel("Pass rate of all prompts (estimate)", fontsize=10, color=canvas.theme.ink)
    if len(runs) > 1:
        handles = [Line2D([], [], color=canvas.color(i), ls=STYLES[i % 4], lw=1.9) for i in range(len(runs))]
        canvas.figure.legend(handles, [short(run.name, 20) for run in runs], loc="outside upper left", ncols=2)

    def say(run: Numbers) -> str:
        parts = [
            f"{short(one.name)} {rate(one.first and one.first.value)} to {rate(one.last and one.last.value)}"
            for one in run.sources()
            if one.name in shown
        ]
        return "from first to last quarter, " + ", ".join(parts)

    return _each(runs, say)


def cost(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Responses and tokens that were paid for each group with a signal."""
    if not any(_known(run.rollouts) for run in runs):
        return None
    tokens = any(_known(run.tokens) for run in runs)
    panels = canvas.axes(1 + tokens, 1, height=4.2 if tokens else 3.1, sharex=True)
    for number, run in enumerate(runs):
        canvas.line(panels[0], run, run.rollouts, number)
        canvas.line(panels[0], run, run.rollouts_without, number if len(runs) > 1 else 1, 1, raw=False)
        if tokens:
            canvas.line(panels[1], run, run.tokens, number)
    canvas.legend(panels[0], _with_without(runs), runs)
    panels[0].set_ylabel("Responses per group\nwith a signal")
    panels[0].set_ylim(bottom=0)
    if tokens:
        panels[1].set_ylabel("Tokens per group\nwith a signal")
        panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panels[1].set_ylim(bottom=0)
        canvas.steps(panels[0], runs)
        panels[0].set_xlabel("")
    canvas.steps(panels[-1], runs)

    def say(run: Numbers) -> str:
        ready = run.ready_S
        text = f"a group with a signal costs {plain(run.rollouts.over(ready))} responses"
        if np.isfinite(run.rollouts_without.over(ready)):
            text += f", {plain(run.rollouts_without.over(ready))} without the filter"
        return text

    return _each(runs, say)


TIME = ("rollout", "training", "blocked")


def time(canvas: Canvas, runs: Sequence[Numbers]) -> str | None:
    """Seconds of a step, by what they went to."""
    if not any(run.time_S for run in runs):
        return None
    if len(runs) == 1:
        (run,) = runs
        bars = [(f"{run.steps[part][0]} to {run.steps[part][-1]}", run, part) for part in run.quarters()]
    else:
        bars = [(short(run.name, 16), run, slice(None)) for run in runs]
    (axes,) = canvas.axes(height=1.5 + 0.42 * len(bars))
    names = [name for name in TIME if any(name in run.time_S for run in runs)]
    left = np.zeros(len(bars))
    hatches = {"rollout": "", "training": "///", "blocked": "xxx"}
    colors = {"rollout": 0, "training": 2, "blocked": 1}
    for name in names:
        parts = [run.time_S[name][part] if name in run.time_S else np.zeros(1) for _, run, part in bars]
        seconds = np.array([np.nanmean(x) if np.isfinite(x).any() else 0.0 for x in parts])
        style: dict[str, Any] = {
            "color": canvas.color(colors[name]),
            "hatch": hatches[name],
            "edgecolor": canvas.theme.page,
            "lw": 0.5,
        }
        axes.barh(range(len(bars)), seconds, left=left, height=0.62, label=_TIME_NAMES.get(name, name), **style)
        left += seconds
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Seconds per step")
    axes.set_ylabel("Steps" if len(runs) == 1 else "")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)

    def say(run: Numbers) -> str:
        known = [(name, run.time_S[name]) for name in names if name in run.time_S]
        means = [(name, float(np.nanmean(x))) for name, x in known]
        return "seconds of a step: " + ", ".join(
            f"{_TIME_NAMES.get(name, name)} {seconds:.1f}" for name, seconds in means
        )

    return _each([run for run in runs if run.time_S], say)


_TIME_NAMES = {"rollout": "rollout and rest", "blocked": "waiting for estimator"}

# Title, function, and a note of how to read the figure.
FIGURES: dict[str, tuple[str, Callable[[Canvas, Sequence[Numbers]], str | None], str]] = {
    "signal": ("Groups with a signal", signal, "A group whose rewards are all equal teaches nothing."),
    "keep-rate": ("Prompts rolled out", keep_rate, "Low means that the filter is strict, not that it is good."),
    "reward": (
        "Pass rate",
        reward,
        "The filter prefers prompts of middle difficulty, so only the estimate for all prompts shows progress.",
    ),
    "sources": (
        "Pass rate by data source",
        sources,
        "Each group is weighted by one over its keep probability, so that it stands for all prompts of its source; "
        "means over an eighth of the run.",
    ),
    "outcome": (
        "Prediction and outcome",
        outcome,
        "A single group's outcome also varies by chance, so a wide spread is expected in the middle.",
    ),
    "calibration": (
        "Calibration",
        calibration,
        "On the dotted line, what was predicted happened as often as predicted. Bins of equally many groups.",
    ),
    "cost": (
        "Cost of a group with a signal",
        cost,
        "Groups that were thrown away after the rollout are counted, too.",
    ),
    "time": ("Where the time goes", time, "Means over the steps."),
}


@dataclass(frozen=True)
class Drawn:
    """One figure of the page.

    name, title, note: from FIGURES.
    message: what it shows, also its alternative text.
    light, dark: PNG files.
    width, height: in CSS pixels, for the page to leave room.
    """

    name: str
    title: str
    note: str
    message: str
    light: bytes
    dark: bytes
    width: int
    height: int


def draw(runs: Sequence[Numbers]) -> tuple[list[Drawn], list[str]]:
    """Return the figures, and the titles of those whose data are missing."""
    drawn, missing = [], []
    for name, (title, function, note) in FIGURES.items():
        images = []
        message = None
        for theme in (LIGHT, DARK):
            canvas = Canvas(theme)
            with matplotlib.rc_context(_style(theme)), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
                message = function(canvas, runs)
                if message is None:
                    break
                file = io.BytesIO()
                canvas.figure.savefig(file, format="png", metadata={"Software": None})
                images.append(_smaller(file))
        if message is None:
            missing.append(title)
            continue
        width, height = (round(float(inches) * 100) for inches in canvas.figure.get_size_inches())
        message = message[0].upper() + message[1:] if len(runs) == 1 else message
        drawn.append(Drawn(name, title, note, message, images[0], images[1], width, height))
    return drawn, missing


def _smaller(png: io.BytesIO) -> bytes:
    """Return a PNG file with at most 128 colours, a third of the size."""
    file = io.BytesIO()
    Image.open(png).convert("RGB").quantize(128).save(file, format="png")
    return file.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    installed = set(font_manager.get_font_names())
    wanted = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS")
    return {
        "text.parse_math": False,  # a data source may be called $x$
        "font.family": [name for name in wanted if name in installed],
        "font.size": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "grid.alpha": 0.7,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "text.color": theme.ink,
        "hatch.linewidth": 0.8,
    }
