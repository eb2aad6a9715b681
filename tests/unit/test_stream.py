"""Positions of the endless stream, and the key by which a prompt is known again."""

import numpy as np
import pytest
from numbered_pool import Prompts, stream

from depo_plugin.messages import prompt_key
from depo_plugin.stream import Item, PromptStream


def test_a_position_gives_the_same_prompt_and_draw_whenever_it_is_asked():
    """Passes are drawn when they are needed and forgotten later; each has another order and other draws."""
    prompts = PromptStream(Prompts(50), seed=3)
    order = stream(50, 3, 200)
    assert len({tuple(order[start : start + 50]) for start in range(0, 200, 50)}) == 4
    forwards = [(prompts.item(i), prompts.uniform(i)) for i in range(200)]
    assert [item for item, _ in forwards] == [Item(f"source {i % 2}", f"prompt {i}", f"label {i}") for i in order]
    assert len({draw for _, draw in forwards}) == 200
    assert all(0 <= draw < 1 for _, draw in forwards)
    some = np.random.default_rng(0).permutation(200).tolist()
    assert [(prompts.item(i), prompts.uniform(i)) for i in some] == [forwards[i] for i in some]
    assert prompts.entry(7) == Prompts(50)[order[7]]
    assert [PromptStream(Prompts(50), seed=4).uniform(i) for i in range(9)] != [draw for _, draw in forwards[:9]]


@pytest.mark.parametrize(("before", "after"), [("", ""), ("a" * 900, " is 2026-01-0"), ("Today Date:", " 32nd")])
def test_prompts_of_other_texts_or_labels_have_other_keys(before, after):
    """A date in the problem is part of it: only the date of a chat template is left out."""
    texts = [f"{before}How many days from 2026-01-0{i} to 2026-11-26{after}? The date: 2026-0{i}-01" for i in range(9)]
    assert len({prompt_key(text, label) for text in texts for label in ("", "a", "b")}) == 27
    assert prompt_key("ab", "c") != prompt_key("a", "bc")
