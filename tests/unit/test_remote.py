"""Both ends of the wire on a real Ray of its own: one driver (this process), the estimator's actor, a tiny encoder.

The tests share one actor (conftest.py), for starting one takes seconds; each counts from the updates it finds.
"""

import logging
import os
import signal
import time
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import ray
from test_config import nested

from depo_plugin import hooks, labels
from depo_plugin.estimator import checkpoint
from depo_plugin.messages import Label, Scores, prompt_key
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import breaker
from depo_plugin.remote import handle as remote_handle
from depo_plugin.settings import config

pytestmark = pytest.mark.slow

GROUP = 4
PROMPTS = [f"{i}+{i * 7}=" for i in range(6)]
ANSWERS = [str(i * 8) for i in range(6)]
DEADLINE_S = 120  # how long anything may take on a busy machine; what is waited for takes seconds


def arguments(encoder, root, **settings):
    """OpenRLHF's arguments, as far as remote.py and the hooks here read them."""
    cfg = config.load_config(None, {"estimator.model": encoder, "estimator.lr": 1e-3} | settings)
    args = nested(
        {
            "train.seed": 3,
            "train.agent_func_path": None,
            "ckpt.path": str(root),
            "ckpt.output_dir": str(Path(root).with_name("model")),
            "ds.use_universal_ckpt": False,
            "reward.remote_url": "reward.py",
            "rollout.n_samples_per_prompt": GROUP,
        }
    )
    args.depo = config.to_namespace(cfg)
    return args


def label(i, y, d=0.5):
    return Label(PROMPTS[i], ANSWERS[i], y, d, GROUP, 0 < y < 1)


def learn(handle, *labels):
    return handle.wait(handle.observe(list(labels)), DEADLINE_S)


def score(handle):
    return handle.score_async(PROMPTS, ANSWERS).result()


def same(one, other):
    return one.updates == other.updates and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)


def on(actor, function):
    """Call function(host) in the actor's process."""
    return ray.get(actor.__ray_call__.remote(function), timeout=DEADLINE_S)


def restore(actor, *methods):
    """Give the actor's estimator its own methods back."""

    def patch(host):
        for method in methods:
            delattr(host.estimator, method)

    on(actor, patch)


def pid_of(actor):
    return on(actor, lambda host: os.getpid())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def answer_again(handle):
    """Ask until the estimator has answered three times in a row; return the first Scores."""
    deadline, answers = time.monotonic() + DEADLINE_S, []
    while len(answers) < breaker.ANSWERS:
        scores = score(handle)
        answers = [] if scores is None else [*answers, scores]
        assert time.monotonic() < deadline, "the estimator did not come back"
        time.sleep(0 if answers else 0.2)
    return answers[0]


def test_scores_come_back_as_one_of_the_jobs_processes_asks_for_them(handle, caplog):
    scores = score(handle)
    assert type(scores) is Scores
    assert (scores.a.shape, scores.b.shape, scores.a.dtype) == ((6,), (6,), np.float64)
    assert (scores.a > 0).all()
    assert (scores.b > 0).all()
    assert warnings_of(caplog) == []


def test_the_time_waited_is_given_once(handle):
    start = time.perf_counter()
    score(handle)
    waited = time.perf_counter() - start
    assert 0 < handle.take_tally()["time_blocked"] <= waited
    assert handle.take_tally() == dict.fromkeys(remote_handle.TALLY, 0.0)


def test_what_was_planned_rejected_and_rolled_out_is_learned_in_one_step(handle):
    records = [
        {
            "key": prompt_key(PROMPTS[i], ANSWERS[i]),
            "p": 0.5,
            "v": 0.75,
            "q": q,
            "keep": keep,
            "reason": "passed" if keep else "rejected",
            "share": 0.5,
            "datasource": "",
        }
        for i, (q, keep) in enumerate([(0.05, True), (1.0, True), (0.05, False), (0.05, False)])
    ]
    before = score(handle).updates
    handle.tally |= {"time_blocked": 1.5, "labels_dropped": 2.0}
    handle.record(records)
    assert not any(handle.tally.values())  # it went with the records, and comes back with the step's metrics
    assert handle.keep_weights(PROMPTS[:3], ANSWERS[:3]) == ([0.05, 1.0, 1.0], [0.5, 0.5, 1.0])
    handle.reject(label(1, 1.0, d=None))
    metrics = learn(handle, label(0, 0.25))
    # Both kept groups came back, one of them through reject(): 2 kept of 4 scanned, mean pass rate 0.625.
    expected = {
        "updates": before,  # learned from before these
        "scanned": 4,
        "kept": 2,
        "keep_rate": 0.5,
        "target_mean": 0.625,
        "time_blocked": 1.5,
        "labels_dropped": 2,
    }
    assert {name: metrics[name] for name in expected} == expected
    again = learn(handle, label(0, 0.25))
    assert again["time_update"] > 0  # of the update before
    assert (again["updates"], again["target_mean"], again["unmatched"]) == (before + 1, 0.25, 1)
    assert again.get("time_blocked", 0.0) == 0.0


def test_save_learn_on_and_load_gives_the_same_scores_again(handle, process, args, caplog):
    # By the hooks, as OpenRLHF calls them: its own folder of the tag is there when it resumes.
    hooks.save(args, "global_step1")
    saved = score(handle)
    folder = Path(args.ckpt.path) / "_actor" / "global_step1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "latest").write_text("global_step1\n")
    learn(handle, label(0, 1.0), label(1, 0.0), label(2, 0.5))
    later = score(handle)
    assert later.updates == saved.updates + 1
    assert not same(saved, later)
    hooks.save(args, "global_step2")
    tags = {path.name for path in (Path(args.ckpt.path) / "depo").iterdir() if path.is_dir()}
    assert tags == {"global_step1", "global_step2"}

    caplog.set_level(logging.INFO, logger="openrlhf.depo_plugin.hooks")
    hooks.load(args, {"global_step": 1})
    assert same(score(handle), saved)
    (folder.parent / "latest").write_text("global_step7")
    hooks.load(args, {"global_step": 7})
    assert same(score(handle), later)
    assert [record.getMessage() for record in caplog.records] == [
        "DEPO: estimator resumed from global_step1",
        "DEPO: estimator checkpoint global_step7 is missing or damaged, global_step2 is used instead: 5 steps of its "
        "learning are lost.",
    ]


def test_a_resume_without_our_checkpoint_is_a_warning(process, args, caplog):
    latest = Path(args.ckpt.path) / "_actor" / "latest"
    latest.parent.mkdir(parents=True, exist_ok=True)
    latest.write_text("global_step0")  # older than any there is
    hooks.load(args, {"global_step": 1})
    assert warnings_of(caplog) == [
        "DEPO: no estimator checkpoint for global_step0; the estimator starts from the beginning: 0 steps of its "
        "learning are lost."
    ]


def test_a_slow_estimator_gives_no_scores_one_warning_and_answers_again(actor, caplog):
    before = score(remote_handle.connect(DEADLINE_S)).updates
    handle = remote_handle.connect(0.05)
    busy = actor.__ray_call__.remote(lambda host: time.sleep(2))
    start = time.perf_counter()
    assert [score(handle) for _ in range(3)] == [None] * 3
    assert time.perf_counter() - start < 1.5
    assert handle.keep_weights(PROMPTS, ANSWERS) is None
    (warning,) = warnings_of(caplog)
    assert warning.startswith("DEPO: the difficulty estimator did not answer (GetTimeoutError")
    assert "Training goes on, without filtering where it gives no scores" in warning
    assert "raise --depo.estimator.timeout_s" in warning
    ray.get(busy, timeout=DEADLINE_S)
    handle.timeout_s = DEADLINE_S
    assert answer_again(handle).updates == before
    assert warnings_of(caplog)[1:] == ["DEPO: the difficulty estimator answers again; prompts are filtered as before."]


def test_a_call_that_fails_is_no_answer_and_the_actor_goes_on(handle, caplog):
    before = score(handle)
    assert learn(handle, label(0, 1.5)) is None
    (warning,) = warnings_of(caplog)
    assert "did not answer (RayTaskError(ValueError): " in warning
    assert "y 1.5 not in [0, 1]" in warning
    assert same(score(handle), before)


def test_a_method_that_fails_at_each_step_is_one_fault_however_much_the_others_answer(actor, handle, caplog):
    def fail(host):
        def learn(judged):
            raise MemoryError

        host.estimator.learn = learn

    def step():
        learn(handle, label(0, 1.0))
        for _ in range(2 * breaker.ANSWERS):  # as many windows of candidates; the learning has ended before
            assert score(handle) is not None

    on(actor, fail)
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
    assert warnings_of(caplog)[1:] == ["DEPO: the difficulty estimator answers again; prompts are filtered as before."]


def test_an_answer_that_is_lost_on_its_way_is_no_answer(actor, handle, caplog):
    """What Ray says of a lost node, or of a process that it ended for want of memory, is no error of the actor's."""
    answer = actor.__ray_call__.remote(lambda host: np.zeros(1_000_000))  # too large to travel with the message
    ray.wait([answer], timeout=DEADLINE_S)
    ray.internal.free([answer])
    assert handle.wait(remote_handle.Call("score", answer), DEADLINE_S) is None
    (warning,) = [line for line in warnings_of(caplog) if line.startswith("DEPO")]  # Ray says something, too
    assert "did not answer (ObjectFreedError" in warning
    assert score(handle) is not None


@pytest.mark.parametrize("how", ["killed by the system", "killed by Ray"])
def test_a_dead_estimator_comes_back_with_its_newest_checkpoint(how, actor, handle, caplog):
    saved = score(handle)
    root = Path(on(actor, lambda host: str(host.root)))
    assert handle.save("global_step3", {"global_step1", "global_step2"}) > 0
    (root / "global_step4").mkdir()  # newer, and damaged: passed over
    learn(handle, label(3, 1.0))
    assert score(handle).updates == saved.updates + 1

    pid = pid_of(actor)
    if how == "killed by the system":
        os.kill(pid, signal.SIGKILL)
    else:
        ray.kill(actor, no_restart=False)
    deadline = time.monotonic() + DEADLINE_S
    while score(handle) is not None:  # Ray's own kill takes a moment
        assert time.monotonic() < deadline, "it was never killed"
    assert same(answer_again(handle), saved)
    assert pid_of(actor) != pid
    told = warnings_of(caplog)
    assert len(told) == 2, told
    assert "did not answer (Actor" in told[0]
    assert "answers again" in told[1]
    assert learn(handle, label(3, 0.5))["updates"] == saved.updates
    assert score(handle).updates == saved.updates + 1


def test_an_estimator_that_cannot_be_placed_names_the_flags(cluster, args, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_actor, "PLACEMENT_TIMEOUT_S", 3)
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "another_estimator")
    big = arguments(args.depo.estimator.model, tmp_path, **{"estimator.num_cpus": 64})
    with pytest.raises(RuntimeError) as error:
        remote_actor.create(big, GROUP, str(tmp_path))
    told = str(error.value)
    assert told.startswith("DEPO: the difficulty estimator was not placed within 3 s.")
    assert "--depo.estimator.num_gpus 0.0 and --depo.estimator.num_cpus 64" in told
    assert "the cluster has free: {" in told
    assert "'CPU': 1.0" in told  # of 2, for the estimator of the other tests has one
    with pytest.raises(ValueError, match="another_estimator"):  # nothing is left that waits for 64 CPUs
        remote_handle.connect(1)


def test_a_process_without_an_estimator_is_told(cluster, monkeypatch):
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "depo_estimator_of_another_job")
    with pytest.raises(ValueError, match="depo_estimator_of_another_job"):
        remote_handle.connect(1)


def test_a_save_that_fails_says_why_and_is_no_fault_of_the_estimator(actor, handle, process, args, caplog):
    """A state that JSON does not know, as labels were that are dates."""

    def spoil(host):
        import datetime

        whole = host.estimator.state_dict
        host.estimator.state_dict = lambda: whole() | {"losses": {"since": datetime.date(2026, 11, 26)}}

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


@pytest.mark.parametrize(
    "label_", [datetime(2026, 11, 26), Decimal("1.50"), b"4", {"answer": 4, "on": date(2026, 1, 1)}]
)
def test_labels_of_any_kind_are_saved(label_, handle, process, args, caplog):
    group = labels.group_label(PROMPTS[0], label_, [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], None, (0.0, 1.0))
    learn(handle, group)
    hooks.save(args, "global_step710")
    assert warnings_of(caplog) == []
    state = checkpoint.load(Path(args.ckpt.path) / "depo" / "global_step710")
    assert str(label_) in [label for _, label, *_ in state["recent"]]
