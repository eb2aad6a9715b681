"""Predict the groups of your own logs, then reveal them: would DEPO have helped?

  depo backtest my_log.jsonl.gz                        tables of the log, and a picture in depo-backtest/
  depo backtest runs/tiny-grpo/rollouts.jsonl          the quickstart's log of single responses
  depo backtest pool.jsonl --passes 3                  a pool of known pass rates, met in random order
  depo backtest my_log.jsonl --depo.history.share false --json out.json

A log has one JSON object a line (.jsonl or .jsonl.gz):
  {"step", "prompt", "label"?, "k", "n", "source"?}    a group: k of n responses were right
  {"prompt", "label"?, "reward"}                       a single response
  {"prompt", "pass_rate", "n"?}                        a pool
  groups.jsonl of a run with DEPO (also in shadow mode)

Each group is predicted before it is revealed, by the package's own estimator and by simple baselines. "depo, closed"
learns only from the groups that its filter keeps, as in a run; all others learn from every group. "hindsight" knows a
prompt's own groups, up to four before and four after: if prompts are met often, no learner can do much better.
With --depo.estimator.cache_dir DIR the next backtest does not embed the prompts again.
The picture needs: pip install 'openrlhf-depo[report]'

Exit status: 0 if done, 1 if a log or the encoder cannot be used, 2 if the options are wrong.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from depo_plugin.json_lines import LineError
from depo_plugin.settings import config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo backtest`, and the --depo.* flags of a launch."""
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--group-size", type=int, default=8, metavar="G", help="responses of a group (default: 8)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="groups of a step (default: 32)")
    parser.add_argument("--passes", type=int, default=3, metavar="N", help="over a pool (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of a pool's order and of exploration (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these predictors beside depo (default: all)")
    parser.add_argument("--out", type=Path, default=Path("depo-backtest"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    config.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `depo backtest` and return the exit status."""
    overrides = config.overrides_from_namespace(args)
    try:
        config.load_config(getattr(args, "depo.config"), overrides)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if low := [
        name
        for name, least in {"group_size": 2, "batch": 1, "passes": 1, "seed": 0}.items()
        if getattr(args, name) < least
    ]:
        print(f"--{low[0].replace('_', '-')} {getattr(args, low[0])}: too small.", file=sys.stderr)
        return 2
    from depo_plugin.backtest.logs import read
    from depo_plugin.estimator.encoder import EncoderError
    from depo_plugin.estimator.text_model import EstimatorError

    options = {"group_size": args.group_size, "batch": args.batch, "passes": args.passes, "seed": args.seed}
    written = {}
    try:
        logs = {path: read(path, **options) for path in args.logs}
        for path, steps in logs.items():
            written[str(path)] = _one(args, path, steps, overrides)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(_without_nan(written), indent=1) + "\n", encoding="utf-8")
    except UnknownName as error:
        print(f"--only {error}", file=sys.stderr)
        return 2
    except (LineError, OSError, EncoderError, EstimatorError) as error:
        print(f"depo backtest: {error}", file=sys.stderr)
        return 1
    return 0


class UnknownName(ValueError):
    """--only names a predictor that there is not."""


def _without_nan(value):
    """Return the same figures with None for those that are undefined: NaN is no JSON."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one(args: argparse.Namespace, path: Path, steps, overrides: dict) -> dict:
    """Play one log with every predictor, print its tables and draw it; return its figures."""
    from tqdm import tqdm
    from transformers.utils import logging

    from depo_plugin.backtest import tables
    from depo_plugin.backtest.judge import play, truth_of
    from depo_plugin.backtest.predictors import predictors
    from depo_plugin.rules import rule_of

    def cfg_of(changes: dict):
        return config.load_config(getattr(args, "depo.config"), overrides | changes)

    logging.disable_progress_bar()
    cfg, truth = cfg_of({}), truth_of(steps)
    with tempfile.TemporaryDirectory(prefix="depo-backtest-") as temporary:
        cache = Path(cfg.estimator.cache_dir or temporary)
        made = predictors(steps, cfg_of, args.group_size, args.seed, cache)
        if unknown := [name for name in args.only or () if name not in made]:
            raise UnknownName(f"{unknown[0]}: must be of {', '.join(made)}.")
        chosen = ["depo", *(name for name in made if name != "depo" and (not args.only or name in args.only))]
        plan = [("depo", False), (tables.CLOSED, True), *((name, False) for name in chosen[1:])]
        found = {}
        pause_s = 0.1 if sys.stderr.isatty() else 30
        with tqdm(total=len(plan) * len(steps), unit="step", mininterval=pause_s, leave=False) as bar:
            for name, closed in plan:
                bar.set_description(name)
                found[name] = play(
                    steps,
                    made["depo" if closed else name](),
                    rule_of(cfg.filter),
                    epsilon=cfg.filter.epsilon,
                    warmup=cfg.filter.warmup_steps,
                    closed=closed,
                    seed=args.seed,
                    tick=bar.update,
                )
    rows = tables.results(truth, found)
    title = (
        f"{path.name}: {len(truth.k_N):,} groups of {len(set(truth.prompt_N.tolist())):,} prompts, {len(steps)} steps"
    )
    print(f"\n{title}\n{tables.sentence(rows[tables.CLOSED]['all'])}\n")
    print("\n".join(tables.lines(rows)))
    name = path.name.split(".")[0]
    if sum(other.name.split(".")[0] == name for other in args.logs) > 1:  # such as groups.jsonl of several runs
        name += f"-{args.logs.index(path) + 1}"
    try:
        tables.draw(truth, found, rows, title, args.out / f"{name}.png")
        print(f"\n{args.out / name}.png")
    except OSError as error:
        print(f"\n(no picture: {error})", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"\n(no picture: the package {error.name} is missing. Run: pip install 'openrlhf-depo[report]')")
    return rows
