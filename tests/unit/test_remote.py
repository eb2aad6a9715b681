"""The estimator's actor and its handle on a real Ray: one driver (this process), a tiny encoder, one actor for all."""

import logging
import os
import signal
import time
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import ray
from remote_run import (
    ANSWERS,
    ANSWERS_AGAIN,
    DEADLINE_S,
    GROUP,
    PROMPTS,
    arguments,
    judged,
    label,
    learn,
    on,
    openrlhf_saved,
    pid_of,
    restore,
    same,
    score,
    until,
    warnings_of,
)

from depo_plugin import hooks, labels
from depo_plugin.estimator import checkpoint
from depo_plugin.messages import Reason, Record, Scores, prompt_key
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import breaker
from depo_plugin.remote import handle as remote_handle

pytestmark = pytest.mark.slow


def answer_again(handle):
    """Ask until the estimator has answered three times in a row; return the first Scores."""
    first = until(lambda: score(handle))
    assert None not in [score(handle) for _ in range(breaker.ANSWERS - 1)]
    return first


def test_a_checkpoint_that_cannot_be_loaded_does_not_make_the_handle_doubt_for_ever():
    """load() is called once a process, so that no answers to it can end its fault."""
    doubting = remote_handle.RemoteEstimator(None, 60.0)
    doubting._failed(ray.exceptions.RayTaskError("load", "", ValueError("odd")), "load")
    assert doubting._breaker.state is breaker.State.HALF_OPEN
    for _ in range(breaker.ANSWERS):
        doubting._answered("score", waited_for=True)
    assert doubting._breaker.state is breaker.State.CLOSED


def test_scores_come_back_and_the_time_waited_is_given_once(handle, caplog):
    start = time.perf_counter()
    scores = score(handle)
    waited = time.perf_counter() - start
    assert type(scores) is Scores
    assert (scores.a.shape, scores.b.shape, scores.a.dtype) == ((6,), (6,), np.float64)
    assert min(*scores.a, *scores.b) > 0
    assert 0 < handle.take_tally()["time_blocked"] <= waited
    assert handle.take_tally() == dict.fromkeys(remote_handle.TALLY, 0.0)
    assert warnings_of(caplog) == []


def test_what_was_planned_rejected_and_rolled_out_is_learned_in_one_step(handle):
    def record(i, q, keep):
        key, reason = prompt_key(PROMPTS[i], ANSWERS[i]), Reason.PASSED if keep else Reason.REJECTED
        return Record(key, ("", ""), p=0.5, v=0.75, q=q, keep=keep, reason=reason, datasource="", share=0.5)

    decisions = [(0.05, True), (1.0, True), (0.05, False), (0.05, False)]
    before = score(handle).updates
    handle.tally |= {"time_blocked": 1.5, "labels_dropped": 2.0}
    handle.record([record(i, q, keep) for i, (q, keep) in enumerate(decisions)])
    assert not any(handle.tally.values())  # it went with the records, and comes back with the step's metrics
    assert handle.keep_weights(PROMPTS[:3], ANSWERS[:3]) == ([0.05, 1.0, 1.0], [0.5, 0.5, 1.0])
    handle.reject(label(1, 1.0, d=None))
    metrics, lines = judged(handle, label(0, 0.25))
    told = [(line["key"], line["y"], line["q"], line.get("rejected")) for line in lines]
    keys = [f"{prompt_key(PROMPTS[i], ANSWERS[i]):016x}" for i in range(2)]
    assert told == [(keys[0], 0.25, 0.05, None), (keys[1], 1.0, 1.0, True)]
    # Both kept groups came back, one of them through reject(): 2 kept of 4 scanned, mean pass rate 0.625.
    expected = {"scanned": 4, "kept": 2, "keep_rate": 0.5, "target_mean": 0.625}
    expected |= {"updates": before, "time_blocked": 1.5, "labels_dropped": 2}
    assert {name: metrics[name] for name in expected} == expected
    handle.tally["labels_dropped"] = 1.0
    again = learn(handle, label(0, 0.25))
    assert again["time_update"] > 0  # of the update before
    assert (again["updates"], again["target_mean"], again["unmatched"]) == (before + 1, 0.25, 1)
    assert again.get("time_blocked", 0.0) == 0.0
    assert (again["labels_dropped"], handle.tally["labels_dropped"]) == (3, 0)  # a total; sent once


# ── Checkpoints, through the hooks, as OpenRLHF calls them ──


def test_save_learn_on_and_load_gives_the_same_scores_again(handle, process, args, caplog):
    hooks.save(args, "global_step1")
    saved = score(handle)
    openrlhf_saved(args, "global_step1")
    learn(handle, label(0, 1.0), label(1, 0.0), label(2, 0.5))
    later = score(handle)
    assert later.updates == saved.updates + 1
    assert not same(saved, later)
    hooks.save(args, "global_step2")
    tags = {path.stem for path in (Path(args.ckpt.path) / "depo").glob("*.safetensors")}
    assert tags == {"global_step1", "global_step2"}

    caplog.set_level(logging.INFO, logger="openrlhf.depo_plugin.hooks")
    hooks.load(args, {"global_step": 1})
    assert same(score(handle), saved)
    openrlhf_saved(args, "global_step7")
    hooks.load(args, {"global_step": 7})
    assert same(score(handle), later)
    assert [record.getMessage() for record in caplog.records] == [
        "DEPO: estimator resumed from global_step1",
        "DEPO: estimator checkpoint global_step7 is missing or damaged, global_step2 is used instead: 5 steps of its "
        "learning are lost.",
    ]


def test_a_resume_without_our_checkpoint_is_a_warning(process, args, caplog):
    openrlhf_saved(args, "global_step0")  # older than any there is
    for state in ({"depo": {}}, {"_num_yielded": 8}):
        hooks.load(args, {"global_step": 1, "data_loader_state_dict": state})
    assert warnings_of(caplog) == [
        "DEPO: no estimator checkpoint for global_step0; the estimator starts from the beginning: 0 steps of its "
        "learning are lost.",
        "DEPO: global_step0 was written without DEPO: the estimator starts from the beginning.",
    ]


def test_a_save_that_fails_says_why_and_is_no_fault_of_the_estimator(actor, handle, process, args, caplog):
    """The state has a date in it, which JSON does not know."""

    def spoil(host):
        whole = host.estimator.state_dict
        host.estimator.state_dict = lambda: whole() | {"losses": {"since": date(2026, 11, 26)}}

    on(actor, spoil)
    try:
        hooks.save(args, "global_step700")
        hooks.save(args, "global_step701")
    finally:
        restore(actor, "state_dict")
    told = warnings_of(caplog)
    assert told == [
        f"DEPO: the estimator's checkpoint global_step70{i} could not be written (TypeError: Object of type date is "
        "not JSON serializable); training goes on."
        for i in range(2)
    ]
    assert score(handle) is not None
    hooks.save(args, "global_step702")
    assert warnings_of(caplog) == told


def test_labels_of_any_kind_are_saved(handle, process, args, caplog):
    kinds = [datetime(2026, 11, 26), Decimal("1.50"), b"4", {"answer": 4, "on": date(2026, 1, 1)}]
    rewards = [0.0, 1.0, 1.0, 1.0]
    learn(handle, *(labels.group_label(PROMPTS[0], kind, rewards, rewards, None, (0.0, 1.0)) for kind in kinds))
    hooks.save(args, "global_step710")
    assert warnings_of(caplog) == []
    state = checkpoint.load(Path(args.ckpt.path) / "depo" / "global_step710")
    assert [label for _, label, *_ in state["recent"]][-4:] == [str(kind) for kind in kinds]


# ── Faults ──


def test_a_slow_estimator_gives_no_scores_one_warning_and_answers_again(actor, caplog):
    before = score(remote_handle.connect(DEADLINE_S)).updates
    handle = remote_handle.connect(0.05)
    handle.tally["labels_dropped"] = 1.0
    busy = actor.__ray_call__.remote(lambda host: time.sleep(2))
    start = time.perf_counter()
    assert [score(handle) for _ in range(3)] == [None] * 3
    assert handle.keep_weights(PROMPTS, ANSWERS) is None
    assert learn(handle, label(0, 0.5), label(1, 0.5)) is None
    handle.reject(label(2, 1.0))
    assert time.perf_counter() - start < 1.5
    assert (handle.tally["labels_unsent"], handle.tally["labels_dropped"]) == (3, 1)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("DEPO: the difficulty estimator did not answer (GetTimeoutError")
    assert "Training goes on, without filtering while there are no scores" in warning
    assert "raise --depo.estimator.timeout_s" in warning
    ray.get(busy, timeout=DEADLINE_S)
    handle.timeout_s = DEADLINE_S
    assert answer_again(handle).updates == before
    assert warnings_of(caplog)[1:] == [ANSWERS_AGAIN]


def test_a_call_that_fails_is_no_answer_and_the_actor_goes_on(handle, caplog):
    before = score(handle)
    assert learn(handle, label(0, 1.5)) is None
    (warning,) = warnings_of(caplog)
    assert "did not answer (RayTaskError(ValueError): " in warning
    assert "y 1.5 not in [0, 1]" in warning
    assert same(score(handle), before)


def test_a_method_that_fails_at_each_step_is_one_fault_however_much_the_others_answer(actor, handle, caplog):
    def step():
        learn(handle, label(0, 1.0))
        for _ in range(2 * breaker.ANSWERS):  # as many windows of candidates; the learning has ended before
            assert score(handle) is not None

    on(actor, lambda host: setattr(host.estimator, "learn", Mock(side_effect=MemoryError)))
    try:
        for _ in range(5):
            step()
    finally:
        restore(actor, "learn")
    (warning,) = warnings_of(caplog)
    assert "did not answer (RayTaskError(MemoryError)" in warning
    for _ in range(breaker.ANSWERS):  # each hears of the learning before its own
        step()
    assert len(warnings_of(caplog)) == 1
    step()
    assert warnings_of(caplog)[1:] == [ANSWERS_AGAIN]


def test_an_answer_that_is_lost_on_its_way_is_no_answer(actor, handle, caplog):
    """The actor raised nothing: Ray lost the answer, as with a node, or with a process that had no memory."""
    answer = actor.__ray_call__.remote(lambda host: np.zeros(1_000_000))  # too large to travel with the message
    ray.wait([answer], timeout=DEADLINE_S)
    ray.internal.free([answer])
    assert handle.wait(remote_handle.Call("score", answer)) is None
    (warning,) = [line for line in warnings_of(caplog) if line.startswith("DEPO")]  # Ray says something, too
    assert "did not answer (ObjectFreedError" in warning
    assert score(handle) is not None


@pytest.mark.parametrize("how", ["killed by the system", "killed by Ray"])
def test_a_dead_estimator_comes_back_with_its_newest_checkpoint(how, actor, args, handle, caplog):
    saved = score(handle)
    assert handle.save("global_step3", {"global_step1", "global_step2"}) > 0
    (Path(args.ckpt.path) / "depo" / "global_step4.safetensors").write_bytes(b"")  # newer, and damaged: passed over
    learn(handle, label(3, 1.0))
    assert score(handle).updates == saved.updates + 1

    pid = pid_of(actor)
    if how == "killed by the system":
        os.kill(pid, signal.SIGKILL)
    else:
        ray.kill(actor, no_restart=False)
    until(lambda: score(handle) is None, pause_s=0)  # Ray's own kill takes a moment
    assert same(answer_again(handle), saved)
    assert pid_of(actor) != pid
    died, back = warnings_of(caplog)
    assert "did not answer (Actor" in died
    assert back == ANSWERS_AGAIN
    assert learn(handle, label(3, 0.5))["updates"] == saved.updates
    assert score(handle).updates == saved.updates + 1


def test_an_estimator_that_cannot_be_placed_names_the_flags(actor, args, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_actor, "PLACEMENT_TIMEOUT_S", 3)
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "another_estimator")
    big = arguments(args.depo.estimator.model, tmp_path, **{"estimator.num_gpus": 0.5})
    with pytest.raises(RuntimeError) as error:
        remote_actor.create(big, GROUP, str(tmp_path))
    told = str(error.value)
    assert told.startswith("DEPO: the difficulty estimator was not placed within 3 s.")
    assert "--depo.estimator.num_gpus 0.5 and --depo.estimator.num_cpus 1" in told
    assert "the cluster has free: {" in told
    assert "'CPU': 1.0" in told  # of 2: the estimator of the other tests has one
    with pytest.raises(ValueError, match="another_estimator"):  # nothing is left that waits for a GPU
        remote_handle.connect(1)


def test_without_a_free_cpu_it_reserves_none(start, args, tmp_path, caplog):
    """In a folder of its own, a relative checkpoint path is the worker's, and embeddings go where they are told."""
    wanted = {"estimator.num_cpus": 64, "estimator.cache_dir": str(tmp_path / "embeddings")}
    _, handle = start(arguments(args.depo.estimator.model, tmp_path, **wanted))
    (warning,) = warnings_of(caplog)
    assert "--depo.estimator.num_cpus is 64: the difficulty estimator reserves none" in warning
    assert score(handle).updates == 0
    assert (tmp_path / "embeddings").is_dir()


def test_what_there_was_no_time_to_read_has_no_score_and_is_read_while_the_policy_trains(actor, handle):
    def believed_slow(host):
        host.estimator.text._speeds.extend([1.0] * 3)
        host.estimator.text._warm = True

    on(actor, believed_slow)
    new, answers = [f"a prompt of its own, {i}" for i in range(40)], ["1"] * 40
    first = handle.score_async(new, answers).result()
    assert np.flatnonzero(np.isnan(first.a)).tolist() == list(range(16, 40))
    assert np.isnan(handle.score_async(new, answers, waited_for=True).result().a).sum() == 24
    learn(handle, label(3, 0.5))
    assert not np.isnan(handle.score_async(new, answers, waited_for=True).result().a).any()


def test_a_restart_takes_up_the_snapshot_that_is_newer_than_the_checkpoint(actor, handle, args, caplog):
    """Nothing was saved since the learning; a snapshot was due."""

    def due(host):
        remote_actor.SNAPSHOT_S = 0.0

    handle.save("global_step9", set())
    on(actor, due)
    learned = learn(handle, label(2, 0.5))["updates"] + 1
    saved = score(handle)
    os.kill(pid_of(actor), signal.SIGKILL)
    assert same(answer_again(handle), saved)
    assert saved.updates == learned
    assert (Path(args.ckpt.path) / "depo" / "snapshot" / "newest.safetensors").is_file()


def test_a_node_without_the_package_is_told_what_it_lacks(cluster, args, tmp_path, monkeypatch):
    """Ray makes a stand-in of an actor whose class the node cannot import; each of its methods raises this."""

    class Stranger:
        def __init__(self, *args):
            """Take anything."""

        def ping(self):
            raise RuntimeError("The actor could not be imported: No module named 'depo_plugin'")

    monkeypatch.setattr(remote_actor, "EstimatorActor", Stranger)
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "a_stranger")
    with pytest.raises(RuntimeError) as error:
        remote_actor.create(arguments(args.depo.estimator.model, tmp_path), GROUP, str(tmp_path))
    told = str(error.value)
    assert "cannot start: RuntimeError: The actor could not be imported: No module named 'depo_plugin'" in told
    assert "must be installed on every node" in told
