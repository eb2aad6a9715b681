"""Start-up on a real Ray: training starts without the estimator if it must, and never on an unpatched OpenRLHF.

OpenRLHF's trainer is played by actors that make its start-up calls of our hooks, in its order; each kill is a kill -9.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import ray
import tiny_encoder
from remote_run import (
    ANSWERS_AGAIN,
    BATCH,
    DEADLINE_S,
    GROUP,
    arguments,
    label,
    learn,
    on,
    openrlhf_saved,
    pid_of,
    score,
    until,
    warnings_of,
)
from startup_actors import OPENRLHF, Process, Site

from depo_plugin import hooks, seam
from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.settings import config

pytestmark = pytest.mark.slow


@pytest.fixture
def started(cluster):
    """started(cls, ...): an actor of this class, killed when the test is over."""
    actors = []

    def started(cls, *init, **parts):
        actors.append(ray.remote(cls).options(num_cpus=0).remote(*init, **parts))
        return actors[-1]

    yield started
    for actor in actors:
        ray.kill(actor)


# ── The proof of attachment ──


def paths(*sites, **others):
    return {site: others.get(site, OPENRLHF / seam.SITES[site]) for site in sites}


def test_a_process_on_another_openrlhf_or_none_stops_the_run(args, started, tmp_path):
    other = tmp_path / "samples_generator.py"
    other.write_text("# another release\n")
    trainer = started(Site, args, paths("BasePPOTrainer", "SamplesGenerator", SamplesGenerator=other))
    with pytest.raises(seam.SeamError) as error:
        hooks.check_attached(args, trainer)
    node = ray.util.get_node_ip_address()
    head, first, second, advice = str(error.value).splitlines()
    assert "the run would silently be plain group_norm" in head
    assert first.startswith(f"  prepare_datasets: no report; on node {node} openrlhf is {OPENRLHF / '__init__.py'}")
    expected = OPENRLHF / seam.SITES["SamplesGenerator"]
    assert second == f"  SamplesGenerator: node {node} runs {other}, which differs from {expected}"
    assert "depo patch --check" in advice


def test_all_sites_of_one_process_are_attached(args, started):
    hooks.check_attached(args, started(Site, args, paths(*seam.SITES)))


@pytest.mark.parametrize("late", ["generator_actor", "trainer_actor"])
def test_in_async_mode_each_process_is_waited_for(late, args, started):
    """A constructor that takes 8 s more is late, not missing."""
    delay = {"generator_actor": 0.0, "trainer_actor": 0.0, late: 8.0}
    generator = started(Site, args, paths("prepare_datasets", "SamplesGenerator"), delay["generator_actor"])
    trainer = started(Site, args, paths("BasePPOTrainer"), delay["trainer_actor"])
    start = time.monotonic()
    hooks.check_attached(args, started(Site, args, {}, generator_actor=generator, trainer_actor=trainer))
    assert time.monotonic() - start > 6


def test_a_process_that_is_never_ready_is_an_error_with_a_sentence(args, started, monkeypatch):
    monkeypatch.setattr(hooks, "ATTACH_TIMEOUT_S", 0.5)
    with pytest.raises(RuntimeError, match=r"^DEPO: a process of OpenRLHF's trainer was not ready within 0.5 s"):
        hooks.check_attached(args, started(Site, args, {}, 600.0))


# ── Kills between any two calls ──


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kills_between_any_two_calls_of_the_start_cost_nothing_but_scores(
    mode, args, start, started, tmp_path, request
):
    """The estimator is killed after each call; the next is made at once. The run resumes, with its checkpoint."""
    own = arguments(args.depo.estimator.model, tmp_path / "ckpt", **{"filter.warmup_steps": 0})
    own.train.num_episodes, own.train.batch_size, own.train.max_epochs = 100, BATCH * GROUP, 1
    own.rollout.vllm_generate_batch_size = BATCH
    own.depo.enabled, own.depo.shadow = True, False
    earlier = DifficultyEstimator(config.from_namespace(own.depo), GROUP, own.train.seed)
    for _ in range(3):
        earlier.learn([label(0, 0.5)])
    checkpoint.save(tmp_path / "ckpt" / "depo" / "global_step7", earlier.state_dict())
    openrlhf_saved(own, "global_step7")

    def call(part, method, *args):
        return ray.get(getattr(part, method).remote(*args), timeout=DEADLINE_S)

    estimator, _ = start(own)

    def kill():
        os.kill(pid_of(estimator), signal.SIGKILL)

    # OpenRLHF's calls in its order. In async mode the trainer has made one process that draws and one that trains.
    kill()
    parts = [started(Process, own, request.node.name) for _ in range(2 if mode == "async" else 1)]
    draws, trains, trainer = parts[0], parts[-1], parts[0]
    if mode == "async":
        trainer = started(Site, own, {}, generator_actor=draws, trainer_actor=trains)
    kill()
    told = [(draws, "prepare"), (draws, "attach", "SamplesGenerator"), (trains, "attach", "BasePPOTrainer")]
    for part, *hook in told:
        call(part, *hook)
        kill()
    hooks.check_attached(own, trainer)
    kill()
    call(trains, "load", 7)
    kill()

    statuses, said = [], lambda: [line for part in parts for line in call(part, "warnings")]

    def filters():
        statuses.append(call(trains, "train", call(draws, "draw"), 8 + len(statuses)))
        return statuses[-1].get("depo/kept") == BATCH and not statuses[-1]["depo/unscored"]

    until(filters)
    assert on(estimator, lambda host: host.estimator.updates) >= 3, "it has the checkpoint's updates"
    assert sum("did not answer" in line for line in said()) <= len(parts)
    assert not [line for line in said() if "Traceback" in line]


def test_a_fresh_run_takes_up_no_checkpoint_of_an_earlier_one(args, start, tmp_path):
    """Killed before it has saved anything: the checkpoint in the folder is of another run."""
    own = arguments(args.depo.estimator.model, tmp_path / "ckpt")
    earlier, handle = start(own)
    learn(handle, label(0, 0.5))
    handle.save("global_step1", set())
    ray.kill(earlier)
    actor, _ = start(own)
    os.kill(pid_of(actor), signal.SIGKILL)
    pid_of(actor)
    assert on(actor, lambda host: host.estimator.updates) == 0
    assert checkpoint.load(tmp_path / "ckpt" / "depo" / "global_step1")["updates"] == 1


# ── Builds that fail ──


def test_an_estimator_that_cannot_be_built_at_the_start_stops_the_run_with_the_reason(start, tmp_path):
    with pytest.raises(RuntimeError) as error:
        start(arguments(str(tmp_path / "nowhere"), tmp_path / "ckpt"))
    told = str(error.value)
    assert told.startswith("DEPO: the difficulty estimator cannot be built on node ")
    assert f"EncoderError: --depo.estimator.model {tmp_path / 'nowhere'}: cannot be loaded" in told


def test_a_restarted_estimator_that_cannot_be_built_says_why_once_and_comes_back(start, tmp_path, caplog):
    """A node without the encoder: the process stays, answers with the reason, and tries again later."""
    encoder = Path(tiny_encoder.write(tmp_path / "encoder"))
    actor, handle = start(arguments(str(encoder), tmp_path / "ckpt"))
    learn(handle, label(0, 0.5))
    assert isinstance(handle.save("global_step1", set()), float)
    saved = score(handle)
    shutil.move(encoder, tmp_path / "away")
    os.kill(pid_of(actor), signal.SIGKILL)
    pid = pid_of(actor)
    for _ in range(5):
        assert score(handle) is None
        assert learn(handle, label(0, 0.5)) is None
    (warning,) = warnings_of(caplog)
    assert "did not answer (" in warning
    assert pid_of(actor) == pid, "the process stays"
    shutil.move(tmp_path / "away", encoder)
    on(actor, lambda host: setattr(host, "_retry_at", 0.0))

    def back():
        score(handle)
        learn(handle, label(0, 0.5))
        return warnings_of(caplog)[1:] == [ANSWERS_AGAIN]

    until(back, pause_s=0)
    assert on(actor, lambda host: host.estimator.updates) > saved.updates, "it went on from its checkpoint"
