"""What the quickstart trains on: the ladder of tasks, the reward function and the weights of `tiny`."""

import json
import operator
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import pytest
import torch

QUICKSTART = Path(__file__).resolve().parents[2] / "scripts" / "quickstart"

import pretrain_tiny  # noqa: E402
import reward_func  # noqa: E402
import tasks  # noqa: E402

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def train_rows():
    return tasks.make_split(640, 42, evaluation=False)


@pytest.fixture(scope="module")
def eval_rows():
    return tasks.make_split(64, 42, evaluation=True)


def problem(prompt):
    """Return the operation and its operands, sorted: a problem and its mirror image are the same."""
    words = prompt.removesuffix(" =").split(" ")
    return words[1], tuple(sorted(map(int, words[::2])))


def test_splits_of_any_seeds_share_no_problem_and_repeat_none(train_rows, eval_rows):
    other_seed = tasks.make_split(640, 7, evaluation=False)
    held_out = {problem(row["input"]) for row in eval_rows}
    assert held_out.isdisjoint(problem(row["input"]) for row in train_rows + other_seed)
    for rows in (train_rows, eval_rows):
        assert len({row["input"] for row in rows}) == len(rows)


def test_smollm2_ladder_fills_the_quickstarts_splits():
    levels = tasks.LADDERS["smollm2"]
    for count, evaluation in ((320, False), (64, True)):
        rows = tasks.make_split(count, 42, evaluation=evaluation, levels=levels)
        assert {row["datasource"] for row in rows} == {level.name for level in levels}
        assert len(rows) == count


def test_same_seed_same_rows_and_another_seed_others(train_rows):
    assert tasks.make_split(640, 42, evaluation=False) == train_rows
    assert tasks.make_split(640, 43, evaluation=False) != train_rows


def test_fewer_problems_than_levels_is_fine():
    assert len(tasks.make_split(3, 0, evaluation=True)) == 3


@pytest.mark.parametrize("count", [3, 10, 64, 645])
def test_quotas_are_even_and_add_up(count):
    quotas = tasks.quotas(count, 10)
    assert sum(quotas) == count
    assert max(quotas) - min(quotas) <= 1


def test_labels_are_what_arithmetic_says(train_rows, eval_rows):
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for row in train_rows + eval_rows:
        words = row["input"].removesuffix(" =").split(" ")
        expected = reduce(apply[words[1]], map(int, words[::2]))
        assert row["label"] == str(expected)
        assert expected >= 0, row


def test_levels_tell_their_operands_digits(train_rows):
    digits = {level.name: level.digits for level in tasks.LEVELS}
    for row in train_rows:
        operands = row["input"].removesuffix(" =").split(" ")[::2]
        assert tuple(map(len, operands)) == digits[row["datasource"]]


def test_too_many_problems_asked_for_is_an_error_that_names_level_and_flag():
    with pytest.raises(ValueError, match=r"add-2by1digit has \d+ eval problems, 100 wanted: lower --eval"):
        tasks.make_split(1000, 0, evaluation=True)


def test_files_hold_the_rows(tmp_path, monkeypatch, train_rows, eval_rows):
    argv = ["tasks.py", "--out", str(tmp_path), "--train", "640", "--eval", "64", "--seed", "42"]
    monkeypatch.setattr(sys, "argv", argv)
    tasks.main()
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


SHOTS = "2 + 3 = 5\n6 + 7 = 13\n47 + 85 ="
CHAT = "<|im_start|>user\n47 + 85 =<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("47 + 85 =", "132<eos>", 1.0),
        ("47 + 85 =", "132", 1.0),  # cut off by max_new_tokens
        ("47 + 85 =", "133<eos>", 0.0),
        ("47 + 85 =", "1325<eos>", 0.0),
        ("47 + 85 =", "-132<eos>", 0.0),
        ("47 + 85 =", "0132<eos>", 0.0),
        ("47 + 85 =", "132 + 1<eos>", 0.0),  # the last integer counts: no credit for guessing twice
        ("47 + 85 =", "<eos>", 0.0),
        ("47 + 85 =", "", 0.0),
        ("47 + 85 =", " + = <unk>", 0.0),
        (SHOTS, " 132\n1 + 1 = 2", 1.0),  # only the line is graded
        (SHOTS, " 131\n47 + 85 = 132", 0.0),
        (SHOTS, "\n132", 1.0),
        (CHAT, "Let me see.\n\n132<|im_end|>", 1.0),
        (CHAT, "47 + 85 = 132.<|im_end|>", 1.0),
        (CHAT, "The answer is **132**<|im_end|>", 1.0),
        (CHAT, "I add 47 and 85.<|im_end|>", 0.0),
    ],
)
def test_reward_of_one_response(prompt, response, reward):
    result = reward_func.reward_func([prompt + response], [prompt], ["132"])
    assert result["rewards"].tolist() == result["scores"].tolist() == [reward]


def test_a_prompt_that_holds_the_label_earns_nothing():
    prompt = "132 * 1 + 0 = 132 ? Say:"
    assert reward_func.reward_func([prompt + "no"], [prompt], ["132"])["rewards"].tolist() == [0.0]


def test_thousands_separators_are_read():
    assert reward_func.last_integer("so 1,234.") == "1234"


def test_reward_result_is_what_openrlhf_makes_tensors_of():
    result = reward_func.reward_func(["1 + 1 =2", "1 + 1 =x"], ["1 + 1 ="] * 2, ["2"] * 2)
    assert result["rewards"].dtype == torch.float32
    assert result["extra_logs"]["answered"].tolist() == [1.0, 0.0]
    one = reward_func.reward_func(["1 + 1 =2"], ["1 + 1 ="], ["2"])
    assert torch.tensor([one["rewards"]]).shape == (1,)  # as in OpenRLHF's SamplesGenerator


def test_reward_log_keeps_every_line_whole_under_concurrent_writers(tmp_path, monkeypatch):
    path = tmp_path / "rewards.jsonl"
    monkeypatch.setenv("DEPO_REWARD_LOG", str(path))
    long_response = "9" * 5000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: reward_func.reward_func([f"{i} ={long_response}"], [f"{i} ="], ["9"]), range(200)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(int(row["prompt"].split(" ")[0]) for row in rows) == list(range(200))
    assert all(row["response"] == long_response and row["reward"] == 0.0 for row in rows)


def test_log_is_off_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("DEPO_REWARD_LOG", raising=False)
    monkeypatch.chdir(tmp_path)
    reward_func.reward_func(["1 =1"], ["1 ="], ["1"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = QUICKSTART / "tiny"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_tiny_is_small():
    assert sum(file.stat().st_size for file in (QUICKSTART / "tiny").iterdir()) < 10 * MEGABYTE


def test_tiny_tokenizer_round_trips_every_prompt_and_has_a_text_for_every_id(tiny, train_rows):
    model, tokenizer = tiny
    for row in train_rows:
        tokens = tokenizer(row["input"] + row["label"], add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == row["input"] + row["label"]
        assert tokenizer.unk_token_id not in tokens
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id != tokenizer.pad_token_id


@pytest.mark.slow
def test_tiny_answers_easy_levels_and_not_the_hopeless_ones(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    rate = {}
    for level in tasks.EASY + tasks.MIDDLE + tasks.HOPELESS:
        rates = pretrain_tiny.group_rates(model, tokenizer, level, problems=16, group=4)
        rate[level.name] = sum(rates) / len(rates)
    # 64 samples a level; the model card's rates are above 0.9, between 0.15 and 0.75, and 0.
    assert all(rate[level.name] > 0.8 for level in tasks.EASY), rate
    assert all(0.05 < rate[level.name] < 0.9 for level in tasks.MIDDLE), rate
    assert all(rate[level.name] < 0.05 for level in tasks.HOPELESS), rate


@pytest.mark.slow
def test_tiny_knows_more_than_it_says(tiny):
    """Greedy answers on the middle levels beat sampled ones: the room that reinforcement learning uses."""
    model, tokenizer = tiny
    level = next(level for level in tasks.MIDDLE if level.name == "sub-2digit")
    rng = random.Random(0)
    drawn = [tasks.draw_in_split(level, rng, evaluation=True) for _ in range(64)]
    prompts = [level.prompt(operands) for operands in drawn]
    answers = [level.answer(operands) for operands in drawn]
    torch.manual_seed(0)
    greedy, sampled = (
        sum(map(operator.eq, pretrain_tiny.sample(model, tokenizer, prompts, greedy=greedy), answers)) / len(answers)
        for greedy in (True, False)
    )
    assert greedy > sampled + 0.15
