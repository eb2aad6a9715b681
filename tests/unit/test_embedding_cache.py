"""The embedding cache: computed once, found again by every process, whole after a kill at any moment."""

import multiprocessing
import signal
import sqlite3
import time

import numpy as np
import pytest

from depo_plugin.estimator import embedding_cache
from depo_plugin.estimator.embedding_cache import EmbeddingCache

WIDTH = 4
FILE = "rows.sqlite3"


def keys(*numbers):
    return np.array(numbers, np.uint64)


def row(key):
    """The embedding of a key: four numbers that fp16 holds exactly and that no other key below 2000 has."""
    return np.outer(np.asarray(key, np.float64), [1.0, -1.0, 0.5, 2.0]).astype(np.float32)


class Encoder:
    """Computes rows and counts what it was asked for."""

    def __init__(self):
        self.asked = []

    def get(self, cache, asked):
        def compute(missing):
            self.asked += asked[missing].tolist()
            return row(asked[missing])

        found = cache.get(asked, compute)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, row(asked).astype(np.float16))
        return found


@pytest.fixture
def encoder():
    return Encoder()


def test_each_text_is_computed_once(tmp_path, encoder):
    cache = EmbeddingCache(tmp_path / "made" / "on the way", WIDTH)
    encoder.get(cache, keys(5, 3, 5, 2**10))
    assert encoder.asked == [5, 3, 2**10], "each once, as they came"
    encoder.get(cache, keys(3, 7, 3, 5))
    assert encoder.asked == [5, 3, 2**10, 7]
    assert len(cache) == 4
    assert encoder.get(cache, keys()).shape == (0, WIDTH)
    assert encoder.asked == [5, 3, 2**10, 7]


def test_rows_are_found_again_by_the_next_process_at_any_key(tmp_path, encoder):
    edges = keys(0, 1, 2**63 - 1, 2**63, 2**64 - 1)  # the middle ones are SQLite's largest and smallest integers
    EmbeddingCache(tmp_path, WIDTH).get(edges, lambda missing: row(missing))
    again = EmbeddingCache(tmp_path, WIDTH)
    assert len(again) == 5
    np.testing.assert_array_equal(again.get(edges[::-1], None), row(range(5))[::-1])


def test_a_temporary_file_goes_with_the_cache(encoder):
    one, other = EmbeddingCache(None, WIDTH), EmbeddingCache(None, WIDTH)
    encoder.get(one, keys(1))
    encoder.get(other, keys(1))
    assert encoder.asked == [1, 1], "each has its own"


def test_two_that_compute_the_same_text_agree(tmp_path, encoder):
    """Another process adds a row while this one computes it, with other last bits: the first counts in both."""
    one, other = EmbeddingCache(tmp_path, WIDTH), EmbeddingCache(tmp_path, WIDTH)

    def compute(missing):
        encoder.get(other, keys(2, 3))
        return -row(keys(1, 2)[missing])

    expected = np.r_[-row([1]), row([2])]
    np.testing.assert_array_equal(one.get(keys(1, 2), compute), expected)
    np.testing.assert_array_equal(one.get(keys(1, 2), None), expected)
    np.testing.assert_array_equal(other.get(keys(1, 2), None), expected)


def append(folder, seed, barrier):
    """One process: 40 batches of 25 keys, in an order of its own."""
    barrier.wait()
    cache, encoder = EmbeddingCache(folder, WIDTH), Encoder()
    order = np.random.default_rng(seed).permutation(1000).astype(np.uint64)
    for batch in np.split(order, 40):
        encoder.get(cache, batch)
    raise SystemExit(0 if len(cache) == 1000 else 1)


def start(folder, seeds):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(seeds) + 1)
    processes = [context.Process(target=append, args=(folder, seed, barrier)) for seed in seeds]
    for process in processes:
        process.start()
    barrier.wait()
    return processes


def assert_whole(folder, count=1000):
    """Every stored row is that of its key, and SQLite finds no fault in the file."""
    db = sqlite3.connect(folder / FILE)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    stored = dict(db.execute("SELECT key, row FROM rows"))
    assert len(stored) <= count
    assert all(found == row([key]).astype(np.float16).tobytes() for key, found in stored.items())
    return len(stored)


def test_processes_that_begin_at_once_share_one_file(tmp_path):
    processes = start(tmp_path, (1, 2, 3))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert assert_whole(tmp_path) == 1000


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_rows(tmp_path):
    """kill -9 of one of two writers, at twelve moments: the other one ends as if nothing had been."""
    exits = []
    for kill in range(12):
        killed, other = start(tmp_path / str(kill), (1, 2))
        time.sleep(0.004 * kill)
        killed.kill()
        for process in (killed, other):
            process.join(60)
        exits.append((killed.exitcode, other.exitcode))
        assert assert_whole(tmp_path / str(kill)) == 1000
    assert [other for _, other in exits] == [0] * 12
    assert [killed for killed, _ in exits].count(-signal.SIGKILL) >= 6


def test_a_folder_that_cannot_be_written_is_a_warning_and_a_temporary_one_stands_in(tmp_path, encoder, caplog):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file", WIDTH)
    encoder.get(cache, keys(1, 2))
    encoder.get(cache, keys(2, 1))
    assert encoder.asked == [1, 2]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"DEPO: embeddings are kept in a temporary file, not in {tmp_path / 'file'}")


class Unlockable(sqlite3.Connection):
    """What SQLite says on a file system without locks."""

    def execute(self, sql, *args):
        if sql.startswith(("BEGIN", "PRAGMA journal")):
            raise sqlite3.OperationalError("locking protocol")
        return super().execute(sql, *args)


def test_without_locks_a_temporary_file_stands_in(tmp_path, encoder, caplog, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3,
        "connect",
        lambda path, **options: connect(path, factory=Unlockable if path else sqlite3.Connection, **options),
    )
    encoder.get(EmbeddingCache(tmp_path, WIDTH), keys(1, 2))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.endswith(f"{tmp_path / FILE}: locking protocol")


@pytest.mark.parametrize("whole", [0, 8192], ids=["found on opening", "found on reading"])
def test_a_damaged_file_is_set_aside_with_one_warning(tmp_path, encoder, caplog, whole):
    """Its first `whole` bytes are as they were; opening it reads two pages of 4096."""
    many = np.arange(1000, dtype=np.uint64)
    before = EmbeddingCache(tmp_path, WIDTH)
    encoder.get(before, many)
    before._db.close()
    data = (tmp_path / FILE).read_bytes()
    data = data[:whole] + b"\x55" * (len(data) - whole)
    (tmp_path / FILE).write_bytes(data)
    cache = EmbeddingCache(tmp_path, WIDTH)
    for _ in range(2):
        encoder.get(cache, many)
    assert len(encoder.asked) == 2000, "embedded again once"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"DEPO: {tmp_path / FILE} is damaged (")
    assert (tmp_path / f"{FILE}.damaged").read_bytes() == data
    assert assert_whole(tmp_path) == 1000


def test_rows_that_were_not_stored_once_are_not_lasting(tmp_path, monkeypatch):
    """Another process holds the lock for too long, and then lets go."""
    monkeypatch.setattr(embedding_cache, "TIMEOUT_S", 0.1)
    cache = EmbeddingCache(tmp_path, 2)
    assert cache.lasting
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("BEGIN IMMEDIATE")
    rows = cache.get(np.array([1, 2], np.uint64), lambda missing: np.ones((len(missing), 2)))
    assert (rows == 1).all()
    other.close()
    cache.get(np.array([3], np.uint64), lambda missing: np.ones((len(missing), 2)))
    assert len(cache) == 1
    assert not cache.lasting
    assert not EmbeddingCache(None, 2).lasting
