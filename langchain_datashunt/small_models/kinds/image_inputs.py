"""Preprocessing of images for a network: size, channels and normalisation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.images import Picture, Pixels
from langchain_datashunt.small_models.engine.devices import on_device

KNOWN = {"ViT", "CLIP", "ConvNext", "MobileNetV2", "MobileNetV1", "Bit", "Siglip", "Blip", "Swin", "DeiT", "ViTHybrid"}
"""Families of transformers image processors whose preprocessing is supported."""

_NOT_DONE = (
    "do_flip_channel_order",
    "rescale_offset",
    "include_top",
    "do_pad",
    "do_reduce_labels",
    "do_convert_grayscale",
)

PREPROCESSOR_FILE = "preprocessor_config.json"


class ImageScale(Strategy):
    """Preprocessing of a picture to an array of shape `[c, h, w]`.

    The picture is resized, cropped if `shortest_edge` is set, and normalised to `(x / 255 - mean) / std`.
    """

    height: int = Field(ge=4, le=4096)
    width: int = Field(ge=4, le=4096)
    channels: int = Field(default=3)
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resample: int = Field(default=2, ge=0, le=5)
    """PIL's resampling filter; 2 is bilinear, 3 is bicubic."""

    shortest_edge: int | None = Field(default=None, ge=4, le=8192)
    """Length of the shorter side in pixels before a centre crop to `height` x `width`. None resizes without a crop."""

    def pixels(self, picture: Picture) -> Pixels:
        """Resize and crop a picture to pixels of shape `[height, width, channels]`."""
        if self.shortest_edge is None:
            return picture.resized(self.height, self.width, self.channels, resample=self.resample)
        h, w = picture.pixels.shape[:2]
        if max(h, w) > 8 * min(h, w):  # crop first: resizing all of a very long picture would need too much memory
            keep = 4 * min(h, w) * max(1, -(-max(self.height, self.width) // self.shortest_edge))
            top, left = max(0, (h - keep) // 2), max(0, (w - keep) // 2)
            picture = Picture(picture.pixels[top : top + keep, left : left + keep])
            h, w = picture.pixels.shape[:2]
        if h <= w:
            size = (self.shortest_edge, int(self.shortest_edge * w / h))
        else:
            size = (int(self.shortest_edge * h / w), self.shortest_edge)
        whole = picture.resized(*size, self.channels, resample=self.resample)
        top, left = (size[0] - self.height) // 2, (size[1] - self.width) // 2
        if top < 0 or left < 0:
            more = ((max(0, -top), max(0, -top)), (max(0, -left), max(0, -left)), (0, 0))
            whole, top, left = np.pad(whole, more), max(0, top), max(0, left)
        cut: Pixels = whole[top : top + self.height, left : left + self.width]
        return cut

    def tensor(self, pixels: Sequence[Pixels], device: Any) -> Any:
        """Stack and normalise `n` arrays of shape `[h, w, c]` to a torch tensor of shape `[n, c, h, w]`."""
        torch = require("torch", "torch")
        stacked = on_device(np.stack(pixels), device).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        return (stacked - mean) / std

    @classmethod
    def fitted(cls, pixels: Sequence[NDArray[Any]], height: int, width: int, channels: int) -> Self:
        """Create a scale with the mean and standard deviation of each channel over training images."""
        values = np.stack(pixels).reshape(-1, channels).astype(np.float64) / 255.0
        std = np.maximum(values.std(axis=0), 1e-3)
        return cls(
            height=height,
            width=width,
            channels=channels,
            mean=tuple(values.mean(axis=0).round(6).tolist()),
            std=tuple(std.round(6).tolist()),
        )

    @classmethod
    def from_transformers(cls, folder: str | Path) -> Self:
        """Read the preprocessor_config.json of a transformers model.

        Args:
            folder: Folder of the model, or a hub id whose file is then taken from the hub or its local cache.

        Raises:
            ConfigurationError: The file is missing, or its preprocessing is not supported.
        """
        file = Path(folder) / PREPROCESSOR_FILE
        if not file.is_file():
            cached = require("transformers.utils", "torch").cached_file(
                str(folder), PREPROCESSOR_FILE, _raise_exceptions_for_missing_entries=False
            )
            if cached is None:
                raise ConfigurationError(
                    f"{folder} has no {PREPROCESSOR_FILE}, so its image preprocessing is unknown. Add the file, or "
                    f"pass `scale=ImageScale(...)`."
                )
            file = Path(cached)
        return cls.from_config(json.loads(file.read_text(encoding="utf-8")))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Create a scale from the content of a preprocessor_config.json.

        Raises:
            ConfigurationError: The preprocessing is not supported.
        """
        size, crop = config.get("size"), config.get("crop_size")
        named = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        kind = named.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
        kind = kind.removesuffix("FeatureExtractor")
        if kind and kind not in KNOWN:
            raise ConfigurationError(
                f"The image processor {named} is not supported. Supported are: {', '.join(sorted(KNOWN))}. Pass "
                f"`scale=ImageScale(...)` instead."
            )
        strange = [name for name in _NOT_DONE if config.get(name)]
        if strange or config.get("do_rescale") is False or config.get("do_resize") is False:
            steps = ", ".join(strange) or "no resizing or no rescaling"
            raise ConfigurationError(
                f"{PREPROCESSOR_FILE} requests {steps}, which is not supported. Pass `scale=ImageScale(...)` instead."
            )
        if isinstance(size, int):
            edge = config.get("do_center_crop") or kind == "ConvNext"
            size = {"shortest_edge": size} if edge else {"height": size, "width": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if not isinstance(size, Mapping):
            raise ConfigurationError(
                f"Expected `size` in {PREPROCESSOR_FILE} to be a number or a mapping, got {size!r}. Pass "
                f"`scale=ImageScale(...)` instead."
            )
        edge = size.get("shortest_edge")
        if edge is not None and not (config.get("do_center_crop") and crop):
            fraction = config.get("crop_pct")
            crop = {"height": edge, "width": edge}
            edge = int(edge / fraction) if fraction and edge < 384 else edge
            if fraction and crop["height"] >= 384:
                edge = None
        elif edge is None and config.get("do_center_crop") and crop and crop != size:
            raise ConfigurationError(
                f"{PREPROCESSOR_FILE} resizes to {size} and crops to {crop}, which is not supported. Pass "
                f"`scale=ImageScale(...)` instead."
            )
        shape = crop if edge is not None or crop else size
        if not isinstance(shape, Mapping) or "height" not in shape:
            raise ConfigurationError(
                f"Expected `size` in {PREPROCESSOR_FILE} to have height and width, or shortest_edge, got {dict(size)}. "
                f"Pass `scale=ImageScale(...)` instead."
            )
        plain = not config.get("do_normalize", True)
        return cls(
            height=shape["height"],
            width=shape["width"],
            mean=(0.0,) * 3 if plain else tuple(config["image_mean"]),
            std=(1.0,) * 3 if plain else tuple(config["image_std"]),
            resample=2 if config.get("resample") is None else config["resample"],
            shortest_edge=edge,
        )
