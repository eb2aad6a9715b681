"""Turn prompts into token batches and embeddings, choose the precision, and estimate memory for the backward pass.

Suffixes: B = prompts, T = tokens of the longest one.
"""

from pathlib import Path

import numpy as np
import torch

from depo_plugin.estimator.encoder import pool

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # a CPU is fastest while a layer's activations stay in its cache
GROWTH, SLACK = 1.125, 8  # a micro-batch's longest prompt: at most 1.125 times its shortest and 8 tokens more
# Most activations that one call keeps for the backward pass; on a CPU 128 mixed prompts of a small encoder fit, on a
# GPU the policy and vLLM need the memory.
KEPT_BYTES = {"cpu": 6 << 30, "cuda": 1 << 30}
UNIT_BYTES = 68  # bytes of activations per token, layer and unit of width (measured with MiniLM, both precisions)
READ_CHARS = 64  # characters of a prompt's end that are tokenized, per token of max_length: far more than a token has
CPU_INFO = Path("/proc/cpuinfo")


def tokenize(tokenizer, prompts: list[str], max_length: int) -> list[list[int]]:
    """Return each prompt's token ids: at most max_length, special tokens included, from the END of the prompt.

    A long system prompt stands at the start, the problem at the end. Only the last READ_CHARS · max_length characters
    are tokenized: 10 MB would take a minute and gigabytes. No list is empty: if the tokenizer adds no special tokens,
    an empty prompt becomes one padding token.
    """
    tokenizer.truncation_side = "left"
    ends = [prompt[-READ_CHARS * max_length :] for prompt in prompts]
    prompts = [end.encode(errors="replace").decode() for end in ends]  # tokenizers refuse lone surrogates
    ids = tokenizer(prompts, truncation=True, max_length=max_length)["input_ids"] if prompts else []
    return [one or [tokenizer.pad_token_id] for one in ids]


def micro_batches(ids: list[list[int]], tokens: int) -> list[np.ndarray]:
    """Return the indices of each micro-batch: at most `tokens` tokens with padding, or one prompt that is longer.

    Short prompts come first. Prompts of similar length stand together, so that little of a micro-batch is padding.
    """
    length_B = np.array([len(one) for one in ids], np.int64)
    batches: list[list[int]] = []
    for i in np.argsort(length_B, kind="stable"):
        here = batches[-1] if batches else []
        full = not here or (len(here) + 1) * length_B[i] > tokens
        if full or length_B[i] > GROWTH * length_B[here[0]] + SLACK:
            batches.append([i])
        else:
            here.append(i)
    return [np.array(batch) for batch in batches]


def pad(ids: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and attention_mask, both (B, T) int64, padded at the end."""
    width = max(len(one) for one in ids)
    input_ids = torch.tensor([one + [pad_id] * (width - len(one)) for one in ids], device=device)
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids], device=device)
    return input_ids, mask


def activation_bytes(config, tokens: int) -> int:
    """Return about how many bytes the backward pass of `tokens` padded tokens needs. config: the encoder's."""
    return UNIT_BYTES * config.num_hidden_layers * config.hidden_size * tokens


def autocast(device: torch.device, dtype: str):
    """Return a context that computes in `dtype`, fp32 or bf16. Switch gradients on or off before you enter it.

    If gradients are off, weights are cast once for all micro-batches. torch does so only for weights that require
    gradients, so a frozen encoder's weights must require them, too. If they are on, it would sum gradients in bf16.
    """
    enabled, cache = dtype == "bf16", not torch.is_grad_enabled()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache)


def embed(encoder: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the prompts' embeddings, float32 (B, E), from (B, T) tokens."""
    return pool(encoder, input_ids, attention_mask).float()


def fastest_dtype(device: torch.device) -> str:
    """Return "bf16" if this CPU or GPU has instructions for it, else "fp32", which is several times faster there.

    Nothing is measured: on a busy machine two runs, or a run and `depo embed`, would not always choose the same, and
    share no embeddings then.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = CPU_INFO.read_text()
    except OSError:  # not Linux
        return "fp32"
    return "bf16" if "bf16" in flags else "fp32"  # avx512_bf16, amx_bf16; on ARM bf16
