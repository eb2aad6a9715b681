"""Checkpoints: what is saved comes back exactly, what is damaged is refused by name, older ones stand in."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.checkpoint import CheckpointError

STATE = {
    "model": {"encoder.layer.0.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))},
    "optimizer": {"encoder.layer.0.weight": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3, 4)}},
    "history": {"kappa": 1 / 3, "keys": np.array([1, 2**64 - 1], np.uint64), "seen": np.array([], np.int64)},
    "records": [[2**64 - 1, 4, None, "explored", 0.05]],
    "by_number": {0: (0.9, 0.999), 1: torch.tensor([True])},
    "empty": {},
    "text": "κ = ∞ \u2028",
    "infinite": math.inf,
    "flag": True,
}


def assert_same(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert list(mine) == list(theirs)
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(mine, torch.Tensor):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)
    elif isinstance(mine, np.ndarray):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    else:
        assert mine == theirs


def save(root: Path, *tags: str):
    for tag in tags:
        checkpoint.save(root / tag, {"tag": tag, "weights": torch.ones(2)})


def test_a_state_comes_back_exactly(tmp_path):
    checkpoint.save(tmp_path / "global_step1", STATE)
    assert_same(checkpoint.load(tmp_path / "global_step1"), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"], "nothing temporary is left"


def test_loaded_arrays_can_be_written_to(tmp_path):
    checkpoint.save(tmp_path / "a", STATE)
    state = checkpoint.load(tmp_path / "a")
    state["history"]["keys"][0] = 5
    state["model"]["encoder.layer.0.weight"].zero_()


def test_a_tag_is_replaced_by_a_second_save(tmp_path):
    checkpoint.save(tmp_path / "global_step1", {"updates": 1})
    checkpoint.save(tmp_path / "global_step1", {"updates": 2})
    assert checkpoint.load(tmp_path / "global_step1") == {"updates": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "bit flipped"])
def test_damage_is_refused_and_names_the_checkpoint(tmp_path, name, damage):
    folder = tmp_path / "global_step7"
    checkpoint.save(folder, STATE)
    file = folder / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        data[len(data) * 2 // 3] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match="global_step7"):
        checkpoint.load(folder)


def test_nothing_is_unpickled(tmp_path):
    """A pickle in place of the tensors fails the checksum before anything reads it."""
    checkpoint.save(tmp_path / "a", STATE)
    torch.save({"weights": torch.ones(2)}, tmp_path / "a" / checkpoint.TENSORS)
    with pytest.raises(CheckpointError, match=checkpoint.TENSORS):
        checkpoint.load(tmp_path / "a")
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source
    assert "torch.load" not in source


def test_latest_valid_takes_the_tag_asked_for(tmp_path):
    save(tmp_path, "global_step9", "global_step10")
    assert checkpoint.latest_valid(tmp_path, "global_step9")[0] == "global_step9"
    tag, state = checkpoint.latest_valid(tmp_path, "global_step10")
    assert tag == state["tag"] == "global_step10"


def test_latest_valid_falls_back_to_the_newest_older_one_by_number(tmp_path, caplog):
    """As text, global_step9 would come after global_step100."""
    save(tmp_path, "global_step9", "global_step20", "global_step100", "global_step200")
    (tmp_path / "global_step100" / checkpoint.STATE).write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_valid(tmp_path, "global_step100")[0] == "global_step20"
    assert "global_step100" in caplog.text
    assert checkpoint.latest_valid(tmp_path, "global_step150")[0] == "global_step20", "a newer one is never used"
    assert checkpoint.latest_valid(tmp_path, "global_step5") is None
    assert checkpoint.latest_valid(tmp_path / "nowhere", "global_step5") is None


def test_latest_valid_skips_damaged_and_unfinished_ones(tmp_path):
    save(tmp_path, "global_step9", "global_step10", "global_step11")
    (tmp_path / "global_step11" / checkpoint.MANIFEST).unlink()
    (tmp_path / "global_step10").rename(tmp_path / ("global_step10" + checkpoint.PARTIAL))
    assert checkpoint.latest_valid(tmp_path, "global_step11")[0] == "global_step9"


def test_the_pointer_says_what_this_run_saved_last(tmp_path):
    assert checkpoint.pointed(tmp_path / "new", "run 1") is None
    for tag in ("global_step4", "best_global_step2"):
        checkpoint.point(tmp_path / "new", "run1", tag)
        assert checkpoint.pointed(tmp_path / "new", "run1") == tag
        assert checkpoint.pointed(tmp_path / "new", "run2") is None, "an earlier run's checkpoints are not this one's"
    checkpoint.prune(tmp_path / "new", set())
    assert checkpoint.pointed(tmp_path / "new", "run1") == "best_global_step2"


def test_prune_keeps_what_it_is_told_and_removes_leftovers(tmp_path):
    save(tmp_path, "global_step1", "global_step2", "global_step3")
    (tmp_path / ("global_step4" + checkpoint.PARTIAL)).mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    checkpoint.prune(tmp_path, {"global_step2", "best_global_step1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step2", "metrics.jsonl"]


def test_a_save_that_fails_leaves_the_tag_as_it_was(tmp_path, monkeypatch):
    save(tmp_path, "global_step1")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, "global_step1")
    assert checkpoint.load(tmp_path / "global_step1")["tag"] == "global_step1"
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]


def test_a_rename_that_fails_puts_the_tag_back(tmp_path, monkeypatch):
    save(tmp_path, "global_step1")
    rename = Path.rename

    def fails_for_the_new_one(path, target):
        if path.name == "global_step1" + checkpoint.PARTIAL:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.save(tmp_path / "global_step1", {"tag": "new"})
    assert checkpoint.load(tmp_path / "global_step1")["tag"] == "global_step1"
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]


KILLED_IN_SAVE = """
import os, signal, sys
from pathlib import Path
from depo_plugin.estimator import checkpoint

def save_until(flushes):
    fsync, done = os.fsync, 0
    def counted(descriptor):
        nonlocal done
        fsync(descriptor)
        done += 1
        if done == flushes:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = counted
    checkpoint.save(folder, {"updates": 2})

folder = Path(sys.argv[1])
for flushes in (1, 2, 3, 4):  # three files, then their folder; after that it is renamed
    child = os.fork()
    if child == 0:
        save_until(flushes)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert checkpoint.latest_valid(folder.parent, folder.name) == (folder.name, {"updates": 1})
"""


def test_a_kill_in_the_middle_of_a_save_costs_the_new_state_alone(tmp_path):
    """Killed at each flush before the rename: the old state of the tag is still read."""
    folder = tmp_path / "global_step1"
    checkpoint.save(folder, {"updates": 1})
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED_IN_SAVE, str(folder)], check=True, env=environment)
    checkpoint.save(folder, {"updates": 3})
    assert checkpoint.load(folder) == {"updates": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]


def test_the_manifest_is_plain_json_of_checksums(tmp_path):
    checkpoint.save(tmp_path / "a", STATE)
    sums = json.loads((tmp_path / "a" / checkpoint.MANIFEST).read_text())
    assert set(sums) == {checkpoint.TENSORS, checkpoint.STATE}
    assert all(len(value) == 64 for value in sums.values())
