"""Files of JSON lines that users wrote: what is wrong in one is one error that names the file and the line."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class LineError(ValueError):
    """A file of JSON lines cannot be used. The text names the file, the line and what is wrong there."""


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the object of each line that is not empty. A file that ends in .gz is unpacked.

    Raises LineError, and OSError if the file cannot be opened.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    # Not str.splitlines(): it also splits at U+2028 and others, which may stand in a text.
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise LineError(f"{path}, line {number}: not an object but {line.strip()[:80]}.")
                yield number, row
        except LineError:
            raise
        except UnicodeDecodeError as error:
            raise LineError(f"{path}, after line {number}: not UTF-8 ({error}). Save it as UTF-8.") from None
        except (ValueError, RecursionError) as error:  # also of a number too long, or brackets too deep
            raise LineError(f"{path}, line {number}: not JSON ({error}). Correct or remove it.") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LineError(f"{path}, after line {number}: not a whole .gz file ({error}). Make it again.") from None


@contextlib.contextmanager
def fields(path: Path, number: int) -> Iterator[None]:
    """Raise LineError for this line if a field that is read inside is missing, or of another kind."""
    try:
        yield
    except KeyError as error:
        raise LineError(f"{path}, line {number}: no field {error}.") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise LineError(f"{path}, line {number}: {error}.") from None


def text(row: dict[str, Any], name: str) -> str:
    """Return a field that must be text. Raises KeyError or TypeError, for fields()."""
    if not isinstance(row[name], str):
        raise TypeError(f"{name} must be text, not {json.dumps(row[name])[:80]}")
    return row[name]
