"""The embedding cache: computed once, found again by every process, whole after a kill at any moment."""

import multiprocessing
import time
import tracemalloc

import numpy as np
import pytest

from depo_plugin.estimator.embedding_cache import EmbeddingCache

WIDTH = 4
ROWS, KEYS = "rows.f16", "keys.u64"


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


def test_rows_are_found_again_by_the_next_process(tmp_path, encoder):
    encoder.get(EmbeddingCache(tmp_path, WIDTH), keys(1, 2, 3))
    again = EmbeddingCache(tmp_path, WIDTH)
    assert len(again) == 3
    encoder.get(again, keys(3, 2, 1, 4))
    assert encoder.asked == [1, 2, 3, 4]
    assert (tmp_path / ROWS).stat().st_size == 4 * 2 * WIDTH
    assert np.fromfile(tmp_path / KEYS, np.uint64).tolist() == [1, 2, 3, 4]


def test_a_temporary_folder_goes_with_the_cache(encoder):
    one, other = EmbeddingCache(None, WIDTH), EmbeddingCache(None, WIDTH)
    encoder.get(one, keys(1))
    encoder.get(other, keys(1))
    assert encoder.asked == [1, 1], "each has its own"


@pytest.mark.parametrize("rows_left", [0, 1, 7, 8, 9, 16, 17, 23, 24])
@pytest.mark.parametrize("keys_left", [0, 3, 8, 15, 16, 20, 24])
def test_what_a_killed_writer_left_is_dropped(tmp_path, encoder, rows_left, keys_left):
    """Three rows of 8 bytes and three keys of 8, each file cut off anywhere: what both hold whole is there."""
    encoder.get(EmbeddingCache(tmp_path, WIDTH), keys(1, 2, 3))
    for name, left in ((ROWS, rows_left), (KEYS, keys_left)):
        with open(tmp_path / name, "r+b") as file:
            file.truncate(left)
    whole = min(rows_left, keys_left) // 8
    cut, late = EmbeddingCache(tmp_path, WIDTH), EmbeddingCache(tmp_path, WIDTH)
    assert len(cut) == len(late) == whole
    encoder.asked.clear()
    encoder.get(cut, keys(9, 3, 2, 1))
    assert encoder.asked == [key for key in (9, 3, 2, 1) if key > whole]
    encoder.get(late, keys(1, 2, 3, 9, 10))
    assert encoder.asked[-1] == 10
    assert len(encoder.asked) == 4 - whole + 1, "what the other one wrote is found"
    assert len(EmbeddingCache(tmp_path, WIDTH)) == 5


def test_a_tail_that_was_read_before_it_was_cut_off_is_not_remembered(tmp_path, encoder):
    """A reader opens while 13 bytes of a killed writer's keys lie there; another writer cuts them off and goes on."""
    writer = EmbeddingCache(tmp_path, WIDTH)
    encoder.get(writer, keys(1, 2))
    with open(tmp_path / KEYS, "ab") as file:
        file.write(b"\x22" * 13)
    reader = EmbeddingCache(tmp_path, WIDTH)
    encoder.get(writer, keys(7, 8))
    encoder.asked.clear()
    encoder.get(reader, keys(7, 8, 1))
    assert encoder.asked == []
    assert len(reader) == 4


def test_two_that_compute_the_same_text_agree(tmp_path, encoder):
    """Another process adds rows while this one computes: both copies are on disk, the oldest counts in both."""
    one, other = EmbeddingCache(tmp_path, WIDTH), EmbeddingCache(tmp_path, WIDTH)

    def compute(missing):
        encoder.get(other, keys(2, 3))
        return -row(keys(1, 2)[missing])

    found = one.get(keys(1, 2), compute)
    np.testing.assert_array_equal(found, np.r_[-row([1]), row([2])])
    assert np.fromfile(tmp_path / KEYS, np.uint64).tolist() == [2, 3, 1, 2]
    assert len(one) == 3
    np.testing.assert_array_equal(other.get(keys(2, 1), None), np.r_[row([2]), -row([1])])


def append(folder, seed, barrier):
    """One of two processes: 40 batches of 25 keys, about half of them the other one's, too."""
    cache, encoder = EmbeddingCache(folder, WIDTH), Encoder()
    order = np.random.default_rng(seed).permutation(1000).astype(np.uint64)
    barrier.wait()
    for batch in np.split(order, 40):
        encoder.get(cache, batch)
    raise SystemExit(0 if len(cache) == 1000 else 1)


def test_two_processes_append_to_one_folder(tmp_path, encoder):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=append, args=(tmp_path, seed, barrier)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    cache = EmbeddingCache(tmp_path, WIDTH)
    assert len(cache) == 1000
    encoder.get(cache, np.arange(1000, dtype=np.uint64))
    assert encoder.asked == []
    stored = np.fromfile(tmp_path / KEYS, np.uint64)
    rows = np.fromfile(tmp_path / ROWS, np.float16).reshape(-1, WIDTH)
    np.testing.assert_array_equal(rows, row(stored).astype(np.float16), err_msg="each row stands with its key")
    assert 1000 <= len(stored) < 2000


def test_a_folder_that_cannot_be_written_is_a_warning_and_a_temporary_one_stands_in(tmp_path, encoder, caplog):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file", WIDTH)
    encoder.get(cache, keys(1, 2))
    encoder.get(cache, keys(2, 1))
    assert encoder.asked == [1, 2]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("DEPO: embeddings are kept in a temporary folder: ")
    assert str(tmp_path / "file") in warning
    assert (tmp_path / "file").read_text() == ""


def test_a_million_texts_cost_less_than_100_bytes_of_memory_each(tmp_path):
    """12 bytes of keys and places; rows are on disk. 64 texts of which four are new within 1 s (0.05 s when idle)."""
    count, width = 1_000_000, 16
    known = np.random.default_rng(0).permutation(count).astype(np.uint64) * np.uint64(7919)
    with open(tmp_path / KEYS, "wb") as file:
        file.write(known.tobytes())
    np.repeat((known % 2000)[:, None], width, 1).astype(np.float16).tofile(tmp_path / ROWS)
    tracemalloc.start()
    try:
        cache = EmbeddingCache(tmp_path, width)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(cache) == count
    assert cache.nbytes == 12 * count
    assert held < 20 * count, "rows are mapped, not read"
    asked = np.r_[known[::16667], keys(1, 2, 3, 4)]
    assert len(asked) == 64
    start = time.perf_counter()
    found = cache.get(asked, lambda missing: np.repeat(asked[missing][:, None], width, 1))
    assert time.perf_counter() - start < 1.0
    np.testing.assert_array_equal(found[:, 0], (asked % 2000).astype(np.float16))
    assert len(cache) == count + 4
