"""The files of a run that never happened, made from a seed: what `depo report` and `depo watch` read.

Three data sources, one of them with a hostile name; the policy gets better, but forgets the easiest source. The rule
is the window, with exploration. Numbers follow docs/metrics.md.
"""

import json
from pathlib import Path

import numpy as np

from depo_plugin.filter import signal_probability

HOSTILE = "<script>alert(1)<_script>"  # a slash in a source's name is written as an underscore
SOURCES = {
    "add-2digit": 3.4,
    "word $problems$": 0.2,
    HOSTILE: -3.4,
}  # name -> logit of its mean pass rate at the start
G = 8
RATE_KEPT = 0.9


def write(
    run: Path,
    steps: int = 40,
    batch: int = 32,
    seed: int = 1,
    warmup: int = 5,
    epsilon: float = 0.05,
    low: float = 0.15,
    skill: float = 1.6,
    shadow: bool = False,
    groups: bool = True,
    settings: bool = True,
) -> Path:
    """Write RUN/model/depo/*, return that folder. skill: how much better the policy is at the end, a logit."""
    rng = np.random.default_rng(seed)
    folder = run / "model" / "depo"
    folder.mkdir(parents=True)
    names = list(SOURCES)
    metrics, lines, faded, saved, seen = [], [], np.zeros(3), 0.0, set()
    for step in range(1, steps + 1):
        done = step / steps
        size = batch if step <= warmup or shadow else 8 * batch
        source = rng.integers(3, size=size)
        drift = np.array([-1.2 * done, skill * done, skill * done])
        logit = np.array(list(SOURCES.values()))[source] + drift[source] + rng.normal(0, 1.2, size)
        p_true = 1 / (1 + np.exp(-logit))
        p = 1 / (1 + np.exp(-(logit + rng.normal(0, 1.5 * np.exp(-3 * done) + 0.3, size)) * 0.9))
        a, b = 7 * p, 7 * (1 - p)
        v = signal_probability(a, b, G)
        q = np.where((low <= p) & (p <= 0.85), 1.0, epsilon)
        reason = np.where(q == 1.0, "passed", "explored")
        keep = rng.random(size) < q
        if step <= warmup:
            q, reason, keep = np.ones(size), np.full(size, "warmup"), np.ones(size, bool)
        elif shadow:
            reason, keep = np.full(size, "shadow"), np.ones(size, bool)
        places = np.flatnonzero(keep)[:batch]
        scanned = places[-1] + 1
        if len(places) < batch:  # filled up
            forced = np.flatnonzero(~keep)[: batch - len(places)]
            q[forced], reason[forced] = 1.0, "forced"
            places, scanned = np.concatenate([places, forced]), size
        y = rng.binomial(G, p_true[places]) / G
        signal = (y > 0) & (y < 1)
        drawn = reason[places] != "forced"
        weight = drawn / (np.ones(batch) if shadow else q[places])
        sums = [(x[:scanned].sum() + weight @ (o - x[places])) for x, o in ((p, y), (v, signal))]
        faded = RATE_KEPT * faded + np.array([*sums, scanned])
        plain = float(np.clip(faded[1] / faded[2], 0.01, 1))
        saved += G * (signal.sum() / plain - batch)
        row = {"step": step, "reward": y.mean(), "rollout/reward_mean": y.mean(), "rollout/num_samples": batch * G}
        row |= {"depo/pred_mean": p[places].mean(), "depo/target_mean": y.mean(), "depo/updates": step - 1}
        row |= {"depo/mae": np.abs(p[places] - y).mean(), "depo/effective_ratio": signal.mean()}
        row |= {"depo/kept": batch, "depo/unmatched": 0, "depo/scanned": scanned, "depo/keep_rate": batch / scanned}
        row |= {f"depo/{name}": (reason[places] == name).sum() for name in ("explored", "forced", "unscored")}
        row |= {"depo/reward_unfiltered": faded[0] / faded[2], "depo/effective_gain": signal.mean() / plain}
        row |= {"depo/rollouts_saved": saved, "depo/labels_unsent": 0, "depo/clipped": 0, "depo/labels_dropped": 0}
        for number, name in enumerate(names):
            here = source[:scanned] == number
            kept = np.isin(np.arange(scanned), places)
            row |= {f"depo/kept/{name}": (here & kept).sum(), f"depo/rejected/{name}": (here & ~kept).sum()}
            if (source[places] == number).any():
                row[f"depo/pass_rate/{name}"] = y[source[places] == number].mean()
        row |= {"timing/make_experience": 6 + rng.random(), "timing/ppo_train": 30 + 2 * rng.random()}
        row |= {"timing/broadcast": 3.0, "depo/time_blocked": 0.2 + 0.3 * rng.random()}
        if step > 1:
            row["depo/time_step"] = 89 - 10 * done + 4 * rng.random()
        if step % 11 == 0:  # a step without an answer of the estimator
            row = {name: value for name, value in row.items() if not name.startswith("depo/") or "time" in name}
        metrics.append(row)
        for place, outcome in zip(places, y, strict=True):
            key = f"{rng.integers(2**20):016x}"
            line = {"step": step, "key": key, "source": names[source[place]], "p": p[place], "v": v[place]}
            line |= {"q": q[place], "reason": str(reason[place]), "y": outcome, "n": G}
            line |= {"signal": bool(0 < outcome < 1), "tokens": int(G * (120 + 80 * (1 - outcome)))}
            line |= {} if key in seen else {"prompt": f"{HOSTILE} {key}", "label": "</title>"}
            seen.add(key)
            lines.append(line)
    dump(folder / "metrics.jsonl", metrics)
    if groups:
        dump(folder / "groups.jsonl", lines)
    if settings:
        depo = {"filter": {"rule": "window", "low": low, "high": 0.85, "epsilon": epsilon, "warmup_steps": warmup}}
        depo |= {"shadow": shadow, "estimator": {"mode": "frozen", "model": None}}
        launch = {"rollout": {"n_samples_per_prompt": G, "batch_size": batch}, "actor": {"adam": {"lr": 1e-6}}}
        launch["data"] = {"prompt_dataset": HOSTILE}
        text = json.dumps({"version": "0.1.0", "depo": depo, "launch": launch})
        (folder / "settings.json").write_text(text)
    return folder


def dump(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines; numpy's numbers become plain ones."""
    path.write_text("".join(json.dumps(row, default=lambda value: value.item()) + "\n" for row in rows))
