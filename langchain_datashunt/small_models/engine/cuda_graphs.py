"""GraphedEncoder: single texts on a GPU as one recorded graph, so that no kernel waits to be launched by Python."""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from langchain_datashunt._utils.fork import Mutex
from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ShuntWarning
from langchain_datashunt.small_models.engine.devices import ready_for
from langchain_datashunt.small_models.engine.layers import PackedStates, Run, Tokens

if TYPE_CHECKING:
    import torch

    from langchain_datashunt.small_models.engine.padding_free import PaddingFreeEncoder

SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens of the recorded graphs: a text takes the next larger one. Longer texts are computed without a graph."""

TOLERANCE = 0.05
"""How far a replayed state may be from the computed one, relative to the largest: both in half precision."""

_ONE_RECORDS = Mutex()
"""Of all models of a process: torch admits one recording at a time."""

Replay: TypeAlias = Callable[[], None]
Record: TypeAlias = "Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]"
"""From a computation on fixed tensors to what repeats it, and the tensor that the result then stands in."""


@dataclass(frozen=True)
class _Graph:
    inputs: torch.Tensor
    """Ids, places, and the lengths of the text and of what fills up, shape `[2 * size + 2]`."""

    replay: Replay
    states: torch.Tensor


class GraphedEncoder:
    """A packed encoder that computes single texts by recorded CUDA graphs, and everything else as it did.

    A launch takes Python some microseconds, and a small encoder has about a hundred: more than the GPU computes. A
    graph of a size holds a text and a second one of made-up tokens that fills it up; variable-length attention keeps
    them apart, so nothing is masked. Each graph is made at the first text of its size and compared with what the
    encoder computes without it; where recording fails or results differ, a warning is given and there are no graphs
    from then on.

    Args:
        encoder: On CUDA, in half precision, with variable-length attention.
        record: How a computation is recorded; None for CUDA graphs.
    """

    def __init__(self, encoder: PaddingFreeEncoder, record: Record | None = None) -> None:
        self.encoder, self.device = encoder, encoder.device
        self._record: Record | None = record or CudaRecorder(encoder.device)
        self._graphs: dict[int, _Graph] = {}
        self._lock = threading.Lock()

    def __call__(self, ids: Sequence[Sequence[int]]) -> PackedStates:
        """States of texts, given as token ids, in their order."""
        if len(ids) != 1 or self._record is None or len(ids[0]) > SIZES[-1]:
            return self.encoder(ids)
        size = SIZES[bisect_left(SIZES, len(ids[0]))]
        with require("torch", "torch").inference_mode(), self._lock:
            graph = self._graphs.get(size) or self._made(size, ids)
            return self.encoder(ids) if graph is None else self._replayed(graph, ids[0], size)

    def _made(self, size: int, ids: Sequence[Sequence[int]]) -> _Graph | None:
        if self._record is None:  # given up while this call waited
            return None
        torch_ = require("torch", "torch")
        inputs = torch_.zeros(2 * size + 2, dtype=torch_.int64, device=self.device)
        made_up = np.arange(1, size + 1) % max(2, max(ids[0]))  # recorded on another text than it is compared on
        inputs.copy_(ready_for(_laid_out(made_up.tolist(), size), self.device))

        def compute() -> torch.Tensor:
            flat, places, lengths = inputs.split([size, size, 2])
            return self.encoder.states_of(Tokens(flat, places, lengths, [Run(0, 1, size)]))

        try:
            graph = _Graph(inputs, *self._record(compute))
            own, other = self.encoder(ids).states.float(), self._replayed(graph, ids[0], size).states.float()
            far = float((own - other).abs().max() / own.abs().max())
        except RuntimeError as error:
            self._give_up(f"could not be recorded ({error})")
            return None
        if not far <= TOLERANCE:
            self._give_up(f"differ from what is computed without them by {far:.2g}")
            return None
        self._graphs[size] = graph
        return graph

    def _give_up(self, why: str) -> None:
        self._record = None
        self._graphs.clear()
        warnings.warn(f"CUDA graphs {why}; single texts are computed without them.", ShuntWarning, 2)

    def _replayed(self, graph: _Graph, ids: Sequence[int], size: int) -> PackedStates:
        """The text's own states; copied, for the next replay writes over them."""
        graph.inputs.copy_(ready_for(_laid_out(ids, size), self.device), non_blocking=True)
        graph.replay()
        return PackedStates(graph.states[: len(ids)].clone(), graph.inputs[-2:-1].clone())


def _laid_out(ids: Sequence[int], size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A text's ids and places, those of what fills up, and both lengths."""
    n = len(ids)
    row = np.zeros(2 * size + 2, dtype=np.int64)
    row[:n] = ids
    row[size : size + n] = np.arange(n)
    row[size + n : 2 * size] = np.arange(size - n)
    row[-2:] = n, size - n
    return row


class CudaRecorder:
    """Records computations as CUDA graphs that share one pool of memory; only one of them may run at a time.

    Torch's own stream for recording is of the GPU that was the first, so there is one of this GPU here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """Record a computation, after it was run twice beside the stream so that kernels are chosen and loaded."""
        cuda = require("torch", "torch").cuda
        with _ONE_RECORDS, cuda.device(self.device), cuda.stream(cuda.current_stream(self.device)):
            self._stream = beside = self._stream or cuda.Stream(self.device)
            beside.wait_stream(cuda.current_stream())
            with cuda.stream(beside):
                for _ in range(2):
                    compute()
            cuda.current_stream().wait_stream(beside)
            self._pool = self._pool or cuda.graph_pool_handle()
            graph = cuda.CUDAGraph()
            with cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
                states = compute()
        return graph.replay, states
