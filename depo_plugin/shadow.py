"""Shadow mode: OpenRLHF's own loader and order; the estimator is shown every prompt, and nothing is filtered.

inner loader -> prompt -> rollout      (as without DEPO)
     '-> every batch: shown to the estimator, which scores it and notes what the filter would have done
"""

from collections.abc import Iterator
from typing import Any

from depo_plugin.stream import Item


class ShadowLoader:
    """Stands in for OpenRLHF's prompt loader and gives out exactly what that one gives out."""

    def __init__(self, inner: Any, estimator: Any, batch_size: int):
        """Take OpenRLHF's loader, which gives out one prompt at a time, and leave its random state alone.

        estimator: a RemoteEstimator; batch_size: prompts that are shown to it at once.
        """
        self._inner, self._estimator, self._batch_size = inner, estimator, batch_size
        self._unshown: list[Item] = []

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._inner:
            source, prompt, label = (column[0] for column in batch[:3])
            self._unshown.append(Item(str(source), prompt, str(label)))
            if len(self._unshown) == self._batch_size:
                self.show()
            yield batch
        self.show()

    def show(self) -> None:
        """Show the estimator the prompts that were given out since the last call, without waiting."""
        if self._unshown:
            sources, prompts, labels = map(list, zip(*self._unshown, strict=True))
            self._estimator.shadow(prompts, labels, sources)
            self._unshown = []

    def refund(self, count: int) -> None:
        """Do nothing: groups that dynamic filtering throws away are replaced by OpenRLHF alone."""

    def state_dict(self) -> dict:
        """Return the inner loader's state."""
        return self._inner.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore the inner loader's state."""
        self._inner.load_state_dict(state)
