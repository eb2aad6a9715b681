"""The problems of the proof: write them with `write_data(folder, train, evaluation, seed)`.

Each line has `input`, `label` and `datasource` (the level), as in scripts/quickstart/tasks.py:
    {"input": "max 471 852 =", "label": "852", "datasource": "max-3digit"}

A level is an operation and the digits of its operands, so the text shows its kind and size. Each level is easy,
learnable or hopeless for `policy/`. pretrain.py taught the policy to confuse operations: a problem of an easy or
learnable level is answered right with the probability `taught_rate`. It depends on the level and on two digits of the
problem, so difficulty also varies within a level.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from tasks import is_eval, quotas, write_jsonl

SPREAD = 1.5  # each of a problem's two digits moves the log-odds of its taught rate by at most this much


@dataclass(frozen=True)
class Level:
    """A kind of problem, for example Level("max-3digit", "easy", "max", (3, 3), 0.96) for "max 471 852 ="."""

    name: str  # goes into `datasource`
    group: str  # "easy", "learnable" or "hopeless"
    op: str  # a key of OPERATIONS
    digits: tuple[int, ...]  # of each operand
    rate: float = 0.0  # about the share of right answers that the policy is taught; 0: it never sees the level


EASY = (
    Level("nocarry-2digit", "easy", "|", (2, 2), 0.99),
    Level("max-3digit", "easy", "max", (3, 3), 0.99),
    Level("div-2by1digit", "easy", "/", (2, 1), 0.99),
    Level("add-2by1digit", "easy", "+", (2, 1), 0.99),
)
LEARNABLE = (
    Level("add-2digit", "learnable", "+", (2, 2), 0.25),
    Level("add-3digit", "learnable", "+", (3, 3), 0.20),
    Level("add-3terms", "learnable", "+", (2, 2, 2), 0.20),
    Level("sub-2digit", "learnable", "-", (2, 2), 0.20),
    Level("sub-3digit", "learnable", "-", (3, 3), 0.20),
    Level("min-3digit", "learnable", "min", (3, 3), 0.15),
    Level("rev-5digit", "learnable", "rev", (5,), 0.35),
    Level("sort-4digit", "learnable", "sort", (4,), 0.15),
    Level("mul-2by1digit", "learnable", "*", (2, 1), 0.50),
    Level("mod-2by1digit", "learnable", "%", (2, 1), 0.25),
    Level("sum-4digit", "learnable", "sum", (4,), 0.20),
)
HOPELESS = (
    Level("add-6digit", "hopeless", "+", (6, 6)),
    Level("sub-6digit", "hopeless", "-", (6, 6)),
    Level("mul-2digit", "hopeless", "*", (2, 2)),
    Level("mul-3digit", "hopeless", "*", (3, 3)),
    Level("mul-4digit", "hopeless", "*", (4, 4)),
    Level("div-5by2digit", "hopeless", "/", (5, 2)),
    Level("mod-5by3digit", "hopeless", "%", (5, 3)),
    Level("rev-9digit", "hopeless", "rev", (9,)),
    Level("sort-8digit", "hopeless", "sort", (8,)),
)
LEVELS = EASY + LEARNABLE + HOPELESS


def digitwise(function, operands: list[int]) -> str:
    """Return the last digits of `function` of the operands' digits, place by place: nothing is carried."""
    width = len(str(max(operands)))
    columns = zip(*(str(operand).zfill(width) for operand in operands), strict=True)
    return str(int("".join(str(function(map(int, column)) % 10) for column in columns)))


def difference(operands) -> int:
    """Return the first operand less the second."""
    first, second = operands
    return first - second


# Operation -> (right answer, the answer that the policy confuses it with), both from the operands.
OPERATIONS = {
    "+": (lambda n: str(sum(n)), lambda n: digitwise(sum, n[:2])),
    "|": (lambda n: digitwise(sum, n), lambda n: str(sum(n))),
    "-": (lambda n: str(difference(n)), lambda n: digitwise(lambda pair: abs(difference(pair)), n)),
    "*": (lambda n: str(math.prod(n)), lambda n: digitwise(sum, n)),
    "/": (lambda n: str(n[0] // n[1]), lambda n: str(n[0] % n[1])),
    "%": (lambda n: str(n[0] % n[1]), lambda n: str(n[0] // n[1])),
    "max": (lambda n: str(max(n)), lambda n: str(min(n))),
    "min": (lambda n: str(min(n)), lambda n: str(max(n))),
    "rev": (lambda n: str(n[0])[::-1], lambda n: "".join(sorted(str(n[0])))),
    "sort": (lambda n: "".join(sorted(str(n[0]))), lambda n: str(n[0])[::-1]),
    "sum": (lambda n: str(sum(map(int, str(n[0])))), lambda n: max(str(n[0]))),
}
WORDS = tuple(op for op in OPERATIONS if op.isalpha())  # written before the operands; the others stand between them


def draw(level: Level, rng: random.Random) -> list[int]:
    """Return random operands of one problem: no division by 1, no negative difference, no digit 0 to move about."""
    if level.op in ("rev", "sort", "sum"):
        return [int("".join(rng.choice("123456789") for _ in range(d))) for d in level.digits]
    low = 2 if level.op in ("/", "%", "*") else 1
    operands = [rng.randrange(max(low, 10 ** (d - 1)), 10**d) for d in level.digits]
    if level.op == "-":
        operands.sort(reverse=True)
    if level.op in ("max", "min", "-") and operands[0] == operands[1]:
        return draw(level, rng)
    return operands


def prompt_of(level: Level, operands: list[int]) -> str:
    """Return the problem as the policy sees it: "47 + 85 =" or "max 471 852 ="."""
    if level.op in WORDS:
        return f"{level.op} {' '.join(map(str, operands))} ="
    return f" {level.op} ".join(map(str, operands)) + " ="


def answer_of(level: Level, operands: list[int]) -> str:
    """Return the right answer in decimal digits."""
    return OPERATIONS[level.op][0](operands)


def confused_answer(level: Level, operands: list[int]) -> str:
    """Return the wrong answer that the policy is taught: another operation's, or the right one with another end."""
    right, confused = (answer(operands) for answer in OPERATIONS[level.op])
    return confused if confused != right else right[:-1] + str((int(right[-1]) + 1) % 10)


def taught_rate(level: Level, operands: list[int]) -> float:
    """Return the share of right answers to this problem that the policy is taught.

    The first digit of the first operand and the last digit of the last operand each move the level's log-odds, by an
    amount that is drawn once for this level and digit.
    """
    places = ("first", str(operands[0])[0]), ("last", str(operands[-1])[-1])
    shift = sum(random.Random(f"{level.name}/{place}/{digit}").uniform(-SPREAD, SPREAD) for place, digit in places)
    return 1 / (1 + (1 / level.rate - 1) * math.exp(-shift))


def draw_in_split(level: Level, rng: random.Random, *, evaluation: bool) -> list[int]:
    """Return random operands of a problem in the wanted split. tasks.is_eval decides the split, not the seed."""
    while True:
        operands = draw(level, rng)
        if is_eval(level, operands) == evaluation:
            return operands


def level_rows(level: Level, count: int, rng: random.Random, *, evaluation: bool) -> list[dict[str, str]]:
    """Return `count` different problems of a level as rows of the JSONL file. Raise ValueError if it has fewer."""
    rows: dict[str, dict[str, str]] = {}
    for _ in range(100 * count):
        if len(rows) == count:
            break
        operands = draw_in_split(level, rng, evaluation=evaluation)
        prompt = prompt_of(level, operands)
        rows[prompt] = {"input": prompt, "label": answer_of(level, operands), "datasource": level.name}
    if len(rows) < count:
        split = "eval" if evaluation else "train"
        raise ValueError(f"{level.name} has {len(rows)} {split} problems, {count} wanted: ask for fewer.")
    return list(rows.values())


def make_split(count: int, seed: int, *, evaluation: bool) -> list[dict[str, str]]:
    """Return `count` different problems, evenly from all levels, in random order."""
    rng = random.Random(f"{seed}/{'eval' if evaluation else 'train'}")
    shares = zip(LEVELS, quotas(count, len(LEVELS)), strict=True)
    rows = [row for level, quota in shares for row in level_rows(level, quota, rng, evaluation=evaluation)]
    rng.shuffle(rows)
    return rows


def write_data(folder: Path, train: int, evaluation: int, seed: int) -> None:
    """Write train.jsonl and eval.jsonl with these numbers of problems. eval.jsonl does not depend on the seed."""
    write_jsonl(folder / "train.jsonl", make_split(train, seed, evaluation=False))
    write_jsonl(folder / "eval.jsonl", make_split(evaluation, 0, evaluation=True))
