"""The embedding cache: each text is embedded once; its row is on disk, memory-mapped. 12 bytes of memory a text.

Two files grow by appending: rows.f16 (fp16 rows), then keys.u64 (the row's text key), so that after a kill at any
moment what the shorter one holds is whole. Several processes may share a folder: appending takes a lock. On a full
disk texts are embedded again each time; what is on disk stays right.

Suffixes: B = texts asked for, each perhaps more than once, E = the encoder's width.
"""

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from depo_plugin.estimator.metrics import append_whole

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format


class EmbeddingCache:
    """Rows of fp16 by 64-bit key."""

    def __init__(self, folder: Path | None, width: int):
        """Open or make the cache. width: E; folder: None for one of its own that goes with this object.

        So it is, with a warning, where the folder cannot be written.
        """
        if folder is not None:
            try:
                self._open(folder)
            except OSError as error:
                logger.warning("DEPO: embeddings are kept in a temporary folder: %s", error)
                folder = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="depo-embeddings-")
            self._open(Path(self._temporary.name))
        self._width = width
        self._full = False  # the warning was given
        self._keys = np.empty(0, np.uint64)  # sorted
        self._places = np.empty(0, np.int32)  # the row of each
        self._count = 0  # rows that were read from the files
        self._rows = np.empty((0, width), np.float16)
        self._refresh()

    def _open(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refused must not be written later, before other rows.
        self._rows_file = open(folder / "rows.f16", "a+b", buffering=0)
        self._keys_file = open(folder / "keys.u64", "a+b", buffering=0)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, without the pages that the system maps."""
        return self._keys.nbytes + self._places.nbytes

    def get(self, keys_B: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the rows of these keys, float16 (B, E).

        keys_B: uint64; compute: given the indices (into keys_B) of texts without a row, returns their embeddings
        (missing, E), which are stored. Where they cannot be, they serve this call alone, with one warning.
        """
        missing = self._missing(keys_B)
        if len(missing):
            self._refresh()  # another process may have added them
            missing = self._missing(keys_B)
        if not len(missing):
            return self._known(keys_B)
        computed = np.asarray(compute(missing), np.float16)
        try:
            self._append(keys_B[missing], computed)
        except OSError as error:
            if not self._full:
                logger.warning("DEPO: embeddings cannot be written: %s. They are computed again each time.", error)
            self._full = True
            return self._joined(keys_B, keys_B[missing], computed)
        self._full = False
        return self._known(keys_B)

    def _known(self, keys_B):
        return self._rows[self._places[np.searchsorted(self._keys, keys_B)]]

    def _joined(self, keys_B, new_keys, new_rows):
        """Return the rows of keys_B, each of which is known or among the new ones."""
        is_new_B = np.isin(keys_B, new_keys)
        rows_BE = np.empty((len(keys_B), self._width), np.float16)
        rows_BE[~is_new_B] = self._known(keys_B[~is_new_B])
        order = np.argsort(new_keys)
        rows_BE[is_new_B] = new_rows[order][np.searchsorted(new_keys[order], keys_B[is_new_B])]
        return rows_BE

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
            append_whole(self._rows_file, rows_BE.tobytes())
            append_whole(self._keys_file, keys_B.tobytes())
        finally:
            fcntl.flock(self._keys_file, fcntl.LOCK_UN)
        self._refresh()
