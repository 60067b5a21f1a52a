"""PaddingFreeEncoder: encoders without padding, on the CPU with weights laid out for the matrix library.

Tokens of all texts of a batch stand one after the other, so that nothing is computed for padding; texts of one length
share an attention call. Products go through oneDNN with weights that are reordered once; by torch's own product where
that is not there. An architecture that is not known, or an encoder whose results differ from the library's own, is
computed by transformers as ever.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from langchain_datashunt._utils.fork import AFTER_FORK, LEFT_ALONE, Mutex
from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError, ShuntWarning
from langchain_datashunt.small_models.engine.architectures import ARCHITECTURES, Parts
from langchain_datashunt.small_models.engine.layers import PackedStates, Products, Tokens
from langchain_datashunt.small_models.engine.onnx_encoder import OnnxEncoder
from langchain_datashunt.small_models.engine.tokenization import pad, usable_length

if TYPE_CHECKING:
    import torch

Engine: TypeAlias = Literal["auto", "padding-free", "plain", "onnx", "onnx-int8"]
"""What computes an encoder."""

AnyEncoder: TypeAlias = Callable[[Sequence[Sequence[int]]], PackedStates]
"""From token ids of `n` texts to their last states."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""How far a state of the packed encoder may be from the library's own, relative to the largest, by number format."""

_LARGEST_EXPORT = 400_000_000
"""Parameters of a network that is exported to ONNX unasked, at the most."""

_PROBE_LENGTHS = (3, 7, 7, 12)
_LONGEST_PROBE = 512
_TRIAL_LENGTHS = (8, 10, 10, 12, 14, 16, 18, 20)
_TRIAL_ROUNDS = 3
_MUCH_SLOWER, _MUCH_SLOWER_THAN_ONNX = 1.2, 1.5
"""By how much the packed form must lose the trial to be left, to transformers and to ONNX Runtime."""

_LOG = logging.getLogger(__name__)

_EIGHT_BITS = (
    "With 8-bit weights an encoder's states differ by up to %.1f%% of the largest, on made-up tokens. `datashunt "
    "agreement` tells how often labels and routes stay the same; choose the threshold under it."
)

_SAID: set[str] = set()
"""Architectures of which it was said that they have no packed form."""


class PaddingFreeEncoder:
    """The packed form of a transformers encoder; made by `packed`."""

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
        self.parts, self.device, self.dtype = parts, device, dtype

    def __call__(self, ids: Sequence[Sequence[int]]) -> PackedStates:
        """States of texts, given as token ids, in their order; quickest where texts of one length stand together."""
        with require("torch", "torch").inference_mode():
            tokens = Tokens.from_ids(ids, self.device)
            return PackedStates(self.states_of(tokens), tokens.lengths)

    def states_of(self, tokens: Tokens) -> torch.Tensor:
        """States of tokens that are on the device, shape `[tokens, d]`."""
        x = self.parts.embed(tokens)
        for layer in self.parts.layers:
            x = layer(x, tokens)
        return x if self.parts.finish is None else self.parts.finish(x)


class Packing:
    """The engine of one network, made when it is first needed, and anew when the network's weights have changed.

    Args:
        engine: "plain" is transformers, "padding-free" computes no padding, "onnx" and "onnx-int8" are ONNX Runtime;
            "auto" takes the quickest of the first three that agree, measured on a few texts at first use.
        dtype: The number format of matrix products; None is the network's own. Of a network in float32 the packed form
            computes products alone in another format, and sums, norms and embeddings as they are.
    """

    def __init__(self, engine: Engine = "auto", dtype: torch.dtype | None = None) -> None:
        if engine not in get_args(Engine):
            raise ConfigurationError(f"There is no engine {engine!r}; use one of {', '.join(get_args(Engine))}.")
        self.engine: Engine = engine
        self.dtype = dtype
        self.seconds: dict[str, float] = {}
        """What each engine took for the texts of the trial, where "auto" had a choice."""
        self._made: AnyEncoder | None = None
        self.network: torch.nn.Module | None = None
        """Whose engine it is; None before the first use."""
        self._watched = _Watched([], [], [])
        self._stamp: tuple[int, ...] | None = None
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Begin with a lock that nobody holds; what has threads of its own, which a child has not, is made anew."""
        self._lock = threading.Lock()
        if isinstance(self._made, OnnxEncoder):
            LEFT_ALONE.append(self._made)  # its end would wait for these threads
            self._made = self.network = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was made, which no pickle holds; copies make their own."""
        return Packing, (self.engine, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Packing:
        return Packing(self.engine, self.dtype)

    def engine_for(self, network: torch.nn.Module, whole: torch.nn.Module | None = None) -> AnyEncoder | None:
        """The engine, None where transformers is to compute, to whose number format the network is brought then.

        Args:
            network: The encoder.
            whole: What it is a part of, and is computed with; None for nothing.

        Raises:
            ConfigurationError: The engine that was asked for cannot compute this network.
            MissingExtraError: It is not installed.
        """
        if self.engine == "plain" or network.training:
            return None
        if self.network is not network or self._stamp_now() != self._stamp:
            with self._lock:
                if self.network is not network or self._stamp_now() != self._stamp:
                    self._watched = _parts_of(network)
                    stamp = self._stamp_now()
                    self._made = self._engine_of(network)
                    if self._made is None and self.dtype not in (None, next(network.parameters()).dtype):
                        (whole or network).to(self.dtype)
                        self._watched = _parts_of(network)
                        stamp = self._stamp_now()
                    self.network, self._stamp = network, stamp
        if self._made is None and self.engine == "padding-free":
            raise ConfigurationError(
                f"This network of the architecture {getattr(network.config, 'model_type', '?')!r} has no packed form "
                f"here: it is none of {', '.join(ARCHITECTURES)}, runs on neither CPU nor CUDA, has hooks, or a "
                f"warning said what else. Use engine='auto'."
            )
        return self._made

    def difference(self, network: torch.nn.Module, ids: Sequence[Sequence[int]]) -> float:
        """How far this engine's states of texts are from transformers' own, relative to the largest state.

        What that does to answers is for labelled texts to tell: see how often labels agree before a format of lower
        precision is used, and choose the threshold under it.
        """
        encoder = self.engine_for(network)
        own = plain_encoder(network)(ids).states.float()
        return 0.0 if encoder is None else float((encoder(ids).states.float() - own).abs().max() / own.abs().max())

    def forget(self) -> None:
        """Make the engine anew at the next call.

        Weights that an optimizer or `load_state_dict` writes, moves or replaces are noticed; what writes behind
        torch's back (a fused optimizer, `weight.data`) is not.
        """
        self.network = None

    def _stamp_now(self) -> tuple[Any, ...]:
        """Changes when a part of the network is replaced or added, has a hook, or a weight is written to or moved."""
        held, parameters, sizes = self._watched
        same = all(where.get(name) is one for where, name, one in held)
        return (same, *map(len, sizes), *(one.data_ptr() for one in parameters), *map(_version, parameters))

    def _engine_of(self, network: torch.nn.Module) -> AnyEncoder | None:
        if self.engine.startswith("onnx"):
            session = OnnxEncoder(network, int8=self.engine == "onnx-int8")
            if self.engine == "onnx-int8":
                _LOG.warning(_EIGHT_BITS, 100.0 * _difference(network, session))
            return session
        device = next(network.parameters()).device.type
        if self.engine == "auto" and device != "cpu":
            return None  # on a GPU the padding-free form is used only by name, after its self-check there
        made = packed(network, self.dtype)
        if self.engine == "padding-free":
            return made
        if made is None and not _has_hooks(network):
            say_once(str(getattr(network.config, "model_type", "?")))
        self.seconds, engines = _tried(network, made, self.dtype)
        name = _chosen(self.seconds)
        if name == "onnx":
            return engines.get("onnx") or _onnx(network)
        return made if name == "padding-free" else None


def _chosen(seconds: dict[str, float]) -> str:
    """The packed form, unless another is so much quicker that a busy moment does not explain it.

    ONNX Runtime must win by more: it keeps the weights twice and takes seconds to be made anew.
    """
    best, taken = "", float("inf")
    for name, must_win in (("padding-free", 1.0), ("plain", _MUCH_SLOWER), ("onnx", _MUCH_SLOWER_THAN_ONNX)):
        if name in seconds and seconds[name] * must_win < taken:
            best, taken = name, seconds[name]
    return best


def say_once(kind: str) -> None:
    """That an architecture has no packed form is no failure, and worth knowing where speed counts."""
    if kind not in _SAID:
        _SAID.add(kind)
        _LOG.warning(
            "The architecture %r has no packed form here; transformers or ONNX Runtime computes it. engine='plain' "
            "says that this is known.",
            kind,
        )


def _onnx(network: torch.nn.Module) -> OnnxEncoder | None:
    """ONNX Runtime, where it is installed, can compute the network, and agrees with transformers."""
    one, torch_ = next(network.parameters()), require("torch", "torch")
    if one.device.type != "cpu" or one.dtype != torch_.float32:
        return None
    if not all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx")):
        return None
    if sum(parameter.numel() for parameter in network.parameters()) > _LARGEST_EXPORT:
        return None
    try:
        made = OnnxEncoder(network)
        return made if _difference(network, made, longest=True) <= TOLERANCE["float32"] else None
    except Exception as error:  # whatever exporting and a runtime may raise: the others compute it
        _LOG.info("ONNX Runtime does not compute this %s: %s", type(network).__name__, error)
        return None


_TRIALS: dict[tuple[Any, ...], dict[str, float]] = {}
_TRIALS_LOCK = Mutex()


def _tried(
    network: torch.nn.Module, made: AnyEncoder | None, dtype: torch.dtype | None
) -> tuple[dict[str, float], dict[str, AnyEncoder]]:
    """What each takes, tried once in a process for networks of one form, so that equal ones are computed alike.

    ONNX Runtime, which takes seconds to be made, is tried where the packed form is missing or gains little over
    transformers. Also what was made for the trial.
    """
    one, torch_ = next(network.parameters()), require("torch", "torch")
    sizes = ("model_type", "hidden_size", "dim", "num_hidden_layers", "n_layers", "intermediate_size", "hidden_dim")
    own = dtype in (None, one.dtype)
    form = (
        *(getattr(network.config, name, None) for name in sizes), dtype or one.dtype, one.device, made is None,
        torch_.get_num_threads(),
    )  # fmt: skip
    engines: dict[str, AnyEncoder] = {}
    ids = made_up(network, _TRIAL_LENGTHS)
    with _TRIALS_LOCK:
        if form not in _TRIALS:
            engines["plain"] = plain_encoder(network if own else copy.deepcopy(network).to(dtype))
            found = {"plain": 0.0}
            if made is not None:
                engines["padding-free"] = made
                found = trial(engines, ids)
            gains = found.get("padding-free", float("inf")) * _MUCH_SLOWER < found.get("plain", float("inf"))
            if not gains and own and (onnx := _onnx(network)) is not None:
                engines["onnx"] = onnx
                found = trial(engines, ids)
            _TRIALS[form] = found
        return _TRIALS[form], engines


def trial(encoders: dict[str, AnyEncoder], ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds that each takes for these texts and the first of them alone: the least of some rounds, in turn.

    One that fails is not among them.
    """
    found = dict.fromkeys(encoders, float("inf"))
    for _ in range(_TRIAL_ROUNDS):
        for name in list(found):
            started = time.perf_counter()
            try:
                encoders[name](ids)
                encoders[name](ids[:1]).states.sum().item()  # a GPU has computed it only when something is asked of it
            except Exception as error:  # texts that are asked for will tell whether it fails at those, too
                _LOG.info("The engine %s failed at made-up tokens: %s", name, error)
                del found[name]
                continue
            found[name] = min(found[name], time.perf_counter() - started)
    return found


def made_up(network: torch.nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Made-up tokens of texts, of such lengths or the longest that the network takes."""
    words = getattr(network.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    size = min(int(getattr(network.config, "vocab_size", 2)), int(words or 2**31))
    rng, longest = np.random.default_rng(0), usable_length(network.config)
    return [rng.integers(0, size, min(length, longest)).tolist() for length in lengths]


def plain_encoder(network: torch.nn.Module) -> AnyEncoder:
    """Transformers itself, as the others are called."""

    def encode(ids: Sequence[Sequence[int]]) -> PackedStates:
        with require("torch", "torch").inference_mode():
            tokens, mask = pad(ids, 0, next(network.parameters()).device)
            states = network(input_ids=tokens, attention_mask=mask).last_hidden_state
            return PackedStates(states[mask.bool()], mask.sum(1))

    return encode


def packed(network: torch.nn.Module, dtype: torch.dtype | None = None) -> PaddingFreeEncoder | None:
    """The packed form of an encoder that transformers made, its products in a format, None where it cannot be had.

    It is had for what `ARCHITECTURES` names, on the CPU and on CUDA, after its states were compared with the
    library's own. That it is not had for another architecture is no failure; that results differ is a warning.
    """
    kind, one = str(getattr(network.config, "model_type", "")), next(network.parameters())
    if kind not in ARCHITECTURES or one.device.type not in ("cpu", "cuda") or network.training:
        return None
    dtype = dtype or one.dtype
    if str(dtype).removeprefix("torch.") not in TOLERANCE or _has_hooks(network):
        return None  # hooks want to see every layer's call
    try:
        parts = ARCHITECTURES[kind](network, network.config, Products(dtype))
        if parts is None:
            return None
        made = PaddingFreeEncoder(parts, one.device, dtype)
        far = _difference(network, made)
    except Exception as error:  # whatever a network that is laid out otherwise leads to: transformers knows it
        warnings.warn(f"The packed form of {kind} cannot be made ({error}); transformers computes it.", ShuntWarning, 2)
        return None
    if not far <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        told = f"The packed form of {kind} differs from transformers by {far:.2g}; transformers computes it."
        warnings.warn(told, ShuntWarning, 2)
        return None
    return made


class _Watched(NamedTuple):
    """What of a network tells that it has changed.

    Attributes:
        held: Where each part and each parameter is held, under what name.
        parameters: The parameters.
        sizes: What would grow by a part that is added, or by a hook.
    """

    held: list[tuple[dict[str, Any], str, Any]]
    parameters: list[Any]
    sizes: list[Sized]


def _parts_of(network: torch.nn.Module) -> _Watched:
    found = _Watched([], list(network.parameters()), [])
    for part in network.modules():
        for where in (part._modules, part._parameters):
            found.held.extend((where, name, one) for name, one in where.items())
        if part._modules:
            found.sizes.append(part._modules)
        found.sizes.extend((part._forward_hooks, part._forward_pre_hooks))
    return found


def _has_hooks(network: torch.nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def _version(parameter: torch.Tensor) -> int:
    """How often a parameter was written to; those made in inference mode do not count."""
    return 0 if parameter.is_inference() else parameter._version


def _difference(network: torch.nn.Module, made: AnyEncoder, *, longest: bool = False) -> float:
    """The largest difference of a state on made-up tokens, relative to the largest state.

    With `longest` one of the texts is about as long as the network takes, for an export may hold for short ones alone.
    """
    window = made.parts.window if isinstance(made, PaddingFreeEncoder) else 0
    more = (min(usable_length(network.config), _LONGEST_PROBE),) if longest else (window + 9,) if window else ()
    ids = made_up(network, (*_PROBE_LENGTHS, *more))
    own = plain_encoder(network)(ids).states.float()
    return float((made(ids).states.float() - own).abs().max() / own.abs().max())
