"""Reward of a math answer for OpenRLHF's --reward.remote_url: 1 if it equals the label, else 0.

The answer is the text after the last "Answer:" in the response. If there is none, the content of the last \\boxed{}.
"""

import re

import torch
from openrlhf.utils import extract_boxed_answer, grade_answer

END = re.compile(r"(<[^<>\s]{1,40}>|\s)+$")  # the token that ends a response: <|im_end|>, </s>


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """Return the scores of responses. queries: prompt and response in one text; labels: the right answers."""
    scores = []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        response = END.sub("", query.removeprefix(prompt))
        stated = re.findall(r"Answer:\s*(.+)", response)
        answer = stated[-1].strip().strip("*$ ") if stated else response
        answer = extract_boxed_answer(answer) or (answer if stated else None)
        scores.append(float(grade_answer(answer, label)))
    rewards = torch.tensor(scores)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"correct": rewards}}
