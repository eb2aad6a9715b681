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


def account(prompts, known=None):
    stream = PromptStream([f"prompt {i}" for i in range(POOL)], SEED)
    return places(stream, batches_of(prompts, BATCH, GROUP), MOST, known=known)


def test_batches_lie_one_behind_the_other_on_the_stream():
    assert account(log()) == [(0, 8), (8, 12), (12, 23), (23, 34)]


def test_a_batch_that_was_filled_up_ends_with_its_scan():
    """Twelve candidates were scanned for the second batch, though its last prompt is the eighth of them."""
    kept = [KEPT[0], [8, 9, 10, 15], [20, 22, 23, 24]]
    assert account(log(kept), known={2: 20}) == [(0, 8), (8, 20), (20, 25)]
    assert account(log(kept), known={3: 25})[2][1] == 25
    with pytest.raises(ValueError, match=r"batch 2: ends at one of \[16, 20\b.*\], not at 19"):
        account(log(kept), known={2: 19})
    with pytest.raises(ValueError, match="batch 3"):
        account(log([*kept[:2], [18, 22, 23, 24]]), known={2: 20})  # 18 was passed over with the second batch


@pytest.mark.parametrize(
    ("kept", "known"),
    [
        ([KEPT[0], KEPT[0], *KEPT[1:]], None),  # the same batch again
        ([KEPT[1], KEPT[0], *KEPT[2:]], None),  # out of order
        ([KEPT[0], [8, 9, 10, 3], *KEPT[2:]], None),  # one prompt of the batch before again
        ([KEPT[0], *KEPT[2:]], {1: 8}),  # a batch is missing: more was passed over for the next than may be
    ],
)
def test_what_was_drawn_twice_or_not_in_turn_has_no_place(kept, known):
    with pytest.raises(ValueError, match=rf"^batch \d: .* not among {MOST} candidates from any of "):
        account(log(kept), known)


def test_a_response_or_a_group_too_many_or_too_few_is_seen():
    whole = log()
    with pytest.raises(ValueError, match=r"batch 1: 'prompt \d+' has 1 responses"):
        account(whole[1:])
    with pytest.raises(ValueError, match="batch 4 has 3 groups, not 4"):
        account(log([*KEPT[:3], KEPT[3][:3]]))
    with pytest.raises(ValueError, match="batch 5 has 1 groups, not 4"):
        account(log([*KEPT, [35]]))
