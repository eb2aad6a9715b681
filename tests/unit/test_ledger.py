"""The ledger of decisions: importance weights, the unfiltered stream and warnings, by hand. No model is loaded."""

import dataclasses

import numpy as np
import pytest
from outcomes import GROUP, group, record_of, rejected

from depo_plugin.estimator import ledger as ledger_module
from depo_plugin.estimator.ledger import Ledger
from depo_plugin.messages import Reason


@pytest.fixture
def ledger():
    return Ledger()


def come_back(ledger, labels, warn=True):
    """These groups come back in one step; return its metrics."""
    kept = ledger.take(labels, warn=warn)
    y_B, signal_B = (np.array([getattr(label, name) for label in labels]) for name in ("y", "signal"))
    return ledger.metrics(kept, y_B, signal_B, GROUP)


def test_weights_of_kept_prompts_are_those_of_their_decisions(ledger):
    explored = record_of(group("1+1=", 0), q=0.05, share=0.4, reason=Reason.EXPLORED)
    ledger.record([explored, record_of(group("2+2=", 0), share=0.4), rejected(0.1, 0.2, "5+5=")])
    ledger.record([record_of(group("1+1=", 0), share=0.7)])
    ask = (["2+2=", "1+1=", "never", "1+1=", "1+1=", "5+5="], ["answer"] * 6)
    expected = ([1.0, 0.05, 1.0, 1.0, 1.0, 1.0], [0.4, 0.4, 1.0, 0.7, 1.0, 1.0])
    assert ledger.keep_weights(*ask) == expected
    assert ledger.keep_weights(*ask) == expected, "asking takes nothing off the record"
    (taken,) = ledger.take([group("1+1=", 2)], warn=True)
    assert (taken.q, taken.share, taken.reason) == (0.05, 0.4, "explored"), "oldest first"
    assert ledger.keep_weights(["1+1=", "1+1="], ["answer"] * 2) == ([1.0, 1.0], [0.7, 1.0])


# ── The unfiltered stream ──


def test_the_unfiltered_stream_by_hand(ledger):
    """Seven scanned: 2 pass, 1 explored (ε = 0.1), 1 forced, 1 unscored, 2 rejected. p̂ sums to 2.6, V to 3.1.

    reward = (2.6 + (1 − 0.8) + (0.25 − 0.5) + (0 − 0.1)/0.1 + 0.25) / 7, without the forced one (outside the claim).
    r₀ = (3.1 + (0 − 0.6) + (1 − 0.9) + (0 − 0.5)/0.1 + 1) / 7, also without it, is below 0.01, which counts instead.
    """
    labels = {i: group(f"{i}=", successes) for i, successes in enumerate((4, 1, 0, 2, 1))}
    ledger.record(
        [
            record_of(labels[0], p=0.8, v=0.6),
            record_of(labels[1], p=0.5, v=0.9),
            record_of(labels[2], p=0.1, v=0.5, q=0.1, reason=Reason.EXPLORED),
            record_of(labels[3], p=0.9, v=0.5, reason=Reason.FORCED),
            record_of(labels[4], p=None, v=None, reason=Reason.UNSCORED),
            rejected(0.2, 0.3, "5="),
            rejected(0.1, 0.3, "6="),
        ]
    )
    assert (3.1 - 0.6 + 0.1 - 5.0 + 1.0) / 7 < 0.01
    rejects = {"too_easy": 0.0, "too_hard": 1.0}
    assert come_back(ledger, [labels[i] for i in (3, 0, 4, 2, 1)]) == pytest.approx(
        {"scanned": 7, "kept": 5, "explored": 1, "forced": 1, "unscored": 1, "unmatched": 0, "keep_rate": 5 / 7}
        | {"reward_unfiltered": (2.6 + 0.2 - 0.25 - 1.0 + 0.25) / 7, "effective_gain": 0.6 / 0.01}
        | rejects
    )
    assert ledger.rollouts_saved == pytest.approx(GROUP * (3 / 0.01 - 5))


def test_what_is_estimated_of_the_unfiltered_stream_fades_over_steps(ledger):
    """Step 1: V sums to 1.2 over 2, both kept, signals 1 and 0: 1.2 + 0.4 − 0.6 = 1 over 2. Step 2: V = 0.95 and a
    signal, kept with q = 0.5, over 4 with three rejected of 0.1: 0.3 + 0.95 + 0.05 / 0.5 = 1.35.
    r₀ = (0.9·1 + 1.35) / (0.9·2 + 4).

    Pass rates: 0.25 and 1 were kept, 1.25 over 2. Then p̂ = 0.5 and 0.75 observed, over 4 with three rejected of
    0.1: 0.3 + 0.5 + 0.25 / 0.5 = 1.3. Step 3 finds no decision and changes nothing.
    """
    one, two, three = group("1=", 1), group("2=", 4), group("3=", 3)
    ledger.record([record_of(one, v=0.6), record_of(two, v=0.6)])
    found = come_back(ledger, [one, two])
    assert found["effective_gain"] == pytest.approx(0.5 / 0.5)
    assert found["reward_unfiltered"] == pytest.approx(1.25 / 2)
    assert ledger.rollouts_saved == pytest.approx(0.0)
    ledger.record([record_of(three, v=0.95, q=0.5), *(rejected(0.1, 0.1, str(i)) for i in range(3))])
    rate = (0.9 * 1 + 1.35) / (0.9 * 2 + 4)
    resumed = Ledger()
    resumed.load_state_dict(ledger.state_dict())
    for made in (ledger, resumed):
        found = come_back(made, [three])
        assert found["effective_gain"] == pytest.approx(1 / rate)
        assert found["reward_unfiltered"] == pytest.approx((0.9 * 1.25 + 1.3) / (0.9 * 2 + 4))
        assert made.rollouts_saved == pytest.approx(GROUP * (1 / rate - 1))
        assert come_back(made, [three])["reward_unfiltered"] == found["reward_unfiltered"]


def test_rejected_candidates_are_told_apart_by_the_predicted_pass_rate(ledger):
    """A batch that kept two rejected 0.9, 0.5 and 0.1; one that kept nothing before it rejected 0.2 and 0.3. So each
    of the two carries 1 easy and 1.5 hard ones. The next batch rejected one easy one, the last one none."""
    batches = [[], [group("1=", 1), group("2=", 1)], [group("3=", 1)], [group("4=", 1)]]
    for kept, ps in zip(batches, [(0.2, 0.3), (0.9, 0.5, 0.1), (0.7,), ()], strict=True):
        ledger.record([*(rejected(p, 0.1, f"{p}") for p in ps), *map(record_of, kept)])
    resumed = Ledger()
    resumed.load_state_dict(ledger.state_dict())
    (one, two), (three,), (four,) = batches[1:]
    for made in (ledger, resumed):
        for labels, easy in (([one], 1 / 2.5), ([two, three], 2 / 3.5)):
            found = come_back(made, labels)
            assert (found["too_easy"], found["too_hard"]) == (pytest.approx(easy), pytest.approx(1 - easy))
        assert not {"too_easy", "too_hard"} & set(come_back(made, [four])), "nothing was rejected"


@pytest.mark.parametrize(
    ("plans", "steps", "scanned"),
    [
        ([(2, 1), (2, 2)], [[0, 1], [2, 3], [9]], [3, 4, None]),
        ([(4, 2)], [[0, 1, 2], [3]], [4.5, 1.5]),
        ([(0, 5), (1, 0)], [[0]], [6]),
    ],
    ids=["planned ahead", "held over by dynamic filtering", "nothing kept"],
)
def test_what_a_plan_scanned_is_counted_when_its_groups_come_back(ledger, plans, steps, scanned):
    """plans: how many prompts each kept and rejected; steps: numbers of the prompts whose groups come back."""
    number = 0
    for kept, others in plans:
        labels = [group(f"{number + i}=", 2) for i in range(kept)]
        ledger.record([*map(record_of, labels), *(rejected(0.1, 0.1, f"{number} {i}") for i in range(others))])
        number += kept
    for step, expected in zip(steps, scanned, strict=True):
        found = come_back(ledger, [group(f"{i}=", 2) for i in step])
        assert found.get("scanned") == expected
        assert ("keep_rate" in found) == (expected is not None)
        assert found["unmatched"] == (expected is None)


def test_prompts_that_never_come_back_are_given_up(ledger):
    for i in range(300):
        ledger.record([record_of(group(f"{i}=", 0)), *(rejected(0.1, 0.1, f"{i}.{j}") for j in range(8))])
    assert len(ledger.state_dict()["kept"]) == ledger_module.FORGET_AFTER


# ── Data sources ──


def test_data_sources_are_told_apart_by_hand(ledger):
    """Two of math kept and one rejected, one of code kept and two rejected; the counts are of one step, then 0."""
    one, two, three = group("1=", 4), group("2=", 1), group("3=", 2)
    ledger.record([record_of(one), record_of(two), rejected(0.1, 0.1, "x")])
    assert "kept/math" not in come_back(ledger, [one]), "one source alone: nothing to tell apart"
    ledger.record([record_of(three, datasource="a/b"), *(rejected(0.1, 0.1, i, datasource="a/b") for i in "yz")])
    counts = {"kept/math": 2.0, "rejected/math": 1.0, "kept/a_b": 1.0, "rejected/a_b": 2.0}
    for labels, expected in (
        ([two, three], counts | {"pass_rate/math": 0.25, "pass_rate/a_b": 0.5}),
        ([group("4=", 1)], dict.fromkeys(counts, 0.0)),
    ):
        found = come_back(ledger, labels)
        assert {name: value for name, value in found.items() if "/" in name} == expected


def test_thousands_of_data_sources_are_not_thousands_of_metrics(ledger):
    ledger.record([rejected(0.1, 0.1, f"{i}=", datasource=f"source {i}") for i in range(1000)])
    found = come_back(ledger, [group("1=", 1)])
    counts = [value for name, value in found.items() if name.startswith("rejected/")]
    assert len(counts) == ledger_module.SOURCES + 1
    assert sum(counts) == 1000
    assert found["rejected/others"] == 1000 - ledger_module.SOURCES


# ── Groups that come back with another prompt or label ──


def said(caplog):
    return [record.getMessage() for record in caplog.records if "came back with another" in record.getMessage()]


def send(ledger, step, lost=0):
    """Return four groups of which all but the first `lost` are on record."""
    given = [group(f"{step}+{i}=", 4) for i in range(4)]
    ledger.record(list(map(record_of, given[lost:])))
    return given


def test_groups_that_come_back_as_others_are_said_once(ledger, caplog):
    """An agent adds a hint to each prompt, so no group finds its decision; the warning shows one example."""
    for step in range(6):
        others = [dataclasses.replace(label, prompt=label.prompt + " Hint!") for label in send(ledger, step)]
        come_back(ledger, others, warn=step >= 2)
        assert len(said(caplog)) == (step >= 2), "after the warm-up"
    (told,) = said(caplog)
    assert told.startswith("DEPO: 4 of 4 groups came back with another prompt or label than they were sent with")
    assert "Sent, for example: prompt ...'0+0=', label 'answer'" in told
    assert "Came back: prompt ...'2+0= Hint!', label 'answer'" in told
    assert "the agent, the reward function" in told


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_groups_that_are_found_or_lost_by_chance_are_not_said(lost, ledger, caplog):
    """Up to half of the groups have no decision, as after an answer that came too late."""
    for step in range(6):
        come_back(ledger, send(ledger, step, lost))
    assert said(caplog) == []


def test_after_a_restart_lost_decisions_are_no_fault_of_the_prompts(ledger, caplog):
    """Three batches were on their way when the estimator died; their groups come back beside new decisions."""
    ledger.expect_unmatched()  # as the actor does
    on_their_way = [send(Ledger(), step) for step in range(3)]
    for step in range(3, 8):
        on_their_way.append(send(ledger, step))
        come_back(ledger, on_their_way.pop(0))
    for batch in on_their_way:
        come_back(ledger, batch)
    assert said(caplog) == []
    for step in range(8, 12):
        come_back(ledger, [dataclasses.replace(label, label="another") for label in send(ledger, step)])
    assert len(said(caplog)) == 1, "the warning is on again once groups were found"
