"""OnnxEncoder: a transformers encoder computed by ONNX Runtime, in float32 or with 8-bit weights."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.small_models.engine.layers import PackedStates
from langchain_datashunt.small_models.engine.tokenization import pad

if TYPE_CHECKING:
    import torch

_OPSET = 17


class OnnxEncoder:
    """An encoder exported to ONNX; texts are padded to the longest of their batch.

    Args:
        network: A transformers encoder on the CPU in float32.
        int8: Whether weights are kept, and products computed, in 8 bits: quicker, and no longer the same results.

    Raises:
        ConfigurationError: The network is not on the CPU in float32, or cannot be exported.
        MissingExtraError: onnxruntime or onnx is not installed.
    """

    def __init__(self, network: torch.nn.Module, *, int8: bool = False) -> None:
        runtime, torch_ = require("onnxruntime", "onnx"), require("torch", "torch")
        require("onnx", "onnx")
        one = next(network.parameters())
        if one.device.type != "cpu" or one.dtype != torch_.float32:
            raise ConfigurationError(
                f"ONNX Runtime computes float32 on the CPU here, and the model is {one.dtype} on {one.device}; use "
                f"device='cpu' and dtype='float32', or another engine."
            )
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "encoder.onnx"
            _export(network, file)
            if int8:
                quantized = file.with_name("int8.onnx")
                quantization = require("onnxruntime.quantization", "onnx")
                with _root_kept():
                    quantization.quantize_dynamic(
                        file, quantized, weight_type=quantization.QuantType.QInt8, per_channel=True
                    )
                file = quantized
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch_.get_num_threads()
            options.log_severity_level = 3
            self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: Sequence[Sequence[int]]) -> PackedStates:
        """States of texts, given as token ids, in their order."""
        torch_ = require("torch", "torch")
        tokens, mask = pad(ids, 0, "cpu")
        (states,) = self.session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        return PackedStates(torch_.from_numpy(states)[mask.bool()], mask.sum(1))


@contextmanager
def _root_kept() -> Iterator[None]:
    """Without a handler that the quantiser's logging would give the root logger, which is the application's affair."""
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    try:
        yield
    finally:
        root.removeHandler(nothing)


def _export(network: Any, file: Path) -> None:
    torch_ = require("torch", "torch")

    class States(torch_.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch_.ones(2, 8, dtype=torch_.int64)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "texts", 1: "tokens"} for name in (*names, "states")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_.onnx.export(
                States().eval(), (ids, torch_.ones_like(ids)), str(file), input_names=names, output_names=["states"],
                dynamic_axes=axes, opset_version=_OPSET, dynamo=False,
            )  # fmt: skip
    except Exception as error:
        kind = getattr(network.config, "model_type", "?")
        raise ConfigurationError(
            f"The architecture {kind!r} cannot be exported to ONNX: {type(error).__name__}: {error}. Use engine='auto'."
        ) from error
