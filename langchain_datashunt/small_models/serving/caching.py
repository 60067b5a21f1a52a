"""A bounded memory of what was computed for an input, so that an exact repeat costs a hash; inputs are not kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt.inputs import text_reader

V = TypeVar("V")


class ResultCache(Generic[V]):
    """What was computed for the inputs that were asked for last, up to `size` of them; for any number of threads.

    Args:
        size: Inputs remembered at the most; the one not asked for the longest goes first.
        key: From an input to 16 bytes that stand for it; None for texts.
    """

    def __init__(self, size: int, key: Callable[[Any], bytes] | None = None) -> None:
        self.size = size
        self.key = key or text_reader().key
        self.hits = 0
        """Inputs that were found."""
        self.misses = 0
        """Inputs that had to be computed."""
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Forget all: another thread of the parent may have been about to change it."""
        self._found: OrderedDict[bytes, V] = OrderedDict()
        self._mutex = threading.Lock()

    def clear(self) -> None:
        """Forget all; what is being computed now is not kept either."""
        with self._mutex:
            self._found = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get_all(
        self, texts: Sequence[Any], compute: Callable[[list[Any]], Sequence[V]], keep: Callable[[V], bool] | None = None
    ) -> list[V]:
        """The value of each input; those not known are computed in one call, each once.

        Args:
            texts: `n` inputs.
            compute: From unknown inputs to their values.
            keep: Which of these are remembered; None for all.
        """
        keys = [self.key(text) for text in texts]
        values: dict[bytes, V] = {}
        with self._mutex:
            found = self._found
            for key in keys:
                if (known := found.get(key)) is not None:
                    found.move_to_end(key)
                    values[key] = known
            new = {key: text for key, text in zip(keys, texts, strict=True) if key not in values}
            self.hits += len(texts) - len(new)
            self.misses += len(new)
        if new:
            computed = dict(zip(new, compute(list(new.values())), strict=True))
            values.update(computed)
            with self._mutex:
                found.update({key: one for key, one in computed.items() if keep is None or keep(one)})
                while len(found) > self.size:
                    found.popitem(last=False)
        return [values[key] for key in keys]
