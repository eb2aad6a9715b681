"""Turn prompts into token batches and embeddings, choose the precision, and estimate memory for the backward pass.

Suffixes: B = prompts, T = tokens of the longest one.
"""

import time

import numpy as np
import torch

from depo_plugin.estimator.encoder import pool

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # a CPU is fastest while a layer's activations stay in its cache
GROWTH, SLACK = 1.125, 8  # a micro-batch's longest prompt: at most 1.125 times its shortest and 8 tokens more
# Most activations that one call keeps for the backward pass; on a CPU 128 mixed prompts of a small encoder fit, on a
# GPU the policy and vLLM need the memory.
KEPT_BYTES = {"cpu": 6 << 30, "cuda": 1 << 30}
UNIT_BYTES = 68  # bytes of activations per token, layer and unit of width (measured with MiniLM, both precisions)
GAIN = 1.25  # bf16 must be faster by this factor, or the noise of a busy machine would decide
PROBE_SECONDS, PROBE_RUNS = 0.7, 3  # limits of the measurement in fastest_dtype
READ_CHARS = 64  # characters of a prompt's end that are tokenized, per token of max_length: far more than a token has
PROBE_PROMPTS, PROBE_TOKENS = {"cpu": 4, "cuda": 64}, 128  # with fewer, bf16 is not at its full speed


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


def fastest_dtype(encoder: torch.nn.Module, device: torch.device, max_length: int) -> str:
    """Return "bf16" if this encoder is clearly faster in it on this device, else "fp32".

    max_length: tokens of a prompt. CPUs without bf16 instructions are several times slower in bf16 than in fp32: there
    it takes about a second, elsewhere less.
    """
    best = {"fp32": float("inf"), "bf16": float("inf")}
    end = time.perf_counter() + PROBE_SECONDS
    for _ in range(PROBE_RUNS):
        for dtype in best:
            best[dtype] = min(best[dtype], probe_seconds(encoder, device, min(max_length, PROBE_TOKENS), dtype))
        if time.perf_counter() > end:
            break
    return "bf16" if best["bf16"] * GAIN < best["fp32"] else "fp32"


def probe_seconds(encoder: torch.nn.Module, device: torch.device, tokens: int, dtype: str) -> float:
    """Return the seconds of one small forward pass; infinity if it fails or its result is not finite."""
    shape = PROBE_PROMPTS[device.type], tokens
    ids = torch.arange(shape[0] * tokens, device=device).view(shape) % encoder.config.vocab_size
    start = time.perf_counter()
    try:
        with torch.no_grad(), autocast(device, dtype):
            fine = bool(embed(encoder, ids, torch.ones_like(ids)).isfinite().all())  # also waits for the GPU
    except RuntimeError:
        return float("inf")
    return time.perf_counter() - start if fine else float("inf")
