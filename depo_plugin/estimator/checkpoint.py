"""Estimator checkpoints: one safetensors file for each tag, with a digest of its content.

    <root>/<tag>.safetensors    tensors and numpy arrays as they are, everything else as JSON in one byte tensor
    <root>/latest               the run's id and the tag it last saved or resumed from

A file is written under a temporary name, flushed to the disk and renamed: a reader finds the whole old one or the
whole new one. Functions take the path without its suffix, `<root>/<tag>`.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

SUFFIX, PARTIAL = ".safetensors", ".partial"
LATEST = "latest"
PLAIN = "plain"  # the tensor with the JSON; the names of all others start with a digit
DIGEST = "sha256"
REFUSED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}  # a file system without such a call
_warned: set[str] = set()  # of "flush" and "rename", what was refused and told


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; names the file and the fault."""


def _split(value, path: str, tensors: dict):
    """Move the tensors and arrays of `value` into `tensors`; return the rest, with their names there, for JSON."""
    if isinstance(value, torch.Tensor | np.ndarray):
        name = f"{len(tensors)}{path}"  # numbered: the path alone is the same for the keys 0 and "0"
        if isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(np.require(value, requirements=["C", "W"])).contiguous()
            return {"__kind__": "array", "at": name}
        tensors[name] = value.detach().cpu().contiguous()
        return {"__kind__": "tensor", "at": name}
    if isinstance(value, dict):
        pairs = [[key, _split(part, f"{path}/{key}", tensors)] for key, part in value.items()]
        return {"__kind__": "dict", "items": pairs}  # pairs: JSON would turn an optimizer's int keys into strings
    if isinstance(value, list | tuple):
        parts = [_split(part, f"{path}/{i}", tensors) for i, part in enumerate(value)]
        return {"__kind__": "tuple", "items": parts} if isinstance(value, tuple) else parts
    return value


def _join(value, tensors: dict):
    """Return what _split() took apart."""
    if isinstance(value, list):
        return [_join(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    kind = value["__kind__"]
    if kind == "tensor":
        return tensors[value["at"]]
    if kind == "array":
        return tensors[value["at"]].numpy()
    if kind == "tuple":
        return tuple(_join(part, tensors) for part in value["items"])
    return {key: _join(part, tensors) for key, part in value["items"]}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 over the tensors' names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write data as `path`, which is on the disk on return. If that fails (OSError), the old file is still there.

    A file system that cannot flush, or cannot rename, costs that promise and one warning.
    """
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            _flush(file.fileno(), path)
        if not _attempt("rename", lambda: os.replace(partial, path), path):
            path.write_bytes(data)
            partial.unlink()
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        _flush(folder, path)  # the new name, too
    finally:
        os.close(folder)


def _flush(descriptor: int, path: Path) -> None:
    _attempt("flush", lambda: os.fsync(descriptor), path)


def _attempt(what: str, run: Callable[[], None], path: Path) -> bool:
    """Run a call and return whether the file system has it; warn once if not."""
    try:
        run()
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        if what not in _warned:
            logger.warning(
                "DEPO: the file system of %s refuses to %s (%s): a checkpoint of the estimator may be lost if the "
                "machine stops while it is written; then an older one is used. Put --ckpt.path on another file system "
                "to mend that.",
                path.parent,
                what,
                error,
            )
        _warned.add(what)
        return False
    return True


def save(at: Path, state: dict) -> None:
    """Write `state` (nested dicts, lists, tuples, numbers, strings, None, tensors, arrays) as `<at>.safetensors`.

    On return it is on the disk. No two tensors or arrays may share memory. Raises OSError if it cannot be written; an
    older file of that tag then stays.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(_split(state, "", tensors)).encode()
    tensors[PLAIN] = torch.frombuffer(bytearray(plain), dtype=torch.uint8)
    _write(at.with_name(at.name + SUFFIX), bytes_from_tensors(tensors, {DIGEST: _digest(tensors)}))


def load(at: Path) -> dict:
    """Return the state that save() wrote. Raises CheckpointError naming the file and what is wrong with it."""
    path = at.with_name(at.name + SUFFIX)
    try:
        data = path.read_bytes()  # not mapped: of a mapped file, an error of the disk would end the process
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err}") from err
    try:
        tensors = tensors_from_bytes(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as err:
        raise CheckpointError(f"{path}: damaged: {err}") from err
    if header.get("__metadata__", {}).get(DIGEST) != _digest(tensors):
        raise CheckpointError(f"{path}: damaged: its SHA-256 digest is not the one it was written with.")
    return _join(json.loads(tensors[PLAIN].numpy().tobytes()), tensors)


def step_of(tag: str) -> int:
    """Return the step in a tag's name, -1 if it has none."""
    number = re.search(r"(\d+)$", tag)
    return int(number[1]) if number else -1


def latest_valid(root: Path, tag: str) -> tuple[str, dict] | None:
    """Return (tag, state) of `tag`, else of the newest older checkpoint that can be read, else None."""
    found = [path.name.removesuffix(SUFFIX) for path in root.glob(f"*{SUFFIX}")]
    older = [name for name in found if name != tag and step_of(name) <= step_of(tag)]
    for name in [tag, *sorted(older, key=step_of, reverse=True)]:
        try:
            return name, load(root / name)
        except CheckpointError as err:
            logger.warning("DEPO: estimator checkpoint passed over: %s", err)
    return None


def point(root: Path, run: str, tag: str) -> None:
    """Note which checkpoint a run last saved or resumed from. run: the launch's id."""
    _write(root / LATEST, f"{run} {tag}".encode())


def pointed(root: Path, run: str) -> str | None:
    """Return the tag that point() noted for this run; None if there is none, or it is an earlier run's."""
    path = root / LATEST
    noted_run, _, tag = path.read_text(encoding="utf-8").partition(" ") if path.exists() else ("", "", "")
    return tag if tag and noted_run == run else None


def prune(root: Path, keep: set[str]) -> None:
    """Remove the checkpoints whose tag is not in `keep`, and what a killed save() left."""
    for path in [*root.glob(f"*{SUFFIX}"), *root.glob(f"*{PARTIAL}")]:
        if path.name.removesuffix(SUFFIX) not in keep:
            with contextlib.suppress(OSError):
                path.unlink()
