"""What `depo backtest` prints and draws of one log."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from depo_plugin.backtest.judge import Predicted, Truth, calibration_error, paired, scores

COLUMNS = {
    "log_loss": "log loss",
    "brier": "Brier",
    "auc_v": "AUC of V",
    "calibration_p": "error of p̂",
    "calibration_v": "error of V",
    "spearman": "Spearman",
    "keep_rate": "kept",
    "signal_kept": "signal, kept",
    "signal_found": "signal found",
}
CLOSED = "depo, closed"  # learns only from what it keeps


def sentence(found: Mapping[str, float]) -> str:
    """Return what the filter would have done, in one sentence. found: scores of `closed`."""
    if not found["signal_all"] > 0:
        return "On this log no group has a signal: there is nothing to find."
    return (
        f"On this log DEPO would have rolled out {found['keep_rate']:.0%} of the groups; "
        f"{found['signal_kept']:.0%} of those had a signal instead of {found['signal_all']:.0%}. "
        f"{found['signal_found']:.0%} of all groups with a signal were among them."
    )


def results(truth: Truth, found: Mapping[str, Predicted]) -> dict[str, Any]:
    """Return everything as plain values, for --json: by predictor its scores, overall and by quarter, and differences.

    `ahead`: depo's log loss less the predictor's, and its standard error over prompts; below 0, depo is ahead.
    """
    parts = {"all": np.ones(len(truth.k_N), bool)} | {f"q{q + 1}": truth.quarter_N == q for q in range(4)}
    rows: dict[str, Any] = {}
    for name, one in found.items():
        rows[name] = {part: scores(truth, one, chosen) for part, chosen in parts.items()}
        if name != "depo":
            rows[name]["ahead"] = {part: paired(truth, found["depo"], one, chosen) for part, chosen in parts.items()}
    return rows


def lines(rows: Mapping[str, Any]) -> list[str]:
    """Return the tables of a log as Markdown: all groups, then log loss by quarter with depo's lead."""
    text = ["| predictor | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        text.append(f"| {name} | " + " | ".join(_number(row["all"][column]) for column in COLUMNS) + " |")
    quarters = [f"q{q}" for q in range(1, 5)]
    text += [
        "",
        "Log loss by quarter; in brackets depo's less the predictor's, with its standard error over prompts:",
        "",
    ]
    text += ["| predictor | first | second | third | last |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [_number(row[q]["log_loss"]) + _lead(row.get("ahead", {}).get(q)) for q in quarters]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return text


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _lead(found: tuple[float, float] | None) -> str:
    return "" if found is None else f" ({found[0]:+.4f} ± {found[1]:.4f})"


def draw(truth: Truth, found: Mapping[str, Predicted], rows: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw log loss by quarter, calibration of p̂ and V, and groups with a signal, into one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.8), dpi=100, layout="constrained")
    loss, rate, chance, signal = figure.subplots(1, 4)
    quarters = [f"q{q}" for q in range(1, 5)]
    for i, (name, row) in enumerate(rows.items()):
        style = {"color": "black", "lw": 2.4} if name == "depo" else {"lw": 1.2, "ls": ("-", "--", "-.", ":")[i % 4]}
        loss.plot(range(1, 5), [row[q]["log_loss"] for q in quarters], marker="o", ms=3, label=name, **style)
    loss.set(title="log loss per response", xlabel="quarter of the log", xticks=range(1, 5))
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    for axes, part, seen in ((rate, "p_N", truth.y_N), (chance, "v_N", truth.signal_N)):
        axes.plot([0, 1], [0, 1], color="gray", lw=0.8)
        for name in ("depo", "Beta-binomial, fitted"):
            if name in found:
                predicted = getattr(found[name], part)
                bins = np.array_split(np.argsort(predicted, kind="stable"), 10)
                points = [(predicted[chosen].mean(), seen[chosen].mean()) for chosen in bins if len(chosen)]
                label = f"{name}: off by {calibration_error(predicted, seen):.3f}"
                axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=label)
        axes.legend(fontsize=7)
    rate.set(title="calibration of p̂", xlabel="predicted pass rate", ylabel="observed")
    chance.set(title="calibration of V", xlabel="predicted chance of a signal", ylabel="observed")
    one = rows[CLOSED]
    for name, label in (("signal_kept", "of the kept"), ("signal_all", "of all"), ("keep_rate", "groups kept")):
        signal.plot(range(1, 5), [one[q][name] for q in quarters], marker="o", ms=4, label=label)
    signal.set(title="groups with a signal (closed)", xlabel="quarter of the log", xticks=range(1, 5), ylim=(0, 1))
    signal.legend(fontsize=7)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
