"""The embedding cache: each text is embedded once; its row lies in an SQLite file.

Several processes of one machine may share a file, and a kill at any moment leaves it whole. A fault of the disk costs
time, never a wrong row: texts are embedded again if the disk is full, a temporary file stands in for a folder that
cannot be used, and a damaged file is set aside.

Suffixes: B = texts asked for, each perhaps more than once, E = the encoder's width.
"""

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

FILE = "rows.sqlite3"
TIMEOUT_S = 30.0  # for other processes' writes
# No INTEGER PRIMARY KEY: that would order the rows themselves by key, and each new one would go between others.
TABLE = "CREATE TABLE IF NOT EXISTS rows (key INTEGER UNIQUE, row BLOB)"
KNOWN = "SELECT key FROM rows WHERE key IN (SELECT value FROM json_each(?))"
READ = "SELECT key, row FROM rows WHERE key IN (SELECT value FROM json_each(?))"
WRITE = "INSERT OR IGNORE INTO rows VALUES (?, ?)"  # of two processes that embed the same text, the first counts


def folder_of(cache_dir: str | None, checkpoints: Path) -> Path:
    """Return the folder of a launch's embeddings. cache_dir: --depo.estimator.cache_dir; checkpoints: --ckpt.path."""
    return Path(cache_dir) if cache_dir else checkpoints / "depo_embeddings"


def _connect(path: Path | str) -> sqlite3.Connection:
    """Return a connection to a cache that can be written. path: "" for a temporary file, gone when it is closed."""
    db = sqlite3.connect(path, timeout=TIMEOUT_S, check_same_thread=False)
    with contextlib.suppress(sqlite3.OperationalError):  # a file system without it: SQLite's plain journal
        db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("BEGIN IMMEDIATE")  # fails now, not at the first row, if the file cannot be written
    db.execute(TABLE)
    db.commit()
    return db


class EmbeddingCache:
    """Rows of fp16 by 64-bit key."""

    def __init__(self, folder: Path | None, width: int):
        """Open or make the cache. width: E; folder: None for a temporary file.

        Falls back to a temporary file, with a warning, if `folder` cannot be used.
        """
        self._path = None if folder is None else folder / FILE
        self._width = width
        self._failing: set[str] = set()  # of "read" and "written", what fails and was warned of
        self._lost = False  # whether a row was not stored, or was set aside with others
        self._db = self._open()

    @property
    def lasting(self) -> bool:
        """Whether all rows that were computed are in the folder, so that later processes find them."""
        return self._in_folder and not self._lost

    def _open(self) -> sqlite3.Connection:
        self._in_folder = self._path is not None
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    return _connect(self._path)
                except sqlite3.DatabaseError as error:
                    self._set_aside(error)
                    return _connect(self._path)
            except (OSError, sqlite3.Error) as error:
                logger.warning("DEPO: embeddings are kept in a temporary file, not in %s: %s", self._path, error)
                self._in_folder = False
        return _connect("")

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Rename the file if the error says that it is damaged; raise any other error."""
        if type(error) is not sqlite3.DatabaseError or self._path is None:  # its subclasses have other causes
            raise error
        aside = self._path.with_name(FILE + ".damaged")
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self._path}{suffix}").replace(f"{aside}{suffix}")
        logger.warning("DEPO: %s is damaged (%s): renamed to %s, texts are embedded again.", self._path, error, aside)

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM rows").fetchone()[0]

    def known(self, keys_B: np.ndarray) -> np.ndarray:
        """Return which of these keys have a row, bool (B,). keys_B: uint64."""
        keys = keys_B.view(np.int64).tolist()  # SQLite's integers are signed
        found = self._attempt("read", lambda: {key for (key,) in self._db.execute(KNOWN, [json.dumps(keys)])}) or set()
        return np.array([key in found for key in keys], bool)

    def get(self, keys_B: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the rows of these keys, float16 (B, E).

        keys_B: uint64; compute: given the indices (into keys_B) of texts without a row, returns their embeddings
        (missing, E), which are stored. If they cannot be, they serve this call alone, with one warning.
        """
        keys = keys_B.view(np.int64).tolist()  # SQLite's integers are signed
        row_of = self._read(keys)
        first = np.sort(np.unique(keys_B, return_index=True)[1])
        missing = np.array([i for i in first.tolist() if keys[i] not in row_of], np.int64)
        if len(missing):
            computed = np.asarray(compute(missing), np.float16)
            row_of |= {keys[i]: row.tobytes() for i, row in zip(missing, computed, strict=True)}
            new = [(keys[i], row_of[keys[i]]) for i in missing]
            self._attempt("written", lambda: self._db.executemany(WRITE, new))
            row_of |= self._read([key for key, _ in new])  # another process may have been first
        return np.frombuffer(bytearray().join([row_of[key] for key in keys]), np.float16).reshape(-1, self._width)

    def _read(self, keys: list[int]) -> dict[int, bytes]:
        return self._attempt("read", lambda: dict(self._db.execute(READ, [json.dumps(keys)]))) or {}

    def _attempt(self, what: str, run: Callable):
        """Return run(). If it fails, warn once and return None; a damaged file is replaced by a new one."""
        try:
            with self._db:  # commits, or rolls back
                found = run()
        except sqlite3.OperationalError as error:
            self._db.rollback()  # Python before 3.11 leaves that to us if it is the commit that fails
            if what not in self._failing:
                text = "DEPO: embeddings cannot be %s (%s: %s). They are computed again each time."
                logger.warning(text, what, self._path, error)
            self._failing.add(what)
            self._lost |= what == "written"
        except sqlite3.DatabaseError as error:
            self._set_aside(error)
            self._lost = True
            self._db.close()
            self._db = self._open()
        else:
            self._failing.discard(what)
            return found
