"""A run in words and tables: which sentences its numbers allow, and what looks wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from depo_plugin.report.numbers import FORCED, UNKNOWN, UNSCORED, Numbers
from depo_plugin.report.runs import GROUPS, SETTINGS, printable

# Limits above which a sentence becomes a warning.
FEW_STEPS = 20
CALIBRATED, POOR = 0.05, 0.10  # mean distance of prediction and outcome over bins
FEW_GROUPS = 100  # to judge calibration
MANY = {"forced": 0.10, "unscored": 0.05, "unmatched": 0.05, "labels_unsent": 0.05, "labels_dropped": 0.01}
BLOCKED = 0.05  # of the time
UNJUDGED = 0.05  # of the steps
CLIPPED = 0.01  # of the responses
HELPS = 1.05  # groups with a signal, with the filter / without it
NAMED_SOURCES = 3  # in one sentence
NONE = "—"


class Sentence(NamedTuple):
    """One sentence of the summary; warning: something is wrong, or a number cannot be trusted."""

    text: str
    warning: bool = False


class Table(NamedTuple):
    """A table: caption, head of each column, rows of cells; the first cell of a row is its head."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def percent(value: float | None) -> str:
    """Return 0.314 as 31%; a share that is not 0 never becomes 0%, one below 1 never 100%."""
    if value is None or not math.isfinite(value):
        return NONE
    if 0 < value < 0.01:
        return "<1%"
    return ">99%" if 0.99 < value < 1 else f"{value:.0%}"


def rate(value: float | None) -> str:
    """Return a pass rate with two digits."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def number(value: float | None) -> str:
    """Return a number with two or three significant digits, or as a whole number, with thousands separated."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def points(value: float) -> str:
    """Return a difference of shares in points of a hundred."""
    number = f"{100 * abs(value):.0f}" if abs(value) >= 0.0095 else f"{100 * abs(value):.1f}"
    return f"{number} point{'' if number == '1' else 's'}"


# ── Sentences ──


def sentences(run: Numbers) -> list[Sentence]:
    """Return the summary of one run; warnings come last."""
    ready = run.ready_S
    parts = [_size(run), *_filter(run, ready), *_calibration(run, ready), *_rewards(run), *_sources(run)]
    parts += [*counts(run, ready), *_time(run), *_files(run)]
    return sorted(parts, key=lambda sentence: sentence.warning)


def _size(run: Numbers) -> Sentence:
    steps, warm = len(run.steps), int(run.warm_S.sum())
    text = f"{steps} step{'s' * (steps != 1)}"
    if run.has_groups:
        text += f", {len(run.y_N):,} groups"
    if 0 < warm < steps:
        text += f"; the figures below are over the {steps - warm} steps after the warm-up, which keeps every prompt"
    elif warm:
        text += "; all of them are warm-up, which keeps every prompt"
    text += "."
    if run.shadow:
        text += " A shadow run: nothing was filtered, so what the filter would have done is an estimate."
    if steps - warm < FEW_STEPS:
        return Sentence(text + " So few steps give rough numbers.", True)
    return Sentence(text)


def _filter(run: Numbers, ready: np.ndarray) -> list[Sentence]:
    found = []
    kept = run.keep.over(ready)
    if math.isfinite(kept):
        did = "The filter would have rolled out about" if run.shadow else "Rolled out"
        found.append(Sentence(f"{did} {percent(kept)} of the prompts it looked at."))
    have, without = run.signal.over(ready), run.signal_without.over(ready)
    if math.isfinite(have) and math.isfinite(without) and without > 0:
        gain = have / without
        if run.shadow:
            text = f"{percent(without)} of the groups had a signal, about {percent(have)} would have with the filter"
        else:
            text = (
                f"{percent(have)} of the groups had a signal, about {percent(without)} would have without the filter"
            )
        if gain >= HELPS:
            found.append(Sentence(f"{text}: {gain:.1f} times as many to learn from for the same rollouts."))
        else:
            found.append(Sentence(f"{text}: the filter does not help here.", not run.warm_S.all()))
    elif math.isfinite(have):
        found.append(Sentence(f"{percent(have)} of the groups had a signal."))
    saved = run.metric("rollouts_saved")
    saved = saved[np.isfinite(saved)]
    if len(saved) and saved[-1] >= 1 and not run.shadow:
        text = f"Dynamic sampling would have paid {number(saved[-1])} more responses for as many groups with a signal."
        found.append(Sentence(text))
    return found


def _calibration(run: Numbers, ready: np.ndarray) -> list[Sentence]:
    if not run.has_groups:
        predicted, observed = (np.nanmean(x[ready]) if np.isfinite(x[ready]).any() else np.nan
                               for x in (run.metric("pred_mean"), run.metric("target_mean")))  # fmt: skip
        if math.isnan(predicted) or math.isnan(observed):
            return []
        return [Sentence(f"The mean prediction was {rate(predicted)}, the mean pass rate {rate(observed)}.")]
    found, _ = run.calibration(ready)
    if found is None or found.size.sum() < FEW_GROUPS:
        return [Sentence("There are too few groups to judge the predictions.")]
    off, bias = found.off(), float(np.average(found.predicted - found.observed, weights=found.size))
    if off <= max(CALIBRATED, 1.5 * found.by_chance()):
        return [Sentence(f"Predictions are calibrated (mean error {points(off)}).")]
    side = ""
    if abs(bias) > off / 2:
        side = ", mostly too high" if bias > 0 else ", mostly too low"
    return [Sentence(f"Predictions are off by {points(off)} on average{side}.", off > POOR)]


def _rewards(run: Numbers) -> list[Sentence]:
    quarters = run.quarters()
    if len(quarters) < 2:
        return []
    first, last = (run.reward_all.over(quarter) for quarter in (quarters[0], quarters[-1]))
    if not (math.isfinite(first) and math.isfinite(last)):
        return []
    what = "The pass rate" if run.shadow else "The estimated pass rate"
    ends = f"from {rate(first)} in the first quarter of the run to {rate(last)} in the last"
    return [Sentence(f"{what} over all prompts went {ends}.")]


def _sources(run: Numbers) -> list[Sentence]:
    sources = run.sources()
    changed = [(source, change) for source in sources if (change := source.change()) is not None]
    found = []
    for verb, sign in (("lose", -1), ("gain", 1)):
        those = sorted((pair for pair in changed if sign * pair[1] > 0), key=lambda pair: sign * -pair[1])
        those = [pair for pair in those if abs(pair[1]) >= 0.01][:NAMED_SOURCES]
        for source, change in those:
            ends = f"from {rate(source.first and source.first.value)} to {rate(source.last and source.last.value)}"
            found.append(Sentence(f"Problems of source {short(source.name)} {verb} {points(change)} ({ends})."))
    return found if len(sources) > 1 else []


def counts(run: Numbers, mask: np.ndarray) -> list[Sentence]:
    """Return what the counting metrics of some steps say; most of it is warnings."""
    groups = {
        "forced": "filled batches up although the rule rejected them: too few prompts pass the filter's rule",
        "unscored": "were kept without a score: the estimator did not answer in time",
        "unmatched": "have no decision on record: the estimator was restarted, or a prompt or label was changed",
        "labels_unsent": "were not learned from: the estimator was behind",
        "labels_dropped": "were not learned from: a score is NaN or infinite",
    }
    found = []
    for name, text in groups.items():
        share = shares(run, name, mask)
        if share > MANY[name]:
            found.append(Sentence(f"{percent(share)} of the groups {text}.", True))
    judged = np.isfinite(run.metric("effective_ratio")[mask])
    if judged.any() and (without := np.mean(~judged)) > UNJUDGED:
        text = f"In {percent(without)} of the steps the estimator judged no group: it was behind, or did not answer."
        found.append(Sentence(text, True))
    responses = np.nansum(run.metric("num_samples", "rollout/")[mask])
    if responses and (clipped := run.total("clipped", mask) / responses) > CLIPPED:
        text = f"{percent(clipped)} of the scores are outside --depo.labels.reward_range and were clipped to it."
        found.append(Sentence(text, True))
    if thrown := int(run.rejected_N.sum()):
        share = percent(thrown / len(run.rejected_N))
        found.append(Sentence(f"Dynamic filtering threw {share} of the groups away after their rollout."))
    return found


def _part(part: float, whole: float) -> float:
    return float(part / whole) if whole else np.nan


def shares(run: Numbers, name: str, mask: np.ndarray | slice = slice(None)) -> float:
    """Return the share of groups that were forced, unscored, unmatched, unsent or dropped; NaN if unknown."""
    if name == "labels_dropped":  # a total; it begins again if a process does
        total = run.metric(name)
        dropped = total[np.isfinite(total)].max(initial=0.0)
        return _part(dropped, dropped + np.nansum(run.signal.bottom))
    if name == "labels_unsent":  # in a step without a judgement all groups are unsent, and `kept` is unknown
        unsent, kept = run.metric(name)[mask], run.metric("kept")[mask]
        judged = np.nansum(kept) + np.nansum(run.metric("unmatched")[mask])
        return _part(np.nansum(unsent), judged + np.nansum(unsent[np.isnan(kept)]))
    share = run.share(name, mask)
    reasons = {"forced": FORCED, "unscored": UNSCORED, "unmatched": UNKNOWN}
    chosen = run.in_steps(mask)
    if math.isfinite(share) or name not in reasons or not chosen.any():
        return share
    return float((run.reason_N[chosen] == reasons[name]).mean())


def _time(run: Numbers) -> list[Sentence]:
    share, seconds = run.blocked_share(), run.total("time_blocked")
    if math.isfinite(share):
        return [Sentence(f"Training waited {percent(share)} of the time for the estimator.", share > BLOCKED)]
    known = np.isfinite(run.metric("time_blocked"))
    if not known.any():
        return []
    text = f"Training waited {number(seconds / known.sum())} s a step for the estimator"
    return [Sentence(f"{text} (what share of the time that is, the files do not say).")]


def _files(run: Numbers) -> list[Sentence]:
    found = []
    if not run.has_groups:
        found.append(
            Sentence(f"{GROUPS} is missing or empty: no calibration, data sources, rollouts or tokens.", True)
        )
    if not run.files.rows:
        found.append(Sentence("metrics.jsonl is missing or empty: no keep rate and no times.", True))
    if not run.files.settings:
        found.append(Sentence(f"{SETTINGS} is missing: the settings are unknown.", True))
    if bad := run.files.bad_lines:
        found.append(Sentence(f"{bad} line{'s' * (bad > 1)} of the files could not be read and are left out.", True))
    return found


# ── Tables ──


def key_figures(runs: Sequence[Numbers]) -> Table:
    """Return the key figures: of one run by quarter, of several runs side by side."""
    columns: list[tuple[str, Numbers, Any]] = []
    if len(runs) == 1:
        (run,) = runs
        quarters = run.quarters()
        for part in quarters if len(quarters) > 1 else []:
            columns.append((f"Steps {run.steps[part][0]} to {run.steps[part][-1]}", run, part))
        columns.append(("Whole run", run, slice(None)))
        caption = "Key figures by quarter of the run, warm-up included"
    else:
        columns = [(short(run.name), run, run.ready_S) for run in runs]
        caption = "Key figures of each run, after the warm-up"
    lines: dict[str, Callable[[Numbers, Any], str]] = {
        "Prompts rolled out, of those looked at": lambda run, part: percent(run.keep.over(part)),
        "Groups with a signal": lambda run, part: percent(run.signal.over(part)),
        "… without the filter (estimate)": lambda run, part: percent(run.signal_without.over(part)),
        "Groups all right": lambda run, part: percent(_mean(run, "all_right", part)),
        "Groups all wrong": lambda run, part: percent(_mean(run, "all_wrong", part)),
        "Too easy, of the rejected prompts": lambda run, part: percent(_mean(run, "too_easy", part)),
        "Pass rate of all prompts (estimate)": lambda run, part: rate(run.reward_all.over(part)),
        "Pass rate of the prompts rolled out": lambda run, part: rate(run.reward.over(part)),
        "Calibration error of p̂": lambda run, part: _off(run.calibration(part)[0]),
        "Calibration error of V": lambda run, part: _off(run.calibration(part)[1]),
        "Responses per group with a signal": lambda run, part: number(run.rollouts.over(part)),
        "Tokens per group with a signal": lambda run, part: number(run.tokens.over(part)),
        "Groups that filled a batch up": lambda run, part: percent(shares(run, "forced", part)),
        "Groups without a score": lambda run, part: percent(shares(run, "unscored", part)),
        "Time that training waited for the estimator": lambda run, part: percent(run.blocked_share(part)),
    }
    rows = [[name, *(cell(run, part) for _, run, part in columns)] for name, cell in lines.items()]
    rows = [row for row in rows if any(text != NONE for text in row[1:])]
    return Table(caption, ["", *(head for head, _, _ in columns)], rows)


def _mean(run: Numbers, name: str, part: Any) -> float:
    """Return the mean of a metric over steps, NaN if none of them has it."""
    value_S = run.metric(name)[part]
    return float(np.nanmean(value_S)) if np.isfinite(value_S).any() else math.nan


def _off(found) -> str:
    return points(found.off()) if found else NONE


def source_table(run: Numbers) -> Table | None:
    """Return one row for each data source, None if they are not known."""

    def end(estimate) -> str:
        return f"{rate(estimate.value)} ± {rate(estimate.error)}" if estimate else NONE

    rows = [
        [
            short(one.name, 60),
            f"{one.groups:,}",
            percent(one.keep_rate),
            end(one.first),
            end(one.last),
            percent(one.signal),
        ]
        for one in run.sources()
    ]
    head = ["Data source", "Groups", "Rolled out", "Pass rate, first quarter", "Last quarter", "With a signal"]
    return Table("Data sources", head, rows) if rows else None


def settings_rows(runs: Sequence[Numbers]) -> list[list[str]]:
    """Return a row for each setting: its name, and its value in each run."""
    flat = [_flat(run.files.settings) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    return [[printable(name), *(one.get(name, NONE) for one in flat)] for name in names]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        parts = (_flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
        return {key: text for part in parts for key, text in part.items()}
    text = (
        {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    )
    return {name: text or printable(value)} if name else {}


def short(name: str, most: int = 28) -> str:
    """Return a name on one line, cut in its middle if it is longer than `most` characters."""
    name = printable(name)
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
