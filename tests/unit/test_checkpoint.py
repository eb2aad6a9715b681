"""Checkpoints: what is saved comes back exactly, what is damaged is refused by name, older ones stand in."""

import errno
import logging
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.checkpoint import CheckpointError

STATE = {
    "model": {"encoder.layer.0.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))},
    "optimizer": {"encoder.layer.0.weight": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3, 4)}},
    "history": {"kappa": 1 / 3, "keys": np.array([1, 2**64 - 1], np.uint64), "seen": np.array([], np.int64)},
    "arrays": [np.arange(6.0).reshape(2, 3).T, np.array([math.nan, -0.0], np.float16), np.array(3, np.int8)],
    "records": [[2**64 - 1, 4, None, "explored", 0.05]],
    "by_number": {0: (0.9, torch.ones(1)), 1: torch.tensor([True]), "0": torch.zeros(1)},
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
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.tobytes() == theirs.tobytes()
    else:
        assert mine == theirs


def save(root: Path, *tags: str):
    for tag in tags:
        checkpoint.save(root / tag, {"tag": tag, "weights": torch.ones(2)})


def file_of(at: Path) -> Path:
    return at.with_name(f"{at.name}.safetensors")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_state_comes_back_exactly(tmp_path):
    checkpoint.save(tmp_path / "v1.5_step1", STATE)
    assert_same(checkpoint.load(tmp_path / "v1.5_step1"), STATE)
    assert names(tmp_path) == ["v1.5_step1.safetensors"], "nothing temporary is left"


def test_loaded_arrays_can_be_written_to(tmp_path):
    checkpoint.save(tmp_path / "a", STATE)
    state = checkpoint.load(tmp_path / "a")
    state["history"]["keys"][0] = 5
    state["model"]["encoder.layer.0.weight"].zero_()
    assert_same(checkpoint.load(tmp_path / "a"), STATE)


def test_an_array_that_is_read_only_is_saved_without_a_warning(tmp_path):
    array = np.frombuffer(b"abcd", np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save(tmp_path / "a", {"array": array})
    assert_same(checkpoint.load(tmp_path / "a"), {"array": array})


def test_any_tool_can_read_the_tensors_by_name(tmp_path):
    checkpoint.save(tmp_path / "a", STATE)
    with safe_open(file_of(tmp_path / "a"), "pt") as file:
        name = next(name for name in file.keys() if name.endswith("/model/encoder.layer.0.weight"))
        assert_same(file.get_tensor(name), STATE["model"]["encoder.layer.0.weight"])
        assert len(file.metadata()["sha256"]) == 64


def test_a_tag_is_replaced_by_a_second_save(tmp_path):
    checkpoint.save(tmp_path / "global_step1", {"updates": 1})
    checkpoint.save(tmp_path / "global_step1", {"updates": 2})
    assert checkpoint.load(tmp_path / "global_step1") == {"updates": 2}
    assert names(tmp_path) == ["global_step1.safetensors"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("missing", "cannot be read: .*No such file"),
        ("truncated", "damaged: "),
        ("empty", "damaged: "),
        ("bit flipped", "damaged: its SHA-256 digest is not"),
        ("folder", "cannot be read: .*Is a directory"),
        ("pickle", "damaged: "),
    ],
)
def test_damage_is_refused_and_names_the_checkpoint(tmp_path, damage, fault):
    checkpoint.save(tmp_path / "global_step7", STATE)
    file = file_of(tmp_path / "global_step7")
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "bit flipped":
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "folder":
        file.mkdir()
    elif damage == "pickle":
        torch.save({"weights": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=rf"global_step7\.safetensors: {fault}"):
        checkpoint.load(tmp_path / "global_step7")


def test_one_wrong_bit_in_any_byte_is_refused(tmp_path):
    """In the header's length, the header, the tensors' names, the digest, a tensor, the JSON."""
    checkpoint.save(tmp_path / "a", {"w": torch.ones(2), "n": 1})
    file = file_of(tmp_path / "a")
    whole = file.read_bytes()
    assert len(whole) > 300
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: damaged"):
            checkpoint.load(tmp_path / "a")


def test_nothing_is_unpickled():
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
    file_of(tmp_path / "global_step100").write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_valid(tmp_path, "global_step100")[0] == "global_step20"
    assert "global_step100" in caplog.text
    assert checkpoint.latest_valid(tmp_path, "global_step150")[0] == "global_step20", "a newer one is never used"
    assert checkpoint.latest_valid(tmp_path, "global_step5") is None
    assert checkpoint.latest_valid(tmp_path / "nowhere", "global_step5") is None


def test_latest_valid_skips_damaged_and_unfinished_ones(tmp_path):
    save(tmp_path, "global_step9", "global_step10", "global_step11")
    file_of(tmp_path / "global_step11").write_bytes(b"")
    file_of(tmp_path / "global_step10").rename(tmp_path / ("global_step10.safetensors" + checkpoint.PARTIAL))
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
    checkpoint.point(tmp_path, "run1", "global_step2")
    for name in ("global_step2", "global_step4"):  # two killed saves, one of a tag that is kept
        (tmp_path / f"{name}.safetensors{checkpoint.PARTIAL}").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").write_text("{}")
    checkpoint.prune(tmp_path, {"global_step2", "best_global_step1"})
    assert names(tmp_path) == ["global_step2.safetensors", "latest", "metrics.jsonl"]
    assert checkpoint.load(tmp_path / "global_step2")["tag"] == "global_step2"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_tag_as_it_was(tmp_path, monkeypatch, call):
    save(tmp_path, "global_step1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "global_step1", {"tag": "new"})
    assert checkpoint.load(tmp_path / "global_step1")["tag"] == "global_step1"
    assert names(tmp_path) == ["global_step1.safetensors"]


@pytest.mark.parametrize("refused", [["fsync"], ["replace"], ["fsync", "replace"]])
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_flush_or_rename_costs_one_warning_each(tmp_path, monkeypatch, caplog, refused, code):
    monkeypatch.setattr(checkpoint, "_warned", set())
    save(tmp_path, "global_step1")

    def refuse(*_):
        raise OSError(code, "refused")

    for call in refused:
        monkeypatch.setattr(os, call, refuse)
    for number in (2, 3):
        checkpoint.save(tmp_path / "global_step1", {"tag": f"new {number}"})
        assert checkpoint.load(tmp_path / "global_step1")["tag"] == f"new {number}"
    assert names(tmp_path) == ["global_step1.safetensors"]
    assert [message.split(" refuses to ")[1].split(" (")[0] for message in caplog.messages] == [
        {"fsync": "flush", "replace": "rename"}[call] for call in refused
    ]


KILLED_IN_SAVE = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from depo_plugin.estimator import checkpoint

at = Path(sys.argv[1])
LARGE = {"updates": 2, "weights": np.ones(2_000_000)}  # 16 MB take some ms to write

def killed_at_flush(number):
    fsync, done = os.fsync, []
    def counted(descriptor):
        fsync(descriptor)
        done.append(descriptor)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = counted
    checkpoint.save(at, LARGE)

def save_forever():
    while True:
        checkpoint.save(at, LARGE)

def end_of(run, *args, after=None):
    checkpoint.save(at, {"updates": 1})
    child = os.fork()
    if child == 0:
        run(*args)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return checkpoint.load(at)["updates"]

assert end_of(killed_at_flush, 1) == 1, "the file is written and not renamed"
assert at.with_name(at.name + ".safetensors.partial").exists()
assert end_of(killed_at_flush, 2) == 2, "it is renamed"
found = [end_of(save_forever, after=milliseconds / 1000) for milliseconds in range(0, 60, 3)]
assert set(found) <= {1, 2} and len(found) == 20, found
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_costs_the_new_state_alone(tmp_path):
    """kill -9 after each flush, and at 20 moments of saves of 16 MB: a whole state of the tag is read."""
    at = tmp_path / "global_step1"
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED_IN_SAVE, str(at)], check=True, env=environment)
    checkpoint.save(at, {"updates": 3})
    assert checkpoint.load(at) == {"updates": 3}
    checkpoint.prune(tmp_path, {"global_step1"})
    assert names(tmp_path) == ["global_step1.safetensors"]
