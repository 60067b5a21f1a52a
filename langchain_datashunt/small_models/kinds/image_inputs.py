"""From pictures to the numbers that an image network takes: size, channels, scale."""

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
"""Families of transformers' image processors whose steps are taken here."""

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
    """How a picture becomes an array `[c, h, w]`: resized, perhaps cropped, scaled to `(x / 255 - mean) / std`."""

    height: int = Field(ge=4, le=4096)
    width: int = Field(ge=4, le=4096)
    channels: int = Field(default=3)
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resample: int = Field(default=2, ge=0, le=5)
    """PIL's number of the filter: 2 is bilinear, 3 bicubic."""

    shortest_edge: int | None = Field(default=None, ge=4, le=8192)
    """Resize the shorter side to this and cut `height` x `width` out of the middle; None resizes both sides."""

    def pixels(self, picture: Picture) -> Pixels:
        """Pixels `[height, width, channels]` of a picture."""
        if self.shortest_edge is None:
            return picture.resized(self.height, self.width, self.channels, resample=self.resample)
        h, w = picture.pixels.shape[:2]
        if max(h, w) > 8 * min(h, w):  # only the middle is kept: the rest of a long picture need not be resized
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
        """Pixels `n` times `[h, w, c]` as a torch tensor `[n, c, h, w]`, scaled."""
        torch = require("torch", "torch")
        stacked = on_device(np.stack(pixels), device).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        return (stacked - mean) / std

    @classmethod
    def fitted(cls, pixels: Sequence[NDArray[Any]], height: int, width: int, channels: int) -> Self:
        """With mean and standard deviation of each channel over training images."""
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
        """As the preprocessor_config.json of a transformers model says; from a folder or, by hub id, from the cache.

        Raises:
            ConfigurationError: There is none, or it says what is not understood here.
        """
        file = Path(folder) / PREPROCESSOR_FILE
        if not file.is_file():
            cached = require("transformers.utils", "torch").cached_file(
                str(folder), PREPROCESSOR_FILE, _raise_exceptions_for_missing_entries=False
            )
            if cached is None:
                raise ConfigurationError(f"{folder} has no {PREPROCESSOR_FILE}, so nobody knows what its images are.")
            file = Path(cached)
        return cls.from_config(json.loads(file.read_text(encoding="utf-8")))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The same from what stands in the file."""
        size, crop = config.get("size"), config.get("crop_size")
        named = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        kind = named.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
        kind = kind.removesuffix("FeatureExtractor")
        if kind and kind not in KNOWN:
            raise ConfigurationError(
                f"Images of a {named} are not prepared here; known are: {', '.join(sorted(KNOWN))}. Give `scale=`."
            )
        strange = [name for name in _NOT_DONE if config.get(name)]
        if strange or config.get("do_rescale") is False or config.get("do_resize") is False:
            told = ", ".join(strange) or "leaving out the resizing or the scaling"
            raise ConfigurationError(f"{PREPROCESSOR_FILE} asks for {told}, which is not done here.")
        if isinstance(size, int):
            edge = config.get("do_center_crop") or kind == "ConvNext"
            size = {"shortest_edge": size} if edge else {"height": size, "width": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if not isinstance(size, Mapping):
            raise ConfigurationError(f"{PREPROCESSOR_FILE} has no size that is understood here: {size!r}.")
        edge = size.get("shortest_edge")
        if edge is not None and not (config.get("do_center_crop") and crop):
            fraction = config.get("crop_pct")
            crop = {"height": edge, "width": edge}
            edge = int(edge / fraction) if fraction and edge < 384 else edge
            if fraction and crop["height"] >= 384:
                edge = None
        elif edge is None and config.get("do_center_crop") and crop and crop != size:
            raise ConfigurationError(f"{PREPROCESSOR_FILE} resizes to {size} and crops to {crop}; this is not known.")
        shape = crop if edge is not None or crop else size
        if not isinstance(shape, Mapping) or "height" not in shape:
            raise ConfigurationError(f"{PREPROCESSOR_FILE} has no size that is understood here: {dict(size)}.")
        plain = not config.get("do_normalize", True)
        return cls(
            height=shape["height"],
            width=shape["width"],
            mean=(0.0,) * 3 if plain else tuple(config["image_mean"]),
            std=(1.0,) * 3 if plain else tuple(config["image_std"]),
            resample=2 if config.get("resample") is None else config["resample"],
            shortest_edge=edge,
        )
