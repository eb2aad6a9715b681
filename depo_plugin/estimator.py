"""The difficulty estimator: what it believes of a prompt's pass rate, and how it learns from the groups that come.

    score    text + history -> Beta(a, b) per prompt          record  what the loader scanned and kept, and why
    observe  judge: compare one step's labels with what was predicted -> metrics; then learn from them

A plain object, no Ray. Every use of chance is seeded by (seed, use, update), so its state is a counter.
Suffixes: B = prompts of one call, E = the encoder's width.
"""

import contextlib
import logging
import time
from collections import deque
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute

from depo_plugin import __version__, encode
from depo_plugin.belief import Belief
from depo_plugin.checkpoint import CheckpointError
from depo_plugin.config import DepoConfig
from depo_plugin.embeddings import EmbeddingCache
from depo_plugin.filter import Reason, signal_probability
from depo_plugin.history import Scores, prompt_key
from depo_plugin.labels import Label
from depo_plugin.losses import losses
from depo_plugin.metrics import prediction_metrics
from depo_plugin.model import (
    DifficultyHeads,
    DifficultyModel,
    encoder_name,
    load_encoder,
    token_limit,
    weights_digest,
)
from depo_plugin.torch_backend import TorchBackend, load_optimizer_state, optimizer_state

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

RECOMPUTED = partial(recompute, encode.embed, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in it
LOGIT_MAX = 14.0  # keeps σ(s) about 1e-6 away from 0 and 1, so that Beta(a, b) stays one
FORGET_AFTER = 100  # planned batches after which a kept prompt that never came back is given up
SOURCES = 32  # data sources with metrics of their own
RATE_KEPT = 0.9  # per step: the unfiltered effective ratio follows about the last ten steps
RATE_MIN = 0.01  # an estimate at or below 0 (few explored groups) must not divide
COUNTED = (Reason.EXPLORED, Reason.FORCED, Reason.UNSCORED)  # reasons that are metrics
IDENTITY_FLAGS = {
    "encoder": "--depo.estimator.model",
    "mode": "--depo.estimator.mode",
    "layers": "the number of the encoder's layers (--depo.estimator.depth)",
    "hidden_size": "the encoder's width",
    "vocab_size": "the encoder's vocabulary",
    "group_size": "--rollout.n_samples_per_prompt",
    "weights": "the digest of the encoder's weights",
}


class EstimatorError(RuntimeError):
    """The estimator cannot give scores or cannot learn: a fault, never a "no" to a prompt."""


class Stream(IntEnum):
    """The estimator's uses of chance; the numbers follow the loader's."""

    INIT = 10
    DROPOUT = 11
    REPLAY = 12


class Kept(NamedTuple):
    """What is remembered of a kept prompt until its group comes back.

    plan: number of the planned batch. p, v: p̂ and V when it was decided, None without a usable score. q: keep
    probability. share: kept/scanned for its weight. source: its data source. scanned, sum_p, sum_v: its part, one
    kept-th, of all that its batch scanned and of their p̂ and V, so that a batch whose groups come back in several
    steps is spread over them.
    """

    plan: int
    p: float | None
    v: float | None
    q: float
    share: float
    reason: str
    source: str
    scanned: float
    sum_p: float
    sum_v: float


class DifficultyEstimator:
    """Text encoder with heads, prompt history and records of decisions, behind score() and observe()."""

    def __init__(self, cfg: DepoConfig, group_size: int, seed: int, strategy=None, cache_dir: Path | None = None):
        """Load the encoder and start with fresh heads.

        group_size: responses per prompt (G); seed: of every use of chance; strategy: from
        backends.deepspeed_strategy() to train in a DeepSpeed engine, None for plain torch on the CPU; cache_dir: where
        embeddings outlive this object (mode frozen), None for a temporary folder.
        """
        self._cfg, self._group_size, self._seed = cfg.estimator, group_size, seed
        self._warmup_steps = cfg.filter.warmup_steps
        self.updates = 0
        with self._seeded(Stream.INIT):
            self._encoder, self._tokenizer = load_encoder(cfg.estimator.model, cfg.estimator.depth)
            self._frozen = cfg.estimator.mode == "frozen"
            width = self._encoder.config.hidden_size
            model = DifficultyHeads(width) if self._frozen else DifficultyModel(self._encoder)
        self._max_length = token_limit(self._encoder, self._tokenizer, cfg.estimator.max_length)
        groups = self._param_groups(model)
        if strategy is None:
            self.backend = TorchBackend(model, groups, cfg.estimator.max_norm)
        else:
            from depo_plugin.backends import DeepSpeedBackend

            self.backend = DeepSpeedBackend(model, groups, cfg.estimator.max_norm, strategy)
        device = self.backend.device
        self._heads = model if self._frozen else model.heads
        self._encoder.eval().to(device)  # for good: dropout is the heads' alone
        asked = cfg.estimator.dtype
        self._dtype = encode.fastest_dtype(self._encoder, device, self._max_length) if asked == "auto" else asked
        self._micro_batch_tokens = cfg.estimator.micro_batch_tokens or encode.MICRO_BATCH_TOKENS[device.type]
        self._cache = self._digest = None
        if self._frozen:
            self._digest = weights_digest(self._encoder)
            if cache_dir is not None:
                cache_dir = cache_dir / f"{self._digest}-{self._max_length}"
            self._cache = EmbeddingCache(cache_dir, width)
        self._belief = Belief(cfg.history, width if self._frozen and cfg.history.share else 0)
        self._kept: dict[int, deque[Kept]] = {}
        self._trained = np.empty(0, np.uint64)  # keys of prompts trained so far, sorted
        self._counters = {"plan": 0, "empty_steps": 0, "rollouts_saved": 0.0, "rate_sum": 0.0, "rate_weight": 0.0}
        self._unkept = [0, 0.0, 0.0]  # scanned, sum_p, sum_v of planned batches that kept nothing
        self._sources: dict[str, list[int]] = {}  # data source -> kept, rejected since the last step
        self._recent: deque[tuple[Label, float]] = deque(maxlen=cfg.estimator.replay)  # with the ability then
        self._time_score = 0.0
        # Of the last batches the plan, key and text of one kept prompt each: what _say_unmatched shows.
        self._examples: deque[tuple[int, int, tuple[str, str]]] = deque(maxlen=4)
        self.watch_unmatched = True
        self._losses: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    # ── What the loader asks ──

    def score(self, prompts: list[str], labels: list[str]) -> Scores:
        """Return what is believed of each prompt's pass rate, from its text and its own history.

        labels: the reference answers; with the prompt, they tell prompts apart. Raises EstimatorError on NaN.
        """
        start = time.perf_counter()
        keys = [prompt_key(prompt, label) for prompt, label in zip(prompts, labels, strict=True)]
        a_B, b_B = self._belief.predict(keys, *self._text(prompts), self.updates)
        self._time_score += time.perf_counter() - start
        return Scores(a_B, b_B, self.updates)

    def record(self, records: list[dict]) -> None:
        """Remember one planned batch: its kept prompts one by one, all it scanned as sums.

        records: one per scanned candidate: key, text, p, v, q, keep, reason, datasource and share (see
        loader._record).
        """
        for one in records:
            counts = self._sources.setdefault(_source(one["datasource"], self._sources), [0, 0])
            counts[not one["keep"]] += 1
        self._counters["plan"] += 1
        plan = self._counters["plan"]
        kept = [one for one in records if one["keep"]]
        sums = (len(records), sum(one["p"] or 0.0 for one in records), sum(one["v"] or 0.0 for one in records))
        sums = [new + old for new, old in zip(sums, self._unkept, strict=True)]
        self._unkept = [0, 0.0, 0.0] if kept else sums
        parts = [total / max(1, len(kept)) for total in sums]
        self._examples.extend((plan, one["key"], one["text"]) for one in kept[:1] if "text" in one)
        for one in kept:
            source = _source(one["datasource"], self._sources)
            entry = Kept(plan, one["p"], one["v"], one["q"], one["share"], str(one["reason"]), source, *parts)
            self._kept.setdefault(one["key"], deque()).append(entry)
        fresh = {key: deque(e for e in entries if e.plan > plan - FORGET_AFTER) for key, entries in self._kept.items()}
        self._kept = {key: entries for key, entries in fresh.items() if entries}

    def keep_weights(self, prompts: list[str], labels: list[str]) -> tuple[list[float], list[float]]:
        """Return q_B and share_B of kept prompts, what advantage.weights() takes; (1, 1) where not on record.

        Where a prompt occurs twice, its oldest decision comes first. Asked before observe(), which takes its groups'
        decisions off the record.
        """
        found, taken = [], {}
        for prompt, label in zip(prompts, labels, strict=True):
            key = prompt_key(prompt, label)
            entries, place = self._kept.get(key, ()), taken.get(key, 0)
            taken[key] = place + 1
            found.append((entries[place].q, entries[place].share) if place < len(entries) else (1.0, 1.0))
        return [q for q, _ in found], [share for _, share in found]

    # ── What comes back ──

    def observe(self, labels: list[Label]) -> dict[str, float]:
        """Judge one step's groups, then learn from them; return the step's metrics (metrics.NAMES)."""
        self.judge(labels)
        self.learn(labels)
        self._metrics |= self._losses | self._totals()
        return self.metrics()

    def judge(self, labels: list[Label]) -> dict[str, float]:
        """Compare one step's groups with what was predicted of them; return the step's metrics.

        The prediction that is judged is the one the decision was made by, or a fresh one where that is not on record.
        Losses are those of the last learn(). Raises ValueError for a label that is none.
        """
        for label in labels:
            if not (0.0 <= label.y <= 1.0 and label.n >= 1):
                raise ValueError(f"label of {label.prompt[:80]!r}: y {label.y} not in [0, 1], or n {label.n} < 1.")
        if not labels:
            self._counters["empty_steps"] += 1
            self._metrics = self._totals()
            return self.metrics()
        keys = [prompt_key(label.prompt, label.label) for label in labels]
        y_B = np.array([label.y for label in labels])
        signal_B = np.array([label.signal for label in labels])
        kept = [self._take(key) for key in keys]
        self._say_unmatched(labels, kept)
        p_B, v_B = self._predicted(keys, labels, kept)
        metrics = prediction_metrics(p_B, v_B, y_B, signal_B) | self._stream_metrics(kept, y_B, signal_B)
        metrics |= self._source_metrics(kept, y_B)
        trained = [key for key, label in zip(keys, labels, strict=True) if label.d is not None]
        self._trained = _with(self._trained, np.array(trained, np.uint64))
        self._metrics = metrics | self._losses | self._totals() | {"time_score": self._time_score}
        self._time_score = 0.0
        return self.metrics()

    def learn(self, labels: list[Label]) -> None:
        """Learn from one step's groups: the belief about each prompt and its like, then the model. None: nothing."""
        if not labels:
            return
        keys = [prompt_key(label.prompt, label.label) for label in labels]
        n_B = np.array([label.n for label in labels], np.float64)
        y_B = np.array([label.y for label in labels])
        with torch.set_grad_enabled(self._cfg.updates_per_step > 0):
            x_BE = self._pooled([label.prompt for label in labels])  # one pass for the belief and the first step
        self._belief.update(keys, *self._read(x_BE), y_B * n_B, n_B, self.updates)
        groups = [(label, self._belief.ability) for label in labels]
        self._losses = self._learn(groups, x_BE)
        self._recent.extend(groups)
        self.updates += 1

    def metrics(self) -> dict[str, float]:
        """Return the last step's metrics."""
        return dict(self._metrics)

    def _predicted(self, keys: list[int], labels: list[Label], kept: list[Kept | None]):
        """Return p̂_B and V_B that these groups' decisions were made by, fresh ones where they are not on record."""
        p_B, v_B = (np.array([getattr(e, name) if e else None for e in kept], np.float64) for name in ("p", "v"))
        lost = np.flatnonzero(np.isnan(p_B))
        if len(lost):
            text = self._text([labels[i].prompt for i in lost])
            a_B, b_B = self._belief.predict([keys[i] for i in lost], *text, self.updates)
            p_B[lost], v_B[lost] = a_B / (a_B + b_B), signal_probability(a_B, b_B, self._group_size)
        return p_B, v_B

    def _take(self, key: int) -> Kept | None:
        """Return the oldest decision on record for this prompt and take it off."""
        entries = self._kept.get(key)
        if not entries:
            return None
        entry = entries.popleft()
        if not entries:
            del self._kept[key]
        return entry

    def _say_unmatched(self, labels: list[Label], kept: list[Kept | None]):
        """Warn once if most groups of a step find no decision, although earlier decisions wait for their groups.

        After a restart (watch_unmatched is False) groups are awaited whose decisions were lost, until most are found.
        """
        unmatched = [label for label, entry in zip(labels, kept, strict=True) if entry is None]
        if 2 * len(unmatched) <= len(labels):
            self.watch_unmatched = self.watch_unmatched is not None  # None: it was said
            return
        late = [text for plan, key, text in self._examples if key in self._kept and plan <= self._counters["plan"] - 2]
        if not (self.watch_unmatched and late and self.updates >= self._warmup_steps):
            return
        self.watch_unmatched = None
        logger.warning(
            "DEPO: %d of %d groups came back with another prompt or label than they were sent with, so they find "
            "neither their decision nor their history, and nothing is learned of the prompts that were kept. Sent, "
            "for example: prompt ...%r, label %r. Came back: prompt ...%r, label %r. Look for code that changes them: "
            "the agent, the reward function.",
            *(len(unmatched), len(labels), *late[0], unmatched[0].prompt[-200:], unmatched[0].label[:200]),
        )

    def _stream_metrics(self, kept: list[Kept | None], y_B: np.ndarray, signal_B: np.ndarray) -> dict[str, float]:
        """Say what the unfiltered stream would have given, from the decisions behind these groups.

        A control variate: (Σ scanned p̂ + Σ kept (y − p̂)/q) / scanned, and the same with V and whether there was a
        signal for the effective ratio r₀, faded over steps. Forced prompts were not drawn by chance: their outcomes
        are outside both corrections.
        """
        groups = zip(kept, y_B.tolist(), signal_B.tolist(), strict=True)
        known = [(e, y, signal) for e, y, signal in groups if e is not None]
        reasons = [e.reason for e, _, _ in known]
        metrics = {"kept": len(known), "unmatched": len(kept) - len(known)}
        metrics |= {reason.value: reasons.count(reason.value) for reason in COUNTED}
        scanned = sum(e.scanned for e, _, _ in known)
        totals = self._counters
        if scanned:
            drawn = [(e, y, signal) for e, y, signal in known if e.reason != Reason.FORCED.value]
            reward = sum(e.sum_p for e, _, _ in known) + sum((y - (e.p or 0.0)) / e.q for e, y, _ in drawn)
            signals = sum(e.sum_v for e, _, _ in known) + sum((s - (e.v or 0.0)) / e.q for e, _, s in drawn)
            metrics |= {"scanned": scanned, "keep_rate": len(known) / scanned, "reward_unfiltered": reward / scanned}
            totals["rate_sum"] = RATE_KEPT * totals["rate_sum"] + signals
            totals["rate_weight"] = RATE_KEPT * totals["rate_weight"] + scanned
        if totals["rate_weight"]:
            rate = min(max(totals["rate_sum"] / totals["rate_weight"], RATE_MIN), 1.0)
            metrics["effective_gain"] = float(signal_B.mean()) / rate
            totals["rollouts_saved"] += self._group_size * (float(signal_B.sum()) / rate - len(kept))
        return {name: float(value) for name, value in metrics.items()}

    def _source_metrics(self, kept: list[Kept | None], y_B: np.ndarray) -> dict[str, float]:
        """Say what was kept and rejected since the last step, and this step's pass rate, by data source."""
        if len(self._sources) < 2:
            return {}  # nothing to tell apart
        metrics = {}
        for source, counts in self._sources.items():
            metrics |= {f"kept/{source}": float(counts[0]), f"rejected/{source}": float(counts[1])}
            counts[:] = 0, 0
            if rates := [y for e, y in zip(kept, y_B.tolist(), strict=True) if e is not None and e.source == source]:
                metrics[f"pass_rate/{source}"] = float(np.mean(rates))
        return metrics

    def _totals(self) -> dict[str, float]:
        """Return the metrics that exist with or without labels."""
        return {
            "kappa": self._belief.kappa,
            "ability": self._belief.ability,
            "distinct": float(len(self._trained)),
            "rollouts_saved": self._counters["rollouts_saved"],
            "empty_steps": float(self._counters["empty_steps"]),
            "updates": float(self.updates),
        }

    # ── The model ──

    @contextlib.contextmanager
    def _seeded(self, stream: Stream, number: int = 0):
        """Draw from this use's own stream inside, leave torch's global ones as they were."""
        backend = getattr(self, "backend", None)  # none while the first weights are drawn, on the CPU
        gpus = [backend.device] if backend is not None and backend.device.type == "cuda" else []
        seed = int(np.random.SeedSequence([self._seed, stream, number]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=gpus):
            # Not torch.manual_seed(): it seeds every GPU of the process, and fork_rng gives back only these.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield

    def _param_groups(self, model: DifficultyModel) -> list[dict]:
        cfg, parameters = self._cfg, dict(model.named_parameters())
        encoder = [parameter for name, parameter in parameters.items() if name.startswith("encoder.")]
        heads = [parameter for name, parameter in parameters.items() if not name.startswith("encoder.")]
        groups = [{"params": heads, "lr": cfg.lr, "weight_decay": cfg.weight_decay}]
        if encoder:
            groups.append({**groups[0], "params": encoder, "lr": cfg.lr * cfg.encoder_lr_ratio})
        return groups

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        """Return the encoder's embeddings of these prompts, float32 (B, E).

        Where gradients are on, activations are kept up to encode.KEPT_BYTES; what is beyond is computed anew in the
        backward pass.
        """
        if not prompts:
            return torch.empty(0, self._encoder.config.hidden_size, device=self.backend.device)
        ids = encode.tokenize(self._tokenizer, prompts, self._max_length)
        batches = encode.micro_batches(ids, self._micro_batch_tokens)
        room = encode.KEPT_BYTES if torch.is_grad_enabled() else float("inf")
        rows = []
        with encode.autocast(self.backend.device, self._dtype):
            for batch in batches:
                tokens = encode.pad([ids[i] for i in batch], self._tokenizer.pad_token_id, self.backend.device)
                room -= encode.activation_bytes(self._encoder.config, tokens[0].numel())
                rows.append((encode.embed if room >= 0 else RECOMPUTED)(self._encoder, *tokens))
        back = torch.from_numpy(np.argsort(np.concatenate(batches))).to(self.backend.device)
        return torch.cat(rows)[back]

    def _pooled(self, prompts: list[str]) -> torch.Tensor:
        """Return what the heads read, float32 (B, E): embeddings; of a frozen encoder from the cache, of length √E."""
        if not self._frozen:
            return self._encode(prompts)

        def compute(missing):
            with torch.no_grad():
                x_BE = self._encode([prompts[i] for i in missing]).cpu().numpy()
            if not np.isfinite(x_BE).all():  # never into the cache
                raise EstimatorError(
                    "the encoder gave NaN or infinity. Use --depo.estimator.dtype fp32, or another one."
                )
            return x_BE

        keys_B = np.array([prompt_key(prompt, "") for prompt in prompts], np.uint64)
        x_BE = torch.from_numpy(_unit(self._cache.get(keys_B, compute).astype(np.float32)))
        return x_BE.to(self.backend.device) * x_BE.shape[1] ** 0.5

    def _text(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return what the text says: score logits, float64 (B,), and unit embeddings (B, E), (B, 0) if not shared."""
        with torch.no_grad():
            return self._read(self._pooled(prompts))

    @torch.no_grad()
    def _read(self, x_BE: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return what _text() does, of what _pooled() gave."""
        self._heads.eval()
        s_B = self._heads(x_BE)[0].double().cpu().numpy()
        if not np.isfinite(s_B).all():
            raise EstimatorError(
                f"the estimator scored {int((~np.isfinite(s_B)).sum())} of {len(s_B)} prompts as NaN or infinite: "
                "its weights are damaged. Lower --depo.estimator.lr, or use --depo.estimator.dtype fp32."
            )
        text_BE = _unit(x_BE.cpu().numpy()) if self._belief.features else np.empty((len(s_B), 0))
        return s_B.clip(-LOGIT_MAX, LOGIT_MAX), text_BE

    def _learn(self, groups: list[tuple[Label, float]], x_BE: torch.Tensor) -> dict[str, float]:
        """Take cfg.updates_per_step optimizer steps on these groups; return the last one's losses.

        groups: as _step() takes them; x_BE: their embeddings, with the graph of the encoder that is trained. With
        cfg.replay each step learns from as many recent groups again, drawn without replacement.
        """
        found = {}
        self._heads.train()
        try:
            with torch.enable_grad():
                for step in range(self._cfg.updates_per_step):
                    number = self.updates * self._cfg.updates_per_step + step
                    rng = np.random.default_rng([self._seed, Stream.REPLAY, number])
                    again = rng.permutation(len(self._recent))[: len(groups)]
                    old = [self._recent[i] for i in again]
                    if step:  # the encoder is another one now
                        x_BE = self._pooled([label.prompt for label, _ in groups])
                    old_BE = self._pooled([label.prompt for label, _ in old])
                    with self._seeded(Stream.DROPOUT, number):
                        found = self._step(groups + old, torch.cat([x_BE, old_BE]))
        finally:
            self._heads.eval()
        return found

    def _step(self, groups: list[tuple[Label, float]], x_BE: torch.Tensor) -> dict[str, float]:
        """Take one optimizer step; return its losses and gradient norm.

        groups: labels, each with the ability when it was made: the model learns what is left without it, so that old
        groups stay true. x_BE: their embeddings. The loss is over the whole batch at any micro-batch size.
        """
        device, labels = self.backend.device, [label for label, _ in groups]
        s_B, c_B = self._heads(x_BE)
        y_B = torch.tensor([label.y for label in labels], dtype=torch.float32, device=device)
        ability_B = torch.tensor([ability for _, ability in groups], dtype=torch.float32, device=device)
        d = [float("nan") if label.d is None else label.d for label in labels]
        d_B = torch.tensor(d, dtype=torch.float32, device=device)
        parts = losses(s_B + self._belief.narrowed(ability_B), c_B, y_B, d_B, self._cfg)
        if not parts.total.isfinite():
            raise EstimatorError(
                f"the estimator's loss is {parts.total.item()} at update {self.updates}: nothing was learned from it. "
                "Lower --depo.estimator.lr, or use --depo.estimator.dtype fp32."
            )
        grad_norm = self.backend.step(parts.total)
        score, distill, rank = (part.item() for part in parts[1:])
        return {
            "loss": parts.total.item(),
            "loss_score": score,
            "loss_distill": distill,
            "loss_rank": rank,
            "grad_norm": grad_norm,
        }

    # ── State ──

    def _identity(self) -> dict:
        """Return what a state belongs to: weights of any other encoder or labels of other groups do not fit."""
        config = self._encoder.config
        return {
            "encoder": encoder_name(self._cfg.model),
            "mode": self._cfg.mode,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "group_size": self._group_size,
            "weights": self._digest,  # frozen ones are not in the state, and heads fit no others
        }

    def state_dict(self) -> dict:
        """Return all that can change a later score or update, as copies."""
        model = self.backend.model
        return {
            "identity": self._identity() | {"version": __version__},
            "model": {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()},
            "optimizer": optimizer_state(model, self.backend.optimizer),
            "belief": self._belief.state_dict(),
            "records": [[key, *entry] for key, entries in self._kept.items() for entry in entries],
            "unkept": list(self._unkept),
            "sources": {source: list(counts) for source, counts in self._sources.items()},
            "trained": self._trained.copy(),
            "recent": [[*vars(label).values(), ability] for label, ability in self._recent],
            "losses": dict(self._losses),
            "counters": dict(self._counters),
            "dtype": self._dtype,
            "rng": self._seed,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(). Raises CheckpointError where it is of another estimator or not whole."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise CheckpointError(
                f"estimator checkpoint: missing {sorted(expected - set(state))}, unexpected "
                f"{sorted(set(state) - expected)}. It was written by another version of openrlhf-depo."
            )
        own, found = self._identity(), state["identity"]
        if other := [name for name in own if found.get(name) != own[name]]:
            raise CheckpointError(
                "the estimator checkpoint belongs to another estimator: "
                + "; ".join(f"{IDENTITY_FLAGS[name]} was {found.get(name)}, is {own[name]}" for name in other)
                + ". Resume with the values it was written with, or remove the folder depo under --ckpt.path."
            )
        self.backend.model.load_state_dict(state["model"])
        load_optimizer_state(self.backend.model, self.backend.optimizer, state["optimizer"])
        self._belief.load_state_dict(state["belief"])
        self._kept = {}
        for key, *entry in state["records"]:
            self._kept.setdefault(key, deque()).append(Kept(*entry))
        self._sources = {source: list(counts) for source, counts in state["sources"].items()}
        self._unkept, self._trained = list(state["unkept"]), np.array(state["trained"], np.uint64)
        recent = ((Label(*label), ability) for *label, ability in state["recent"])
        self._recent, self._losses = deque(recent, maxlen=self._cfg.replay), dict(state["losses"])
        if self._cfg.dtype == "auto":
            self._dtype = state["dtype"]  # to go on with the same numbers, whatever is fastest here
        self._counters, self._seed, self.updates = dict(state["counters"]), state["rng"], state["updates"]


def _source(name: str, known: dict) -> str:
    """Return the data source as metrics name it: no logger is to get one metric for each of thousands."""
    name = str(name).replace("/", "_")
    return name if name in known or len(known) < SOURCES else "others"


def _with(keys: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return sorted keys, each once, with more of them; without sorting all of them anew, as np.union1d does."""
    more = np.unique(more)
    at = np.searchsorted(keys, more)
    new = np.append(keys, np.uint64(0))[at] != more
    new |= at == len(keys)
    return np.insert(keys, at[new], more[new])


def _unit(x_BE: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1."""
    return x_BE / np.maximum(np.linalg.norm(x_BE, axis=1, keepdims=True), 1e-6)
