"""A bounded cache of computed results, keyed by a hash of the input. Inputs are not stored."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt.inputs import text_reader

V = TypeVar("V")


class ResultCache(Generic[V]):
    """Thread-safe LRU cache of results by input.

    Args:
        size: Maximum number of entries. The least recently used is evicted first.
        key: Function from an input to its 16-byte hash. None hashes texts.
    """

    def __init__(self, size: int, key: Callable[[Any], bytes] | None = None) -> None:
        self.size = size
        self.key = key or text_reader().key
        self.hits = 0
        """Number of inputs that were found in the cache or repeated within a call."""
        self.misses = 0
        """Number of inputs that were computed."""
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Clear the cache in a forked child, since a thread of the parent may have been changing it."""
        self._found: OrderedDict[bytes, V] = OrderedDict()
        self._mutex = threading.Lock()

    def clear(self) -> None:
        """Remove all entries. Results that are being computed are not stored either."""
        with self._mutex:
            self._found = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get_all(
        self, texts: Sequence[Any], compute: Callable[[list[Any]], Sequence[V]], keep: Callable[[V], bool] | None = None
    ) -> list[V]:
        """Return the value of each input, computing all missing values in one call.

        Args:
            texts: `n` inputs.
            compute: Function from the missing inputs, each once, to their values.
            keep: Function that returns whether to store a computed value. None stores all.
        """
        keys = [self.key(text) for text in texts]
        values: dict[bytes, V] = {}
        with self._mutex:
            found = self._found  # `clear` replaces the dict, so values computed before it are stored in the old one
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
