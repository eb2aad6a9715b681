"""The text output of a run: the table, and whether depo meets its goals."""

from collections.abc import Iterable, Iterator

import numpy as np

# Column -> (title, decimals); median over seeds ± half their range.
COLUMNS = {
    "rollouts_per_effective_group": ("rollouts/eff", 2),
    "effective_ratio": ("effective", 3),
    "oracle_share": ("of oracle", 2),
    "coverage": ("coverage", 3),
    "zero_auc": ("zero AUC", 3),
    "mae_true": ("mae", 3),
    "brier": ("brier", 3),
    "ece": ("ece", 3),
    "spearman": ("spearman", 3),
    "final_ability": ("ability", 2),
    "estimator_seconds": ("seconds", 1),
}
WIDTH = 13
TOLERANCE = 0.005  # a smaller difference in effective ratio does not count as worse
OWN = ("depo", "depo_narrow")
RIVALS = ("mopps", "dps", "depo_paper", "history_only", "text_only")


def settings_of(rows: Iterable[dict]) -> list[tuple[str, int]]:
    """Return the different (pool, group size) pairs, in the order of the rows."""
    return list(dict.fromkeys((row["pool"], row["group_size"]) for row in rows))


def _values(rows: list[dict], setting: tuple[str, int], method: str, key: str) -> list[float]:
    found = [r[key] for r in rows if (r["pool"], r["group_size"]) == setting and r["method"] == method]
    return [value for value in found if value is not None]


def table(rows: list[dict], told: dict[str, list[tuple[float, float]]]) -> str:
    """Return one block of lines per pool and group size.

    told: pool -> two rank correlations with the starting pass rates per seed: of a cross-validated ridge regression on
    frozen embeddings, and of the text's true part, which ideal knows.
    """
    lines = []
    for setting in settings_of(rows):
        pool, group_size = setting
        ridge, known = (", ".join(f"{value:.2f}" for value in values) for values in zip(*told[pool], strict=True))
        lines += ["", f"{pool}, G = {group_size}   (Spearman of the text: ridge on embeddings {ridge}; ideal {known})"]
        lines.append("method".ljust(WIDTH) + "".join(title.rjust(WIDTH) for title, _ in COLUMNS.values()))
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = [_cell(_values(rows, setting, method, key), digits) for key, (_, digits) in COLUMNS.items()]
            if any(cells):
                lines.append(method.ljust(WIDTH) + "".join((cell or "-").rjust(WIDTH) for cell in cells))
    return "\n".join(lines[1:])


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = (max(values) - min(values)) / 2
    return f"{np.median(values):.{digits}f}" + (f" ±{spread:.{digits}f}" if len(values) > 1 else "")


# ── Goals ──


def goals(rows: list[dict]) -> list[tuple[str, int, str, bool]]:
    """Return (pool, group size, text, met) of each goal that these rows can decide, by means over seeds."""
    found = []
    for setting in settings_of(rows):
        if all(_values(rows, setting, method, "effective_ratio") for method in ("depo", "ideal")):
            found += [(*setting, text, bool(met)) for text, met in _goals_of(rows, setting)]
    return found


def _goals_of(rows: list[dict], setting: tuple[str, int]) -> Iterator[tuple[str, bool]]:
    def mean(method: str, key: str) -> float | None:
        values = _values(rows, setting, method, key)
        return float(np.mean(values)) if values else None

    ratio = {method: mean(method, "effective_ratio") for method in ("depo", "ideal", "grpo", *RIVALS)}
    depo, ideal, grpo = ratio["depo"], ratio["ideal"], ratio["grpo"]
    if grpo is not None and ideal > grpo:
        share = (depo - grpo) / (ideal - grpo)
        yield f"gain in effective ratio over grpo {share:.3f} of ideal's (at least 0.90)", share >= 0.90
    if None not in (coverages := [mean(method, "coverage") for method in ("depo", "ideal")]):
        difference = 100 * (coverages[0] - coverages[1])
        yield f"coverage {difference:+.1f} points beside ideal's (at most 2 below)", difference >= -2
    errors = [mean(method, "mae_true") for method in ("depo", "ideal")]
    yield f"error of p̂ {errors[0] / errors[1]:.3f} of ideal's (at most 1.15)", errors[0] <= 1.15 * errors[1]
    aucs = [mean(method, "zero_auc") - 0.5 for method in ("depo", "ideal")]
    yield f"zero AUC above one half {aucs[0] / aucs[1]:.3f} of ideal's (at least 0.90)", aucs[0] >= 0.90 * aucs[1]
    ece = mean("depo", "ece")
    yield f"calibration error {ece:.3f} (at most 0.03)", ece <= 0.03
    if (mopps := ratio["mopps"]) is not None and ideal >= 1.2 * mopps:
        share = (depo - mopps) / (ideal - mopps)
        yield f"margin over mopps {share:.3f} of ideal's (at least 0.80)", share >= 0.80
    for rival in RIVALS:
        if ratio[rival] is not None:
            covered = mean(rival, "coverage")
            points = [(mean(name, "coverage"), mean(name, "effective_ratio")) for name in OWN]
            own, at = _at_coverage([point for point in points if None not in point], covered)
            where = f" at coverage {at:.2f}, {rival} at {covered:.2f}" if at is not None else ""
            own = depo if own is None else own
            text = f"effective ratio {own:.3f} beside {rival}'s {ratio[rival]:.3f} (not behind){where}"
            yield text, own >= ratio[rival] - TOLERANCE


def _at_coverage(points: list[tuple[float, float]], coverage: float | None) -> tuple[float | None, float | None]:
    """Return depo's effective ratio at a rival's coverage, and the coverage used. Less coverage gives a higher ratio.

    points: (coverage, effective ratio) of depo and depo_narrow. The ratio is interpolated between them; outside, the
    nearer point is used. Return (None, None) if there is no coverage to compare at.
    """
    if coverage is None or not points:
        return None, None
    x, y = zip(*sorted(points), strict=True)
    return float(np.interp(coverage, x, y)), float(np.clip(coverage, x[0], x[-1]))


def goals_text(found: list[tuple[str, int, str, bool]]) -> str:
    """Return one line per goal, with "met" or "MISSED", and a last line with the number of goals met."""
    lines = ["depo beside what any learner could reach (ideal):"]
    for pool, group_size, text, met in found:
        lines.append(f"  {pool + f', G = {group_size}:':<18} {'met   ' if met else 'MISSED'}  {text}")
    return "\n".join([*lines, f"{sum(met for *_, met in found)} of {len(found)} goals met."])
