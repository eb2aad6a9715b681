"""The embedding cache: each text is embedded once; its row is on disk, memory-mapped. 12 bytes of memory a text.

Two files grow by appending: rows.f16 (fp16 rows), then keys.u64 (the row's text key), so that after a kill at any
moment what the shorter one holds is whole. Several processes may share a folder: appending takes a lock.

Suffixes: B = texts asked for, each perhaps more than once, E = the encoder's width.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


class EmbeddingCache:
    """Rows of fp16 by 64-bit key."""

    def __init__(self, folder: Path | None, width: int):
        """Open or make the cache. folder: None for one of its own that goes with this object; width: E."""
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="depo-embeddings-")
            folder = Path(self._temporary.name)
        folder.mkdir(parents=True, exist_ok=True)
        self._width = width
        self._rows_file = open(folder / "rows.f16", "a+b")
        self._keys_file = open(folder / "keys.u64", "a+b")
        self._keys = np.empty(0, np.uint64)  # sorted
        self._places = np.empty(0, np.int32)  # the row of each
        self._count = 0  # rows that were read from the files
        self._rows = np.empty((0, width), np.float16)
        self._refresh()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, without the pages that the system maps."""
        return self._keys.nbytes + self._places.nbytes

    def get(self, keys_B: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the rows of these keys, float16 (B, E).

        keys_B: uint64; compute: given the indices (into keys_B) of texts without a row, returns their embeddings
        (missing, E), which are stored. Raises OSError where they cannot be written.
        """
        missing = self._missing(keys_B)
        if len(missing):
            self._refresh()  # another process may have added them
            missing = self._missing(keys_B)
        if len(missing):
            self._append(keys_B[missing], np.asarray(compute(missing), np.float16))
        return self._rows[self._places[np.searchsorted(self._keys, keys_B)]]

    def _missing(self, keys_B):
        """Return the index of the first occurrence of each key that has no row, in order of occurrence."""
        _, first = np.unique(keys_B, return_index=True)
        first = np.sort(first)
        at = np.searchsorted(self._keys, keys_B[first])
        known = at < len(self._keys)
        known[known] = self._keys[at[known]] == keys_B[first][known]
        return first[~known]

    def _whole(self) -> int:
        """Return how many rows both files hold whole."""
        rows = os.fstat(self._rows_file.fileno()).st_size // (2 * self._width)
        return min(rows, os.fstat(self._keys_file.fileno()).st_size // 8)

    def _refresh(self):
        """Take up the rows that were added to the files since."""
        count = self._whole()
        if count <= self._count:
            return
        # Past Python's buffer: it may hold what another process has since cut off and written anew.
        added = os.pread(self._keys_file.fileno(), 8 * (count - self._count), 8 * self._count)
        added = np.frombuffer(added, np.uint64)
        places = np.arange(self._count, count, dtype=np.int32)
        keys, places = np.r_[self._keys, added], np.r_[self._places, places]
        self._keys, first = np.unique(keys, return_index=True)  # of equal ones the oldest
        self._places = places[first]
        self._count = count
        self._rows = np.memmap(self._rows_file, np.float16, "r", shape=(count, self._width))

    def _append(self, keys_B, rows_BE):
        fcntl.flock(self._keys_file, fcntl.LOCK_EX)
        try:
            whole = self._whole()
            self._rows_file.truncate(2 * self._width * whole)  # what a killed process left behind
            self._keys_file.truncate(8 * whole)
            for file, array in ((self._rows_file, rows_BE), (self._keys_file, keys_B)):
                file.write(array.tobytes())
                file.flush()
        finally:
            fcntl.flock(self._keys_file, fcntl.LOCK_UN)
        self._refresh()
