"""Start-up on a real Ray: the estimator is advice from the first line on, and the proof of attachment stands alone.

OpenRLHF's trainer is played by actors that make its start-up calls of our hooks, in its order; each kill is a kill -9.
"""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import tiny_encoder
from startup_actors import BATCH, OPENRLHF, Process, Site
from test_remote import DEADLINE_S, GROUP, arguments, label, learn, on, pid_of, score, warnings_of

from depo_plugin import hooks
from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.remote import actor as remote_actor
from depo_plugin.remote import handle as remote_handle
from depo_plugin.settings import config

pytestmark = pytest.mark.slow


# ── The proof of attachment ──


def started(cls, *init, **parts):
    return ray.remote(cls).options(num_cpus=0).remote(*init, **parts)


def paths(*sites, **others):
    return {site: others.get(site, OPENRLHF / hooks.SITES[site]) for site in sites}


@pytest.fixture
def base(args):
    args.algo = SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm"))
    return args


@pytest.fixture
def ended():
    """ended(actor, ...): these are killed when the test is over."""
    actors = []
    yield lambda *more: actors.extend(more)
    for actor in actors:
        ray.kill(actor)


def test_a_process_on_another_openrlhf_or_none_stops_the_run(base, cluster, ended, tmp_path):
    other = tmp_path / "samples_generator.py"
    other.write_text("# another release\n")
    trainer = started(Site, base, paths("BasePPOTrainer", "SamplesGenerator", SamplesGenerator=other))
    ended(trainer)
    with pytest.raises(hooks.SeamError) as error:
        hooks.check_attached(base, trainer)
    node = ray.util.get_node_ip_address()
    head, first, second, advice = str(error.value).splitlines()
    assert "the run would silently be plain group_norm" in head
    assert first.startswith(f"  prepare_datasets: no report; on node {node} openrlhf is {OPENRLHF / '__init__.py'}")
    expected = OPENRLHF / hooks.SITES["SamplesGenerator"]
    assert second == f"  SamplesGenerator: node {node} runs {other}, which differs from {expected}"
    assert "depo patch --check" in advice


def test_all_sites_of_one_process_are_attached(base, cluster, ended):
    trainer = started(Site, base, paths(*hooks.SITES))
    ended(trainer)
    hooks.check_attached(base, trainer)


@pytest.mark.parametrize("late", ["generator_actor", "trainer_actor"])
def test_in_async_mode_each_process_is_waited_for(late, base, cluster, ended):
    """A constructor that takes 20 s more is late, not missing."""
    delay = {"generator_actor": 0.0, "trainer_actor": 0.0, late: 20.0}
    generator = started(Site, base, paths("prepare_datasets", "SamplesGenerator"), delay["generator_actor"])
    trainer = started(Site, base, paths("BasePPOTrainer"), delay["trainer_actor"])
    both = started(Site, base, {}, generator_actor=generator, trainer_actor=trainer)
    ended(generator, trainer, both)
    start = time.monotonic()
    hooks.check_attached(base, both)
    assert time.monotonic() - start > 15


def test_a_process_that_is_never_ready_is_an_error_with_a_sentence(base, cluster, ended, monkeypatch):
    monkeypatch.setattr(hooks, "ATTACH_TIMEOUT_S", 0.5)
    trainer = started(Site, base, {}, 600.0)
    ended(trainer)
    with pytest.raises(RuntimeError, match=r"^DEPO: a process of OpenRLHF's trainer was not ready within 0.5 s"):
        hooks.check_attached(base, trainer)


# ── Kills between any two calls ──


class Launch:
    """A launch's start-up, call by call, sync or async."""

    def __init__(self, mode, args, name, resume):
        self.mode, self.args, self.name, self.resume = mode, args, name, resume
        self.parts, self.trainer = [], None

    def calls(self):
        """The start-up's calls in OpenRLHF's order, as functions."""
        yield self.create
        yield self.make_trainer
        yield lambda: self.call(self.parts[0], "prepare")
        yield lambda: self.call(self.parts[0], "attach", "SamplesGenerator")
        yield lambda: self.call(self.parts[-1], "attach", "BasePPOTrainer")
        yield lambda: hooks.check_attached(self.args, self.trainer)
        if self.resume:
            yield lambda: self.call(self.parts[-1], "load", self.resume)

    def create(self):
        self.estimator = remote_actor.create(self.args, GROUP, hooks._snapshot_root(self.args))

    def make_trainer(self):
        count = 2 if self.mode == "async" else 1
        self.parts = [started(Process, self.args, self.name) for _ in range(count)]
        names = ("generator_actor", "trainer_actor")
        self.trainer = self.parts[0]
        if self.mode == "async":
            self.trainer = started(Site, self.args, {}, **dict(zip(names, self.parts, strict=True)))

    def call(self, part, method, *args):
        return ray.get(getattr(part, method).remote(*args), timeout=DEADLINE_S)

    def step(self, step):
        batch = self.call(self.parts[0], "draw")
        return batch, self.call(self.parts[-1], "train", batch, step)

    def end(self):
        for actor in (self.estimator, self.trainer, *self.parts):
            with contextlib.suppress(ValueError):
                ray.kill(actor)


def estimator_pid(actor):
    """The process of the estimator, which may be starting again."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return pid_of(actor)
        except ray.exceptions.RayError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kills_between_any_two_calls_of_the_start_cost_nothing_but_scores(mode, cluster, args, tmp_path, monkeypatch):
    """The estimator is killed after each call; the next is made at once. The run resumes, with its checkpoint."""
    own = arguments(args.depo.estimator.model, tmp_path / "ckpt", **{"filter.warmup_steps": 0})
    own.algo = SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm"))
    own.train.num_episodes, own.train.batch_size, own.train.max_epochs = 100, BATCH * GROUP, 1
    own.rollout.vllm_generate_batch_size = BATCH
    own.depo.enabled = True
    monkeypatch.setattr(remote_handle, "actor_name", lambda: f"estimator-{mode}")
    earlier = DifficultyEstimator(config.from_namespace(own.depo), GROUP, own.train.seed)
    for _ in range(3):
        earlier.observe([label(0, 0.5)])
    checkpoint.save(tmp_path / "ckpt" / "depo" / "global_step7", earlier.state_dict())
    latest = tmp_path / "ckpt" / "_actor" / "latest"
    latest.parent.mkdir()
    latest.write_text("global_step7")

    launch = Launch(mode, own, f"estimator-{mode}", resume=7)
    try:
        kills = 0
        for call in launch.calls():
            call()
            os.kill(estimator_pid(launch.estimator), signal.SIGKILL)
            kills += 1
        assert kills == 7
        drawn, deadline, step, status = [], time.monotonic() + DEADLINE_S, 8, {}
        while status.get("depo/kept") != BATCH or status["depo/unscored"]:  # until it filters again
            batch, status = launch.step(step)
            drawn, step = drawn + batch, step + 1
            assert time.monotonic() < deadline, launch.call(launch.parts[-1], "warnings")
            time.sleep(0.2)
        assert len(drawn) == (step - 8) * BATCH
        assert on(launch.estimator, lambda host: host.estimator.updates) >= 3, "it has the checkpoint's updates"
        said = [line for part in launch.parts for line in launch.call(part, "warnings")]
        assert sum("did not answer" in line for line in said) <= len(launch.parts)
        assert not [line for line in said if "Traceback" in line]
    finally:
        launch.end()


def test_a_fresh_run_takes_up_no_checkpoint_of_an_earlier_one(cluster, args, tmp_path, monkeypatch):
    """Killed before it has saved anything: what lies in the folder is of another run."""
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "estimator-fresh")
    own = arguments(args.depo.estimator.model, tmp_path / "ckpt")
    for run in (1, 2):
        actor = remote_actor.create(own, GROUP, hooks._snapshot_root(own))
        handle = remote_handle.connect(DEADLINE_S)
        if run == 1:
            learn(handle, label(0, 0.5))
            handle.save("global_step1", set())
        else:
            os.kill(pid_of(actor), signal.SIGKILL)
            estimator_pid(actor)
            assert on(actor, lambda host: host.estimator.updates) == 0
        ray.kill(actor)
    assert checkpoint.load(tmp_path / "ckpt" / "depo" / "global_step1")["updates"] == 1


# ── Builds that fail ──


def test_an_estimator_that_cannot_be_built_at_the_start_stops_the_run_with_the_reason(
    cluster, args, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "estimator-broken")
    own = arguments(str(tmp_path / "nowhere"), tmp_path / "ckpt")
    with pytest.raises(RuntimeError) as error:
        remote_actor.create(own, GROUP, str(tmp_path))
    told = str(error.value)
    assert told.startswith("DEPO: the difficulty estimator cannot be built on node ")
    assert f"EncoderError: --depo.estimator.model {tmp_path / 'nowhere'}: cannot be loaded" in told


def test_a_restarted_estimator_that_cannot_be_built_says_why_once_and_comes_back(
    cluster, args, tmp_path, monkeypatch, caplog
):
    """A node without the encoder: the process stays, answers with the reason, and tries again later."""
    monkeypatch.setattr(remote_handle, "actor_name", lambda: "estimator-homeless")
    encoder = Path(tiny_encoder.write(tmp_path / "encoder"))
    own = arguments(str(encoder), tmp_path / "ckpt")
    actor = remote_actor.create(own, GROUP, hooks._snapshot_root(own))
    handle = remote_handle.connect(DEADLINE_S)
    learn(handle, label(0, 0.5))
    assert isinstance(handle.save("global_step1", set()), float)
    saved = score(handle)
    shutil.move(encoder, tmp_path / "away")
    os.kill(pid_of(actor), signal.SIGKILL)
    pid = estimator_pid(actor)
    for _ in range(5):
        assert score(handle) is None
        assert learn(handle, label(0, 0.5)) is None
    (warning,) = warnings_of(caplog)
    assert "did not answer (" in warning
    assert estimator_pid(actor) == pid, "the process stays"
    shutil.move(tmp_path / "away", encoder)

    def soon(host):
        host._retry_at = 0.0

    on(actor, soon)
    deadline = time.monotonic() + DEADLINE_S
    while len(warnings_of(caplog)) < 2:
        score(handle)
        learn(handle, label(0, 0.5))
        assert time.monotonic() < deadline
    assert "answers again" in warnings_of(caplog)[1]
    assert on(actor, lambda host: host.estimator.updates) > saved.updates, "it went on from its checkpoint"
    ray.kill(actor)
