"""The endless stream of prompts: the pool in a new order each pass. Position -> prompt and exploration draw.

Nothing here is state: both kinds of chance follow from (seed, Stream, pass).
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from depo_plugin.messages import Stream, prompt_key


class Item(NamedTuple):
    """What is read of a dataset's entry to judge it; the label as text."""

    datasource: str
    prompt: str
    label: str


class PromptStream:
    """A dataset as a stream of positions 0, 1, 2, ...: one pass takes len(stream) of them."""

    def __init__(self, dataset: Any, seed: int):
        """Take the pool. dataset[i]: (datasource, prompt, label, image). Raises ValueError if it is empty."""
        self._dataset, self._seed = dataset, seed
        self._size = len(dataset)
        if not self._size:
            raise ValueError(
                "DEPO: the prompt dataset is empty. Check --data.prompt_dataset, --data.prompt_split and "
                "--data.max_samples."
            )
        self._drawn: dict[tuple[Stream, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._size

    def entry(self, position: int) -> Any:
        """Return the dataset's own entry at a position."""
        return self._dataset[self._index(position)]

    def item(self, position: int) -> Item:
        """Return what is judged at a position. Raises ValueError if the prompt is not text."""
        return self._item(self._index(position))

    def uniform(self, position: int) -> float:
        """Return the exploration draw at a position, in [0, 1)."""
        pass_no, place = divmod(position, self._size)
        return float(self._draw(Stream.EXPLORE, pass_no)[place])

    def digest(self) -> str:
        """Return 16 hex digits that tell pools apart, by their prompts' keys in the dataset's order."""
        digest = hashlib.blake2b(digest_size=8)
        for index in range(self._size):
            item = self._item(index)
            digest.update(prompt_key(item.prompt, item.label).to_bytes(8, "big"))
        return digest.hexdigest()

    def _index(self, position: int) -> int:
        pass_no, place = divmod(position, self._size)
        return int(self._draw(Stream.ORDER, pass_no)[place])

    def _item(self, index: int) -> Item:
        source, prompt, label, *_ = self._dataset[index]
        if not isinstance(prompt, str):
            raise ValueError(
                f"DEPO: prompt {index} of --data.prompt_dataset is not text but a {type(prompt).__name__}: "
                f"{str(prompt)[:200]}. If these are chat messages, add --data.apply_chat_template; else name the "
                "column that holds the text with --data.input_key."
            )
        return Item(source, prompt, str(label))

    def _draw(self, stream: Stream, pass_no: int) -> np.ndarray:
        """Return this pass's order, or its exploration draws in [0, 1) by place in it."""
        key = (stream, pass_no)
        if key not in self._drawn:
            rng = np.random.default_rng([self._seed, stream, pass_no])
            values = rng.permutation(self._size) if stream is Stream.ORDER else rng.random(self._size)
            # A batch may reach over the end of a pass. Older passes are hardly asked for, and can be drawn again.
            self._drawn = {k: v for k, v in self._drawn.items() if k[1] >= pass_no - 1} | {key: values}
        return self._drawn[key]
