"""From the pool of prompts to full batches of those worth a rollout.

The pool, in a new order each pass, is one endless stream; every candidate on it is decided on exactly once:

    pass 0                     | pass 1                     | pass 2 ...
    decided: kept or rejected -----> cursor [asked: scores on their way] ->
                  |
                  '-> queue (the planned batch) -> one prompt per next() -> rollout

A batch is planned whole when the queue is empty. When its last prompt leaves, the scores of the next candidates are
asked for, so that they are computed behind the rollout: batch t+1 is decided with the weights after update t−1 (where
those do not give a full batch, more are asked for and waited for at once).
Nothing but stream positions, counters and those scores is state; both kinds of chance, the order of a pass and each
position's exploration draw, follow from (seed, pass).

Suffix B: one entry per candidate.
"""

import hashlib
import logging
import math
from collections import deque
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from depo_plugin.config import FilterConfig
from depo_plugin.filter import Decision, Reason, decide, fill_up, keep_all, keep_share, signal_probability
from depo_plugin.history import Scores, prompt_key

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

ASK_MARGIN = (
    1.25  # of the candidates that a batch is expected to take, so that the scores asked ahead nearly always do
)
RATE_KEPT = 0.8  # per batch: the expected keep rate follows about the last five
FORCED_IN_A_ROW = 10  # batches that had to be filled up, after which one warning names the likely cause


class Stream(IntEnum):
    """The loader's uses of chance, each with its own random stream: default_rng([seed, Stream, pass])."""

    ORDER = 0
    EXPLORE = 1


class Item(NamedTuple):
    """What of a dataset's entry is needed to judge it."""

    datasource: str
    prompt: str
    label: str


class Candidate(NamedTuple):
    """A decided candidate. p: p̂ or None, v: V or None (without a usable score)."""

    position: int
    item: Item
    p: float | None
    v: float | None
    decision: Decision


class Asked:
    """Consecutive candidates from the cursor on, and the scores that were asked for them."""

    def __init__(self, items: list[Item], future=None, scores: Scores | None = None):
        self.items = items
        self._future = future
        self._scores = scores

    def scores(self) -> Scores | None:
        """Wait for the scores, once; None where the estimator could not give them."""
        if self._future is not None:
            self._scores, self._future = self._future.result(), None
        return self._scores


class DifficultyFilteredLoader:
    """Stands in for OpenRLHF's prompt loader: one prompt per next(), drawn from the pool by predicted difficulty.

    It is its own iterator; iter() starts the next episode once the one before it is exhausted, and goes on
    with the current one otherwise (so after load_state_dict, too).
    """

    def __init__(
        self,
        inner,
        estimator,
        cfg: FilterConfig,
        *,
        batch_size: int,
        group_size: int,
        seed: int,
        num_episodes: int,
    ):
        """Take the pool over from OpenRLHF's own loader.

        inner: loader whose `dataset[i]` is (datasource, prompt, label, image) and whose `collate_fn` batches such
        items; it is never iterated. estimator: has score_async(prompts, labels) -> future of Scores or None, and
        record(records). batch_size: prompts drawn for one batch; group_size: responses per prompt (G).
        """
        self._dataset, self._collate = inner.dataset, inner.collate_fn
        self._pool = len(self._dataset)
        if not self._pool:
            raise ValueError(
                "DEPO: the prompt dataset is empty. Check --data.prompt_dataset, --data.prompt_split and "
                "--data.max_samples."
            )
        self._digest = self._pool_digest()
        self._estimator = estimator
        self._cfg = cfg
        self._batch_size = batch_size
        self._group_size = group_size
        self._seed = seed
        self._num_episodes = num_episodes
        # Longer than one pass, a scan would only ask the same prompts again.
        self._scan_limit = max(batch_size, min(cfg.max_scan * batch_size, self._pool))
        self._chance: dict[tuple[Stream, int], np.ndarray] = {}
        self._forced_in_a_row = 0
        self._exhausted = False  # StopIteration was raised: the next iter() starts the next episode

        self._episode = 0
        self._before = 0  # prompts given out in earlier episodes
        self._served = 0  # prompts given out in this episode
        self._refunds = 0  # places given back in this episode
        self._cursor = 0  # stream position of the next candidate to decide on
        self._queue: deque[int] = deque()  # positions of the planned batch that are still to be given out
        self._open: list[int] = []  # kept positions of a batch that a pass ended before it was full (budget data)
        self._asked: Asked | None = None
        self._updates = 0  # of the estimator, as last heard
        self._keep_rate = 0.5  # expected, after warm-up

    # ── The loader's side: what OpenRLHF calls ──

    def __len__(self) -> int:
        """Return where the progress bar ends that OpenRLHF makes for the next or resumed episode.

        That bar starts at len's remainder of all prompts given out: right where each earlier episode gave out as many.
        Where one did not (replacements, budget data), the bar counts all prompts since the start of the run.
        """
        before, served, refunds = self._before, self._served, self._refunds
        if self._exhausted:
            before, served, refunds = before + served, 0, 0
        expected = self.expected(1) + (refunds if self._cfg.budget == "steps" else 0)
        length = max(expected, served + bool(served))  # beyond what was given out, or its remainder were 0
        return length if before % length == 0 else before + length

    def expected(self, episodes: int) -> int:
        """Return how many prompts so many episodes give out; budget data: by expected_keep_rate."""
        if self._cfg.budget == "steps":
            return episodes * max(1, self._pool // self._batch_size) * self._batch_size
        # Their remainders lead the next episode. 1e-6: 0.7 * 10 is just below 7.
        kept = int(episodes * self._pass_length() * self._cfg.expected_keep_rate + 1e-6)
        return max(episodes, kept // self._batch_size) * self._batch_size

    def __iter__(self):
        if self._exhausted:
            self._exhausted = False
            self._episode += 1
            self._before += self._served
            self._served = self._refunds = 0
        return self

    def __next__(self) -> Any:
        """Return inner.collate_fn([item]) of the next prompt."""
        if self._spent() or not (self._queue or self._plan()):
            self._finish()
            raise StopIteration
        index = self._index(self._queue.popleft())
        self._served += 1
        if not self._queue:
            self._ask_ahead()
        return self._collate([self._dataset[index]])

    def refund(self, count: int) -> None:
        """Give back the places of `count` prompts whose groups dynamic filtering threw away.

        The episode gives out more, up to one extra pass in all: with budget steps as many, with budget data what the
        batch still lacks when the pass ends.
        """
        if not self._exhausted:
            self._refunds = min(self._refunds + count, self._pass_length())

    # ── The end of an episode ──

    def _spent(self) -> bool:
        if self._cfg.budget == "steps":
            return self._served >= self.expected(1) + self._refunds
        return self._left() < 0  # the next pass was begun to fill a batch; what is queued leads the next episode

    def _owing(self) -> bool:
        """Return whether a batch of this episode is still to be filled; without replacements, all are whole."""
        whole = self._served > 0 and (self._served - self._refunds) % self._batch_size == 0
        return not whole and self._refunds < self._pass_length()

    def _finish(self):
        if not self._exhausted and self._refunds == self._pass_length():
            logger.warning(
                "DEPO: episode %d ends: dynamic filtering threw away at least %d groups, as many as a pass has, and "
                "no more than that are replaced. The last batch may be short. Widen --algo.dynamic_filtering_range, "
                "or use prompts nearer to what the policy can do.",
                self._episode + 1,
                self._refunds,
            )
        self._exhausted = True

    def _pass_length(self) -> int:
        """Return the positions of one pass of the pool, or of as many passes as hold one batch."""
        return self._pool * math.ceil(self._batch_size / self._pool)

    def _left(self) -> float:
        """Return how many candidates this episode may still scan; below 0 where it has begun the next one's pass."""
        if self._cfg.budget == "steps" or self._owing():
            return math.inf
        return (self._episode + 1) * self._pass_length() - self._cursor

    # ── The pool ──

    def _item(self, index: int) -> Item:
        """Return entry `index` of the dataset, its label as text. Raises ValueError if the prompt is no text."""
        source, prompt, label, *_ = self._dataset[index]
        if not isinstance(prompt, str):
            raise ValueError(
                f"DEPO: prompt {index} of --data.prompt_dataset is no text but a {type(prompt).__name__}: "
                f"{str(prompt)[:200]}. If these are chat messages, add --data.apply_chat_template; else name the "
                "column that holds the text with --data.input_key."
            )
        return Item(source, prompt, str(label))

    def _pool_digest(self) -> str:
        """Return 16 hex digits that tell pools apart, by their prompts' keys in the dataset's order."""
        digest = hashlib.blake2b(digest_size=8)
        for index in range(self._pool):
            item = self._item(index)
            digest.update(prompt_key(item.prompt, item.label).to_bytes(8, "big"))
        return digest.hexdigest()

    # ── The stream ──

    def _draw(self, stream: Stream, pass_no: int) -> np.ndarray:
        """Return what chance gave to this pass: its order, or the exploration draws in [0, 1) by place in it."""
        key = (stream, pass_no)
        if key not in self._chance:
            rng = np.random.default_rng([self._seed, stream, pass_no])
            drawn = rng.permutation(self._pool) if stream is Stream.ORDER else rng.random(self._pool)
            # A batch may reach over the end of a pass; what is older is hardly asked for, and can be drawn again.
            oldest = self._cursor // self._pool - 1
            self._chance = {k: v for k, v in self._chance.items() if k[1] >= oldest} | {key: drawn}
        return self._chance[key]

    def _index(self, position: int) -> int:
        pass_no, place = divmod(position, self._pool)
        return int(self._draw(Stream.ORDER, pass_no)[place])

    def _uniform(self, position: int) -> float:
        pass_no, place = divmod(position, self._pool)
        return self._draw(Stream.EXPLORE, pass_no)[place]

    # ── Scores ──

    def _first_count(self) -> int:
        """Return how many candidates to ask about at first: a batch in warm-up, then what a batch should take."""
        rate = 1.0 if self._updates < self._cfg.warmup_steps else self._keep_rate / ASK_MARGIN
        return min(math.ceil(self._batch_size / rate), self._scan_limit, max(0, self._left()))

    def _items(self, count: int) -> list[Item]:
        positions = range(self._cursor, self._cursor + count)
        return [self._item(self._index(position)) for position in positions]

    def _ask(self, count: int) -> Asked:
        items = self._items(count)
        future = self._estimator.score_async([item.prompt for item in items], [item.label for item in items])
        return Asked(items, future)

    def _ask_ahead(self):
        """Ask for the next batch's first scores, unless the run ends here."""
        last = self._spent() and self._episode + 1 >= self._num_episodes
        count = self._first_count()
        if count and not last:
            self._asked = self._ask(count)

    # ── The plan of a batch ──

    def _plan(self) -> bool:
        """Scan until a batch is full and queue it; return False where the episode's pass ends before (budget data)."""
        wanted = self._batch_size - len(self._open)
        scanned: list[Candidate] = []
        kept = 0
        while kept < wanted and len(scanned) < self._scan_limit and self._left() > 0:
            if self._asked is None:
                most = self._batch_size if scanned else self._first_count()
                self._asked = self._ask(min(most, self._scan_limit - len(scanned), self._left()))
            asked, self._asked = self._asked, None
            for candidate in self._decided(asked):
                scanned.append(candidate)
                self._cursor += 1
                kept += candidate.decision.keep
                if kept == wanted:  # the rest stay ahead of the cursor: asked about again with the next batch
                    break
        full = kept == wanted
        if scanned and self._updates >= self._cfg.warmup_steps:
            rate = RATE_KEPT * self._keep_rate + (1 - RATE_KEPT) * kept / len(scanned)
            self._keep_rate = max(rate, 1 / self._cfg.max_scan)
        forced = not full and len(scanned) >= self._scan_limit  # more, where a resumed run lowers max_scan
        share = keep_share(kept, len(scanned), stopped=full) if kept else 1.0
        if forced:
            decisions = fill_up([c.decision for c in scanned], [c.v for c in scanned], wanted - kept)
            scanned = [c._replace(decision=decision) for c, decision in zip(scanned, decisions, strict=True)]
        self._open += [c.position for c in scanned if c.decision.keep]
        if scanned:
            self._estimator.record([_record(candidate, share) for candidate in scanned])
        if not (full or forced):
            return False
        self._queue.extend(self._open)
        self._open = []
        self._watch_forced(scanned, forced)
        return True

    def _decided(self, asked: Asked) -> list[Candidate]:
        """Return the asked candidates with their decisions; they begin at the cursor."""
        positions = range(self._cursor, self._cursor + len(asked.items))
        scores = asked.scores()
        if scores is None:
            p_B = v_B = [None] * len(positions)
            decisions = keep_all(len(positions), Reason.UNSCORED)
        else:
            self._updates = scores.updates
            v_B = signal_probability(scores.a, scores.b, self._group_size)
            total_B = np.asarray(scores.a, np.float64) + scores.b
            p_B = np.divide(scores.a, total_B, out=np.full_like(v_B, np.nan), where=~np.isnan(v_B))
            p_B, v_B = (np.where(np.isnan(v_B), None, x_B).tolist() for x_B in (p_B, v_B))
            if scores.updates < self._cfg.warmup_steps:
                decisions = keep_all(len(positions), Reason.WARMUP)
            else:
                uniform_B = np.array([self._uniform(position) for position in positions])
                decisions = decide(scores.a, scores.b, self._cfg, self._group_size, uniform_B)
        return [Candidate(*row) for row in zip(positions, asked.items, p_B, v_B, decisions, strict=True)]

    def _watch_forced(self, scanned: list[Candidate], forced: bool):
        self._forced_in_a_row = self._forced_in_a_row + 1 if forced else 0
        if self._forced_in_a_row != FORCED_IN_A_ROW:
            return
        p_B = np.array([c.p for c in scanned if c.p is not None])
        solved, unsolved = np.mean(p_B > 0.8), np.mean(p_B < 0.2)
        logger.warning(
            "DEPO: %d batches in a row were filled up with prompts that --depo.filter.rule %s rejects: too few of the "
            "%d scanned pass. By their predicted pass rates the policy nearly always solves %.0f%% of them and hardly "
            "ever %.0f%%: add %s prompts, relax the rule, or raise --depo.filter.max_scan (%d).",
            FORCED_IN_A_ROW,
            self._cfg.rule,
            len(scanned),
            100 * solved,
            100 * unsolved,
            "harder" if solved > unsolved else "easier",
            self._cfg.max_scan,
        )

    # ── State ──

    def _identity(self) -> dict:
        """Return what a state belongs to: any other is refused."""
        return {
            "batch_size": self._batch_size,
            "seed": self._seed,
            "budget": self._cfg.budget,
        }

    def state_dict(self) -> dict:
        """Return all that can change a later draw, in plain numbers and lists; waits for scores on their way.

        Those are part of it: a resumed run must not ask an estimator that has learned since.
        """
        asked = None
        if self._asked is not None:
            asked = {"count": len(self._asked.items), "scores": None}
            scores = self._asked.scores()
            if scores is not None:
                a, b = (np.asarray(x, np.float64).tolist() for x in scores[:2])
                asked["scores"] = {"a": a, "b": b, "updates": int(scores.updates)}
        return self._identity() | {
            "pool": self._pool,
            "digest": self._digest,
            "episode": self._episode,
            "before": self._before,
            "served": self._served,
            "refunds": self._refunds,
            "cursor": self._cursor,
            "queue": list(self._queue),
            "open": list(self._open),
            "asked": asked,
            "updates": int(self._updates),
            "keep_rate": self._keep_rate,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(); the next iter() goes on with its episode, also if that has no prompt left.

        With another pool, told by its digest, positions mean other prompts: then the stream starts its next pass, and
        a warning says so. Raises ValueError if fields are missing or unexpected, or the state is of another batch
        size, seed or budget.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
            raise ValueError(
                f"DEPO: this is not the prompt loader's state: missing {missing}, unexpected {unexpected}. It was "
                "written without DEPO or by another version of it. Resume with the version that wrote it, or start "
                "anew: leave --ckpt.load_enable out, or give another --ckpt.path."
            )
        own = self._identity()
        if changed := [name for name in own if state[name] != own[name]]:
            flags = {
                "batch_size": "--rollout.vllm_generate_batch_size (default: --rollout.batch_size)",
                "seed": "--train.seed",
                "budget": "--depo.filter.budget",
            }
            raise ValueError(
                "DEPO: the checkpoint belongs to another run: "
                + "; ".join(f"{flags[name]} was {state[name]}, is {own[name]}" for name in changed)
                + ". Resume with the values it was written with, or start anew: leave --ckpt.load_enable out, or give "
                "another --ckpt.path."
            )
        self._episode, self._before = state["episode"], state["before"]
        self._served, self._refunds = state["served"], state["refunds"]
        self._cursor, self._updates, self._keep_rate = state["cursor"], state["updates"], state["keep_rate"]
        self._queue, self._open = deque(state["queue"]), list(state["open"])
        self._exhausted = False
        self._chance = {}
        self._asked = None
        if state["digest"] != self._digest:
            self._start_next_pass(state)
        elif (asked := state["asked"]) is not None:
            scores = asked["scores"]
            known = Scores(np.array(scores["a"]), np.array(scores["b"]), scores["updates"]) if scores else None
            self._asked = Asked(self._items(asked["count"]), scores=known)

    def _start_next_pass(self, state: dict):
        """Go on with this pool after a state of another one."""
        self._cursor = math.ceil(state["cursor"] / state["pool"]) * self._pool
        self._queue, self._open = deque(), []
        logger.warning(
            "DEPO: these are not the prompts of the checkpoint (%d then, %d now, told apart by text and label): the "
            "next pass over the pool starts now. What was learned of a prompt is kept if its text and label are the "
            "same as before. If the data is the same, something in the prompts changes from launch to launch, such as "
            "a chat template or system prompt that writes a date: then every prompt is a new one. Prompt 0 is now "
            "%.300r.",
            state["pool"],
            self._pool,
            self._item(0).prompt,
        )


def _record(candidate: Candidate, share: float) -> dict:
    """Return what the estimator remembers of a decided candidate.

    share: keep_share of its batch. Forced prompts have weight 1, so share 1: they are outside the claim. text: the
    end of its prompt and its label, to be shown if its group does not come back.
    """
    item, decision = candidate.item, candidate.decision
    return {
        "key": prompt_key(item.prompt, item.label),
        "text": (item.prompt[-200:], item.label[:200]),
        "p": candidate.p,
        "v": candidate.v,
        "q": decision.q,
        "keep": decision.keep,
        "reason": decision.reason,
        "datasource": item.datasource,
        "share": 1.0 if decision.reason is Reason.FORCED else share,
    }
