"""OnnxEncoder: runs a transformers encoder with ONNX Runtime, in float32 or with 8-bit weights."""

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
from langchain_datashunt.small_models.engine.layers import TokenStates
from langchain_datashunt.small_models.engine.tokenization import pad

if TYPE_CHECKING:
    import torch

_OPSET = 17


class OnnxEncoder:
    """Encoder exported to ONNX, which pads the texts of a batch to the longest one.

    Args:
        network: Transformers encoder on the CPU in float32.
        int8: Whether to quantize the weights to 8 bits. This is faster, but changes the results.

    Raises:
        ConfigurationError: If the network is not on the CPU in float32, or cannot be exported.
        MissingExtraError: If onnxruntime or onnx is not installed.
    """

    def __init__(self, network: torch.nn.Module, *, int8: bool = False) -> None:
        runtime, torch_ = require("onnxruntime", "onnx"), require("torch", "torch")
        require("onnx", "onnx")
        one = next(network.parameters())
        if one.device.type != "cpu" or one.dtype != torch_.float32:
            raise ConfigurationError(
                f"The ONNX engines require a float32 model on the CPU, got {one.dtype} on {one.device}. Use "
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

    def __call__(self, ids: Sequence[Sequence[int]]) -> TokenStates:
        """Return the last hidden states of texts, given as token ids."""
        torch_ = require("torch", "torch")
        tokens, mask = pad(ids, 0, "cpu")
        (states,) = self.session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        return TokenStates(torch_.from_numpy(states)[mask.bool()], mask.sum(1))


@contextmanager
def _root_kept() -> Iterator[None]:
    """Prevent the quantizer from adding a handler to the root logger, which belongs to the application."""
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
            f"Exporting the architecture {kind!r} to ONNX failed: {type(error).__name__}: {error}. Use engine='auto'."
        ) from error
