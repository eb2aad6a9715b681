"""Reward for OpenRLHF (`--reward.remote_url reward_func.py`): 1.0 if the last integer of the answer is the label.

If the prompt ends in "=", the answer is the rest of that line, because a base model goes on with more lines. For any
other prompt, such as one in a chat template, the answer is the whole response.

If DEPO_REWARD_LOG names a file, every graded sample is appended to it as one JSON line, so that they can be counted:
    {"prompt": "47 + 85 =", "label": "132", "response": "132<eos>", "reward": 1.0}
"""

import json
import os
import re

import torch

INTEGER = re.compile(r"(?<!\d)-?\d[\d,]*")


def response_of(query: str, prompt: str) -> str:
    """Return the policy's response; the whole query if it does not start with its prompt (it was truncated)."""
    return query[len(prompt) :] if query.startswith(prompt) else query


def answer_of(response: str, prompt: str) -> str:
    """Return the part of a response that is graded."""
    return response.lstrip().partition("\n")[0] if prompt.rstrip().endswith("=") else response


def last_integer(text: str) -> str | None:
    """Return the last integer of a text without thousands separators ("so 1,234." gives "1234"), None without one."""
    found = INTEGER.findall(text)
    return found[-1].replace(",", "") if found else None


def log(rows: list[dict]) -> None:
    """Append rows to the file DEPO_REWARD_LOG with one write, so that lines of concurrent writers do not mix."""
    path = os.environ.get("DEPO_REWARD_LOG")
    if not path:
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """Grade a batch of B samples; query = prompt + response, special tokens included.

    Return `rewards` (B,) and `scores` (B,), both 0.0 or 1.0, and `extra_logs` with `answered` (B,): 1.0 if the answer
    contains an integer.
    """
    responses = [response_of(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    answers = [last_integer(answer_of(*pair)) for pair in zip(responses, prompts, strict=True)]
    rewards = [float(answer == str(label)) for answer, label in zip(answers, labels, strict=True)]
    keys = ("prompt", "label", "response", "reward")
    log([dict(zip(keys, row, strict=True)) for row in zip(prompts, labels, responses, rewards, strict=True)])
    rewards_B = torch.tensor(rewards)
    answered_B = torch.tensor([float(answer is not None) for answer in answers])
    return {"rewards": rewards_B, "scores": rewards_B, "extra_logs": {"answered": answered_B}}
