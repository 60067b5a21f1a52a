"""A CUDA device that computes on the CPU and is as strict as the real one, for machines that have none.

Tensors say `cuda:0`, hold their values in a CPU tensor, and refuse what CUDA refuses: another tensor that is on the
host, attention by the variable-length kernel with heads, formats or bounds that it does not take, a wait for the device
or memory of the host while a graph is recorded. A graph repeats the recorded kernels alone, on the same memory, without
the Python that called them; what it computed before is gone. Waits for the device are counted. What is left to a real
GPU are the kernels' own numbers, streams that overlap, and time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from langchain_datashunt.small_models.engine.attention import _torch_has_it

CUDA = torch.device("cuda", 0)

_ANYWHERE = {"aten::copy_", "aten::_to_copy"}
"""Kernels that take tensors of both host and device."""

_WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal",
    "aten::_unique2", "aten::unique_dim",
}  # fmt: skip
"""Kernels whose result the host waits for."""


class RefusedError(RuntimeError):
    """What a real device would have refused."""


class OnDevice(torch.Tensor):
    """A tensor that says that it is on the device."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnDevice:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=CUDA
        )
        made.own = own
        return cast(OnDevice, made)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.own!r})"

    @classmethod
    def __torch_dispatch__(
        cls, kernel: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _DEVICE.computed(kernel, tuple(args), dict(kwargs or {}))


@dataclass
class _Kernel:
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]

    def __call__(self) -> None:
        for before, now in zip(self.results, _tensors(self.call(*self.args, **self.kwargs)), strict=True):
            if before.data_ptr() != now.data_ptr():  # what is a view, or was written in its place, stands there already
                before.copy_(now)


@dataclass
class Graph:
    """Recorded kernels."""

    kernels: list[_Kernel] = field(default_factory=list)
    replays: int = 0

    def __post_init__(self) -> None:
        _DEVICE.graphs.append(self)

    def replay(self) -> None:
        """Compute them again, from what their inputs hold now."""
        self.replays += 1
        self.lose()
        for kernel in self.kernels:
            kernel()

    def lose(self) -> None:
        """What kernels have computed: recording computes nothing, and between replays the memory serves others."""
        for kernel in self.kernels:
            given = {_where(one) for one in _tensors((kernel.args, kernel.kwargs))}
            for made in kernel.results:
                if _where(made) not in given and made.dtype.is_floating_point:
                    made.fill_(torch.nan)


class Device:
    """The device's state: what is recorded, and how often the host has waited."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.kernels = 0
        self.graphs: list[Graph] = []
        self.recording: Graph | None = None

    def computed(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a kernel on tensors of which one is on the device."""
        name = kernel.name().partition(".")[0]
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        host = [one for one in tensors if not isinstance(one, OnDevice)]
        if host and name not in _ANYWHERE and any(one.dim() for one in host):
            raise RefusedError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        asked = kwargs.get("device")
        to_host = name == "aten::_to_copy" and asked is not None and torch.device(asked).type == "cpu"
        if name == "aten::copy_":
            to_host = not isinstance(args[0], OnDevice)
        from_host = bool(host) and name in _ANYWHERE and not to_host
        by_truth = "index" in name and any(one.dtype in (torch.bool, torch.uint8) for one in tensors[1:])
        waited_for = not (kwargs.get("non_blocking") or (name == "aten::copy_" and True in args[2:]))
        read_at_once = from_host and (waited_for or not all(getattr(one, "pinned", False) for one in host))
        waits = name in _WAITS or to_host or by_truth or read_at_once
        if waits:
            self.waits.append(name)
        if self.recording is not None and (waits or from_host):
            raise RefusedError(f"{name}: operation not permitted when stream is capturing")
        self.kernels += 1
        call = _in_place_of(name) or kernel
        if isinstance(asked, (torch.device, str)) and not to_host:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        own_args, own_kwargs = tree_map_only(OnDevice, lambda one: one.own, (args, kwargs))
        if from_host and name == "aten::_to_copy":
            own_args = (own_args[0].clone(), *own_args[1:])
        found = call(*own_args, **own_kwargs)
        if to_host:
            return args[0] if name == "aten::copy_" else found.clone()
        if self.recording is not None:
            self.recording.kernels.append(_Kernel(call, own_args, own_kwargs, _tensors(found)))
        back = {id(one.own): one for one in tensors if isinstance(one, OnDevice)}  # in place: the same tensor again
        return tree_map_only(torch.Tensor, lambda one: back[id(one)] if id(one) in back else OnDevice(one), found)


_DEVICE = Device()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _where(one: torch.Tensor) -> int:
    return one.untyped_storage().data_ptr()


def _in_place_of(name: str) -> Callable[..., Any] | None:
    """Of kernels that a CPU has not."""
    return {"torch_attn::_varlen_attn": _variable_length, "aten::_thnn_fused_lstm_cell": _lstm_cell}.get(name)


def _lstm_cell(
    of_input: torch.Tensor, of_state: torch.Tensor, cell: torch.Tensor, *biases: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gates = of_input + of_state + sum(biases)
    enter, forget, new, leave = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell, gates


def _variable_length(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    causal: bool = False, scale: float | None = None, window: Sequence[int] = (-1, -1), *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Flash attention's checks, and its result text by text in single precision."""
    if any(rest) or causal:
        raise RefusedError("not stood in for")
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RefusedError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RefusedError("head_size should be a multiple of 8, and at most 256")
    if any(one.stride(-1) != 1 or one.dim() != 3 for one in (q, k, v)):
        raise RefusedError("Input tensor must have contiguous last dimension")
    if any(one.dtype != torch.int32 or not one.is_contiguous() or one.dim() != 1 for one in (cu_q, cu_k)):
        raise RefusedError("cu_seqlens must have dtype int32, and be contiguous")
    found = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        n = end - start
        if n > max_q or n > max_k:
            raise RefusedError(f"a text of {n} tokens where {max_q} were told as the most")
        own, keys, values = (one[start:end].float().transpose(0, 1) for one in (q, k, v))
        apart = torch.arange(n) - torch.arange(n)[:, None]
        seen = torch.ones(n, n, dtype=torch.bool)
        if window[0] >= 0:
            seen &= apart >= -window[0]
        if window[1] >= 0:
            seen &= apart <= window[1]
        told = torch.nn.functional.scaled_dot_product_attention(own, keys, values, attn_mask=seen, scale=scale)
        found[start:end] = told.transpose(0, 1).to(q.dtype)
    lse = torch.zeros(q.shape[1], len(q))
    return found, lse, torch.zeros(2, dtype=torch.uint64)


class _Calls(TorchFunctionMode):
    """What would ask for a real device before a kernel is chosen: moves to it, tensors made on it, pinned memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            if _DEVICE.recording is not None:
                raise RefusedError("memory of the host is taken while a graph is recorded")
            pinned: Any = args[0].clone()
            pinned.pinned = True
            return pinned
        if name == "is_pinned":
            return hasattr(args[0], "pinned")
        if name == "data_ptr" and isinstance(args[0], OnDevice):
            return args[0].own.data_ptr()
        if name == "tolist" and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        if name == "cuda":
            name, func, args = "to", torch.Tensor.to, (args[0], CUDA)
        if name == "to" and not isinstance(args[0], OnDevice):
            return _moved(args[0], args[1:], kwargs)
        if name == "__getitem__" and isinstance(args[0], OnDevice):  # lists are made tensors of the device by torch
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(OnDevice(torch.tensor(one)) if isinstance(one, list) else one for one in where)
        if any(isinstance(one, OnDevice) for one in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        asked = kwargs.get("device")
        if isinstance(asked, (str, torch.device)) and torch.device(asked).type == "cuda":
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _moved(one: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})  # type: ignore[attr-defined]
    if device is None or device.type != "cuda":
        return one.to(*args, **kwargs)
    if _DEVICE.recording is not None:
        raise RefusedError("a copy from the host while a graph is recorded")
    if not (getattr(one, "pinned", False) and kwargs.get("non_blocking")):
        _DEVICE.waits.append("to")
    return OnDevice(one.detach().to(dtype or one.dtype).clone())


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        """Nothing overlaps here."""


@contextlib.contextmanager
def _recorded(graph: Graph, **_: Any) -> Iterator[None]:
    if _DEVICE.recording is not None:
        raise RefusedError("one recording at a time")
    _DEVICE.recording = graph
    try:
        yield
    finally:
        _DEVICE.recording = None
    graph.lose()


_META, _CUDA, _TYPES = 14, 1, 20
"""Of torch's enumeration of kinds of devices, c10/core/DeviceType.h."""


@contextlib.contextmanager
def _choosing_the_device() -> Iterator[None]:
    """Choosing a device does nothing, as for tensors without memory: a torch without CUDA refuses to choose it."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    try:
        guards = (ctypes.c_void_p * _TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except ValueError:
        pytest.skip("this torch does not tell where it keeps what chooses a device")
    before, guards[_CUDA] = guards[_CUDA], guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


@contextlib.contextmanager
def _giving_memory() -> Iterator[None]:
    """Memory that torch itself takes on the device, before it chooses a kernel."""

    def empty(size: Any, dtype: Any = None, layout: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        return OnDevice(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype))

    kernels = torch.library.Library("aten", "IMPL", "CUDA")
    try:
        kernels.impl("empty.memory_format", empty)
        kernels.impl("empty_strided", empty_strided)
        yield
    finally:
        kernels._destroy()


@contextlib.contextmanager
def stand_in_for_cuda(*, flash: bool = True) -> Iterator[Device]:
    """In this thread, "cuda" is the device of this module.

    Args:
        flash: Whether it has flash attention.
    """
    _DEVICE.__init__()  # type: ignore[misc]
    cuda = torch.cuda
    instead: list[tuple[Any, str, Any]] = [
        (cuda, "is_available", lambda: True),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "device_count", lambda: 1),
        (cuda, "synchronize", lambda device=None: None),
        (cuda, "get_device_name", lambda device=None: "stand-in"),
        (cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (cuda, "get_device_capability", lambda device=None: (9, 0)),
        (cuda, "Stream", _Stream),
        (cuda, "current_stream", _Stream),
        (cuda, "stream", contextlib.nullcontext),
        (cuda, "device", contextlib.nullcontext),
        (cuda, "graph_pool_handle", lambda: (0, 1)),
        (cuda, "CUDAGraph", Graph),
        (cuda, "graph", _recorded),
        (torch, "inference_mode", torch.no_grad),  # which tensors of Python cannot be looked at in
        (torch.backends.cuda, "is_flash_attention_available", lambda: flash),
    ]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `weight.data = ` would lose tensors of Python
    try:
        with pytest.MonkeyPatch.context() as patch, _choosing_the_device(), _giving_memory(), _Calls():
            for where, name, value in instead:
                patch.setattr(where, name, value)
            _torch_has_it.cache_clear()
            yield _DEVICE
    finally:
        _torch_has_it.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(before)
