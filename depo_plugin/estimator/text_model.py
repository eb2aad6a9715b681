"""What the text of a prompt says: encoder and heads. Two verbs: read (embed, logits) and one gradient step.

Frozen, an encoder embeds each prompt once, into a cache; in mode finetune it is trained with the heads.
Suffixes: B = prompts of one call, E = the encoder's width.
"""

import contextlib
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from depo_plugin.estimator import embed
from depo_plugin.estimator.backends import (
    WEIGHT_DECAY,
    DeepSpeedBackend,
    TorchBackend,
    load_optimizer_state,
    optimizer_state,
)
from depo_plugin.estimator.embedding_cache import EmbeddingCache
from depo_plugin.estimator.encoder import encoder_name, load_encoder, token_limit, weights_digest
from depo_plugin.estimator.heads import DifficultyHeads, DifficultyModel
from depo_plugin.estimator.losses import losses
from depo_plugin.messages import Stream, prompt_key
from depo_plugin.settings.config import EstimatorConfig

UNMEASURED, LEAST = 256, 16  # prompts that prepare() embeds before it knows how fast it is, and at least
CHARS_PER_TOKEN = 4
LOGIT_MAX = 14.0  # keeps σ(s) about 1e-6 away from 0 and 1, so that a Beta(a, b) can be made of it
RECOMPUTED = partial(recompute, embed.embed, use_reentrant=False, preserve_rng_state=False)  # it draws nothing


class EstimatorError(RuntimeError):
    """The estimator cannot give scores or cannot learn: a fault, never a "no" to a prompt."""


class Targets(NamedTuple):
    """What one optimizer step learns from, float32 (B,) on the CPU.

    y: pass rates in [0, 1].
    d: the policy's confidences in (0, 1), NaN if not known.
    shift: what the policy's ability adds to each score logit: the model learns what is left without it.
    """

    y: torch.Tensor
    d: torch.Tensor
    shift: torch.Tensor


class TextModel:
    """Encoder, heads, their optimizer and the embedding cache."""

    def __init__(self, cfg: EstimatorConfig, seed: int, strategy=None, cache_dir: Path | None = None):
        """Load the encoder and start with fresh heads.

        seed: of the heads' first weights and of dropout; strategy: from backends.deepspeed_strategy() to train in a
        DeepSpeed engine, None for plain torch on the CPU; cache_dir: folder of the embeddings in mode frozen, which
        later runs read again, None for a temporary file. Raises EncoderError if the encoder cannot be loaded.
        """
        self._cfg, self._seed, self._cache_dir = cfg, seed, cache_dir
        self._frozen = cfg.mode == "frozen"
        with self._seeded(Stream.INIT):
            self._encoder, self._tokenizer = load_encoder(cfg.model, cfg.depth)
            self.width = self._encoder.config.hidden_size
            self.model = DifficultyHeads(self.width) if self._frozen else DifficultyModel(self._encoder)
        self._max_length = token_limit(self._encoder, self._tokenizer, cfg.max_length)
        groups = _param_groups(self.model, cfg)
        self._backend: TorchBackend | DeepSpeedBackend = (
            TorchBackend(self.model, groups) if strategy is None else DeepSpeedBackend(self.model, groups, strategy)
        )
        self.device = self._backend.device
        self._heads = self.model if self._frozen else self.model.heads
        self._encoder.to(self.device)
        self._encoder.eval()  # for good: only the heads have dropout
        self._heads.eval()  # but in step()
        self._micro_batch_tokens = cfg.micro_batch_tokens or embed.MICRO_BATCH_TOKENS[self.device.type]
        self._digest = weights_digest(self._encoder) if self._frozen else None
        self._warm = False  # whether prompts were embedded before: the first call takes longer
        self._speeds: deque[float] = deque(maxlen=3)  # characters of new prompts a second, of the last calls
        self._use(embed.fastest_dtype(self.device) if cfg.dtype == "auto" else cfg.dtype)

    def _use(self, dtype: str) -> None:
        """Compute in this precision from now on, with the embeddings that were made in it."""
        self._dtype = dtype
        if self._frozen:
            name = f"{self._digest}-{self._max_length}-{dtype}"
            self._cache = EmbeddingCache(self._cache_dir and self._cache_dir / name, self.width)

    def forget(self) -> None:
        """Close the embedding cache and open it again: without a folder it is empty then."""
        self._use(self._dtype)

    @contextlib.contextmanager
    def _seeded(self, stream: Stream, number: int = 0):
        """Draw from this use's own random stream inside; leave torch's global ones as they were."""
        backend = getattr(self, "_backend", None)  # none while the first weights are drawn, on the CPU
        gpus = [backend.device] if backend is not None and backend.device.type == "cuda" else []
        seed = int(np.random.SeedSequence([self._seed, stream, number]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=gpus):
            # Not torch.manual_seed(): it seeds every GPU of the process, and fork_rng restores only these.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield

    # ── Read ──

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return what the heads read, float32 (B, E) on the device.

        Mode finetune: the encoder's embeddings, with their graph if gradients are on. Mode frozen: embeddings from the
        cache, each scaled to length √E. Raises EstimatorError if an embedding is not finite.
        """
        if not self._frozen:
            return self._encode(prompts)

        def compute(missing):
            start = time.perf_counter()
            with torch.no_grad():
                x_BE = self._encode([prompts[i] for i in missing]).cpu().numpy()
            if not np.isfinite(x_BE).all():  # never into the cache
                raise EstimatorError(
                    "the encoder gave NaN or infinity. Use --depo.estimator.dtype fp32, or another encoder."
                )
            self._measure([prompts[i] for i in missing], time.perf_counter() - start)
            return x_BE

        x_BE = torch.from_numpy(unit(self._cache.get(_keys(prompts), compute).astype(np.float32)))
        return x_BE.to(self.device) * self.width**0.5

    def prepare(self, prompts: list[str], seconds: float) -> np.ndarray:
        """Embed as many of these prompts, in their order, as should take so many seconds; return which are embedded.

        bool (B,). By the best speed of the last calls, but with a second or more at least LEAST of them, so that a
        slow call is not believed for ever; before a speed is known UNMEASURED, but none with 0 seconds. In mode
        finetune there is nothing to prepare: all are True.
        """
        if not self._frozen or not prompts:
            return np.ones(len(prompts), bool)
        keys_B = _keys(prompts)
        known_B = self._cache.known(keys_B)
        missing = np.flatnonzero(~known_B)
        count = UNMEASURED
        if self._speeds:
            chars = np.cumsum([self._read_chars(prompts[i]) for i in missing])
            count = int(np.searchsorted(chars, seconds * max(self._speeds), side="right"))
            count = max(count, LEAST if seconds >= 1 else 0)
        missing = missing[: count if seconds > 0 else 0]
        if len(missing):
            self.embed([prompts[i] for i in missing])
            known_B |= np.isin(keys_B, keys_B[missing])  # one may occur twice
        return known_B

    @property
    def lasting(self) -> bool:
        """Whether later processes find all that was embedded: in mode frozen, in a folder that can be used."""
        return self._frozen and self._cache.lasting

    def rate(self, prompts: list[str]) -> float | None:
        """Return how many new prompts like these are read a second, as last measured; None before that."""
        if not self._speeds or not prompts:
            return None
        return max(self._speeds) * len(prompts) / sum(map(self._read_chars, prompts))

    def _measure(self, prompts: list[str], seconds: float) -> None:
        """Note the speed of a call, unless it is the first or too small to tell."""
        if self._warm and len(prompts) >= LEAST:
            self._speeds.append(sum(map(self._read_chars, prompts)) / max(seconds, 1e-9))
        self._warm = True

    def _read_chars(self, prompt: str) -> int:
        """Return about how many characters of a prompt are read: a token is about CHARS_PER_TOKEN of them."""
        return min(len(prompt), CHARS_PER_TOKEN * self._max_length) + 1

    @torch.no_grad()
    def logits(self, x_BE: torch.Tensor) -> np.ndarray:
        """Return the score logits of embedded prompts, float64 (B,), within ±LOGIT_MAX.

        Raises EstimatorError if one is not finite.
        """
        s_B = self._heads(x_BE)[0].double().cpu().numpy()
        if not np.isfinite(s_B).all():
            raise EstimatorError(
                f"the estimator scored {int((~np.isfinite(s_B)).sum())} of {len(s_B)} prompts as NaN or infinite: "
                "its weights are damaged. Lower --depo.estimator.lr, or use --depo.estimator.dtype fp32."
            )
        return s_B.clip(-LOGIT_MAX, LOGIT_MAX)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        """Return the encoder's embeddings of these prompts, float32 (B, E).

        If gradients are on, activations are kept up to embed.KEPT_BYTES; the rest is computed again in the backward
        pass.
        """
        if not prompts:
            return torch.empty(0, self.width, device=self.device)
        ids = embed.tokenize(self._tokenizer, prompts, self._max_length)
        batches = embed.micro_batches(ids, self._micro_batch_tokens)
        room = embed.KEPT_BYTES[self.device.type] if torch.is_grad_enabled() else float("inf")
        rows = []
        with embed.autocast(self.device, self._dtype):
            for batch in batches:
                tokens = embed.pad([ids[i] for i in batch], self._tokenizer.pad_token_id, self.device)
                room -= embed.activation_bytes(self._encoder.config, tokens[0].numel())
                rows.append((embed.embed if room >= 0 else RECOMPUTED)(self._encoder, *tokens))
        back = torch.from_numpy(np.argsort(np.concatenate(batches))).to(self.device)
        return torch.cat(rows)[back]

    # ── Learn ──

    def step(self, x_BE: torch.Tensor, targets: Targets, number: int) -> dict[str, float]:
        """Make one optimizer step and return its losses and gradient norm (metrics.NAMES).

        x_BE: from embed(), with the encoder's graph in mode finetune; number: of the step, for dropout's seed. The
        loss is over the whole batch at any micro-batch size. Raises EstimatorError, with the weights untouched, if the
        loss is not finite.
        """
        y_B, d_B, shift_B = (values.to(self.device) for values in targets)
        self._heads.train()
        try:
            with torch.enable_grad(), self._seeded(Stream.DROPOUT, number):
                s_B, c_B = self._heads(x_BE)
                found = losses(s_B + shift_B, c_B, y_B, d_B, self._cfg)
                if not found.total.isfinite():
                    raise EstimatorError(
                        f"the estimator's loss is {found.total.item()} in step {number}: nothing was learned from it. "
                        "Lower --depo.estimator.lr, or use --depo.estimator.dtype fp32."
                    )
                grad_norm = self._backend.step(found.total)
        finally:
            self._heads.eval()
        total, score, distill, rank = (part.item() for part in found)
        return {
            "loss": total,
            "loss_score": score,
            "loss_distill": distill,
            "loss_rank": rank,
            "grad_norm": grad_norm,
        }

    # ── State ──

    def identity(self) -> dict:
        """Return what a state belongs to: weights of another encoder do not fit."""
        config = self._encoder.config
        return {
            "encoder": encoder_name(self._cfg.model),
            "mode": self._cfg.mode,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "weights": self._digest,  # frozen ones are not in the state, and the heads fit no others
        }

    def state_dict(self) -> dict:
        """Return weights, the optimizer's state, the precision and the seed, as copies on the CPU."""
        return {
            "model": {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()},
            "optimizer": optimizer_state(self.model, self._backend.optimizer),
            "dtype": self._dtype,
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(). With dtype auto its precision is kept, whatever is fastest on this machine."""
        self._seed = state["seed"]
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.model, self._backend.optimizer, state["optimizer"])
        if self._cfg.dtype == "auto" and state["dtype"] != self._dtype:
            self._use(state["dtype"])


def _param_groups(model: nn.Module, cfg: EstimatorConfig) -> list[dict]:
    """Return AdamW's parameter groups: the heads, and the encoder (if it is trained) with its own learning rate."""
    parameters = dict(model.named_parameters())
    encoder = [parameter for name, parameter in parameters.items() if name.startswith("encoder.")]
    heads = [parameter for name, parameter in parameters.items() if not name.startswith("encoder.")]
    groups = [{"params": heads, "lr": cfg.lr, "weight_decay": WEIGHT_DECAY}]
    if encoder:
        groups.append({"params": encoder, "lr": cfg.lr * cfg.encoder_lr_ratio, "weight_decay": WEIGHT_DECAY})
    return groups


def _keys(prompts: list[str]) -> np.ndarray:
    return np.array([prompt_key(prompt, "") for prompt in prompts], np.uint64)


def unit(x_BE: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1."""
    return x_BE / np.maximum(np.linalg.norm(x_BE, axis=1, keepdims=True), 1e-6)
