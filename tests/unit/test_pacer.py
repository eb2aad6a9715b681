"""How long the estimator may read, by when it was asked and told; and what a slow encoder costs on a virtual clock."""

import pytest

from benchmarks import loader as bench
from depo_plugin.remote import pacer
from depo_plugin.remote.pacer import FIRST_S, LEAST_S, SHARE, WAITED_SHARE, Pacer


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def made(clock):
    """Three steps of 60 s of rollouts and 20 s of training; the last question comes at 160."""
    made = Pacer(clock)
    assert made.for_scores() == pytest.approx(SHARE * FIRST_S)
    for start in (-80.0, 0.0, 80.0):
        made.asked(start, waited_for=False)
        made.judged(start + 60.0)
    made.asked(160.0, waited_for=False)
    return made


def test_scores_may_take_as_long_as_the_rollouts_did(made, clock):
    clock.now = 160.0
    assert made.for_scores() == pytest.approx(SHARE * 60)
    clock.now = 190.0  # this call waited for the one before
    assert made.for_scores() == pytest.approx(SHARE * 60 - 30)
    clock.now = 1000.0
    assert made.for_scores() == LEAST_S


def test_scores_that_a_replacement_would_wait_for_take_no_longer_than_those_that_training_waits_for(clock):
    """With dynamic filtering the first rejected group draws from the next batch, in the middle of the rollouts."""
    made = Pacer(clock, replaces=True)
    made.asked(0.0, waited_for=False)
    made.judged(60.0)
    made.asked(80.0, waited_for=False)
    assert made.for_scores() == LEAST_S
    made.judged(140.0)
    clock.now = 140.0
    assert made.for_learning() == pytest.approx(SHARE * 20)  # the rest is read while the policy trains


def test_learning_may_take_as_long_as_training_did(made, clock):
    made.judged(220.0)
    clock.now = 221.0
    assert made.for_learning() == pytest.approx(SHARE * 20 - 1)
    clock.now = 240.0
    assert made.for_learning() == 0.0


def test_a_question_that_training_waits_for_ends_the_training_and_begins_no_rollouts(made, clock):
    made.judged(220.0)
    made.asked(230.0, waited_for=True)
    made.asked(235.0, waited_for=False)
    made.judged(285.0)
    clock.now = 285.0
    assert made.for_learning() == pytest.approx(SHARE * 10)
    made.asked(300.0, waited_for=False)
    clock.now = 300.0
    assert made.for_scores() == pytest.approx(SHARE * 50)


def test_those_who_wait_wait_for_a_hundredth_of_a_step_or_two_seconds(made):
    assert made.for_those_who_wait() == LEAST_S
    made._rolling.extend([380.0, 390.0])
    assert made.for_those_who_wait() == pytest.approx(WAITED_SHARE * 400)


def test_groups_without_a_question_before_them_leave_the_lengths_as_they_were(clock):
    """Asynchronous training may train two batches between two questions."""
    made = Pacer(clock)
    made.asked(0.0, waited_for=False)
    made.judged(50.0)
    made.judged(90.0)
    assert list(made._rolling) == [FIRST_S, 50.0]
    made.asked(100.0, waited_for=False)
    assert list(made._training) == [FIRST_S, 10.0]


def test_an_evaluation_in_one_step_is_not_taken_for_the_next_one(made, clock):
    made.judged(220.0)
    made.asked(600.0, waited_for=False)  # 360 s of evaluation
    made.judged(660.0)
    clock.now = 660.0
    assert made.for_learning() == pytest.approx(SHARE * 20)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "batch"), [(126, 128), (12, 256), (12, 512)])
def test_a_slow_encoder_blocks_no_step_and_decides_what_its_speed_allows(monkeypatch, rate, batch):
    monkeypatch.setattr(bench, "POOL", 40_000)
    found = bench.paced(rate, batch, 60)
    assert found["blocked"] <= 0.01
    assert found["first_s"] < 3
    assert found["of_allowed"] >= 0.9
    assert (found["decided"] > 0.98) == (rate * 60 > batch / bench.WANTED)


@pytest.mark.slow
def test_without_the_pacer_that_test_fails(monkeypatch):
    monkeypatch.setattr(bench, "POOL", 40_000)
    monkeypatch.setattr(pacer.Pacer, "for_scores", lambda self: 1e9)
    assert bench.paced(12, 512, 60)["blocked"] > 0.1
