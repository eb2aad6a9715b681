"""The problems of the proof.

Each line of its data has `input`, `label` and `datasource` (the level), as in scripts/quickstart/tasks.py:
    {"input": "max 471 852 =", "label": "852", "datasource": "max-3digit"}

A level is an operation and the digits of its operands, so the text shows its kind and size. Each level is easy,
learnable or hopeless for `policy/`. pretrain.py taught the policy to confuse operations: a problem of an easy or
learnable level is answered right with the probability `Level.taught_rate`. It depends on the level and on two digits
of the problem, so difficulty also varies within a level.
"""

import math
import random
from dataclasses import dataclass

import tasks

SPREAD = 1.5  # each of a problem's two digits moves the log-odds of its taught rate by at most this much


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


@dataclass(frozen=True)
class Level(tasks.Level):
    """A kind of problem, for example Level("max-3digit", "max", (3, 3), "easy", 0.96) for "max 471 852 ="."""

    group: str  # "easy", "learnable" or "hopeless"
    rate: float = 0.0  # about the share of right answers that the policy is taught; 0: it never sees the level

    def draw(self, rng: random.Random) -> list[int]:
        """Return random operands: no division by 1, no negative difference, no digit 0 to move about."""
        if self.op in ("rev", "sort", "sum"):
            return [int("".join(rng.choice("123456789") for _ in range(d))) for d in self.digits]
        low = 2 if self.op in ("/", "%", "*") else 1
        operands = [rng.randrange(max(low, 10 ** (d - 1)), 10**d) for d in self.digits]
        if self.op == "-":
            operands.sort(reverse=True)
        if self.op in ("max", "min", "-") and operands[0] == operands[1]:
            return self.draw(rng)
        return operands

    def prompt(self, operands: list[int]) -> str:
        """Return the problem as the policy sees it: "47 + 85 =" or "max 471 852 ="."""
        return f"{self.op} {' '.join(map(str, operands))} =" if self.op in WORDS else super().prompt(operands)

    def answer(self, operands: list[int]) -> str:
        """Return the right answer in decimal digits."""
        return OPERATIONS[self.op][0](operands)

    def confused(self, operands: list[int]) -> str:
        """Return the wrong answer that is taught: another operation's, or the right one with a wrong end."""
        right, confused = (answer(operands) for answer in OPERATIONS[self.op])
        return confused if confused != right else right[:-1] + str((int(right[-1]) + 1) % 10)

    def taught_rate(self, operands: list[int]) -> float:
        """Return the share of right answers to this problem that the policy is taught.

        The first digit of the first operand and the last digit of the last operand each move the level's log-odds, by
        an amount that is drawn once for this level and digit.
        """
        places = ("first", str(operands[0])[0]), ("last", str(operands[-1])[-1])
        shift = sum(random.Random(f"{self.name}/{place}/{digit}").uniform(-SPREAD, SPREAD) for place, digit in places)
        return 1 / (1 + (1 / self.rate - 1) * math.exp(-shift))


EASY = (
    Level("nocarry-2digit", "|", (2, 2), "easy", 0.99),
    Level("max-3digit", "max", (3, 3), "easy", 0.99),
    Level("div-2by1digit", "/", (2, 1), "easy", 0.99),
    Level("add-2by1digit", "+", (2, 1), "easy", 0.99),
)
LEARNABLE = (
    Level("add-2digit", "+", (2, 2), "learnable", 0.25),
    Level("add-3digit", "+", (3, 3), "learnable", 0.20),
    Level("add-3terms", "+", (2, 2, 2), "learnable", 0.20),
    Level("sub-2digit", "-", (2, 2), "learnable", 0.20),
    Level("sub-3digit", "-", (3, 3), "learnable", 0.20),
    Level("min-3digit", "min", (3, 3), "learnable", 0.15),
    Level("rev-5digit", "rev", (5,), "learnable", 0.35),
    Level("sort-4digit", "sort", (4,), "learnable", 0.15),
    Level("mul-2by1digit", "*", (2, 1), "learnable", 0.50),
    Level("mod-2by1digit", "%", (2, 1), "learnable", 0.25),
    Level("sum-4digit", "sum", (4,), "learnable", 0.20),
)
HOPELESS = (
    Level("add-6digit", "+", (6, 6), "hopeless"),
    Level("sub-6digit", "-", (6, 6), "hopeless"),
    Level("mul-2digit", "*", (2, 2), "hopeless"),
    Level("mul-3digit", "*", (3, 3), "hopeless"),
    Level("mul-4digit", "*", (4, 4), "hopeless"),
    Level("div-5by2digit", "/", (5, 2), "hopeless"),
    Level("mod-5by3digit", "%", (5, 3), "hopeless"),
    Level("rev-9digit", "rev", (9,), "hopeless"),
    Level("sort-8digit", "sort", (8,), "hopeless"),
)
LEVELS = EASY + LEARNABLE + HOPELESS
