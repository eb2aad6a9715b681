"""Write what a run's estimator believes of each prompt's pass rate: the difficulty of a data set, as a by-product.

  depo score runs/x/checkpoints/depo/global_step100.safetensors prompts.jsonl --out scores.jsonl

PROMPTS has one JSON object a line with `prompt` and, if the launch has labels, `label`: the prompt as the policy sees
it, after its chat template. groups.jsonl of the run is such a file. Each line of the output has:

  prompt, label   as given
  pass_rate       the believed pass rate at the end of the run (p̂), and spread, its standard deviation
  n               how many responses that belief is worth, so that the file can be --depo.history.prior of another run
  v               the chance that a group has a signal
  visits          steps in which the prompt was trained or thrown away
  verdict         "never solved" or "always solved" if it was met at least three times and hardly ever had a
                  signal: look at its label

The encoder and the other estimator settings are those of the launch: give the same --depo.* flags.

Exit status: 0 if done, 1 if a file cannot be used, 2 if the options are wrong.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from depo_plugin import json_lines
from depo_plugin.settings import config

VISITS, SURE = 3, 0.2  # for a verdict: at least so many visits, and at most this believed chance of a signal
BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo score`, and the --depo.* flags of a launch."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="<ckpt.path>/depo/<tag>.safetensors")
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="JSON lines with prompt and label")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, one for each prompt")
    config.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `depo score` and return the exit status."""
    try:
        cfg = config.load_config(getattr(args, "depo.config"), config.overrides_from_namespace(args))
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    from depo_plugin.estimator.checkpoint import CheckpointError
    from depo_plugin.estimator.encoder import EncoderError
    from depo_plugin.estimator.estimator import DifficultyEstimator
    from depo_plugin.estimator.text_model import EstimatorError

    try:
        asked = list(_asked(args.prompts))
        estimator = DifficultyEstimator.from_checkpoint(args.checkpoint, cfg)
        counts = _write(estimator, asked, args.out)
    except (OSError, json_lines.LineError, CheckpointError, EncoderError, EstimatorError) as error:
        print(f"depo score: {error}", file=sys.stderr)
        return 1
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{args.out}: {len(asked)} prompts, {told}")
    return 0


def _write(estimator, asked: list[tuple[str, str]], path: Path) -> dict[str, int]:
    """Write the output; return how often each verdict was given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = {"never solved": 0, "always solved": 0}
    # Half a surrogate pair is no UTF-8: it is written as JSON's escape for it.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for start in range(0, len(asked), BATCH):
            for row in _scored(estimator, asked[start : start + BATCH]):
                if "verdict" in row:
                    counts[row["verdict"]] += 1
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def _asked(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each prompt and label of a file once. Raises LineError."""
    seen = set()
    for number, row in json_lines.read(path):
        if "prompt" not in row and "key" in row:  # groups.jsonl: the text stands in a key's first line
            continue
        with json_lines.fields(path, number):
            one = json_lines.text(row, "prompt"), str(row.get("label", ""))
        if one not in seen:
            seen.add(one)
            yield one


def _scored(estimator, asked: list[tuple[str, str]]) -> Iterator[dict]:
    """Yield the output's line of each prompt."""
    from depo_plugin.filter import beliefs_of

    prompts, labels = map(list, zip(*asked, strict=True))
    _, beliefs = beliefs_of(estimator.score(prompts, labels), [""] * len(asked), estimator.group_size)
    fields = (getattr(beliefs, name).tolist() for name in ("p", "a", "b", "v", "visits"))
    for prompt, label, p, a, b, v, visits in zip(prompts, labels, *fields, strict=True):
        n = a + b
        row = {"prompt": prompt, "label": label, "pass_rate": round(p, 6), "n": round(n, 3)}
        row |= {"spread": round((p * (1 - p) / (n + 1)) ** 0.5, 6), "v": round(v, 6), "visits": int(visits)}
        if visits >= VISITS and v <= SURE:
            row["verdict"] = "always solved" if p > 0.5 else "never solved"
        yield row
