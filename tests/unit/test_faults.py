"""Faults that are made to happen to the real parts: Ray's actor killed, slow or out of memory, disks full or not ours,
damaged or strange checkpoints, huge prompts. docs/faults.md is the whole table.
"""

import dataclasses
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import tiny_encoder
import torch
from test_embeddings import WIDTH, Encoder, keys, row
from test_hooks import Recorder, resolved
from test_labels import micro_batch
from test_loader import ACCEPT_ALL, Prompts, inner_loader, number, stream
from test_remote import (
    ANSWERS,
    DEADLINE_S,
    GROUP,
    PROMPTS,
    arguments,
    label,
    learn,
    on,
    pid_of,
    restore,
    same,
    score,
    warnings_of,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from depo_plugin import hooks
from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.embedding_cache import EmbeddingCache
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.metrics import MetricsFile
from depo_plugin.loader import DifficultyFilteredLoader
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import handle as remote_handle
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, FilterConfig

NOBODY = 65534
PAGE = 4096  # what tmpfs gives and takes
BATCH, POOL = 4, 24

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


# ── A full disk ──


class Disk:
    """A file system of its own, of so many bytes, that can be filled up to the last page and emptied again."""

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, leave_pages=0):
        self.free()
        room = os.statvfs(self.folder)
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (room.f_bavail - leave_pages) * room.f_frsize)

    def free(self):
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def mount(tmp_path):
    """mount(size): a Disk. Skips where this user may not mount one."""
    folders = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk of our own: {done.stderr.strip()}")
        folders.append(folder)
        return Disk(folder)

    yield make
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("leave_pages", [0, 1, 2, 3, 4])
def test_a_full_disk_costs_the_embedding_cache_time_but_no_row(mount, leave_pages, caplog):
    """1503 rows of 8 bytes are three pages, their keys as many: the disk is full in either, or just not."""
    disk, encoder = mount("1m"), Encoder()
    cache = EmbeddingCache(disk.folder / "cache", WIDTH)
    encoder.get(cache, keys(5, 3, 2000))
    disk.fill(leave_pages)
    many = np.r_[np.arange(10, 1510, dtype=np.uint64), keys(3, 1499, 5, 12)]
    for _ in range(2):
        encoder.get(cache, many)  # right, and computed each time
    stored = leave_pages == 4  # each file has its first page already
    assert len(cache) == (1503 if stored else 3)
    assert len(encoder.asked) == 3 + 1500 * (1 if stored else 2)
    assert len(warnings_of(caplog)) == (0 if stored else 1)
    assert all("No space left" in warning for warning in warnings_of(caplog))
    another = EmbeddingCache(disk.folder / "cache", WIDTH)
    assert len(another) == len(cache)
    encoder.get(another, keys(3, 2000, 5))

    disk.free()
    encoder.asked.clear()
    encoder.get(cache, many)
    encoder.get(another, many)
    encoder.get(EmbeddingCache(disk.folder / "cache", WIDTH), many)
    assert len(encoder.asked) == (0 if stored else 1500)
    found = np.fromfile(disk.folder / "cache" / "keys.u64", np.uint64)
    assert len(found) == 1503
    rows = np.fromfile(disk.folder / "cache" / "rows.f16", np.float16).reshape(-1, WIDTH)
    np.testing.assert_array_equal(rows, row(found).astype(np.float16), err_msg="each row stands with its key")


def test_a_full_disk_costs_metrics_of_some_steps_and_one_warning(mount, monkeypatch, caplog):
    disk = mount("64k")
    monkeypatch.setattr(hooks, "_process", SimpleNamespace(**vars(hooks._process) | {"handle": Recorder()}))
    args = resolved(**{"ckpt.output_dir": str(disk.folder)})
    path = disk.folder / "depo" / "metrics.jsonl"
    for step in range(1, 30):
        if step == 5:
            disk.fill()
        if step == 25:
            disk.free()
        status = {"policy_loss": 0.5, "text" * 50: 1.0}  # 400 bytes a line: the first page is full after ten
        hooks.log(args, status, step)
        assert status["depo/time_blocked"] == 0.25, "the other loggers have it all the same"
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    first_lost = next(step for step in range(1, 30) if step not in steps)
    assert 5 < first_lost < 15
    assert steps == [step for step in range(1, 30) if not first_lost <= step < 25]
    (warning,) = warnings_of(caplog)
    assert str(path) in warning
    assert "No space left" in warning
    assert "training goes on" in warning


@pytest.mark.parametrize("leave_pages", [0, 1, 2, 10, 200])
def test_a_full_disk_costs_the_new_checkpoint_alone(mount, leave_pages):
    """A checkpoint takes 250 pages; it is cut off in every file of it."""
    disk = mount("4m")
    root = disk.folder / "depo"
    state = {"weights": torch.arange(240 * PAGE // 4, dtype=torch.float32), "text": "x" * 10 * PAGE, "updates": 0}
    for step in (1, 2):
        checkpoint.save(root / f"global_step{step}", state | {"updates": step})
    checkpoint.point(root, "run", "global_step2")
    disk.fill(leave_pages)
    for tag in ("global_step3", "global_step2"):  # a new one, and one that a resumed run writes again
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(root / tag, state | {"updates": 9})
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["global_step1", "global_step2"]
    for step in (1, 2):
        found = checkpoint.load(root / f"global_step{step}")
        assert found["updates"] == step
        assert torch.equal(found["weights"], state["weights"])
    assert checkpoint.pointed(root, "run") == "global_step2"
    disk.free()
    checkpoint.save(root / "global_step3", state | {"updates": 3})
    assert checkpoint.load(root / "global_step3")["updates"] == 3


# ── Another user's folder ──


def as_nobody(function):
    """Call function in a child process of the user nobody; return what it returns, which is plain data."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        theirs.send(function())

    process = context.Process(target=child)
    process.start()
    assert ours.poll(DEADLINE_S), "the child said nothing"
    process.join(DEADLINE_S)
    assert process.exitcode == 0
    return ours.recv()


@needs_root
def test_a_folder_of_another_user_costs_what_cannot_be_written_and_nothing_that_was(monkeypatch, caplog):
    with tempfile.TemporaryDirectory(prefix="depo-") as folder:
        root = Path(folder)
        root.chmod(0o755)  # it can be read, not written
        checkpoint.save(root / "depo" / "global_step1", {"updates": 1})
        EmbeddingCache(root / "depo_embeddings", WIDTH)
        MetricsFile(root / "depo" / "metrics.jsonl").append({"step": 1})
        monkeypatch.setattr(hooks, "_process", SimpleNamespace(**vars(hooks._process) | {"handle": Recorder()}))
        args = resolved(**{"ckpt.output_dir": str(root)})

        def theirs():
            with pytest.raises(PermissionError):
                checkpoint.save(root / "depo" / "global_step1", {"updates": 2})
            with pytest.raises(PermissionError):
                checkpoint.save(root / "depo" / "global_step2", {"updates": 2})
            for step in (2, 3):
                hooks.log(args, {}, step)
            cache, encoder = EmbeddingCache(root / "depo_embeddings", WIDTH), Encoder()
            encoder.get(cache, keys(1, 2))
            found = checkpoint.latest_valid(root / "depo", "global_step2")
            return os.getuid(), found, len(cache), warnings_of(caplog)

        uid, found, rows, told = as_nobody(theirs)
        assert (uid, found, rows) == (NOBODY, ("global_step1", {"updates": 1}), 2)
        # the metrics once, the embeddings, and the checkpoint that is not there
        assert [("metrics.jsonl" in line, "temporary folder" in line, "global_step2" in line) for line in told] == [
            (True, False, False),
            (False, True, False),
            (False, False, True),
        ]
        assert all("Permission denied" in line for line in told[:2])
        assert checkpoint.load(root / "depo" / "global_step1") == {"updates": 1}
        assert (root / "depo" / "metrics.jsonl").read_text() == '{"step": 1}\n'


# ── The pool ──


def test_an_empty_dataset_is_refused_by_openrlhfs_own_loader():
    """Before ours takes it over (test_an_empty_pool_is_refused)."""
    with pytest.raises(ValueError, match="num_samples should be a positive integer"):
        StatefulDataLoader(Prompts(0), batch_size=1, shuffle=True)


@pytest.mark.parametrize("text", ["Let x be 3x + 7 = 22, and y its square. ", "1+1=", " ", "a"])
def test_of_a_prompt_of_10_mb_only_the_end_is_read(text, tmp_path):
    """The same score as the end alone gets; 10 MB through the tokenizer take up to a minute and five gigabytes."""
    cfg = DepoConfig(estimator=EstimatorConfig(model=tiny_encoder.write(tmp_path), dtype="fp32", max_length=128))
    made = DifficultyEstimator(cfg, GROUP, 0)
    huge = (text * (10_000_000 // len(text)))[:-20] + " What is 47 + 85 + 3?"
    assert len(huge) > 9_000_000
    made.score(["warm"], ["up"])
    start = time.process_time()
    scores = made.score([huge, "short"], ["1", "1"])
    assert time.process_time() - start < 2.0  # 0.1 s when idle
    end = made.score([huge[-8192:], "short"], ["1", "1"])  # 64 characters for each of 128 tokens
    np.testing.assert_array_equal(scores.a, end.a)
    np.testing.assert_array_equal(scores.b, end.b)


# ── The actor ──


class Run:
    """A training run as OpenRLHF drives it: real loader, hooks and actor. Its policy solves i % 5 of 4 of prompt i."""

    def __init__(self, args):
        self.args = args
        self.loader = hooks._process.loader = DifficultyFilteredLoader(
            inner_loader(POOL),
            hooks._process.handle,
            FilterConfig(**ACCEPT_ALL),
            batch_size=BATCH,
            group_size=GROUP,
            seed=0,
            num_episodes=1000,
        )
        self.drawn, self.steps = [], []

    def step(self) -> dict:
        """Draw a batch, roll it out, send its groups, log; return the step's metrics without their prefix."""
        batch = [self._draw() for _ in range(BATCH)]
        self.drawn += batch
        rewards = [float(response < i % (GROUP + 1)) for i in batch for response in range(GROUP)]
        sent = micro_batch(range(BATCH * GROUP), rewards, group_size=GROUP)
        texts = {name: [f"{name[:-1]} {i}" for i in batch for _ in range(GROUP)] for name in ("prompts", "labels")}
        status = {}
        hooks.observe(self.args, [dataclasses.replace(sent, **texts)], len(self.steps) + 2)
        hooks.log(self.args, status, len(self.steps) + 2)
        self.steps.append({name.removeprefix("depo/"): value for name, value in status.items()})
        return self.steps[-1]

    def _draw(self) -> int:
        try:
            return number(next(self.loader))
        except StopIteration:
            return number(next(iter(self.loader)))

    def until(self, condition) -> None:
        """Take steps until the last one's metrics fulfil the condition."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(self.step()):
            assert time.monotonic() < deadline, self.steps[-3:]
            time.sleep(0.2)

    def assert_nothing_lost_or_doubled(self):
        """Every prompt of the pool in its turn: whatever became of the estimator, the stream goes on."""
        assert self.drawn == stream(POOL, 0, len(self.drawn))
        assert len(self.drawn) == BATCH * len(self.steps)


def scored(step) -> bool:
    """Whether this step's batch was planned with scores."""
    return step.get("kept") == BATCH and step["unscored"] == 0


def slow_down(actor, method, seconds, flag=None):
    """Let a method of the actor's estimator write `flag` and sleep before it does its work."""

    def patch(host):
        work = getattr(host.estimator, method)

        def slow(*args):
            if flag:
                Path(flag).write_text("")
            time.sleep(seconds)
            return work(*args)

        setattr(host.estimator, method, slow)

    on(actor, patch)


def latest(args, name, file="latest"):
    """Let OpenRLHF's checkpoint folder say what was saved last."""
    path = Path(args.ckpt.path) / "_actor" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)


@pytest.mark.slow
@pytest.mark.parametrize("during", [None, "score", "record", "judge", "learn"])
def test_a_killed_estimator_costs_neither_a_prompt_nor_a_batch(during, process, args, actor, tmp_path, caplog):
    """Killed as the kernel's OOM killer does it, at rest and in the middle of each of its jobs."""
    run = Run(args)
    run.until(scored)
    hooks.save(args, "global_step100")
    saved = score(process.handle).updates
    run.step()
    pid, flag = pid_of(actor), tmp_path / "at work"
    if during is None:
        os.kill(pid, signal.SIGKILL)
    else:
        slow_down(actor, during, 600, flag)

        def kill_at_work():
            while not flag.exists():
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)

        threading.Thread(target=kill_at_work, daemon=True).start()
    killed, start = len(run.steps), time.monotonic()
    run.until(lambda step: warnings_of(caplog))
    assert time.monotonic() - start < DEADLINE_S / 2, "a death is no timeout"
    run.until(lambda step: len(warnings_of(caplog)) == 2)
    assert scored(run.step())
    run.assert_nothing_lost_or_doubled()
    told = warnings_of(caplog)
    assert ["did not answer (Actor" in line for line in told] == [True, False], told
    assert told[1] == "DEPO: the difficulty estimator answers again; prompts are filtered as before."
    updates = [step["updates"] for step in run.steps[killed:] if "updates" in step]
    resumed = updates[updates.index(saved) :]
    assert resumed == list(range(saved, saved + len(resumed))), "it goes on from its checkpoint, one update a step"
    assert len(resumed) >= 2
    assert pid_of(actor) != pid


@pytest.mark.slow
def test_an_estimator_100_times_slower_is_waited_for_once(process, args, actor, caplog):
    run, handle = Run(args), process.handle
    run.until(scored)
    start = time.perf_counter()
    run.step()
    slow_s = min(max(100 * (time.perf_counter() - start), 2.0), 5.0)  # where a step takes 20 to 50 ms
    handle.timeout_s = slow_s / 4
    learned = score(handle).updates
    for method in ("score", "judge"):
        slow_down(actor, method, slow_s)
    before, start = len(run.steps), time.monotonic()
    while time.monotonic() - start < 6 * slow_s:
        run.step()
        time.sleep(slow_s / 20)  # the policy's training
    slow, took = run.steps[before:], time.monotonic() - start
    assert len(slow) > 60
    waited = sum(step["time_blocked"] for step in slow)
    assert handle.timeout_s <= waited < 1.2 * handle.timeout_s + 0.01 * len(slow), (waited, took)
    assert len(warnings_of(caplog)) == 1, warnings_of(caplog)
    assert not any(map(scored, slow[2:]))

    start = time.monotonic()
    restore(actor, "score", "judge")
    assert time.monotonic() - start < 3 * slow_s, "no queue of calls was there to work off"
    handle.timeout_s = DEADLINE_S
    run.until(lambda step: len(warnings_of(caplog)) == 2)
    assert warnings_of(caplog)[1] == "DEPO: the difficulty estimator answers again; prompts are filtered as before."
    assert scored(run.step())
    run.assert_nothing_lost_or_doubled()
    # Every step's groups were learned from, or counted as unsent.
    lost = sum(step["labels_unsent"] for step in run.steps[before:])
    assert lost > BATCH * 50
    learned = score(handle).updates - learned
    assert learned * BATCH + lost == BATCH * len(run.steps[before:])


@pytest.mark.slow
@pytest.mark.parametrize("during", ["score", "learn"])
def test_an_estimator_out_of_memory_is_a_warning_and_goes_on_with_memory(during, process, args, actor, caplog):
    """A limit on the address space, 256 MB above what it has, and a job that asks for 1 GB."""
    run = Run(args)
    run.until(scored)

    def limit(host):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + (256 << 20), resource.RLIM_INFINITY))
        work = getattr(host.estimator, during)

        def hungry(*args):
            room = torch.ones(1 << 28) if during == "score" else bytearray(1 << 30)
            return work(*args) if len(room) else None

        setattr(host.estimator, during, hungry)

    pid = pid_of(actor)
    on(actor, limit)
    for _ in range(5):
        run.step()
    (warning,) = warnings_of(caplog)
    assert "did not answer (RayTaskError(" in warning
    assert "memory" in warning.lower()
    on(actor, lambda host: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))
    run.until(lambda step: len(warnings_of(caplog)) == 2)
    assert warnings_of(caplog)[1].endswith("answers again; prompts are filtered as before.")
    assert scored(run.step())
    run.assert_nothing_lost_or_doubled()
    assert pid_of(actor) == pid, "it was never restarted"
    restore(actor, during)


@pytest.mark.slow
def test_an_estimator_on_a_full_disk_goes_on_and_saves_again_when_there_is_room(
    mount, args, cluster, monkeypatch, caplog
):
    """An actor whose checkpoints, embeddings and metrics lie on a disk that fills up."""
    disk = mount("400m")
    own = arguments(args.depo.estimator.model, disk.folder / "ckpt")
    assert Path(own.ckpt.output_dir).parent == disk.folder
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "depo_estimator_on_a_small_disk")
    small = remote_actor.create(own, GROUP, hooks._snapshot_root(own))
    fresh = SimpleNamespace(
        **vars(hooks._process) | {"driver_actor": small, "handle": remote_handle.connect(DEADLINE_S)}
    )
    monkeypatch.setattr(hooks, "_process", fresh)
    try:
        run = Run(own)
        run.until(scored)
        hooks.save(own, "global_step1")
        saved = checkpoint.load(disk.folder / "ckpt" / "depo" / "global_step1")["updates"]
        disk.fill()
        for _ in range(2 * POOL // BATCH):
            run.step()
        assert scored(run.steps[-1]), "new texts, too, are embedded: they are only not kept"
        hooks.save(own, "global_step2")
        told = warnings_of(caplog)
        assert [line.split(" ")[1] for line in told] == [str(disk.folder / "model/depo/metrics.jsonl"), "the"], told
        assert told[1].startswith(
            "DEPO: the estimator's checkpoint global_step2 could not be written ([Errno 28] No space"
        )
        assert checkpoint.latest_valid(disk.folder / "ckpt" / "depo", "global_step2")[1]["updates"] == saved
        caplog.clear()

        disk.free()
        run.step()
        hooks.save(own, "global_step3")
        assert checkpoint.load(disk.folder / "ckpt" / "depo" / "global_step3")["updates"] == len(run.steps)
        rows = [json.loads(line) for line in (disk.folder / "model/depo/metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == len(run.steps) + 1
        assert warnings_of(caplog) == []
        run.assert_nothing_lost_or_doubled()
    finally:
        ray.kill(small)


@pytest.mark.slow
@needs_root
def test_a_checkpoint_folder_of_another_user_is_a_warning_at_each_save(process, args, actor, caplog):
    hooks.save(args, "global_step200")
    before = score(process.handle)
    learn(process.handle, label(0, 1.0))
    later = score(process.handle)
    on(actor, lambda host: os.seteuid(NOBODY))
    hooks.save(args, "global_step201")
    assert same(score(process.handle), later)
    on(actor, lambda host: os.seteuid(0))
    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        "DEPO: the estimator's checkpoint global_step201 could not be written ([Errno 13] Permission"
    )
    latest(args, "global_step201")
    hooks.load(args, {"global_step": 201})
    assert same(score(process.handle), before), "what was saved earlier is there"
    assert "global_step200 is used instead: 1 steps of its learning are lost" in warnings_of(caplog)[-1]


@pytest.mark.slow
def test_of_damaged_checkpoints_the_newest_whole_one_is_used_and_the_loss_is_said(process, args, caplog):
    whole = None
    for step in (300, 301, 302):
        hooks.save(args, f"global_step{step}")
        whole = whole or score(process.handle)
        learn(process.handle, label(step % 6, 1.0))
        (Path(args.ckpt.path) / "_actor" / f"global_step{step}").mkdir(parents=True, exist_ok=True)  # or it is pruned
    root = Path(args.ckpt.path) / "depo"
    tensors = root / "global_step302" / checkpoint.TENSORS
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of one weight
    tensors.write_bytes(data)
    state = root / "global_step301" / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-100])
    assert not same(score(process.handle), whole)
    latest(args, "global_step302")
    hooks.load(args, {"global_step": 302})
    assert same(score(process.handle), whole)
    assert warnings_of(caplog) == [
        "DEPO: estimator checkpoint global_step302 is missing or damaged, global_step300 is used instead: 2 steps of "
        "its learning are lost."
    ]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["global_step400_universal", "my_converted_folder"])
def test_a_universal_checkpoint_finds_the_estimators(folder, process, args, monkeypatch, caplog):
    """DeepSpeed's converter writes a folder beside ours and names it in latest_universal."""
    hooks.save(args, "global_step400")
    saved = score(process.handle)
    learn(process.handle, label(0, 0.25))
    latest(args, "global_step77")
    latest(args, folder, "latest_universal")
    monkeypatch.setattr(args.ds, "use_universal_ckpt", True)
    hooks.load(args, {"global_step": 400})
    assert same(score(process.handle), saved)
    assert warnings_of(caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 2 * GROUP}, f"--rollout.n_samples_per_prompt was {2 * GROUP}, is {GROUP}"),
        ({"encoder": "another"}, "--depo.estimator.model was another, is encoder"),
    ],
    ids=["group size", "encoder"],
)
def test_a_checkpoint_of_another_estimator_stops_the_run_and_is_not_touched(change, message, process, args, tmp_path):
    model = tiny_encoder.write(tmp_path / change.get("encoder", "encoder"))
    cfg = DepoConfig(estimator=dataclasses.replace(EstimatorConfig(), model=model, lr=1e-3))
    other = DifficultyEstimator(cfg, change.get("group_size", GROUP), 3)
    folder = Path(args.ckpt.path) / "depo" / "global_step500"
    checkpoint.save(folder, other.state_dict())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = score(process.handle)
    latest(args, "global_step500")
    with pytest.raises(checkpoint.CheckpointError) as error:
        hooks.load(args, {"global_step": 500})
    told = str(error.value).strip().splitlines()[-1]
    assert "the estimator checkpoint belongs to another estimator" in told
    assert message in told
    assert "Resume with the values it was written with" in told
    assert same(score(process.handle), before)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.slow
def test_a_prompt_of_10_mb_goes_through_loader_actor_and_checkpoint(process, args, actor):
    huge = "Let x be 3x + 7 = 22. " * 450_000
    assert len(huge) > 9_000_000
    start = time.monotonic()
    scores = process.handle.score_async([huge, *PROMPTS], ["5", *ANSWERS]).result()
    assert np.isfinite(scores.a).all()
    without = score(process.handle)
    np.testing.assert_allclose(scores.a[1:], without.a, rtol=1e-5, err_msg="the others are as without it")
    np.testing.assert_allclose(scores.b[1:], without.b, rtol=1e-5)
    metrics = learn(process.handle, dataclasses.replace(label(0, 0.5), prompt=huge))
    assert metrics["updates"] == scores.updates
    hooks.save(args, "global_step600")
    learned = process.handle.score_async([huge, *PROMPTS], ["5", *ANSWERS]).result()
    latest(args, "global_step600")
    hooks.load(args, {"global_step": 600})
    again = process.handle.score_async([huge, *PROMPTS], ["5", *ANSWERS]).result()
    assert same(again, learned)
    assert time.monotonic() - start < DEADLINE_S


@pytest.mark.slow
def test_the_estimator_ends_with_its_driver(cluster, args, tmp_path):
    """A driver that is killed leaves no actor behind."""
    (tmp_path / "args").write_bytes(pickle.dumps(args))
    script = f"""
import os, pickle, time, ray
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import handle as remote_handle
ray.init({ray.get_runtime_context().gcs_address!r}, log_to_driver=False)
args = pickle.load(open({str(tmp_path / "args")!r}, "rb"))
actor = remote_actor.create(args, {GROUP}, {str(tmp_path / "depo")!r})
print("pid", ray.get(actor.__ray_call__.remote(lambda host: os.getpid())), flush=True)
time.sleep(600)
"""
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = next(int(line.split()[1]) for line in driver.stdout if line.startswith("pid "))
    assert Path(f"/proc/{pid}").exists()
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the actor outlives its driver"
        time.sleep(0.2)
