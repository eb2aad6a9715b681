"""What crosses from one part to another, and from one process to another: plain values, nothing of Ray or torch.

    loader -> estimator   score_async(prompts, labels) -> Scores        record([Record, ...])
    trainer -> estimator  judge([Label, ...]) -> Judgement              learn([Label, ...])

Suffix B: one entry per prompt of a call.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple, Protocol

import numpy as np

HEAD = 1000  # characters at the start of a rendered prompt in which a chat template writes today's date
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = rf"\d{{4}}[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.]\d{{4}}|\d\d? {_MONTH},? \d{{4}}|{_MONTH} \d\d?,? \d{{4}}"
# "Today Date: ...", "Current date: ...", "Today's date is ...": in templates of Llama 3, gpt-oss, Granite and Mistral.
DATED = re.compile(rf"(?:today(?:['\u2019]s)?|current) date(?: is)?:? *({_DATE})", re.IGNORECASE)


class Stream(IntEnum):
    """Every use of chance in the package. Each has its own random stream: default_rng([seed, Stream, number])."""

    ORDER = 0  # the order of one pass over the pool
    EXPLORE = 1  # one draw for each position of a pass
    INIT = 10  # the first weights of the heads
    DROPOUT = 11  # of one optimizer step
    REPLAY = 12  # which recent groups one optimizer step learns from again


class Reason(str, Enum):
    """Why a candidate was kept or rejected; each is counted in the metrics."""

    WARMUP = "warmup"  # kept: the estimator has learned too little to be asked
    PASSED = "passed"  # kept: the rule says yes, or says perhaps and chance says yes
    EXPLORED = "explored"  # kept by chance ε, although the rule says no
    FORCED = "forced"  # kept although the rule says no, because too few passed to fill a batch
    REJECTED = "rejected"  # not kept: the rule says no, or says perhaps and chance says no
    UNSCORED = "unscored"  # kept: the estimator gave no usable score
    SHADOW = "shadow"  # kept, because nothing is filtered in shadow mode; q says what the rule would have done

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Record:
    """The loader's decision on one scanned candidate, as it is sent to the estimator.

    key: prompt_key of the prompt.
    text: the end of its prompt and the start of its label, shown in a warning if its group does not come back.
    p, v: p̂ and V that the decision was made by; None without a usable score.
    q: probability of being kept, in (0, 1] if `keep` is true.
    keep: whether it is rolled out.
    reason: why.
    datasource: its data source.
    share: kept/scanned of its batch (filter.keep_share); 1 for a forced prompt, which has no importance weight.
    """

    key: int
    text: tuple[str, str]
    p: float | None
    v: float | None
    q: float
    keep: bool
    reason: Reason
    datasource: str
    share: float


@dataclass(frozen=True)
class Label:
    """The outcome of one prompt's group.

    prompt, label: as the loader gave them out, the label as text; together they identify the prompt.
    y: pass rate in [0, 1], the mean of the group's normalised scores.
    d: exp(mean token log-prob) of the group's responses in [1e-4, 1 - 1e-4], or None if it is not known.
    n: number of responses in the group.
    signal: whether the group's rewards differ, so that its advantages are not all zero.
    tokens: response tokens of the whole group, or None if they are not known.

    Limit: the group counts as y·n successes of n, and V assumes rewards of 0 or 1. A prompt whose responses all get
    0.5 (y 0.5, signal False) is therefore believed to be as useful as one with as many right as wrong responses.
    """

    prompt: str
    label: str
    y: float
    d: float | None
    n: int
    signal: bool
    tokens: int | None = None

    @property
    def key(self) -> int:
        """The prompt_key of its prompt and label."""
        return prompt_key(self.prompt, self.label)


class Scores(NamedTuple):
    """Beliefs about prompts: Beta(a, b) over each one's pass rate, float64 (B,), after `updates` updates.

    a and b are NaN for a prompt that there was no time to read; visits: float64 (B,), in how many updates each prompt
    was learned from.
    """

    a: np.ndarray
    b: np.ndarray
    visits: np.ndarray
    updates: int


class PendingScores(Protocol):
    """Scores that were asked for and are being computed."""

    def result(self) -> Scores | None:
        """Wait for the scores and return them; None if the estimator could not give them."""


class EstimatorHandle(Protocol):
    """What the loader needs of an estimator: a RemoteEstimator in a run, an object beside it in replay and tests."""

    def score_async(self, prompts: Sequence[str], labels: Sequence[str], waited_for: bool = False) -> PendingScores:
        """Ask for the scores of these prompts without waiting. labels: their reference answers, as text.

        waited_for: whether result() is called at once, so that the estimator should be quick rather than complete.
        """

    def record(self, records: list[Record]) -> None:
        """Take the decisions on one scanned batch."""


def prompt_key(prompt: str, label: str) -> int:
    """Return the prompt's identity: a 64-bit number, equal in every process and after every restart.

    The date that a chat template writes ("Today Date: 26 Nov 2026") is left out, so that a run that is resumed on
    another day finds its prompts again.
    """
    if dated := DATED.search(prompt[:HEAD]):
        prompt = prompt[: dated.start(1)] + prompt[dated.end(1) :]
    text = f"{prompt}\0{label}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
