"""Faults that are made to happen to the real parts: Ray's actor killed, slow or out of memory, disks full or not ours,
damaged or strange checkpoints, huge prompts. docs/faults.md is the whole table.
"""

import dataclasses
import json
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

import numpy as np
import pytest
import ray
import tiny_encoder
import torch
from depo_launch import Recorder, resolved
from numbered_pool import Prompts
from remote_run import (
    ANSWERS,
    BATCH,
    DEADLINE_S,
    GROUP,
    POOL,
    PROMPTS,
    Run,
    arguments,
    label,
    learn,
    on,
    openrlhf_saved,
    pid_of,
    restore,
    same,
    score,
    slow_down,
    until,
    warnings_of,
)
from system_faults import NOBODY, PAGE, as_nobody, mounting, needs_root
from torchdata.stateful_dataloader import StatefulDataLoader

from depo_plugin import hooks
from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.embedding_cache import EmbeddingCache
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.metrics import MetricsFile
from depo_plugin.settings.config import DepoConfig, EstimatorConfig

WIDTH = 4  # of the embeddings in the cache

# ── A full disk ──


@pytest.fixture
def mount(tmp_path):
    with mounting(tmp_path / "disk") as mount:
        yield mount


def embed(cache, *numbers):
    """Get the rows of these keys, check every one, and return how many had to be computed."""
    keys, computed = np.array(numbers, np.uint64), []

    def rows(places):
        return np.outer(keys[places].astype(np.float64), [1.0, -1.0, 0.5, 2.0])  # exact in fp16, another for each key

    def compute(missing):
        computed.extend(missing)
        return rows(missing)

    np.testing.assert_array_equal(cache.get(keys, compute), rows(np.arange(len(keys))))
    return len(computed)


@pytest.mark.parametrize("leave_pages", [0, 1, 2, 10, 100])
def test_a_full_disk_costs_the_embedding_cache_time_but_no_row(mount, leave_pages, caplog):
    """1503 rows take about 30 pages, first in SQLite's log."""
    disk, many = mount("1m"), [*range(10, 1510), 3, 1499, 5, 12]
    cache = EmbeddingCache(disk.folder / "cache", WIDTH)
    assert embed(cache, 5, 3, 2000) == 3
    disk.fill(leave_pages)
    stored = leave_pages == 100
    assert [embed(cache, *many), embed(cache, *many)] == [1500, 0 if stored else 1500]
    assert len(cache) == (1503 if stored else 3)
    assert ["disk is full" in warning for warning in warnings_of(caplog)] == ([] if stored else [True])
    another = EmbeddingCache(disk.folder / "cache", WIDTH)  # SQLite's files beside it are there already
    assert len(another) == len(cache)
    assert embed(another, 3, 2000, 5) == 0

    disk.free()
    assert [embed(cache, *many), embed(another, *many)] == [0 if stored else 1500, 0]
    again = EmbeddingCache(disk.folder / "cache", WIDTH)
    assert (embed(again, *many, 2000), len(again)) == (0, 1503)


def test_a_full_disk_costs_metrics_of_some_steps_and_one_warning(mount, monkeypatch, caplog):
    disk = mount("64k")
    monkeypatch.setattr(hooks, "_process", hooks.Process(handle=Recorder(metrics={"kept": 4.0})))
    args = resolved(**{"ckpt.output_dir": str(disk.folder)})
    path = disk.folder / "depo" / "metrics.jsonl"
    for step in range(1, 30):
        if step == 5:
            disk.fill()
        if step == 25:
            disk.free()
        status = {"policy_loss": 0.5, "text" * 50: 1.0}  # 400 bytes a line: the first page is full after ten
        hooks.log(args, status, step)
        assert status["depo/kept"] == 4.0, "the other loggers have it all the same"
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    first_lost = next(step for step in range(1, 30) if step not in steps)
    assert 5 < first_lost < 15
    assert steps == [step for step in range(1, 30) if not first_lost <= step < 25]
    (warning,) = warnings_of(caplog)
    assert all(words in warning for words in (str(path), "No space left", "training goes on"))


@pytest.mark.parametrize("leave_pages", [0, 1, 2, 10, 200])
def test_a_full_disk_costs_the_new_checkpoint_alone(mount, leave_pages):
    """A checkpoint takes 250 pages; it is cut off anywhere in it."""
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
    assert sorted(path.stem for path in root.iterdir()) == ["global_step1", "global_step2", "latest"]
    for step in (1, 2):
        found = checkpoint.load(root / f"global_step{step}")
        assert found["updates"] == step
        assert torch.equal(found["weights"], state["weights"])
    assert checkpoint.pointed(root, "run") == "global_step2"
    disk.free()
    checkpoint.save(root / "global_step3", state | {"updates": 3})
    assert checkpoint.load(root / "global_step3")["updates"] == 3


# ── Another user's folder ──


@needs_root
def test_a_folder_of_another_user_costs_what_cannot_be_written_and_nothing_that_was(monkeypatch, caplog):
    with tempfile.TemporaryDirectory(prefix="depo-") as folder:
        root = Path(folder)
        root.chmod(0o755)  # it can be read, not written
        checkpoint.save(root / "depo" / "global_step1", {"updates": 1})
        EmbeddingCache(root / "depo_embeddings", WIDTH)
        MetricsFile(root / "depo" / "metrics.jsonl").append({"step": 1})
        monkeypatch.setattr(hooks, "_process", hooks.Process(handle=Recorder()))
        args = resolved(**{"ckpt.output_dir": str(root)})

        def theirs():
            for step in (1, 2):
                with pytest.raises(PermissionError):
                    checkpoint.save(root / "depo" / f"global_step{step}", {"updates": 2})
                hooks.log(args, {}, step + 1)
            rows = embed(EmbeddingCache(root / "depo_embeddings", WIDTH), 1, 2)
            found = checkpoint.latest_valid(root / "depo", "global_step2")
            return os.getuid(), found, rows, warnings_of(caplog)

        uid, found, rows, told = as_nobody(theirs, DEADLINE_S)
        assert (uid, found, rows) == (NOBODY, ("global_step1", {"updates": 1}), 2)
        # the metrics once, the embeddings, and the checkpoint that is not there
        assert [("metrics.jsonl" in line, "temporary file" in line, "global_step2" in line) for line in told] == [
            (True, False, False),
            (False, True, False),
            (False, False, True),
        ]
        assert "Permission denied" in told[0]
        assert "readonly database" in told[1]
        assert checkpoint.load(root / "depo" / "global_step1") == {"updates": 1}
        assert (root / "depo" / "metrics.jsonl").read_text() == '{"step": 1}\n'


# ── The pool ──


def test_an_empty_dataset_is_refused_by_openrlhfs_own_loader():
    """Before ours takes it over (test_an_empty_pool_is_refused)."""
    with pytest.raises(ValueError, match="num_samples should be a positive integer"):
        StatefulDataLoader(Prompts(0), batch_size=1, shuffle=True)


@pytest.mark.slow
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
    assert same(scores, made.score([huge[-8192:], "short"], ["1", "1"]))  # 64 characters for each of 128 tokens


# ── The actor ──


@pytest.fixture
def run(process, args):
    """A run that filters."""
    run = Run(args)
    until(run.filters)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("during", [None, "score", "record", "judge", "learn"])
def test_a_killed_estimator_costs_neither_a_prompt_nor_a_batch(during, run, process, args, actor, tmp_path, caplog):
    """Killed as the kernel's OOM killer does it, at rest and in the middle of each of its jobs."""
    hooks.save(args, "global_step100")
    saved = score(process.handle).updates
    run.step()
    pid, flag = pid_of(actor), tmp_path / "at work"
    if during is None:
        os.kill(pid, signal.SIGKILL)
    else:
        slow_down(actor, during, 600, flag)

        def kill_at_work():
            until(flag.exists, pause_s=0.01)
            os.kill(pid, signal.SIGKILL)

        threading.Thread(target=kill_at_work, daemon=True).start()
    killed, start = len(run.steps), time.monotonic()
    until(lambda: run.step() and warnings_of(caplog))
    assert time.monotonic() - start < DEADLINE_S / 2, "a death is no timeout"
    run.assert_back(caplog)
    run.assert_nothing_lost_or_doubled()
    assert "did not answer (Actor" in warnings_of(caplog)[0]
    updates = [step["updates"] for step in run.steps[killed:] if "updates" in step]
    resumed = updates[updates.index(saved) :]
    assert resumed == list(range(saved, saved + len(resumed))), "it goes on from its checkpoint, one update a step"
    assert len(resumed) >= 2
    assert pid_of(actor) != pid


@pytest.mark.slow
def test_an_estimator_100_times_slower_is_waited_for_once(run, process, actor, caplog):
    handle, start = process.handle, time.perf_counter()
    run.step()
    slow_s = min(max(100 * (time.perf_counter() - start), 2.0), 5.0)  # where a step takes 20 to 50 ms
    handle.timeout_s = slow_s / 4
    learned = score(handle).updates
    for method in ("score", "judge"):
        slow_down(actor, method, slow_s)
    before, start = len(run.steps), time.monotonic()
    while time.monotonic() - start < 6 * slow_s:
        assert not run.filters() or len(run.steps) <= before + 2
        time.sleep(slow_s / 20)  # the policy's training
    slow = run.steps[before:]
    assert len(slow) > 60
    waited = sum(step["time_blocked"] for step in slow)
    assert handle.timeout_s <= waited < 1.2 * handle.timeout_s + 0.01 * len(slow), waited
    assert len(warnings_of(caplog)) == 1, warnings_of(caplog)

    start = time.monotonic()
    restore(actor, "score", "judge")
    assert time.monotonic() - start < 3 * slow_s, "no queue of calls was there to work off"
    handle.timeout_s = DEADLINE_S
    run.assert_back(caplog)
    run.assert_nothing_lost_or_doubled()
    # Every step's groups were learned from, or counted as unsent.
    lost = sum(step["labels_unsent"] for step in run.steps[before:])
    assert lost > BATCH * 50
    learned = score(handle).updates - learned
    assert learned * BATCH + lost == BATCH * len(run.steps[before:])


@pytest.mark.slow
@pytest.mark.parametrize("during", ["score", "learn"])
def test_an_estimator_out_of_memory_is_a_warning_and_goes_on_with_memory(during, run, actor, caplog):
    """A limit on the address space, 256 MB above what it has, and a job that asks for 1 GB."""

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
    run.assert_back(caplog)
    run.assert_nothing_lost_or_doubled()
    assert pid_of(actor) == pid, "it was never restarted"
    restore(actor, during)


@pytest.mark.slow
def test_an_estimator_on_a_full_disk_goes_on_and_saves_again_when_there_is_room(
    mount, args, start, monkeypatch, caplog
):
    """An actor whose checkpoints, embeddings and metrics lie on a disk that fills up."""
    disk = mount("400m")
    own = arguments(args.depo.estimator.model, disk.folder / "ckpt")
    assert Path(own.ckpt.output_dir).parent == disk.folder
    small, handle = start(own)
    monkeypatch.setattr(hooks, "_process", hooks.Process(driver_actor=small, handle=handle))
    run = Run(own)
    until(run.filters)
    hooks.save(own, "global_step1")
    saved = checkpoint.load(disk.folder / "ckpt" / "depo" / "global_step1")["updates"]
    disk.fill()
    assert [run.filters() for _ in range(2 * POOL // BATCH)][-1], "new texts are embedded, but not kept"
    hooks.save(own, "global_step2")
    metrics, groups, save = warnings_of(caplog)
    assert str(disk.folder / "model/depo/metrics.jsonl") in metrics
    assert str(disk.folder / "model/depo/groups.jsonl") in groups
    assert save.startswith("DEPO: the estimator's checkpoint global_step2 could not be written ([Errno 28] No space")
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
    assert "checkpoint global_step201 could not be written ([Errno 13] Permission" in warning
    openrlhf_saved(args, "global_step201")
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
        openrlhf_saved(args, f"global_step{step}")  # or ours is pruned
    root = Path(args.ckpt.path) / "depo"
    newest, older = (root / f"global_step{step}.safetensors" for step in (302, 301))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of one weight
    newest.write_bytes(data)
    older.write_bytes(older.read_bytes()[:-100])
    assert not same(score(process.handle), whole)
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
    openrlhf_saved(args, "global_step77")
    openrlhf_saved(args, folder, "latest_universal")
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
    saved = Path(args.ckpt.path) / "depo" / "global_step500.safetensors"
    checkpoint.save(saved.with_suffix(""), other.state_dict())
    written = saved.read_bytes()
    before = score(process.handle)
    openrlhf_saved(args, "global_step500")
    with pytest.raises(checkpoint.CheckpointError) as error:
        hooks.load(args, {"global_step": 500})
    told = str(error.value).strip().splitlines()[-1]
    assert "the estimator checkpoint belongs to another estimator" in told
    assert message in told
    assert "Resume with the values it was written with" in told
    assert same(score(process.handle), before)
    assert saved.read_bytes() == written


@pytest.mark.slow
def test_a_prompt_of_10_mb_goes_through_loader_actor_and_checkpoint(process, args):
    huge = "Let x be 3x + 7 = 22. " * 450_000
    assert len(huge) > 9_000_000

    def scored():
        return process.handle.score_async([huge, *PROMPTS], ["5", *ANSWERS]).result()

    start, scores, without = time.monotonic(), scored(), score(process.handle)
    assert np.isfinite(scores.a).all()
    np.testing.assert_allclose(scores.a[1:], without.a, rtol=1e-5, err_msg="the others are as without it")
    np.testing.assert_allclose(scores.b[1:], without.b, rtol=1e-5)
    metrics = learn(process.handle, dataclasses.replace(label(0, 0.5), prompt=huge))
    assert metrics["updates"] == scores.updates
    hooks.save(args, "global_step600")
    learned = scored()
    openrlhf_saved(args, "global_step600")
    hooks.load(args, {"global_step": 600})
    assert same(scored(), learned)
    assert time.monotonic() - start < DEADLINE_S


@pytest.mark.slow
def test_the_estimator_ends_with_its_driver(cluster, args, tmp_path):
    """A driver that is killed leaves no actor behind."""
    (tmp_path / "args").write_bytes(pickle.dumps(args))
    script = f"""
import os, pickle, time, ray
from depo_plugin.remote import actor as remote_actor
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
    until(lambda: not Path(f"/proc/{pid}").exists())  # or the actor outlives its driver
