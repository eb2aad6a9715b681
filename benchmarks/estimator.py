"""How much time and memory does the estimator use? `python -m benchmarks.estimator [--json FILE] [--quick]`

Compares it with a textbook loop in the same run. The loop scores in batches of 16 in order of arrival. It updates in
micro-batches of 8, each computed once for the ranking term over the whole batch and once more for its gradient. It is
timed in fp32 and bf16 on 64 prompts; the faster one is then timed on all prompts, and counts.

finetune: prompts of 20 to 500 tokens and the bundled encoder; on a GPU also prompts of 512 tokens and a random encoder
of 110M parameters. frozen: pools in which every embedding is cached and every second prompt has a history.
Memory is the peak minus the memory that was in use before.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from depo_plugin.estimator.backends import MAX_NORM
from depo_plugin.estimator.embedding_cache import EmbeddingCache
from depo_plugin.estimator.encoder import load_encoder, token_limit
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.heads import DifficultyModel
from depo_plugin.estimator.history import PromptHistory, no_evidence
from depo_plugin.estimator.losses import losses
from depo_plugin.messages import Label, Reason, Record, prompt_key
from depo_plugin.settings.config import load_config

GROUP = 8
SCORED, UPDATED, FEW = 512, 128, 64
SCORE_BATCH, UPDATE_BATCH = 16, 8  # the textbook loop's
SHORTEST, LONGEST = 20, 500  # tokens
MAX_LENGTH = 512  # of both: all prompts are read whole
POOLS = (1_000, 100_000, 1_000_000)
STEPS = 9  # timed steps on a frozen pool; the medians are reported
CHUNK = 50_000  # prompts of a pool that are put into the cache in one call
ANSWER = "x"
WORDS = (
    "the a number of find such that if and then sum circle how many points let be real positive probability value "
    "function prime divide by seven side area what is smallest largest each box contains red blue balls train leaves "
    "station at speed hour cost apples sold total remaining"
).split()
VERBS = ("score", "update")
GOALS = {"bf16": {"score": 2.5, "update": 3.0}, "fp32": {"score": 1.8, "update": 2.0}}  # by our precision
GOAL_FROZEN, GOAL_FLAT = 50.0, 1.25


# ── Prompts and labels ──


def mixed_prompts(count: int) -> list[str]:
    """Return prompts with lengths spread evenly from SHORTEST to LONGEST tokens; each word is one token."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(SHORTEST - 2, LONGEST - 1))) for _ in range(count)]


def long_prompts(count: int) -> list[str]:
    """Return prompts of 512 tokens and more."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 520)) for _ in range(count)]


def labels_of(prompts: list[str]) -> list[Label]:
    """Return one label per prompt, with each possible pass rate in turn."""
    rates = [i % (GROUP + 1) / GROUP for i in range(len(prompts))]
    return [Label(x, ANSWER, y, 0.5, GROUP, 0 < y < 1) for x, y in zip(prompts, rates, strict=True)]


# ── Time and memory ──


def resident(field: str) -> float:
    """Return this process's memory in MiB: VmRSS now, VmHWM at its peak since the last reset (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


class Clock:
    """with Clock(device) as clock: ... -> clock.ms, and clock.mib: peak memory minus the memory in use before."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"

    def __enter__(self) -> "Clock":
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # give freed memory back to the system
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # if this fails, VmHWM is the peak since the start
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self._before = resident("VmRSS")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self._gpu:
            torch.cuda.synchronize()
        self.ms = 1e3 * (time.perf_counter() - self._start)
        self.mib = (torch.cuda.max_memory_allocated() / 2**20 if self._gpu else resident("VmHWM")) - self._before


# ── What is measured ──


class Textbook:
    """The estimator's model, scored and trained by the textbook loop."""

    def __init__(self, model: str | None, device: torch.device, dtype: str):
        torch.manual_seed(0)
        self.cfg, self.device, self.dtype = load_config(None, {}).estimator, device, dtype
        encoder, self.tokenizer = load_encoder(model)
        self.limit = token_limit(encoder, self.tokenizer, MAX_LENGTH)
        self.model = DifficultyModel(encoder).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.cfg.lr)

    def _logits(self, prompts: list[str]) -> torch.Tensor:
        found = self.tokenizer(prompts, truncation=True, max_length=self.limit, padding=True, return_tensors="pt")
        found = found.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return torch.stack(self.model(found["input_ids"], found["attention_mask"]))

    def score(self, prompts: list[str]) -> None:
        """Score in order of arrival."""
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(prompts), SCORE_BATCH):
                self._logits(prompts[start : start + SCORE_BATCH])[0].sigmoid().tolist()

    def update(self, labels: list[Label]) -> None:
        """Take one optimizer step on the loss over the whole batch."""
        self.model.train()
        parts = [[one.prompt for one in labels[i : i + UPDATE_BATCH]] for i in range(0, len(labels), UPDATE_BATCH)]
        with torch.no_grad():
            logits = torch.cat([self._logits(part) for part in parts], -1)
        logits.requires_grad_()
        y_B, d_B = (torch.tensor([getattr(one, name) for one in labels], device=self.device) for name in ("y", "d"))
        losses(*logits, y_B, d_B, self.cfg).total.backward()
        self.optimizer.zero_grad()
        for part, gradient in zip(parts, logits.grad.split(UPDATE_BATCH, -1), strict=True):
            self._logits(part).backward(gradient)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()


class Ours:
    """The estimator, called in the same way: one update per step, no replay."""

    def __init__(self, device: torch.device, cache: Path | None = None, **settings):
        given = {"updates_per_step": 1, "replay": 0, "max_length": MAX_LENGTH} | settings
        cfg = load_config(None, {f"estimator.{name}": value for name, value in given.items()})
        with device:  # without a DeepSpeed engine the estimator stays on the device that its weights were made on
            self.made, self.device = DifficultyEstimator(cfg, GROUP, 0, cache_dir=cache), device
        self.dtype = self.made.text.state_dict()["dtype"]

    def score(self, prompts: list[str]) -> None:
        """Score the prompts."""
        self.made.score(prompts, [ANSWER] * len(prompts))

    def update(self, labels: list[Label]) -> None:
        """Record decisions for these labels, then judge and learn from them."""
        decision = {"p": 0.5, "v": 0.9, "q": 1.0, "keep": True, "reason": Reason.PASSED, "share": 1.0}
        decision |= {"text": ("", ""), "datasource": "x"}
        self.made.record([Record(prompt_key(one.prompt, one.label), **decision) for one in labels])
        self.made.judge(labels)
        self.made.learn(labels)


def timed(who, verb: str, given: list) -> tuple[int, float, float]:
    """Return the number of inputs, ms and peak MiB of one call, after a call with two inputs to warm up."""
    getattr(who, verb)(given[:2])
    with Clock(who.device) as clock:
        getattr(who, verb)(given)
    return len(given), clock.ms, clock.mib


def row(name: str, who, verb: str, count: int, ms: float, mib: float) -> dict:
    """Return one row of figures, and print it."""
    per_s = 1e3 * count / ms
    print(f"| {name} | {who.device.type} {who.dtype} | {verb} | {count} | {per_s:.3g} | {ms:.0f} | {mib:.0f} |")
    fields = {"name": name, "device": who.device.type, "dtype": who.dtype, "verb": verb}
    return fields | {"prompts": count, "per_s": per_s, "ms": ms, "mib": mib}


# ── Training the encoder ──


def finetune(device: torch.device, given: dict[str, list], model: str | None = None) -> list[dict]:
    """Return rows of the textbook loop and of ours. given: verb -> its inputs; model: None for the bundled one.

    The last rows of each name are compared: the loop in its faster precision, ours in the precision that it chooses.
    """
    size, rows = "" if model is None else ", 110M", []
    for verb in VERBS:
        few, trials = given[verb][:FEW], {}
        for dtype in ("fp32", "bf16"):
            who = Textbook(model, device, dtype)
            trials[dtype] = row(f"textbook{size}, {len(few)}", who, verb, *timed(who, verb, few))
            rows.append(trials[dtype])
        who = Textbook(model, device, min(trials, key=lambda dtype: trials[dtype]["ms"]))
        rows.append(row(f"textbook{size}", who, verb, *timed(who, verb, given[verb])))
        for dtype in ("fp32", "auto") if device.type == "cpu" else ("bf16",):
            who = Ours(device, mode="finetune", model=model, dtype=dtype)
            part, name = (few, f"finetune{size}, {len(few)}") if dtype == "fp32" else (given[verb], f"finetune{size}")
            rows.append(row(name, who, verb, *timed(who, verb, part)))
    return rows


def random_encoder(folder: Path) -> str:
    """Write a random encoder of 110M parameters (BERT base) with the bundled tokenizer, and return its path."""
    from transformers import BertConfig, BertModel

    _, tokenizer = load_encoder(None)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ── A frozen encoder, a pool of cached embeddings ──


def pool_prompts(count: int) -> list[str]:
    """Return `count` different prompts of 100 to 2,000 characters."""
    text = " ".join(np.resize(WORDS, 500))
    return [f"{i}: {text[: 100 + i * 7919 % 1900]}" for i in range(count)]


def frozen(device: torch.device, size: int, steps: int) -> list[dict]:
    """Return rows of scoring SCORED and learning from UPDATED random prompts of a pool, medians over steps."""
    with tempfile.TemporaryDirectory() as folder:
        who, rng = Ours(device, cache=Path(folder)), np.random.default_rng(0)
        prompts, width, state = pool_prompts(size), who.made.text.width, who.made.state_dict()
        cache = EmbeddingCache(next(Path(folder).iterdir()), width)  # the estimator's, as another process shares it
        for start in range(0, size, CHUNK):
            keys = np.array([prompt_key(prompt, "") for prompt in prompts[start : start + CHUNK]], np.uint64)
            cache.get(keys, lambda missing: rng.standard_normal((len(missing), width), np.float32))
        met = np.sort(np.array([prompt_key(prompt, ANSWER) for prompt in prompts[::2]], np.uint64))
        history = PromptHistory()
        history.put(met, no_evidence(len(met)), 0)
        state["belief"]["history"], state["trained"] = history.state_dict(), met
        who.made.load_state_dict(state)
        found: dict[str, list] = {verb: [] for verb in VERBS}
        for _ in range(2 + steps):
            drawn = [prompts[i] for i in rng.integers(0, size, SCORED)]
            for verb, given in (("score", drawn), ("update", labels_of(drawn[:UPDATED]))):
                with Clock(device) as clock:
                    getattr(who, verb)(given)
                found[verb].append((clock.ms, clock.mib))
        counts = {"score": SCORED, "update": UPDATED}
        return [
            row(f"frozen, pool {size:,}", who, verb, counts[verb], *np.median(found[verb][2:], 0)) for verb in VERBS
        ]


# ── Goals ──


def goals(rows: list[dict]) -> list[dict]:
    """Return each goal with the measured figure and whether it is met."""
    per_s = {(one["device"], one["name"], one["verb"], one["dtype"]): one["per_s"] for one in rows}
    faster = {(one["device"], one["name"], one["verb"]): one for one in rows}
    found = []

    def add(device: str, what: str, goal: float, figure: float, least: bool = True) -> None:
        found.append(
            {"device": device, "what": what, "goal": goal, "figure": figure, "met": bool((figure >= goal) == least)}
        )

    for verb in VERBS:
        ours, loop = faster["cpu", "finetune", verb], faster["cpu", "textbook", verb]
        text = f"finetune {verb}, {ours['dtype']} against the loop's {loop['dtype']}"
        add("cpu", text, GOALS[ours["dtype"]][verb], ours["per_s"] / loop["per_s"])
        few = next(one["prompts"] for one in rows if one["name"].startswith("textbook,") and one["verb"] == verb)
        ratio = per_s["cpu", f"finetune, {few}", verb, "fp32"] / per_s["cpu", f"textbook, {few}", verb, "fp32"]
        add("cpu", f"finetune {verb}, fp32 against fp32, {few} prompts", GOALS["fp32"][verb], ratio)
        pools = [one for one in rows if one["name"].startswith("frozen") and one["verb"] == verb]
        add("cpu", f"frozen {verb} against the loop's", GOAL_FROZEN, pools[-1]["per_s"] / loop["per_s"])
        growth = pools[-1]["ms"] / pools[0]["ms"]
        add("cpu", f"frozen {verb}, {pools[-1]['name'][8:]} against {pools[0]['name'][8:]}", GOAL_FLAT, growth, False)
    return found


def main() -> None:
    """Print each row when it is measured, then the goals, and write both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimator", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="torch's (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="an eighth of the prompts, no pool of a million")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scored, updated = (SCORED // 8, UPDATED // 8) if args.quick else (SCORED, UPDATED)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads\n")
    print("| what | on | verb | prompts | prompts/s | ms | peak MiB |\n|---|---|---|---|---|---|---|")
    prompts = mixed_prompts(scored)
    given = {"score": prompts, "update": labels_of(prompts[:updated])}
    rows = finetune(torch.device("cpu"), given)
    for size in POOLS[:2] if args.quick else POOLS:
        rows += frozen(torch.device("cpu"), size, STEPS)
    if torch.cuda.is_available():
        device, prompts = torch.device("cuda"), long_prompts(scored)
        rows += finetune(device, given) + frozen(device, POOLS[0], STEPS)
        with tempfile.TemporaryDirectory() as folder:
            given = {"score": prompts, "update": labels_of(prompts[:updated])}
            rows += finetune(device, given, random_encoder(Path(folder)))
    else:
        print("\nNo GPU: its rows are left out.")
    found = goals(rows)
    print("\n| goal | at least (growth: at most) | figure | |\n|---|---|---|---|")
    for one in found:
        print(f"| {one['what']} | {one['goal']:g} | {one['figure']:.2f} | {'met' if one['met'] else 'MISSED'} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        setup = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "threads": args.threads}
        args.json.write_text(json.dumps({"setup": setup, "rows": rows, "goals": found}, indent=1))


if __name__ == "__main__":
    main()
