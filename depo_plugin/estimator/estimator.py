"""The difficulty estimator: what it believes of a prompt's pass rate, and how it learns from the groups that come.

    score    text + history -> Beta(a, b) per prompt        record  what the loader scanned and kept, and why
    judge    one step's groups against what was predicted   learn   from the same groups, afterwards

It composes three parts: the text model (text_model.py), the belief about each prompt (belief.py) and the ledger of
decisions (ledger.py). A plain object, no Ray. Every use of chance is seeded by (seed, use, update), so that the state
of chance is a counter. Suffixes: B = prompts of one call, E = the encoder's width.
"""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depo_plugin import __version__
from depo_plugin.estimator import checkpoint, prior
from depo_plugin.estimator.belief import Belief
from depo_plugin.estimator.ledger import Kept, Ledger
from depo_plugin.estimator.metrics import Judgement, prediction_metrics
from depo_plugin.estimator.text_model import Targets, TextModel, unit
from depo_plugin.filter import signal_probability
from depo_plugin.messages import Label, Record, Scores, Stream, prompt_key
from depo_plugin.settings.config import DepoConfig

PRIOR_BATCH = 256  # known pass rates that are taken as one step's groups
IDENTITY_FLAGS = {
    "encoder": "--depo.estimator.model",
    "mode": "--depo.estimator.mode",
    "layers": "the number of the encoder's layers (--depo.estimator.depth)",
    "hidden_size": "the encoder's width",
    "vocab_size": "the encoder's vocabulary",
    "weights": "the digest of the encoder's weights",
    "group_size": "--rollout.n_samples_per_prompt",
}


class DifficultyEstimator:
    """Text model, belief and ledger, behind score, record, judge and learn."""

    def __init__(self, cfg: DepoConfig, group_size: int, seed: int, strategy=None, cache_dir: Path | None = None):
        """Load the encoder and start without experience.

        group_size: responses per prompt (G); seed: of every use of chance; strategy, cache_dir: as in TextModel.
        """
        self._cfg, self.group_size, self._seed = cfg, group_size, seed
        self.text = TextModel(cfg.estimator, seed, strategy, cache_dir)
        shared = cfg.estimator.mode == "frozen" and cfg.history.share
        self.belief = Belief(cfg.history, self.text.width if shared else 0)
        self.ledger = Ledger()
        self.updates = 0  # learn() calls so far
        self._trained = np.empty(0, np.uint64)  # keys of prompts trained so far, sorted
        self._written: set[int] = set()  # keys whose text was in a judgement of this process
        self._recent: deque[tuple[Label, float]] = deque(maxlen=cfg.estimator.replay)  # with the ability then
        self._losses: dict[str, float] = {}
        self._totals = {"empty_steps": 0, "labels_dropped": 0}
        self._time_score = 0.0

        if cfg.history.prior:
            self._start_from(prior.read(cfg.history.prior))

    @classmethod
    def from_checkpoint(cls, path: Path, cfg: DepoConfig) -> "DifficultyEstimator":
        """Return the estimator that wrote this checkpoint, a .safetensors file, on the CPU.

        cfg: the settings of its launch. Raises CheckpointError if the file cannot be used with them, EncoderError if
        the encoder cannot be loaded.
        """
        state = checkpoint.load(path.with_suffix(""))
        estimator = cls(cfg, state["identity"]["group_size"], state["seed"])
        estimator.load_state_dict(state)
        return estimator

    def _start_from(self, known: list[prior.KnownRate]) -> None:
        """Take known pass rates as evidence, in batches. Their policy may have been another one, so they are faded."""
        for start in range(0, len(known), PRIOR_BATCH):
            batch = known[start : start + PRIOR_BATCH]
            keys = [prompt_key(one.prompt, one.label) for one in batch]
            n_B = np.array([one.n for one in batch])
            k_B = np.array([one.pass_rate for one in batch]) * n_B
            text, weight = self._text([one.prompt for one in batch]), self._cfg.history.prior_weight
            self.belief.update(keys, *text, k_B, n_B, 0, prior=weight)

    # ── What the loader asks ──

    def score(self, prompts: list[str], labels: list[str], seconds: float | None = None) -> Scores:
        """Return what is believed of each prompt's pass rate, from its text and its own history.

        labels: the reference answers; a prompt is identified by both; seconds: for reading new prompts, None: as long
        as it takes. A prompt that was not read has a and b NaN. Raises EstimatorError if the model gives NaN.
        """
        start = time.perf_counter()
        keys = [prompt_key(prompt, label) for prompt, label in zip(prompts, labels, strict=True)]
        a_B, b_B = self._believed(keys, prompts, seconds)
        self._time_score += time.perf_counter() - start
        return Scores(a_B, b_B, self.belief.visits(keys, self.updates), self.updates)

    def _believed(self, keys: list[int], prompts: list[str], seconds: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Return a_B and b_B; NaN for prompts that cannot be embedded in so many seconds."""
        if seconds is None:
            return self.belief.predict(keys, *self._text(prompts), self.updates)
        known = np.flatnonzero(self.text.prepare(prompts, seconds)).tolist()
        a_B, b_B = np.full(len(keys), np.nan), np.full(len(keys), np.nan)
        if known:
            text = self._text([prompts[i] for i in known])
            a_B[known], b_B[known] = self.belief.predict([keys[i] for i in known], *text, self.updates)
        return a_B, b_B

    def record(self, records: list[Record]) -> None:
        """Take the decisions on one planned batch."""
        self.ledger.record(records)

    def keep_weights(self, prompts: list[str], labels: list[str]) -> tuple[list[float], list[float]]:
        """Return q_B and share_B of kept prompts (see Ledger.keep_weights); to be asked before judge()."""
        return self.ledger.keep_weights(prompts, labels)

    # ── What comes back ──

    def judge(
        self,
        labels: list[Label],
        dropped: int = 0,
        rejected: list[Label] | None = None,
        seconds: float | None = None,
    ) -> Judgement:
        """Compare one step's groups with what was predicted of them; return the step's metrics and group lines.

        A group is judged by the prediction that its decision was made by, or by a new one if that is not on record.
        labels: of the groups that are trained on; rejected: of groups that dynamic filtering threw away; dropped:
        groups of this step that have no label; seconds: as in score(), for new predictions; without one a group is not
        judged. Losses are those of the last learn(). Raises ValueError if a label's y is not in [0, 1] or its n is
        below 1.
        """
        trained_on, labels = len(labels), labels + (rejected or [])
        for label in labels:
            if not (0.0 <= label.y <= 1.0 and label.n >= 1):
                raise ValueError(f"label of {label.prompt[:80]!r}: y {label.y} not in [0, 1], or n {label.n} < 1.")
        self._totals["labels_dropped"] += dropped
        if not labels:
            self._totals["empty_steps"] += 1
            return Judgement(self._total_metrics(), [])
        y_B = np.array([label.y for label in labels])
        signal_B = np.array([label.signal for label in labels])
        kept = self.ledger.take(labels, warn=self.updates >= self._cfg.filter.warmup_steps)
        p_B, v_B = self._predicted(labels, kept, seconds)
        metrics = prediction_metrics(p_B, v_B, y_B, signal_B)
        metrics |= self.ledger.metrics(kept, y_B, signal_B, self.group_size)
        trained = [label.key for label in labels if label.d is not None]
        self._trained = _with(self._trained, np.array(trained, np.uint64))
        metrics |= self._losses | self._total_metrics() | {"time_score": self._time_score}
        if (rate := self.text.rate([label.prompt for label in labels])) is not None:
            metrics["read_rate"] = rate
        self._time_score = 0.0
        groups = zip(labels, kept, p_B.tolist(), v_B.tolist(), strict=True)
        return Judgement(metrics, [self._line(i >= trained_on, *group) for i, group in enumerate(groups)])

    def _line(self, rejected: bool, label: Label, entry: Kept | None, p: float, v: float) -> dict[str, Any]:
        """Return a group's line of groups.jsonl without its step: plain values, in the order of docs/metrics.md."""
        line: dict[str, Any] = {
            "key": f"{label.key:016x}",
            "source": entry.source if entry else None,
            "p": None if math.isnan(p) else float(f"{p:.6g}"),
            "v": None if math.isnan(v) else float(f"{v:.6g}"),
            "q": float(f"{entry.q:.6g}") if entry else 1.0,
            "reason": entry.reason if entry else None,
            "y": float(label.y),
            "n": int(label.n),
            "signal": bool(label.signal),
            "tokens": label.tokens,
        }
        if rejected:
            line["rejected"] = True
        if label.key not in self._written:  # the text once, so that the file stays small
            self._written.add(label.key)
            line |= {"prompt": label.prompt, "label": label.label}
        return line

    def learn(self, labels: list[Label], seconds: float | None = None) -> int:
        """Learn from one step's groups: first the belief, then the text model. An empty list changes nothing.

        seconds: as in score(). Return how many groups were not learned from, because their prompts are not embedded.
        """
        given = len(labels)
        if seconds is not None:
            known_B = self.text.prepare([label.prompt for label in labels], seconds)
            labels = [label for label, known in zip(labels, known_B, strict=True) if known]
        if not labels:
            self.updates += given > 0  # a step all the same: warm-up ends, if late
            return given
        keys = [label.key for label in labels]
        n_B = np.array([label.n for label in labels], np.float64)
        y_B = np.array([label.y for label in labels])
        with torch.set_grad_enabled(self._cfg.estimator.updates_per_step > 0):
            x_BE = self.text.embed([label.prompt for label in labels])  # one pass for the belief and the first step
        self.belief.update(keys, *self._read(x_BE), y_B * n_B, n_B, self.updates)
        groups = [(label, self.belief.ability) for label in labels]
        try:
            self._losses = self._train(groups, x_BE)
        finally:  # the belief has learned from these groups: they count, also if an optimizer step fails
            self._recent.extend(groups)
            self.updates += 1
        return given - len(labels)

    def _train(self, groups: list[tuple[Label, float]], x_BE: torch.Tensor) -> dict[str, float]:
        """Take updates_per_step optimizer steps on these groups; return the last one's losses.

        groups: labels, each with the policy's ability at that time, so that old groups stay true; x_BE: their
        embeddings. With `replay`, each step learns from as many recent groups again, drawn without replacement.
        """
        found: dict[str, float] = {}
        count = self._cfg.estimator.updates_per_step
        for step in range(count):
            number = self.updates * count + step
            rng = np.random.default_rng([self._seed, Stream.REPLAY, number])
            old = [self._recent[i] for i in rng.permutation(len(self._recent))[: len(groups)]]
            with torch.enable_grad():
                if step:  # a trained encoder has changed since
                    x_BE = self.text.embed([label.prompt for label, _ in groups])
                old_BE = self.text.embed([label.prompt for label, _ in old])
                both_BE = torch.cat([x_BE, old_BE])
            found = self.text.step(both_BE, _targets(groups + old, self.belief), number)
        return found

    def _text(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return self._read(self.text.embed(prompts))

    def _read(self, x_BE: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return what the belief takes of embedded prompts: score logits, and unit embeddings ((B, 0) if unused)."""
        s_B = self.text.logits(x_BE)
        return s_B, unit(x_BE.detach().cpu().numpy()) if self.belief.features else np.empty((len(s_B), 0))

    def _predicted(
        self, labels: list[Label], kept: list[Kept | None], seconds: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return p̂_B and V_B that these groups' decisions were made by; new ones for those not on record, or NaN."""
        p_B, v_B = (np.array([getattr(e, name) if e else None for e in kept], np.float64) for name in ("p", "v"))
        lost = np.flatnonzero(np.isnan(p_B))
        if len(lost):
            a_B, b_B = self._believed([labels[i].key for i in lost], [labels[i].prompt for i in lost], seconds)
            p_B[lost], v_B[lost] = a_B / (a_B + b_B), signal_probability(a_B, b_B, self.group_size)
        return p_B, v_B

    def _total_metrics(self) -> dict[str, float]:
        """Return the metrics that exist with and without labels."""
        totals = {name: float(value) for name, value in self._totals.items()}
        return totals | {
            "kappa": self.belief.kappa,
            "ability": self.belief.ability,
            "distinct": float(len(self._trained)),
            "rollouts_saved": self.ledger.rollouts_saved,
            "updates": float(self.updates),
        }

    # ── State ──

    def _identity(self) -> dict:
        return self.text.identity() | {"group_size": self.group_size}

    def state_dict(self) -> dict:
        """Return all that can change a later score or update, as copies."""
        return {
            "identity": self._identity() | {"version": __version__},
            "text": self.text.state_dict(),
            "belief": self.belief.state_dict(),
            "ledger": self.ledger.state_dict(),
            "trained": self._trained.copy(),
            "recent": [[*vars(label).values(), ability] for label, ability in self._recent],
            "losses": dict(self._losses),
            "totals": dict(self._totals),
            "seed": self._seed,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(). Raises CheckpointError if it is of another estimator or lacks a field."""
        mine = self.state_dict()
        for pick in (lambda s: s, lambda s: s["text"], lambda s: s["ledger"]):  # the belief checks its own
            expected, fields = set(pick(mine)), set(pick(state))
            if fields != expected:
                raise checkpoint.CheckpointError(
                    f"estimator checkpoint: missing {sorted(expected - fields)}, unexpected "
                    f"{sorted(fields - expected)}. It was written by another version of openrlhf-depo."
                )
        own, found = self._identity(), state["identity"]
        if other := [name for name in own if found.get(name) != own[name]]:
            raise checkpoint.CheckpointError(
                "the estimator checkpoint belongs to another estimator: "
                + "; ".join(f"{IDENTITY_FLAGS[name]} was {found.get(name)}, is {own[name]}" for name in other)
                + ". Resume with the values it was written with, or remove the folder depo under --ckpt.path."
            )
        try:
            self.belief.load_state_dict(state["belief"])
        except ValueError as error:
            raise checkpoint.CheckpointError(f"the estimator checkpoint does not fit: {error}") from error
        self.text.load_state_dict(state["text"])
        self.ledger.load_state_dict(state["ledger"])
        self._trained = np.array(state["trained"], np.uint64)
        recent = ((Label(*label), ability) for *label, ability in state["recent"])
        self._recent = deque(recent, maxlen=self._cfg.estimator.replay)
        self._losses, self._totals = dict(state["losses"]), dict(state["totals"])
        self._seed, self.updates = state["seed"], state["updates"]


def _targets(groups: list[tuple[Label, float]], belief: Belief) -> Targets:
    """Return what the text model learns from labels, each with the policy's ability at that time."""
    d = [float("nan") if label.d is None else label.d for label, _ in groups]
    ability_B = torch.tensor([ability for _, ability in groups], dtype=torch.float32)
    return Targets(
        y=torch.tensor([label.y for label, _ in groups], dtype=torch.float32),
        d=torch.tensor(d, dtype=torch.float32),
        shift=belief.narrowed(ability_B),
    )


def _with(keys: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return sorted keys, each once, with more of them; faster than sorting all of them, as np.union1d does."""
    more = np.unique(more)
    at = np.searchsorted(keys, more)
    new = np.append(keys, np.uint64(0))[at] != more
    new |= at == len(keys)
    return np.insert(keys, at[new], more[new])
