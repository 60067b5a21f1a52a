"""PackedEncoder: encoders without padding, on the CPU with weights laid out for the matrix library.

Tokens of all texts of a batch stand one after the other, so that nothing is computed for padding; texts of one length
share an attention call. Products go through oneDNN with weights that are reordered once; by torch's own product where
that is not there. An architecture that is not known, or an encoder whose results differ from the library's own, is
computed by transformers as ever.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from langchain_datashunt._extras import require
from langchain_datashunt.exceptions import ConfigurationError, ShuntWarning
from langchain_datashunt.small_models.packed_layers import ARCHITECTURES, Parts, Tokens
from langchain_datashunt.small_models.tokenization import pad

if TYPE_CHECKING:
    import torch

Engine: TypeAlias = Literal["auto", "packed", "plain"]
"""What computes an encoder."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""How far a state of the packed encoder may be from the library's own, relative to the largest, by number format."""

_PROBE_LENGTHS = (3, 7, 7, 12)


@dataclass(frozen=True)
class PackedStates:
    """Last hidden states of `n` texts.

    Attributes:
        states: Shape `[tokens, d]`, the texts' one after the other.
        lengths: Tokens of each text, shape `[n]`.
    """

    states: torch.Tensor
    lengths: torch.Tensor

    def first(self) -> torch.Tensor:
        """The first token's state of each text, shape `[n, d]`."""
        return self.states[self.lengths.cumsum(0) - self.lengths]

    def mean(self) -> torch.Tensor:
        """The mean state of each text, shape `[n, d]`."""
        torch = require("torch", "torch")
        n, device = len(self.lengths), self.states.device
        owner = torch.repeat_interleave(torch.arange(n, device=device), self.lengths)
        total = torch.zeros(n, self.states.shape[1], device=device).index_add_(0, owner, self.states.float())
        return total / self.lengths[:, None]  # type: ignore[no-any-return]


class PackedEncoder:
    """The packed form of a transformers encoder; made by `packed`."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        self.parts, self.device = parts, device

    def __call__(self, ids: Sequence[Sequence[int]]) -> PackedStates:
        """States of texts, given as token ids, in their order; quickest where texts of one length stand together."""
        with require("torch", "torch").inference_mode():
            tokens = Tokens.of(ids, self.device)
            x = self.parts.embed(tokens)
            for layer in self.parts.layers:
                x = layer(x, tokens)
            return PackedStates(x if self.parts.finish is None else self.parts.finish(x), tokens.lengths)


class Packing:
    """The packed form of one network, made when it is first needed, and anew when the network's weights have changed.

    Args:
        engine: "plain" never packs, "packed" insists, "auto" packs where it can be had.
    """

    def __init__(self, engine: Engine = "auto") -> None:
        if engine not in ("auto", "packed", "plain"):
            raise ConfigurationError(f"There is no engine {engine!r}; use 'auto', 'packed' or 'plain'.")
        self.engine: Engine = engine
        self._made: PackedEncoder | None = None
        self._stamp: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was made, which no pickle holds; copies make their own."""
        return Packing, (self.engine,)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Packing:
        return Packing(self.engine)

    def of(self, network: torch.nn.Module) -> PackedEncoder | None:
        """The packed form, None where transformers is to compute.

        Raises:
            ConfigurationError: The engine is "packed", and this network has no packed form.
        """
        if self.engine == "plain":
            return None
        stamp = (id(network), *(part for one in network.parameters() for part in (one.data_ptr(), _version(one))))
        if stamp != self._stamp:
            with self._lock:
                if stamp != self._stamp:
                    self._made = packed(network)
                    self._stamp = stamp
        if self._made is None and self.engine == "packed":
            raise ConfigurationError(
                f"The architecture {getattr(network.config, 'model_type', '?')!r} has no packed form here, or runs on "
                f"neither CPU nor CUDA; use engine='auto'. There are: {', '.join(ARCHITECTURES)}."
            )
        return self._made


def packed(network: torch.nn.Module) -> PackedEncoder | None:
    """The packed form of an encoder that transformers made, None where it cannot be had.

    It is had for the architectures of `packed_layers` on the CPU and on CUDA, after its states were compared with the
    library's own. That it is not had for another architecture is no failure; that results differ is a warning.
    """
    kind, one = str(getattr(network.config, "model_type", "")), next(network.parameters())
    if kind not in ARCHITECTURES or one.device.type not in ("cpu", "cuda") or network.training:
        return None
    dtype = one.dtype
    try:
        made = PackedEncoder(ARCHITECTURES[kind](network, network.config), one.device)
        far = _difference(network, made)
    except (AttributeError, RuntimeError, TypeError) as error:
        warnings.warn(f"The packed form of {kind} cannot be made ({error}); transformers computes it.", ShuntWarning, 2)
        return None
    if not far <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        told = f"The packed form of {kind} differs from transformers by {far:.2g}; transformers computes it."
        warnings.warn(told, ShuntWarning, 2)
        return None
    return made


def _difference(network: torch.nn.Module, made: PackedEncoder) -> float:
    """The largest difference of a state on made-up tokens, relative to the largest state."""
    torch, config = require("torch", "torch"), network.config
    rng, size = np.random.default_rng(0), int(getattr(config, "vocab_size", 2))
    lengths = (*_PROBE_LENGTHS, made.parts.window + 9) if made.parts.window else _PROBE_LENGTHS
    ids = [rng.integers(0, size, length).tolist() for length in lengths]
    with torch.inference_mode():
        tokens, mask = pad(ids, 0, made.device)
        states = network(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        own = torch.cat([states[i, : len(one)] for i, one in enumerate(ids)])
        found = (made(ids).states.float() - own).abs().max() / own.abs().max()
    return float(found)


def _version(parameter: torch.Tensor) -> int:
    """How often a parameter was written to; those made in inference mode do not count."""
    return 0 if parameter.is_inference() else parameter._version
