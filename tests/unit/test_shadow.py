"""Shadow mode: OpenRLHF's own prompts in its own order, and an estimator that is shown all of them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from depo_launch import Recorder, launch, resolved
from numbered_pool import Prompts, inner_loader

from depo_plugin import hooks
from depo_plugin.estimator.ledger import Ledger
from depo_plugin.estimator.metrics import said
from depo_plugin.filter import Decision, Judged, record_of
from depo_plugin.messages import Label, Reason
from depo_plugin.shadow import ShadowLoader


class Shown:
    """An estimator that notes what it is shown."""

    def __init__(self):
        self.batches = []

    def shadow(self, prompts, labels, datasources):
        self.batches.append(list(zip(prompts, labels, datasources, strict=True)))


def drawn(loader, count=None):
    return [batch[1][0] for batch in itertools.islice(loader, count)]


def test_it_gives_out_what_the_inner_loader_gives_out_also_after_a_resume():
    torch.manual_seed(3)
    plain = inner_loader(20)
    expected, state = drawn(plain, 13), plain.state_dict()
    torch.manual_seed(3)
    shadow = ShadowLoader(inner_loader(20), Shown(), 8)
    assert drawn(shadow, 13) == expected
    assert repr(shadow.state_dict()) == repr(state)
    rests = []
    for resumed in (inner_loader(20), ShadowLoader(inner_loader(20), Shown(), 8)):
        resumed.load_state_dict(state)
        rests.append(drawn(resumed))
    assert rests[0] == rests[1]
    assert sorted(expected + rests[0]) == sorted(f"prompt {i}" for i in range(20))
    assert len(shadow) == len(plain) == 20


def test_it_leaves_every_random_stream_alone():
    def after(make):
        torch.manual_seed(3)
        drawn(make(inner_loader(20)))
        return torch.get_rng_state()

    assert after(lambda inner: inner).equal(after(lambda inner: ShadowLoader(inner, Shown(), 8)))


def test_every_prompt_is_shown_once_in_batches_before_the_last_one_is_rolled_out():
    seen = Shown()
    loader = iter(ShadowLoader(inner_loader(20), seen, 8))
    first = drawn(loader, 8)
    assert [prompt for prompt, _, _ in seen.batches[0]] == first
    rest = drawn(loader)
    assert [len(batch) for batch in seen.batches] == [8, 8, 4]
    assert sorted(itertools.chain(*seen.batches)) == sorted(
        (prompt, label, source) for source, prompt, label, _ in (Prompts(20)[i] for i in range(20))
    )
    assert len(first + rest) == 20


def judged(q, signal, reason=Reason.SHADOW):
    return Judged(0.5, 0.5, Decision(True, q, reason)), signal


def test_what_the_filter_would_have_done_is_weighted_by_q():
    """q = 1, 1, .5, .1, of which the first and third have a signal: kept 2.6 of 4, 1.5 of 2.6 with a signal."""
    ledger = Ledger()
    groups = [judged(1.0, True), judged(1.0, False), judged(0.5, True), judged(0.1, False)]
    prompts = [f"prompt {i}" for i in range(len(groups))]
    ledger.record([record_of("s", prompt, "l", one, 1.0) for prompt, (one, _) in zip(prompts, groups, strict=True)])
    labels = [Label(p, "l", 0.5, None, 8, signal, 80) for p, (_, signal) in zip(prompts, groups, strict=True)]
    signal = np.array([label.signal for label in labels])
    found = ledger.metrics(ledger.take(labels, warn=False), np.full(4, 0.5), signal, 8)
    assert found["shadow_keep_rate"] == pytest.approx(2.6 / 4)
    assert found["shadow_effective_ratio"] == pytest.approx(1.5 / 2.6)
    assert found["shadow_unfiltered_ratio"] == 0.5
    # Everything was rolled out, so the unfiltered stream is what was seen: no weights 1/q.
    assert found["keep_rate"] == found["effective_gain"] == 1.0
    assert found["reward_unfiltered"] == 0.5
    line = said(10, [found | {"effective_ratio": 0.5, "pred_mean": 0.5, "target_mean": 0.5}])
    assert "the filter would have kept 65% of the groups; 58% of those had a signal, 50% of all groups" in line
    copy = Ledger()
    copy.load_state_dict(ledger.state_dict())
    assert copy.shadow_metrics() == ledger.shadow_metrics()


def test_groups_of_the_warm_up_are_not_counted():
    ledger = Ledger()
    ledger.record([record_of("s", "p", "l", judged(1.0, True, Reason.WARMUP)[0], 1.0)])
    ledger.metrics(ledger.take([Label("p", "l", 0.5, None, 8, True, 80)], warn=False), np.ones(1), np.ones(1), 8)
    assert ledger.shadow_metrics() == {}


def test_a_launch_in_shadow_mode_says_so_and_weights_nothing(capsys, monkeypatch):
    args = resolved("--depo.shadow", "--depo.advantage.importance_rescale")
    assert "DEPO is in shadow mode (nothing is filtered or weighted" in capsys.readouterr().out
    assert args.depo.shadow
    handle = Recorder(metrics={}, weights=([0.1], [0.5]))
    loader = SimpleNamespace(show=lambda: handle.calls.append(("show",)))
    monkeypatch.setattr(hooks, "_process", hooks.Process(handle=handle, loader=loader))
    advantages = torch.ones(2, 3)
    experience = SimpleNamespace(
        index=[0, 1],
        prompts=["p", "p"],
        labels=["l", "l"],
        rewards=torch.tensor([float("nan"), 1.0]),  # not ours to stop
        scores=torch.tensor([float("nan"), 1.0]),
        action_log_probs=torch.zeros(2, 3),
        action_mask=torch.ones(2, 3),
        advantages=advantages,
    )
    hooks.observe(args, [experience], 1)
    assert advantages.equal(torch.ones(2, 3))
    assert [call[0] for call in handle.calls] == ["show", "judge", "learn"]


def test_without_depo_the_flag_does_nothing_and_says_so(capsys):
    args = launch("--depo.shadow", **{"depo.chosen": []})
    hooks.resolve(args)
    assert "DEPO is off" in capsys.readouterr().out
    assert not hooks.enabled(args)
