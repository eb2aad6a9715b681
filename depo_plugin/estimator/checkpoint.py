"""Estimator checkpoints: a folder with tensors as safetensors, the rest as JSON, and checksums of both.

    <root>/<tag>/tensors.safetensors  state.json  manifest.json

A folder is written under a temporary name, flushed to the disk and renamed, so that a tag is whole or not there.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

logger = logging.getLogger(f"openrlhf.{__name__}")  # OpenRLHF's own handler and format

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
PARTIAL = ".partial"
LATEST = "latest"  # the file that names the checkpoint a restarted actor goes on from


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; names the file and the fault."""


def _split(value, path: str, tensors: dict):
    """Return value with its tensors and arrays replaced by references, and put those into `tensors`."""
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        # Arrays travel as their bytes: safetensors has no uint64 in every version.
        raw = value if kind == "tensor" else torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        tensors[path] = raw.detach().cpu().contiguous().clone()
        extra = {} if kind == "tensor" else {"dtype": value.dtype.str, "shape": list(value.shape)}
        return {"__kind__": kind, "at": path, **extra}
    if isinstance(value, dict):
        pairs = [[key, _split(part, f"{path}/{key}", tensors)] for key, part in value.items()]
        return {"__kind__": "dict", "items": pairs}  # pairs: JSON would turn an optimizer's int keys into strings
    if isinstance(value, list | tuple):
        parts = [_split(part, f"{path}/{i}", tensors) for i, part in enumerate(value)]
        return {"__kind__": "tuple", "items": parts} if isinstance(value, tuple) else parts
    return value


def _join(value, tensors: dict):
    if isinstance(value, list):
        return [_join(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    kind = value["__kind__"]
    if kind == "tensor":
        return tensors[value["at"]]
    if kind == "array":
        raw = tensors[value["at"]].numpy().tobytes()
        return np.frombuffer(raw, np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if kind == "tuple":
        return tuple(_join(part, tensors) for part in value["items"])
    return {key: _join(part, tensors) for key, part in value["items"]}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, state: dict) -> None:
    """Write `state` (nested dicts, lists, tuples, numbers, strings, None, tensors, numpy arrays) as `folder`.

    On return it is on the disk. Raises OSError where it cannot be written; a tag of that name is then untouched.
    """
    tensors = {}
    plain = json.dumps(_split(state, "", tensors)).encode()
    files = {TENSORS: dump_tensors(tensors), STATE: plain}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = json.dumps(sums).encode()
    partial = folder.with_name(folder.name + PARTIAL)
    replaced = folder.with_name(folder.name + ".replaced" + PARTIAL)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, data in files.items():
            _write(partial / name, data)
        _sync_folder(partial)
        if folder.exists():  # a tag that is written again after a resume
            folder.rename(replaced)
        partial.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise


def load(folder: Path) -> dict:
    """Return the state that save() wrote. Raises CheckpointError naming what is missing or damaged."""
    try:
        sums = json.loads((folder / MANIFEST).read_bytes())
        files = {name: (folder / name).read_bytes() for name in (TENSORS, STATE)}
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{folder}: cannot be read: {err}") from err
    for name, data in files.items():
        if not isinstance(sums, dict) or sums.get(name) != hashlib.sha256(data).hexdigest():
            raise CheckpointError(f"{folder / name}: its checksum is not the one it was written with: damaged.")
    return _join(json.loads(files[STATE]), load_tensors(files[TENSORS]))


def step_of(tag: str) -> int:
    """Return the step in a tag's name, -1 where there is none."""
    number = re.search(r"(\d+)$", tag)
    return int(number[1]) if number else -1


def _tags(root: Path) -> list[Path]:
    """Return the checkpoints under root, newest step first."""
    if not root.is_dir():
        return []
    folders = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.endswith(PARTIAL)]
    return sorted(folders, key=lambda folder: step_of(folder.name), reverse=True)


def _first_valid(folders: list[Path]) -> tuple[str, dict] | None:
    for folder in folders:
        try:
            return folder.name, load(folder)
        except CheckpointError as err:
            logger.warning("DEPO: estimator checkpoint passed over: %s", err)
    return None


def latest_valid(root: Path, tag: str) -> tuple[str, dict] | None:
    """Return (tag, state) of the checkpoint asked for, else of the newest older one that can be read, else None."""
    asked = root / tag
    older = [folder for folder in _tags(root) if folder.name != tag and step_of(folder.name) <= step_of(tag)]
    return _first_valid([asked, *older])


def point(root: Path, run: str, tag: str) -> None:
    """Write down which checkpoint a run last saved or resumed from. run: the launch's id."""
    root.mkdir(parents=True, exist_ok=True)
    partial = root / (LATEST + PARTIAL)
    _write(partial, f"{run} {tag}".encode())
    partial.replace(root / LATEST)


def pointed(root: Path, run: str) -> str | None:
    """Return the tag that point() wrote for this run; None if there is none, or it is an earlier run's."""
    path = root / LATEST
    noted_run, _, tag = path.read_text(encoding="utf-8").partition(" ") if path.exists() else ("", "", "")
    return tag if tag and noted_run == run else None


def prune(root: Path, keep: set[str]) -> None:
    """Remove the checkpoints whose tag is not in `keep`, and what a killed save() left."""
    for folder in root.iterdir():
        if folder.is_dir() and folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
