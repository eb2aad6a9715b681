"""The soak's account of batches sees what it is to see: a prompt, a group or a batch that is lost or doubled."""

import numpy as np
import pytest

from benchmarks.soak import PromptStream, batches_of, places

POOL, SEED, BATCH, GROUP, MOST = 30, 5, 4, 2, 12
ORDER = [i for turn in range(3) for i in np.random.default_rng([SEED, 0, turn]).permutation(POOL)]
KEPT = [[0, 2, 3, 7], [8, 9, 10, 11], [13, 20, 21, 22], [27, 29, 30, 33]]  # the last one reaches into the second pass


def log(kept=KEPT):
    """The reward log of these positions: each batch's responses in the order of another shuffle."""
    rng = np.random.default_rng(1)
    shuffled = [rng.permutation([position for position in batch for _ in range(GROUP)]) for batch in kept]
    return [f"prompt {ORDER[position]}" for batch in shuffled for position in batch]


def account(prompts):
    stream = PromptStream([f"prompt {i}" for i in range(POOL)], SEED)
    return list(places(stream, batches_of(prompts, BATCH, GROUP), MOST))


def test_batches_lie_one_behind_the_other_on_the_stream():
    assert account(log()) == [(0, 8), (8, 12), (12, 23), (23, 34)]


@pytest.mark.parametrize(
    "kept",
    [
        [KEPT[0], KEPT[0], *KEPT[1:]],  # the same batch again
        [KEPT[1], KEPT[0], *KEPT[2:]],  # out of order
        [KEPT[0], [8, 9, 10, 3], *KEPT[2:]],  # one prompt of the batch before again
        [KEPT[0], *KEPT[2:]],  # a batch is missing, and with it more candidates are passed over than may be
    ],
)
def test_what_was_drawn_twice_or_not_in_turn_has_no_place(kept):
    with pytest.raises(ValueError, match=rf"^batch \d: .* not among the {MOST} candidates from \d+ on"):
        account(log(kept))


def test_a_response_or_a_group_too_many_or_too_few_is_seen():
    whole = log()
    with pytest.raises(ValueError, match=r"batch 1: 'prompt \d+' has 1 responses"):
        account(whole[1:])
    with pytest.raises(ValueError, match="batch 4 has 3 groups, not 4"):
        account(log([*KEPT[:3], KEPT[3][:3]]))
    with pytest.raises(ValueError, match="batch 5 has 1 groups, not 4"):
        account(log([*KEPT, [35]]))
