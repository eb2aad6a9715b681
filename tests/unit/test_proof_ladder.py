"""The problems and the policy of benchmarks/proof."""

import json
import random
from collections import Counter

import pytest
import reward_func
import tasks

from benchmarks.proof import ladder, launch, pretrain

POLICY = pretrain.POLICY
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def train_rows():
    count = 24 * 300  # 300 a level, for 225 steps of 32 prompts
    return tasks.make_split(count, 0, evaluation=False, levels=ladder.LEVELS)


@pytest.fixture(scope="module")
def eval_rows():
    return tasks.make_split(24 * 40, 1, evaluation=True, levels=ladder.LEVELS)


def operands_of(prompt):
    """Return the operation and its operands as numbers."""
    words = prompt.removesuffix(" =").split(" ")
    numbers = tuple(int(word) for word in words if word.isdecimal())
    (op,) = {word for word in words if not word.isdecimal()}
    return op, numbers


def answer_by_hand(op, numbers):
    """Return the right answer, worked out in another way than ladder.py does."""
    match op:
        case "+":
            total = 0
            for number in numbers:
                total += number
            return str(total)
        case "-":
            return str(numbers[0] + -numbers[1])
        case "*":
            return str(sum(numbers[0] for _ in range(numbers[1])))
        case "/":
            return str(divmod(*numbers)[0])
        case "%":
            return str(divmod(*numbers)[1])
        case "max":
            return str(sorted(numbers)[1])
        case "min":
            return str(sorted(numbers)[0])
        case "rev":
            return "".join(reversed(str(numbers[0])))
        case "sort":
            counts = Counter(str(numbers[0]))
            return "".join(digit * counts[digit] for digit in "123456789")
        case "sum":
            value = numbers[0]
            return str(value // 1000 + value // 100 % 10 + value // 10 % 10 + value % 10)
        case "|":
            tens, ones = sum(n // 10 for n in numbers) % 10, sum(n % 10 for n in numbers) % 10
            return str(10 * tens + ones)
    raise AssertionError(op)


def test_each_level_has_the_same_share_and_enough_problems(train_rows, eval_rows):
    names = {level.name for level in ladder.LEVELS}
    assert Counter(row["datasource"] for row in train_rows) == dict.fromkeys(names, 300)
    assert Counter(row["datasource"] for row in eval_rows) == dict.fromkeys(names, 40)


def test_the_splits_share_no_problem_and_repeat_none(train_rows, eval_rows):
    trained, evaluated = ({row["input"] for row in rows} for rows in (train_rows, eval_rows))
    assert (len(trained), len(evaluated)) == (len(train_rows), len(eval_rows))

    def unordered(prompts):
        return {(op, *sorted(numbers)) for op, numbers in map(operands_of, prompts)}

    assert not unordered(trained) & unordered(evaluated)


def test_the_answers_are_right_and_the_reward_function_knows_them(train_rows, eval_rows):
    rows = train_rows[:2000] + eval_rows
    assert {operands_of(row["input"])[0] for row in rows} == set(ladder.OPERATIONS)
    for row in rows:
        assert row["label"] == answer_by_hand(*operands_of(row["input"])), row
    prompts, labels = [row["input"] for row in rows], [row["label"] for row in rows]
    queries = [f"{prompt}{label}<eos>" for prompt, label in zip(prompts, labels, strict=True)]
    assert reward_func.reward_func(queries, prompts, labels)["rewards"].eq(1).all()


def test_a_confused_answer_is_always_wrong():
    rng = random.Random(0)
    for level in ladder.EASY + ladder.LEARNABLE:
        for _ in range(200):
            operands = level.draw(rng)
            assert level.confused(operands) != level.answer(operands), (level, operands)


def test_confused_answers_by_hand():
    levels = {level.name: level for level in ladder.LEVELS}
    wanted = {  # level: operands, right, confused
        "add-2digit": ([47, 85], "132", "22"),  # no carries
        "nocarry-2digit": ([47, 85], "22", "132"),
        "sub-2digit": ([63, 59], "4", "16"),  # |6-5| and |3-9|
        "mod-2by1digit": ([47, 7], "5", "6"),  # the quotient
        "rev-5digit": ([31524], "42513", "12345"),  # sorted
        "add-2by1digit": ([42, 5], "47", "48"),  # nothing to carry: the last digit is one too large
    }
    for name, (operands, right, confused) in wanted.items():
        assert levels[name].answer(operands) == right
        assert levels[name].confused(operands) == confused


def test_the_taught_rate_varies_around_the_levels_rate():
    rng = random.Random(0)
    for level in ladder.EASY + ladder.LEARNABLE:
        odds = level.rate / (1 - level.rate)
        rates = [level.taught_rate(level.draw(rng)) for _ in range(100)]
        found = [rate / (1 - rate) for rate in rates]
        assert max(found) > 2 * min(found)
        # e^(2 * 1.5) = 20.1: the most that two digits can do to the odds
        assert odds / 20.1 <= min(found)
        assert max(found) <= odds * 20.1


def test_write_data_is_deterministic_and_evaluation_does_not_depend_on_the_seed(tmp_path):
    size = launch.Size(prompts=8, steps=30, episodes=1, lr=1e-4, held_out=48)
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        launch.write_data("ladder", tmp_path / folder, size, seed)
    for name, lines in (("train.jsonl", 240), ("eval.jsonl", 48)):
        first, second, other = ((tmp_path / folder / name).read_text() for folder in ("a", "b", "c"))
        assert first == second
        assert (first == other) == (name == "eval.jsonl")
        rows = [json.loads(line) for line in first.splitlines()]
        assert len(rows) == lines
        assert all(set(row) == {"input", "label", "datasource"} for row in rows)


def test_too_many_problems_are_an_error_that_names_the_level():
    division = next(level for level in ladder.LEVELS if level.name == "div-2by1digit")
    with pytest.raises(ValueError, match=r"div-2by1digit has \d+ eval problems, 90 wanted: lower --eval"):
        tasks.level_rows(division, 90, random.Random(0), evaluation=True)


def test_every_prompt_and_answer_is_known_to_the_tokenizer(train_rows):
    tokenizer = pretrain.make_tokenizer()
    for row in train_rows[:1000]:
        prompt, answer = tokenizer([row["input"], row["label"]]).input_ids
        assert pretrain.pretrain_tiny.UNK not in prompt + answer
        assert tokenizer.decode(prompt + answer) == row["input"] + row["label"]
        assert len(answer) <= 11


def test_the_policy_is_small_and_its_tokenizer_is_the_scripts(eval_rows, tmp_path):
    assert sum(file.stat().st_size for file in POLICY.iterdir()) < 10 * MEGABYTE
    pretrain.make_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (POLICY / "tokenizer.json").read_text()
