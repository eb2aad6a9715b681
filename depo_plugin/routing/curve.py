"""The threshold of a router: how many answers are right against the share of requests that the large model gets.

A request goes to the large model if the believed pass rate of the small one is below the threshold.
Suffix: N = labelled requests.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from depo_plugin import json_lines

REPLICATES = 1000  # of the bootstrap
RANGE = (2.5, 97.5)  # percentiles of a prediction interval


class Sample(NamedTuple):
    """Labelled requests, float64 (N,), all in [0, 1].

    p_N: believed pass rates of the small model; small_N, large_N: shares of right answers of the two models.
    """

    p_N: np.ndarray
    small_N: np.ndarray
    large_N: np.ndarray

    def at(self, rows: np.ndarray) -> "Sample":
        """Return some of the requests."""
        return Sample(*(values[rows] for values in self))


@dataclass(frozen=True)
class Target:
    """What a threshold is chosen for: the most requests for the large model, or the accuracy to reach; one is None."""

    share: float | None = None
    accuracy: float | None = None


class Outcome(NamedTuple):
    """What a threshold does. share: of requests for the large model; accuracy: share of right answers;
    lead: accuracy less that of as many requests chosen at random."""

    share: float
    accuracy: float
    lead: float


@dataclass(frozen=True)
class Choice:
    """A threshold and what it does.

    threshold: requests with a believed pass rate below it go to the large model
    labelled: what it does to the labelled requests
    low, high: 95% prediction interval of what it will do to as many new requests
    small, large: accuracy if one model answers all
    random: accuracy if as many requests, chosen at random, go to the large model
    oracle: the best accuracy that any choice of as many requests could reach
    """

    threshold: float
    labelled: Outcome
    low: Outcome
    high: Outcome
    small: float
    large: float
    random: float
    oracle: float


def read(path: Path, template: Callable[[list[dict]], str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the prompts of a file of JSON lines, and small_N and large_N.

    template: makes a prompt of messages. Raises LineError, and OSError if the file cannot be opened.
    """
    prompts, rates = [], []
    for number, row in json_lines.read(path):
        with json_lines.fields(path, number):
            if "messages" not in row:
                prompt = json_lines.text(row, "prompt")
            else:
                try:
                    prompt = template(row["messages"])
                except Exception as error:  # noqa: BLE001 - the template is the model's own code
                    raise ValueError(f"messages that the chat template refuses ({error})") from None
            pair = float(row["small"]), float(row["large"])
            if not all(0 <= rate <= 1 for rate in pair):
                raise ValueError("small and large must be numbers from 0 to 1")
        prompts.append(prompt)
        rates.append(pair)
    if len(prompts) < 2:
        raise json_lines.LineError(f"{path}: {len(prompts)} requests; at least 2, better some hundreds, are needed.")
    small_N, large_N = np.array(rates, np.float64).T
    return prompts, small_N, large_N


def accuracies(order_N: np.ndarray, sample: Sample) -> np.ndarray:
    """Return the accuracy if the first 0, 1, ..., N requests of this order go to the large model, float64 (N + 1,)."""
    gains_N = (sample.large_N - sample.small_N)[order_N]
    return sample.small_N.mean() + np.concatenate([[0.0], np.cumsum(gains_N)]) / len(gains_N)


def by_difficulty(sample: Sample) -> np.ndarray:
    """Return the order in which requests go to the large model: the lowest believed pass rates first, int64 (N,)."""
    return np.argsort(sample.p_N, kind="stable")


def by_gain(sample: Sample) -> np.ndarray:
    """Return the order of an oracle: the requests first that gain most by the large model, int64 (N,)."""
    return np.argsort(sample.small_N - sample.large_N, kind="stable")


def threshold_of(sample: Sample, target: Target) -> float:
    """Return the threshold for a target; if no threshold reaches the accuracy, that of the highest accuracy."""
    order_N = by_difficulty(sample)
    p_N = sample.p_N[order_N]
    if target.share is not None:
        count = int(target.share * len(order_N) + 1e-9)
    else:
        # Requests of one pass rate go to the same model, so a threshold can only lie between two different rates.
        possible = np.concatenate([[True], p_N[1:] > p_N[:-1], [True]])
        accuracy = np.where(possible, accuracies(order_N, sample), -1.0)
        count = int(np.argmax(accuracy >= min(target.accuracy or 0.0, accuracy.max())))
    return float(p_N[count]) if count < len(p_N) else 1.0


def outcome(threshold: float, sample: Sample) -> Outcome:
    """Return what a threshold does to these requests."""
    large_N = sample.p_N < threshold
    share, accuracy = float(large_N.mean()), float(np.where(large_N, sample.large_N, sample.small_N).mean())
    return Outcome(share, accuracy, accuracy - at_random(share, sample))


def at_random(share: float, sample: Sample) -> float:
    """Return the accuracy if this share of requests, chosen at random, goes to the large model."""
    return float((1 - share) * sample.small_N.mean() + share * sample.large_N.mean())


def choose(sample: Sample, target: Target, seed: int) -> Choice:
    """Return the threshold for a target and what it will do.

    seed: of the bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993). Each replicate chooses a
    threshold for requests drawn with replacement, and looks how differently it does for others, drawn likewise. So the
    intervals include the chance in the labelled requests and in the new ones, and that a threshold does better on the
    requests that it was chosen for. Raises ValueError if no threshold reaches the accuracy.
    """
    threshold = threshold_of(sample, target)
    got = outcome(threshold, sample)
    if target.accuracy is not None and got.accuracy < target.accuracy - 1e-9:
        raise ValueError(
            f"no threshold reaches an accuracy of {target.accuracy:g}: the best is {got.accuracy:.3f}, with "
            f"{got.share:.0%} of the requests for the large model. Lower --accuracy."
        )
    rng, size = np.random.default_rng(seed), len(sample.p_N)
    errors = []
    for _ in range(REPLICATES):
        here, new = (sample.at(rows) for rows in rng.integers(size, size=(2, size)))
        cut = threshold_of(here, target)
        errors.append(np.subtract(outcome(cut, new), outcome(cut, here)))
    low, high = (np.array(got) + np.percentile(errors, RANGE, axis=0)).clip([0, 0, -1], 1).tolist()
    return Choice(
        threshold=threshold,
        labelled=got,
        low=Outcome(*low),
        high=Outcome(*high),
        small=float(sample.small_N.mean()),
        large=float(sample.large_N.mean()),
        random=at_random(got.share, sample),
        oracle=float(accuracies(by_gain(sample), sample)[: round(got.share * size) + 1].max()),
    )


def sentences(choice: Choice) -> list[str]:
    """Return what a threshold does, in sentences."""
    got, low, high = choice.labelled, choice.low, choice.high
    told = [
        f"Threshold {choice.threshold:.6g}: {got.share:.0%} of the requests go to the large model "
        f"({low.share:.0%} to {high.share:.0%} of as many new ones), "
        f"{got.accuracy:.1%} of the answers are right ({low.accuracy:.1%} to {high.accuracy:.1%}).",
        f"All by the small model: {choice.small:.1%}. All by the large one: {choice.large:.1%}. As many, chosen at "
        f"random: {choice.random:.1%}. As many, chosen by an oracle: {choice.oracle:.1%}.",
    ]
    if low.lead <= 0 and 0 < got.share < 1:
        told.append(
            "[Warning] This may be no better than chance: the texts say too little of what the small model can do, or "
            "what is hard for it is hard for the large one, too."
        )
    return told


def write(choice: Choice, sample: Sample, folder: Path) -> None:
    """Write curve.json (the choice, and the curves) and curve.png."""
    curves = {
        "share": np.linspace(0, 1, len(sample.p_N) + 1),
        "by_difficulty": accuracies(by_difficulty(sample), sample),
        "oracle": accuracies(by_gain(sample), sample),
    }
    folder.mkdir(parents=True, exist_ok=True)
    row = asdict(choice) | {name: one._asdict() for name, one in vars(choice).items() if isinstance(one, Outcome)}
    row["curves"] = {name: np.round(values, 5).tolist() for name, values in curves.items()}
    (folder / "curve.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    _draw(choice, curves, folder / "curve.png")


def _draw(choice: Choice, curves: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(curves["share"], curves["oracle"], color="#7a6000", ls=":", lw=1.6, label="oracle: knows the answers")
    axes.plot(curves["share"], curves["by_difficulty"], color="#0072b2", lw=2.2, label="by believed difficulty")
    axes.plot([0, 1], [choice.small, choice.large], color="#444444", ls="--", lw=1.4, label="at random")
    got, low, high = choice.labelled, choice.low, choice.high
    x, y = ([[max(0, one - a)], [max(0, b - one)]] for a, one, b in zip(low[:2], got[:2], high[:2], strict=True))
    label = f"threshold {choice.threshold:.3f}; 95% of new samples"
    axes.errorbar([got.share], [got.accuracy], xerr=x, yerr=y, label=label, color="#d55e00", marker="o", capsize=3)
    axes.set(
        xlabel="share of requests for the large model",
        ylabel="right answers",
        title=f"{len(curves['share']) - 1} requests: small model {choice.small:.0%}, large model {choice.large:.0%}",
        xlim=(0, 1),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#d0d7de", lw=0.6)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
