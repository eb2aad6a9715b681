"""A pool of numbered prompts, an estimator whose beliefs a test writes down, and the prompt loader over both."""

import functools
import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.messages import Scores, Stream, prompt_key
from depo_plugin.settings.config import FilterConfig

GROUP_SIZE = 8
ACCEPT_ALL = {"low": 0.0, "high": 1.0, "epsilon": 0.0, "warmup_steps": 0}
REJECT_ALL = {"low": 0.98, "high": 0.99, "epsilon": 0.0, "warmup_steps": 0}
FILTER = {"low": 0.25, "high": 0.75, "epsilon": 0.05, "warmup_steps": 0}


class Prompts(torch.utils.data.Dataset):
    """The interface of OpenRLHF's PromptDataset; prompt i is "prompt i", its label "label i"."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return f"source {i % 2}", f"prompt {i}", f"label {i}", None

    def collate_fn(self, items):
        return tuple(list(column) for column in zip(*items, strict=True))


class Texts(Prompts):
    """The same interface over these prompts and labels."""

    def __init__(self, prompts, labels=None):
        super().__init__(len(prompts))
        self.prompts = prompts
        self.labels = labels or [f"label {i}" for i in range(len(prompts))]

    def __getitem__(self, i):
        return "source", self.prompts[i], self.labels[i], None


class Estimator:
    """Scripted beliefs: p̂ = pass_rate(prompt number, updates) with the evidence of `strength` samples.

    Answers with what it had learned when it was asked, as the actor does. answers: what to do with the n-th question:
    None for no scores, or a function of the Scores.
    """

    def __init__(self, pass_rate, updates=0, strength=8.0, answers=None):
        self.pass_rate, self.updates, self.strength = pass_rate, updates, strength
        self.answers = answers or {}
        self.questions = []  # (updates, prompt numbers)
        self.waits = []  # whether each one was waited for
        self.batches = []  # records by call

    def score_async(self, prompts, labels, waited_for=False):
        numbers = [int(prompt.split()[1]) for prompt in prompts]
        assert numbers
        assert labels == [f"label {i}" for i in numbers]
        p = np.array([self.pass_rate(i, self.updates) for i in numbers])
        scores = Scores(self.strength * p, self.strength * (1 - p), np.zeros(len(p)), self.updates)
        answer = self.answers.get(len(self.questions), lambda scores: scores)
        self.questions.append((self.updates, numbers))
        self.waits.append(waited_for)
        results = [answer and answer(scores)]
        return SimpleNamespace(result=results.pop)  # fails if it is called a second time

    def record(self, records):
        self.batches.append(records)

    @property
    def records(self):
        return [record for batch in self.batches for record in batch]


class InProcess:
    """A DifficultyEstimator as the loader sees it, without Ray. updates: counted by draw()."""

    def __init__(self, made):
        self.made, self.updates = made, 0
        self.records = []

    def score_async(self, prompts, labels, waited_for=False):
        scores = self.made.score(prompts, labels)
        return SimpleNamespace(result=lambda: scores)

    def record(self, records):
        self.records += records
        self.made.record(records)


def noise(i, updates=0):
    """A pass rate in [0, 1) that is another one after each update."""
    return int.from_bytes(hashlib.blake2b(f"{i} {updates}".encode(), digest_size=4).digest(), "big") / 2**32


def inner_loader(dataset):
    """OpenRLHF's own loader over a dataset, or over so many numbered prompts."""
    dataset = Prompts(dataset) if isinstance(dataset, int) else dataset
    return StatefulDataLoader(dataset, batch_size=1, shuffle=True, collate_fn=dataset.collate_fn)


def make(count, batch_size, pass_rate=noise, *, episodes=1, seed=0, estimator=None, inner=None, **cfg):
    """The loader over `count` prompts, and its estimator. cfg: changes to FILTER."""
    estimator = estimator or Estimator(pass_rate)
    loader = DifficultyFilteredLoader(
        inner or inner_loader(count),
        estimator,
        FilterConfig(**(FILTER | cfg)),
        batch_size=batch_size,
        group_size=GROUP_SIZE,
        seed=seed,
        num_episodes=episodes,
    )
    return loader, estimator


def number(batch):
    """The prompt number of what the loader gives for one prompt."""
    ((_, (prompt,), (label,), (image,)),) = [batch]
    assert label == prompt.replace("prompt", "label")
    assert image is None
    return int(prompt.split()[1])


def take(loader, count):
    """The next `count` prompt numbers of an episode, or fewer at its end."""
    return [number(batch) for batch in itertools.islice(loader, count)]


def episode(loader):
    """The prompt numbers of the rest of the episode, or of the next one if it has ended."""
    return take(loader, None)


def draw(loader, estimator, count, batch_size, served):
    """Draw `count` prompts as training does: an update after each batch, a new episode after the end of one.

    served: prompts that were drawn before, so that the updates come where they would have come.
    """
    drawn = []
    while len(drawn) < count:
        for batch in itertools.islice(loader, count - len(drawn)):
            drawn.append(number(batch))
            estimator.updates += (served + len(drawn)) % batch_size == 0
    return drawn


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def stream(count, seed, length):
    """The pool in the order of each pass, one after the other."""
    passes = (np.random.default_rng([seed, Stream.ORDER, n]).permutation(count) for n in range(length // count + 1))
    return np.concatenate(list(passes)).tolist()[:length]


@functools.cache
def key_to_number(count):
    return {prompt_key(f"prompt {i}", f"label {i}"): i for i in range(count)}


def numbers(records, count):
    """The prompt numbers of records."""
    return [key_to_number(count)[record.key] for record in records]
