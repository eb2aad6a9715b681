"""Prompts to token batches. Suffixes: B = prompts, T = tokens of the longest one."""

import numpy as np
import torch


def tokenize(tokenizer, prompts: list[str], max_length: int) -> list[list[int]]:
    """Return each prompt's token ids, at most max_length of them with the special tokens, keeping its END.

    A long system prompt stands at the start, the problem at the end. Never an empty list: where a tokenizer adds no
    special tokens, an empty prompt becomes one padding token.
    """
    tokenizer.truncation_side = "left"
    ids = tokenizer(prompts, truncation=True, max_length=max_length)["input_ids"] if prompts else []
    return [one or [tokenizer.pad_token_id] for one in ids]


def micro_batches(ids: list[list[int]], size: int) -> list[np.ndarray]:
    """Return the indices of each micro-batch, at most `size` each; like lengths stand together to save padding."""
    order = np.argsort([len(one) for one in ids], kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def pad(ids: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and attention_mask, both (B, T) int64, padded at the end."""
    width = max(len(one) for one in ids)
    input_ids = torch.tensor([one + [pad_id] * (width - len(one)) for one in ids], device=device)
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids], device=device)
    return input_ids, mask
