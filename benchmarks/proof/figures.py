"""Pictures of the proof: scores against what they cost, groups with a signal, differences by level."""

from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.proof.compare import SCORES, curve, final, paired

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COSTS = {
    "rollouts": "rollouts",
    "signal": "groups with a signal",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "seconds": "seconds in steps",
}
COLOURS = (
    "#555555",
    "#cc79a7",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito's, colour-blind-safe
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def draw(rows: dict[str, dict[int, dict]], groups: dict[str, str], labels: dict[str, str], title: str, path: Path):
    """Draw one batch size. rows: method -> seed -> row, the base first; path: without its ending; one PNG each."""
    _scores(rows, groups, labels, title, path.with_name(path.name + "-scores.png"))
    _costs(rows, groups, labels, title, path.with_name(path.name + "-costs.png"))
    _levels(rows, groups, labels, title, path.with_name(path.name + "-levels.png"))
    _signal(rows, labels, title, path.with_name(path.name + "-signal.png"))


def _style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def _line(axes, runs, groups, name, cost, **style):
    cost_E, score_SE = curve(list(runs.values()), groups, name, cost)
    mean_E = score_SE.mean(0)
    axes.plot(cost_E, mean_E, marker="o", markersize=3, **style)
    if len(score_SE) > 1:
        error_E = score_SE.std(0, ddof=1) / np.sqrt(len(score_SE))
        axes.fill_between(cost_E, mean_E - error_E, mean_E + error_E, color=style["color"], alpha=0.15, linewidth=0)


def _save(figure, title: str, path: Path):
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _scores(rows, groups, labels, title, path):
    figure, axes = plt.subplots(1, len(SCORES), figsize=(15, 4.6), layout="constrained")
    for panel, name in zip(axes, SCORES, strict=True):
        for i, (method, runs) in enumerate(rows.items()):
            _line(panel, runs, groups, name, "rollouts", label=labels[method], **_style(i))
        panel.set(title=f"{name} levels", xlabel="rollouts", ylabel="held-out pass rate")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _save(figure, title, path)


def _costs(rows, groups, labels, title, path):
    figure, axes = plt.subplots(1, len(COSTS), figsize=(21, 4.4), layout="constrained", sharey=True)
    for panel, (cost, text) in zip(axes, COSTS.items(), strict=True):
        for i, (method, runs) in enumerate(rows.items()):
            _line(panel, runs, groups, "learnable", cost, label=labels[method], **_style(i))
        panel.set(xlabel=text)
        panel.grid(alpha=0.3)
    axes[0].set(ylabel="held-out pass rate, learnable levels")
    axes[0].legend(fontsize=8)
    _save(figure, title, path)


def _levels(rows, groups, labels, title, path):
    methods = list(rows)[1:]
    if not methods:
        return
    base = rows[next(iter(rows))]
    figure, axes = plt.subplots(figsize=(13, 5), layout="constrained")
    for i, method in enumerate(methods, start=1):
        found = [paired(rows[method], base, lambda row, n=level: final(row, groups, n)) for level in groups]
        at = np.arange(len(groups)) + (i - (len(methods) + 1) / 2) * 0.8 / len(methods)
        means, errors = (np.nan_to_num([getattr(d, part) for d in found]) for part in ("mean", "error"))
        axes.errorbar(at, means, 2 * errors, fmt="o", markersize=4, color=_style(i)["color"], label=labels[method])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(groups)),
        [f"{level}\n({group})" for level, group in groups.items()],
        rotation=60,
        ha="right",
        fontsize=8,
    )
    axes.set(ylabel="final pass rate less GRPO's (two standard errors)")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    _save(figure, title, path)


def _signal(rows, labels, title, path):
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for i, (method, runs) in enumerate(rows.items()):
        length = min(len(row["steps"]["groups"]) for row in runs.values())
        signal, made = (
            np.sum([row["steps"][name][:length] for row in runs.values()], axis=0) for name in ("signal", "groups")
        )
        window = np.ones(min(10, length))
        share = np.convolve(signal, window, "valid") / np.convolve(made, window, "valid")
        done = np.cumsum(made)[len(window) - 1 :] * 8 / len(runs)
        axes.plot(done, share, label=labels[method], **_style(i))
    axes.set(xlabel="rollouts", ylabel="groups with a signal, of those rolled out (10 steps)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, title, path)
