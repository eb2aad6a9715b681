"""The view of a run in progress that `depo watch` shows in the terminal."""

import math

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from depo_plugin.report.numbers import Numbers, Ratio
from depo_plugin.report.runs import METRICS, SETTINGS, printable
from depo_plugin.report.summary import BLOCKED, counts, number, percent, rate, short

RECENT = 40  # steps that the view is about
SOURCES = 6  # most data sources that are shown
LATE = 5  # a step is late after this many times the usual time of a step
LATE_S, UNKNOWN_LATE_S = 60.0, 900.0  # and after this many seconds: at least, and if the usual time is unknown
BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: np.ndarray, top: float = 1.0) -> str:
    """Return a bar for each value in [0, top]; a blank if it is unknown."""
    places = (math.nan if math.isnan(value) else min(max(value / top, 0), 1) * (len(BARS) - 1) for value in values)
    return "".join(" " if math.isnan(place) else BARS[round(place)] for place in places)


def duration(seconds: float) -> str:
    """Return seconds as 42 s, 3 min or 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def view(run: Numbers, now: float) -> Group:
    """Return what to show. run: with at least one step in metrics.jsonl; now: time.time()."""
    recent = np.arange(len(run.steps)) >= len(run.steps) - RECENT
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(justify="right", no_wrap=True)
    lines.add_column(no_wrap=True, overflow="crop")

    def add(name: str, ratio: Ratio, show=percent) -> None:
        if np.isfinite(ratio.raw()).any():
            lines.add_row(name, show(ratio.over(recent)), sparkline(ratio.raw()[recent]))

    add("rolled out", run.keep)
    add("groups with a signal", run.signal)
    add("  without the filter", run.signal_without)
    add("pass rate, all prompts", run.reward_all, rate)
    weight = run.signal.bottom
    predicted = Ratio(run.metric("pred_mean") * weight, weight)
    if np.isfinite(predicted.raw()).any():
        add("predicted pass rate", predicted, rate)
        add("  observed", run.reward, rate)
    for name in _sources(run, recent):
        ratio = Ratio(run.metric(f"pass_rate/{name}"), np.ones(len(run.steps)))
        lines.add_row(Text(f"  {short(name, 22)}"), rate(ratio.over(recent)), sparkline(ratio.raw()[recent]))
    waited = run.metric("time_blocked")[recent]
    if np.isfinite(waited).any():
        share = run.blocked_share(recent)
        of_time = f"{percent(share)} of the time" if math.isfinite(share) else ""
        lines.add_row("waited for estimator", f"{number(float(np.nanmean(waited)))} s a step", of_time)
    head = Text(_head(run, now), style="bold cyan")
    notes = [Text(f"! {text}", style="bold yellow") for text in warnings(run, recent, now)]
    return Group(head, Text(f"last {int(recent.sum())} steps", style="dim"), lines, *notes)


def warnings(run: Numbers, recent: np.ndarray, now: float) -> list[str]:
    """Return what looks wrong in the recent steps, and whether a new step is late."""
    found = []
    age, usual = now - _written(run, METRICS), _usual(run)
    if age > (max(LATE_S, LATE * usual) if math.isfinite(usual) else UNKNOWN_LATE_S):
        beside = f" (a step takes about {duration(usual)})" if math.isfinite(usual) else ""
        found.append(f"No new step for {duration(age)}{beside}: the run is finished, or something hangs.")
    found += [sentence.text for sentence in counts(run, recent) if sentence.warning]
    if run.blocked_share(recent) > BLOCKED:
        found.append(f"Training waits {percent(run.blocked_share(recent))} of the time for the estimator.")
    if run.files.bad_lines:
        found.append(f"{run.files.bad_lines} lines of the files could not be read.")
    return found


def _head(run: Numbers, now: float) -> str:
    parts = [f"{printable(run.name)}: step {run.steps[-1]}"]
    if math.isfinite(started := _written(run, SETTINGS)):
        parts.append(f"started {duration(now - started)} ago")
    parts.append(f"last step {duration(max(0.0, now - _written(run, METRICS)))} ago")
    if run.shadow:
        parts.append("shadow run: nothing is filtered")
    elif run.warm_S[-1]:
        parts.append("warm-up: every prompt is kept")
    return ", ".join(parts)


def _written(run: Numbers, name: str) -> float:
    """Return when a file was written last, NaN if it is missing."""
    try:
        return (run.files.folder / name).stat().st_mtime
    except OSError:
        return math.nan


def _usual(run: Numbers) -> float:
    """Return the median time of a recent step in seconds, NaN if unknown."""
    known = run.metric("time_step")[-RECENT:]
    return float(np.nanmedian(known)) if np.isfinite(known).any() else math.nan


def _sources(run: Numbers, recent: np.ndarray) -> list[str]:
    """Return the data sources with a pass rate in the recent steps, those that were kept most often first."""
    prefix = "depo/pass_rate/"
    rows = run.files.rows[-RECENT:]
    names = {name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)}
    return sorted(names, key=lambda name: (-run.total(f"kept/{name}", recent), name))[:SOURCES]
