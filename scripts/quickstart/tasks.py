"""Write the quickstart's arithmetic problems as JSONL files for OpenRLHF: `python tasks.py --out DIR`.

Each line has `input` (the prompt), `label` (the answer) and `datasource` (the level):
    {"input": "47 + 85 =", "label": "132", "datasource": "add-2digit"}

A level is an operation and the digits of its operands, so the text shows how difficult a problem is. About a third of
the problems are easy for the model in `tiny/`, a third are too hard, and the rest lie between. So most groups of an
unfiltered batch teach nothing.
"""

import argparse
import hashlib
import json
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

EVAL_SHARE = 0.1  # share of all possible problems that is for evaluation; the others are for training


_APPLY = {"+": sum, "*": math.prod, "-": lambda operands: operands[0] - sum(operands[1:])}


@dataclass(frozen=True)
class Level:
    """A kind of problem, for example Level("add-2digit", "+", (2, 2)) for "47 + 85 ="."""

    name: str  # goes into `datasource`
    op: str  # "+", "-" or "*"
    digits: tuple[int, ...]  # of each operand

    def draw(self, rng: random.Random) -> list[int]:
        """Return random operands, uniform over numbers with these digits. A difference is not negative."""
        operands = [rng.randrange(10 ** (d - 1), 10**d) for d in self.digits]
        if self.op != "-":
            return operands
        operands.sort(reverse=True)
        return operands if _APPLY["-"](operands) >= 0 else self.draw(rng)

    def prompt(self, operands: list[int]) -> str:
        """Return the problem as the policy sees it: "47 + 85 ="."""
        return f" {self.op} ".join(map(str, operands)) + " ="

    def answer(self, operands: list[int]) -> str:
        """Return the right answer in decimal digits."""
        return str(_APPLY[self.op](operands))


EASY = (
    Level("add-2by1digit", "+", (2, 1)),
    Level("add-1digit-3terms", "+", (1, 1, 1)),
    Level("add-2digit", "+", (2, 2)),
)
MIDDLE = (
    Level("sub-2by1digit", "-", (2, 1)),
    Level("sub-2digit", "-", (2, 2)),
    Level("sub-3terms", "-", (2, 1, 1)),
    Level("add-3terms", "+", (2, 2, 2)),
)
HOPELESS = (
    Level("mul-2digit", "*", (2, 2)),
    Level("mul-3digit", "*", (3, 3)),
    Level("mul-4digit", "*", (4, 4)),
)
LEVELS = EASY + MIDDLE + HOPELESS
LADDERS = {  # levels by policy; smollm2 solves one-digit sums and little more
    "tiny": LEVELS,
    "smollm2": (Level("add-1digit", "+", (1, 1)), *EASY, *MIDDLE[:2], *HOPELESS[:2]),
}


def is_eval(level: Level, operands: list[int]) -> bool:
    """Return whether a problem belongs to the evaluation split. This does not depend on the seed.

    A hash of the problem decides, so a problem is in the same split for every seed, size and run. Operands are sorted
    first, so that 47 + 85 and 85 + 47 are in the same split.
    """
    digest = hashlib.blake2b(f"{level.op}{sorted(operands)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < EVAL_SHARE


def draw_in_split(level: Level, rng: random.Random, *, evaluation: bool) -> list[int]:
    """Return random operands of a problem in the wanted split."""
    while True:
        operands = level.draw(rng)
        if is_eval(level, operands) == evaluation:
            return operands


def quotas(count: int, levels: int) -> list[int]:
    """Return the number of problems for each level: as even as possible, with `count` as their sum."""
    ends = [count * i // levels for i in range(levels + 1)]
    return [end - start for start, end in pairwise(ends)]


def level_rows(level: Level, count: int, rng: random.Random, *, evaluation: bool) -> list[dict[str, str]]:
    """Return `count` different problems of a level as rows of the JSONL file. Raise ValueError if it has fewer."""
    rows: dict[str, dict[str, str]] = {}
    for _ in range(100 * count):
        if len(rows) == count:
            break
        operands = draw_in_split(level, rng, evaluation=evaluation)
        prompt = level.prompt(operands)
        rows[prompt] = {"input": prompt, "label": level.answer(operands), "datasource": level.name}
    if len(rows) < count:
        split = "eval" if evaluation else "train"
        raise ValueError(f"{level.name} has {len(rows)} {split} problems, {count} wanted: lower --{split}.")
    return list(rows.values())


def make_split(count: int, seed: int, *, evaluation: bool, levels: tuple[Level, ...] = LEVELS) -> list[dict[str, str]]:
    """Return `count` different problems, evenly from all levels, in random order."""
    rng = random.Random(f"{seed}/{'eval' if evaluation else 'train'}")
    shares = zip(levels, quotas(count, len(levels)), strict=True)
    rows = [row for level, quota in shares for row in level_rows(level, quota, rng, evaluation=evaluation)]
    rng.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write train.jsonl and eval.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--train", type=int, default=2048, metavar="N", help="training problems (default: 2048)")
    parser.add_argument("--eval", type=int, default=128, metavar="N", help="evaluation problems (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ladder", choices=LADDERS, default="tiny", help="policy it is made for (default: tiny)")
    args = parser.parse_args()
    for name, count in (("train", args.train), ("eval", args.eval)):
        try:
            rows = make_split(count, args.seed, evaluation=name == "eval", levels=LADDERS[args.ladder])
        except ValueError as fault:
            parser.error(str(fault))
        write_jsonl(args.out / f"{name}.jsonl", rows)
        print(f"{args.out / name}.jsonl: {count} problems")


if __name__ == "__main__":
    main()
