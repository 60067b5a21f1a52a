"""PaddingFreeEncoder: runs transformers encoders without padding, and `EngineSelector` selects the fastest engine.

The tokens of all texts of a batch are concatenated, so no time is spent on padding. On a CPU, matrix products use
oneDNN with weights that are reordered once, or torch if oneDNN is not available. If an architecture is not supported,
or if the results differ from transformers, transformers computes the encoder.
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
from langchain_datashunt.small_models.engine.layers import Products, Tokens, TokenStates
from langchain_datashunt.small_models.engine.onnx_encoder import OnnxEncoder
from langchain_datashunt.small_models.engine.tokenization import pad, usable_length

if TYPE_CHECKING:
    import torch

Engine: TypeAlias = Literal["auto", "padding-free", "plain", "onnx", "onnx-int8"]
"""Name of an engine, see `EngineSelector`."""

AnyEncoder: TypeAlias = Callable[[Sequence[Sequence[int]]], TokenStates]
"""Function from the token ids of `n` texts to their last hidden states."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""Maximum difference from the states of transformers, relative to the largest state, by dtype."""

_LARGEST_EXPORT = 400_000_000
"""Maximum parameters of a network that engine "auto" exports to ONNX."""

_PROBE_LENGTHS = (3, 7, 7, 12)
_LONGEST_PROBE = 512
_TRIAL_LENGTHS = (8, 10, 10, 12, 14, 16, 18, 20)
_TRIAL_ROUNDS = 3
_MUCH_SLOWER, _MUCH_SLOWER_THAN_ONNX = 1.2, 1.5
"""Minimum speedup in the trial at which transformers and ONNX Runtime replace the padding-free encoder."""

_LOG = logging.getLogger(__name__)

_EIGHT_BITS = (
    "8-bit weights change the encoder's states by up to %.1f%% of the largest state on random tokens. Run `datashunt "
    "compare-engines` to measure how many labels and routes change, and calibrate the threshold with this engine."
)

_LOGGED: set[str] = set()
"""Architectures that were logged as not supported by the padding-free encoder."""


class PaddingFreeEncoder:
    """Padding-free version of a transformers encoder, created by `padding_free_encoder`."""

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
        self.parts, self.device, self.dtype = parts, device, dtype

    def __call__(self, ids: Sequence[Sequence[int]]) -> TokenStates:
        """Return the last hidden states of texts, given as token ids. Sorting the texts by length is faster."""
        with require("torch", "torch").inference_mode():
            tokens = Tokens.from_ids(ids, self.device)
            return TokenStates(self.states_of(tokens), tokens.lengths)

    def states_of(self, tokens: Tokens) -> torch.Tensor:
        """Return the states of tokens on the device, shape `[tokens, d]`."""
        x = self.parts.embed(tokens)
        for layer in self.parts.layers:
            x = layer(x, tokens)
        return x if self.parts.finish is None else self.parts.finish(x)


class EngineSelector:
    """Engine of one network, built at the first use and rebuilt if the weights of the network change.

    Args:
        engine: "plain" is transformers, "padding-free" avoids padding, and "onnx" and "onnx-int8" are ONNX Runtime.
            "auto" measures "plain", "padding-free" and "onnx" at the first use and selects the fastest one that agrees
            with transformers. On a GPU, "auto" is transformers.
        dtype: Dtype of matrix products; None means the dtype of the network. The padding-free encoder of a float32
            network uses `dtype` for products only, and float32 for sums, norms and embeddings.

    Raises:
        ConfigurationError: If the engine is unknown.
    """

    def __init__(self, engine: Engine = "auto", dtype: torch.dtype | None = None) -> None:
        if engine not in get_args(Engine):
            raise ConfigurationError(f"Unknown engine {engine!r}. Use one of {', '.join(get_args(Engine))}.")
        self.engine: Engine = engine
        self.dtype = dtype
        self.seconds: dict[str, float] = {}
        """Seconds by engine in the trial of "auto", empty if there was no trial."""
        self._made: AnyEncoder | None = None
        self.network: torch.nn.Module | None = None
        """Network that the engine was built for, or None before the first use."""
        self._watched = _Watched([], [], [])
        self._stamp: tuple[int, ...] | None = None
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Replace the lock, and drop an ONNX session, because its threads do not exist in the forked child."""
        self._lock = threading.Lock()
        if isinstance(self._made, OnnxEncoder):
            LEFT_ALONE.append(self._made)  # destroying it would wait for these threads
            self._made = self.network = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings only, because an engine cannot be pickled."""
        return EngineSelector, (self.engine, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> EngineSelector:
        return EngineSelector(self.engine, self.dtype)

    def engine_for(self, network: torch.nn.Module, whole: torch.nn.Module | None = None) -> AnyEncoder | None:
        """Return the engine of a network, or None if transformers is to run it.

        If transformers runs the network for an engine other than "plain", the network is converted to `dtype` first.

        Args:
            network: Encoder.
            whole: Model that contains the encoder and is converted with it, or None.

        Raises:
            ConfigurationError: If the requested engine does not support this network.
            MissingExtraError: If the requested engine is not installed.
        """
        if self.engine == "plain" or network.training:
            return None
        if self.network is not network or self._stamp_now() != self._stamp:
            with self._lock:
                if self.network is not network or self._stamp_now() != self._stamp:
                    self._watched = _parts_of(network)
                    stamp = self._stamp_now()
                    self._made = self._engine_of(network)
                    plain = self._made is None and self.engine != "padding-free"  # else it raises below
                    if plain and self.dtype not in (None, next(network.parameters()).dtype):
                        (whole or network).to(self.dtype)
                        self._watched = _parts_of(network)
                        stamp = self._stamp_now()
                    self.network, self._stamp = network, stamp
        if self._made is None and self.engine == "padding-free":
            raise ConfigurationError(
                f"engine='padding-free' does not support this {getattr(network.config, 'model_type', '?')!r} network. "
                f"It requires one of the architectures {', '.join(ARCHITECTURES)}, a CPU or CUDA device, and no "
                f"forward hooks. Check for earlier warnings, or use engine='auto'."
            )
        return self._made

    def difference(self, network: torch.nn.Module, ids: Sequence[Sequence[int]]) -> float:
        """Return the largest difference of this engine's states from transformers, relative to the largest state.

        The difference of states does not show how many answers change. Before using a lower precision, measure the
        agreement of labels, and calibrate the threshold with that precision.
        """
        encoder = self.engine_for(network)
        own = plain_encoder(network)(ids).states.float()
        return 0.0 if encoder is None else float((encoder(ids).states.float() - own).abs().max() / own.abs().max())

    def forget(self) -> None:
        """Rebuild the engine at the next call.

        Changes of weights by an optimizer, `load_state_dict` or a move are detected automatically. Call this method
        after in-place changes that torch does not track, such as a fused optimizer or a write to `weight.data`.
        """
        self.network = None

    def _stamp_now(self) -> tuple[Any, ...]:
        """Return a value that changes with the modules, hooks and weights of the network."""
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
            return None  # on a GPU, the padding-free encoder is used only if requested by name
        made = padding_free_encoder(network, self.dtype)
        if self.engine == "padding-free":
            return made
        if made is None and not _has_hooks(network):
            log_once(str(getattr(network.config, "model_type", "?")))
        self.seconds, engines = _tried(network, made, self.dtype)
        name = _chosen(self.seconds)
        if name == "onnx":
            return engines.get("onnx") or _onnx(network)
        return made if name == "padding-free" else None


def _chosen(seconds: dict[str, float]) -> str:
    """Return the name of the padding-free engine, unless another one is faster by a clear margin.

    The margin guards against measurement noise. It is larger for ONNX Runtime, which stores the weights a second time
    and takes seconds to rebuild.
    """
    best, taken = "", float("inf")
    for name, must_win in (("padding-free", 1.0), ("plain", _MUCH_SLOWER), ("onnx", _MUCH_SLOWER_THAN_ONNX)):
        if name in seconds and seconds[name] * must_win < taken:
            best, taken = name, seconds[name]
    return best


def log_once(kind: str) -> None:
    """Log once per architecture that the padding-free encoder does not support it."""
    if kind not in _LOGGED:
        _LOGGED.add(kind)
        _LOG.warning(
            "The padding-free encoder does not support the architecture %r, so transformers or ONNX Runtime computes "
            "it. Set engine='plain' to silence this warning.",
            kind,
        )


def _onnx(network: torch.nn.Module) -> OnnxEncoder | None:
    """Return an ONNX encoder if ONNX Runtime is installed, supports the network and agrees with transformers."""
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
    except Exception as error:  # export and runtime raise many types, and other engines remain
        _LOG.info("ONNX Runtime does not support this %s: %s", type(network).__name__, error)
        return None


_TRIALS: dict[tuple[Any, ...], dict[str, float]] = {}
_TRIALS_LOCK = Mutex()


def _tried(
    network: torch.nn.Module, made: AnyEncoder | None, dtype: torch.dtype | None
) -> tuple[dict[str, float], dict[str, AnyEncoder]]:
    """Measure the engines of a network, once per process for networks of the same shape.

    Networks of the same shape share the result, so that equal networks use the same engine. ONNX Runtime takes seconds
    to build, so it is measured only if the padding-free encoder is missing or hardly faster than transformers.

    Returns:
        Seconds by engine, and the engines built in this call, empty if the result was already available.
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
    """Return the seconds that each encoder takes for a batch of texts and then for the first text alone.

    The encoders take turns for some rounds, and the fastest round counts. An encoder that fails is left out.
    """
    found = dict.fromkeys(encoders, float("inf"))
    for _ in range(_TRIAL_ROUNDS):
        for name in list(found):
            started = time.perf_counter()
            try:
                encoders[name](ids)
                encoders[name](ids[:1]).states.sum().item()  # waits for a GPU to finish
            except Exception as error:  # a failure on random tokens only excludes the engine
                _LOG.info("The engine %s failed on random tokens: %s", name, error)
                del found[name]
                continue
            found[name] = min(found[name], time.perf_counter() - started)
    return found


def made_up(network: torch.nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Return random token ids of texts with the given lengths, at most the length that the network supports."""
    words = getattr(network.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    size = min(int(getattr(network.config, "vocab_size", 2)), int(words or 2**31))
    rng, longest = np.random.default_rng(0), usable_length(network.config)
    return [rng.integers(0, size, min(length, longest)).tolist() for length in lengths]


def plain_encoder(network: torch.nn.Module) -> AnyEncoder:
    """Return transformers' own computation of a network as an encoder function."""

    def encode(ids: Sequence[Sequence[int]]) -> TokenStates:
        with require("torch", "torch").inference_mode():
            tokens, mask = pad(ids, 0, next(network.parameters()).device)
            states = network(input_ids=tokens, attention_mask=mask).last_hidden_state
            return TokenStates(states[mask.bool()], mask.sum(1))

    return encode


def padding_free_encoder(network: torch.nn.Module, dtype: torch.dtype | None = None) -> PaddingFreeEncoder | None:
    """Return the padding-free version of a transformers encoder, or None if it is not supported.

    Before the encoder is returned, its states are compared with transformers. If they differ, or if the encoder cannot
    be built, this warns and returns None.

    Args:
        network: Transformers encoder in evaluation mode, on the CPU or on CUDA, without forward hooks.
        dtype: Dtype of matrix products; None means the dtype of the network.
    """
    kind, one = str(getattr(network.config, "model_type", "")), next(network.parameters())
    if kind not in ARCHITECTURES or one.device.type not in ("cpu", "cuda") or network.training:
        return None
    dtype = dtype or one.dtype
    if str(dtype).removeprefix("torch.") not in TOLERANCE or _has_hooks(network):
        return None  # hooks would not be called
    try:
        parts = ARCHITECTURES[kind](network, network.config, Products(dtype))
        if parts is None:
            return None
        made = PaddingFreeEncoder(parts, one.device, dtype)
        far = _difference(network, made)
    except Exception as error:  # a differently built network can fail in any way
        warnings.warn(
            f"Building the padding-free {kind} encoder failed: {error}. Transformers computes it.", ShuntWarning, 2
        )
        return None
    if not far <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        message = f"The padding-free {kind} encoder differs from transformers by {far:.2g}. Transformers computes it."
        warnings.warn(message, ShuntWarning, 2)
        return None
    return made


class _Watched(NamedTuple):
    """Parts of a network that are compared to detect changes.

    Attributes:
        held: Owning dict, name and value of each submodule and parameter.
        parameters: Parameters of the network.
        sizes: Collections that grow if a submodule or a hook is added.
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
    """Return how often a parameter was written to, or 0 for inference tensors, which do not count writes."""
    return 0 if parameter.is_inference() else parameter._version


def _difference(network: torch.nn.Module, made: AnyEncoder, *, longest: bool = False) -> float:
    """Return the largest difference from transformers on random tokens, relative to the largest state.

    With `longest`, one text is as long as the network supports, up to 512 tokens, because an export can be correct for
    short texts only.
    """
    window = made.parts.window if isinstance(made, PaddingFreeEncoder) else 0
    more = (min(usable_length(network.config), _LONGEST_PROBE),) if longest else (window + 9,) if window else ()
    ids = made_up(network, (*_PROBE_LENGTHS, *more))
    own = plain_encoder(network)(ids).states.float()
    return float((made(ids).states.float() - own).abs().max() / own.abs().max())
