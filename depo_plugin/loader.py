"""From the pool of prompts to full batches of prompts that are worth a rollout.

Every candidate of the stream (stream.py) is decided on exactly once, in order:

    pass 0                     | pass 1                     | pass 2 ...
    decided: kept or rejected -----> cursor [asked: scores on their way] ->
                  |
                  '-> queue (the planned batch) -> one prompt per next() -> rollout

A whole batch is planned when the queue is empty. When its last prompt leaves the queue, the scores of the next
candidates are asked for, so that they are computed while the GPUs roll out: batch t+1 is decided with the weights
after update t−1. If those scores do not give a full batch, more are asked for and waited for at once.

Suffix B: one entry per candidate.
"""

import logging
import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from depo_plugin.filter import Judged, PromptFilter, fill_up, keep_share, record_of
from depo_plugin.messages import EstimatorHandle, PendingScores, Scores
from depo_plugin.settings.config import FilterConfig
from depo_plugin.stream import Item, PromptStream

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

ASK_MARGIN = 1.25  # times the candidates that a batch is expected to need, so that one request is nearly always enough
RATE_KEPT = 0.8  # of the keep rate per batch: it follows about the last five batches
FORCED_IN_A_ROW = 10  # batches in a row that had to be filled up, after which one warning names the likely cause
STATE = "depo"  # the loader's own part of its state
BATCH_FLAG = "--rollout.vllm_generate_batch_size (default: --rollout.batch_size)"


class Candidate(NamedTuple):
    """A candidate, and how it was judged."""

    position: int
    item: Item
    judged: Judged


class Asked:
    """Consecutive candidates from the cursor on, and the scores that were asked for them."""

    def __init__(self, items: list[Item], pending: PendingScores | None = None, scores: Scores | None = None):
        self.items = items
        self._pending = pending
        self._scores = scores

    def scores(self) -> Scores | None:
        """Wait for the scores once and return them; None if the estimator could not give them."""
        if self._pending is not None:
            self._scores, self._pending = self._pending.result(), None
        return self._scores


class DifficultyFilteredLoader:
    """Stands in for OpenRLHF's prompt loader: one prompt per next(), chosen by predicted difficulty.

    It is its own iterator. iter() starts the next episode if the one before it is exhausted; otherwise it goes on with
    the current one, also after load_state_dict().
    """

    def __init__(
        self,
        inner: Any,
        estimator: EstimatorHandle,
        cfg: FilterConfig,
        *,
        batch_size: int,
        group_size: int,
        seed: int,
        num_episodes: int,
    ):
        """Take the pool over from OpenRLHF's own loader.

        inner: loader whose `dataset[i]` is (datasource, prompt, label, image) and whose `collate_fn` makes a batch of
        such items; it is never iterated. batch_size: prompts drawn for one batch; group_size: responses per prompt
        (G); seed: of the launch; num_episodes: after the last one nothing is scored ahead. Raises ValueError if the
        pool is empty, RuleError if cfg.rule is a file that cannot be used here.
        """
        self._filter = PromptFilter(cfg, group_size)
        self._stream = PromptStream(inner.dataset, seed)
        self._collate = inner.collate_fn
        self._workers = inner.num_workers
        self._digest = self._stream.digest()
        self._estimator = estimator
        self._cfg = cfg
        self._batch_size = batch_size
        self._seed = seed
        self._num_episodes = num_episodes
        pool = len(self._stream)
        # A scan longer than one pass would only ask about the same prompts again.
        self._scan_limit = max(batch_size, min(cfg.max_scan * batch_size, pool))
        self._most_refunds = pool * math.ceil(batch_size / pool)  # one extra pass, or as many as make one batch
        self._forced_in_a_row = 0
        self._exhausted = False  # StopIteration was raised: the next iter() starts the next episode

        self._episode = 0
        self._served = 0  # prompts given out in this episode
        self._refunds = 0  # places given back in this episode
        self._cursor = 0  # stream position of the next candidate to decide on
        self._queue: deque[int] = deque()  # positions of the planned batch that are still to be given out
        self._asked: Asked | None = None
        self._updates = 0  # of the estimator, as last heard
        self._keep_rate = 0.5  # expected after warm-up

    # ── What OpenRLHF calls ──

    def __len__(self) -> int:
        """Return the prompts that an episode gives out: as many full batches as fit into the pool, at least one.

        Refunds are not counted: OpenRLHF's progress bar is right in a run without them, and in a run with dynamic
        filtering it is off by the refunds of earlier episodes. Steps and totals are always right.
        """
        return max(1, len(self._stream) // self._batch_size) * self._batch_size

    def __iter__(self):
        if self._exhausted:
            self._exhausted = False
            self._episode += 1
            self._served = self._refunds = 0
        return self

    def __next__(self) -> Any:
        """Return inner.collate_fn([entry]) of the next prompt."""
        if self._spent():
            self._finish()
            raise StopIteration
        if not self._queue:
            self._plan()
        entry = self._stream.entry(self._queue.popleft())
        self._served += 1
        if not self._queue:
            self._ask_ahead()
        return self._collate([entry])

    def refund(self, count: int) -> None:
        """Give back the places of `count` prompts whose groups dynamic filtering threw away.

        The episode gives out as many prompts more, up to one extra pass in all.
        """
        if not self._exhausted:
            self._refunds = min(self._refunds + count, self._most_refunds)

    def _spent(self) -> bool:
        return self._served >= len(self) + self._refunds

    def _finish(self) -> None:
        if not self._exhausted and self._refunds == self._most_refunds:
            logger.warning(
                "DEPO: episode %d ends: dynamic filtering threw away at least %d groups, as many as a pass has, and "
                "no more than that are replaced. The last batch may be short. Widen --algo.dynamic_filtering_range, "
                "or use prompts nearer to what the policy can do.",
                self._episode + 1,
                self._refunds,
            )
        self._exhausted = True

    # ── Scores ──

    def _ask(self, count: int, waited_for: bool = False) -> Asked:
        items = [self._stream.item(position) for position in range(self._cursor, self._cursor + count)]
        return Asked(items, self._scores_of(items, waited_for))

    def _scores_of(self, items: list[Item], waited_for: bool) -> PendingScores:
        prompts, labels = [item.prompt for item in items], [item.label for item in items]
        return self._estimator.score_async(prompts, labels, waited_for)

    def _first_count(self) -> int:
        """Return how many candidates to ask about first: one batch in warm-up, then what a batch should need."""
        rate = 1.0 if self._updates < self._cfg.warmup_steps else self._keep_rate / ASK_MARGIN
        return min(math.ceil(self._batch_size / rate), self._scan_limit)

    def _ask_ahead(self) -> None:
        """Ask for the next batch's first scores, unless the run ends here."""
        if not (self._spent() and self._episode + 1 >= self._num_episodes):
            self._asked = self._ask(self._first_count())

    # ── The plan of a batch ──

    def _plan(self) -> None:
        """Scan until a batch is full and queue it; fill it up with the best rejected ones at the scan limit."""
        scanned: list[Candidate] = []
        kept = 0
        while kept < self._batch_size and len(scanned) < self._scan_limit:
            if self._asked is None:
                most = self._batch_size if scanned else self._first_count()
                self._asked = self._ask(min(most, self._scan_limit - len(scanned)), waited_for=True)
            asked, self._asked = self._asked, None
            for candidate in self._decided(asked):
                scanned.append(candidate)
                self._cursor += 1
                kept += candidate.judged.decision.keep
                if kept == self._batch_size:  # the rest stay ahead of the cursor: the next batch asks about them anew
                    break
        forced = kept < self._batch_size
        if self._updates >= self._cfg.warmup_steps:
            rate = RATE_KEPT * self._keep_rate + (1 - RATE_KEPT) * kept / len(scanned)
            self._keep_rate = max(rate, 1 / self._cfg.max_scan)
        share = keep_share(kept, len(scanned), stopped=not forced) if kept else 1.0
        if forced:
            judged = fill_up([c.judged for c in scanned], self._batch_size - kept)
            scanned = [c._replace(judged=one) for c, one in zip(scanned, judged, strict=True)]
        self._queue.extend(c.position for c in scanned if c.judged.decision.keep)
        self._estimator.record([record_of(*c.item, c.judged, share) for c in scanned])
        self._watch_forced(scanned, forced)

    def _decided(self, asked: Asked) -> list[Candidate]:
        """Return the asked candidates with their decisions; they begin at the cursor."""
        positions = range(self._cursor, self._cursor + len(asked.items))
        scores = asked.scores()
        if scores is not None:
            self._updates = scores.updates
            if self._updates >= self._cfg.warmup_steps:
                scores = self._with_late_ones(asked.items, scores)
        uniform_B = np.array([self._stream.uniform(position) for position in positions])
        judged = self._filter.judge(scores, [item.datasource for item in asked.items], uniform_B)
        return [Candidate(*row) for row in zip(positions, asked.items, judged, strict=True)]

    def _with_late_ones(self, items: list[Item], scores: Scores) -> Scores:
        """Ask once more for what the estimator had no time to read: it may have read it since."""
        late = np.flatnonzero(np.isnan(scores.a))
        found = self._scores_of([items[i] for i in late], True).result() if len(late) else None
        if found is None:
            return scores
        a, b, visits = (np.array(x, np.float64) for x in scores[:3])
        a[late], b[late], visits[late] = found.a, found.b, found.visits
        return Scores(a, b, visits, scores.updates)

    def _watch_forced(self, scanned: list[Candidate], forced: bool) -> None:
        """Warn once if FORCED_IN_A_ROW batches in a row had to be filled up."""
        self._forced_in_a_row = self._forced_in_a_row + 1 if forced else 0
        if self._forced_in_a_row != FORCED_IN_A_ROW:
            return
        p_B = np.array([c.judged.p for c in scanned if c.judged.p is not None])
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

    def state_dict(self) -> dict:
        """Return, under STATE, all that can change a later draw, in plain numbers and lists; waits for pending scores.

        Those scores are part of the state: a resumed run must not ask an estimator that has learned since. Beside it
        is what OpenRLHF's own loader takes up as a new pass, so that a launch without DEPO can go on from here.
        """
        asked: dict[str, Any] | None = None
        if self._asked is not None:
            asked = {"count": len(self._asked.items), "scores": None}
            scores = self._asked.scores()
            if scores is not None:
                told = {name: _plain(getattr(scores, name)) for name in ("a", "b", "visits")}
                asked["scores"] = told | {"updates": int(scores.updates)}
        return plain_state(self._workers) | {
            STATE: {
                "batch_size": self._batch_size,
                "seed": self._seed,
                "pool": len(self._stream),
                "digest": self._digest,
                "episode": self._episode,
                "served": self._served,
                "refunds": self._refunds,
                "cursor": self._cursor,
                "queue": list(self._queue),
                "asked": asked,
                "updates": int(self._updates),
                "keep_rate": self._keep_rate,
            }
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state_dict(); the next iter() goes on with its episode, also if that has no prompt left.

        A launch that has changed since is accepted, with one warning. With another batch size the stream goes on from
        its position. With other prompts (told by their digest), with another seed, and after a launch without DEPO,
        whose state is that of OpenRLHF's own loader, positions mean other prompts: then the next pass starts. Raises
        ValueError if fields of DEPO's own part are missing or unexpected.
        """
        self._queue, self._asked, self._exhausted = deque(), None, False
        if STATE not in state:
            self._go_on_without_state(state)
            return
        own = state[STATE]
        expected = set(self.state_dict()[STATE])
        if set(own) != expected:
            missing, unexpected = sorted(expected - set(own)), sorted(set(own) - expected)
            raise ValueError(
                f"DEPO: this is not the prompt loader's state: missing {missing}, unexpected {unexpected}. It was "
                "written by another version of openrlhf-depo. Resume with the version that wrote it, or start anew: "
                "leave --ckpt.load_enable out, or give another --ckpt.path."
            )
        self._episode, self._served, self._refunds = own["episode"], own["served"], own["refunds"]
        self._cursor, self._updates, self._keep_rate = own["cursor"], own["updates"], own["keep_rate"]
        other_prompts = own["digest"] != self._digest
        other_stream = other_prompts or own["seed"] != self._seed
        if other_stream:
            self._cursor = math.ceil(own["cursor"] / own["pool"]) * len(self._stream)
        elif own["batch_size"] != self._batch_size:
            self._cursor = min([own["cursor"], *own["queue"]])  # what was planned and not given out is decided anew
        else:
            self._queue.extend(own["queue"])
            self._asked = self._asked_before(own["asked"])
        if own["batch_size"] != self._batch_size:
            self._leave_whole_batches()
        self._warn_of_changes(own, other_prompts, other_stream)

    def _asked_before(self, asked: dict | None) -> Asked | None:
        """Return the candidates that had been asked about, with their scores if those had come."""
        if asked is None:
            return None
        known = None
        if (saved := asked["scores"]) is not None:
            a, b, visits = (np.array(saved[name], np.float64) for name in ("a", "b", "visits"))
            known = Scores(a, b, visits, saved["updates"])
        positions = range(self._cursor, self._cursor + asked["count"])
        return Asked([self._stream.item(position) for position in positions], scores=known)

    def _warn_of_changes(self, own: dict, other_prompts: bool, other_stream: bool) -> None:
        changed = []
        if own["batch_size"] != self._batch_size:
            changed.append(f"{BATCH_FLAG} was {own['batch_size']}, is {self._batch_size}")
        if own["seed"] != self._seed:
            changed.append(f"--train.seed was {own['seed']}, is {self._seed}")
        if other_prompts:
            changed.append(
                f"the prompts are others ({own['pool']} then, {len(self._stream)} now, told apart by text and label)"
            )
        if not changed:
            return
        text = (
            f"DEPO: since the checkpoint was written something has changed: {'; '.join(changed)}. "
            f"{'The next pass over the pool starts now' if other_stream else 'The pass over the pool goes on'}, and "
            "what was learned of a prompt is kept."
        )
        if other_prompts:
            text += (
                " A prompt is known if its text and label are the same as before. If the data is the same, something "
                "in the prompts changes from launch to launch, such as a chat template or system prompt that writes a "
                "date: then every prompt is a new one. The next prompt is "
                f"{repr(self._stream.item(self._cursor).prompt)[:300]}."
            )
        logger.warning("%s", text)

    def _go_on_without_state(self, state: dict) -> None:
        """Go on after a launch without DEPO: finish its episode, with a new pass over the pool."""
        snapshot = state.get("_snapshot", {}).get("_snapshot_step", 0) + state.get("_steps_since_snapshot", 0)
        self._served = state.get("_num_yielded", snapshot)
        logger.warning(
            "DEPO: the checkpoint was written without DEPO: its episode goes on after %d prompts, with a new pass "
            "over the pool.",
            self._served,
        )
        self._leave_whole_batches()

    def _leave_whole_batches(self) -> None:
        """Shorten the episode by what is less than a batch: a short batch may be too small for the policy's ranks."""
        self._served += (len(self) + self._refunds - self._served) % self._batch_size


def _plain(x: Any) -> list[float | None]:
    """Return numbers as a list, None for NaN, which JSON does not have."""
    return [None if np.isnan(value) else value for value in np.asarray(x, np.float64).tolist()]


def plain_state(workers: int) -> dict:
    """Return a state that torchdata's StatefulDataLoader takes up as a new pass: it has given out nothing.

    workers: its num_workers, 0 or more; the two kinds of iterators read different fields.
    """
    sampler = {"_index_sampler_state": None, "_sampler_iter_state": None, "_sampler_iter_yielded": 0}
    sampler |= {"_IterableDataset_len_called": None, "_shared_seed": None}
    state = {"_num_yielded": 0, "fetcher_state": None, "dataset_state": None, "_iterator_finished": False}
    if not workers:
        return sampler | state
    return {
        "_snapshot": {
            "_snapshot_step": 0,
            "_last_yielded_worker_id": workers - 1,
            "_main_snapshot": sampler | {"_num_workers": workers, "_base_seed": 0},
            "_worker_snapshots": {},
        },
        "_steps_since_snapshot": 0,
        "_iterator_finished": False,
    }
