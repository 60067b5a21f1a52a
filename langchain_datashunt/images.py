"""Image inputs: decoding with size limits, and conversion for prompts and records."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from langchain_core.messages import BaseMessage, HumanMessage
from numpy.typing import NDArray
from pydantic import Field

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import InputError
from langchain_datashunt.inputs import InputReader, messages_of

Pixels: TypeAlias = NDArray[np.uint8]
"""Shape `[h, w, c]`, with c = 1 (grey) or 3 (red, green, blue)."""

_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_LONG = 500
_LOSSLESS_SIDE = 64
"""Largest side in pixels up to which images are encoded as lossless PNG."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded. Some of PIL's other formats run external programs."""

ACCEPTED = (
    "a PIL image, an array [h, w] or [h, w, c] of uint8, the bytes of an image file, a pathlib.Path, a data URL, an "
    "image content block, or a message that contains one"
)


@dataclass(frozen=True, eq=False)
class Picture:
    """Decoded image.

    Attributes:
        pixels: Shape `[h, w, c]`, uint8, c = 1 or 3.
    """

    pixels: Pixels

    @cached_property
    def digest(self) -> bytes:
        """16-byte digest of size and pixels."""
        seen = blake2b(repr(self.pixels.shape).encode(), digest_size=16)
        seen.update(np.ascontiguousarray(self.pixels).tobytes())
        return seen.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Picture({'x'.join(map(str, self.pixels.shape))}, {self.digest.hex()[:8]})"

    def image(self) -> Any:
        """Return a PIL image of mode L or RGB."""
        pixels = self.pixels[..., 0] if self.pixels.shape[2] == 1 else self.pixels
        return require("PIL.Image", "images").fromarray(np.ascontiguousarray(pixels))

    def resized(self, height: int, width: int, channels: int, *, resample: int = 2) -> Pixels:
        """Return the pixels in another size and number of channels, shape `[height, width, channels]`.

        Args:
            height: Height in pixels.
            width: Width in pixels.
            channels: 1 or 3.
            resample: PIL's filter number. 2 is bilinear, 3 is bicubic.
        """
        if self.pixels.shape == (height, width, channels):
            return self.pixels
        image = self.image().convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)

    def encoded(self, longest_side: int | None = None) -> tuple[str, bytes]:
        """Return MIME type and bytes of an image file without metadata such as location, camera or thumbnail.

        Images with sides of up to 64 pixels are encoded as lossless PNG, larger ones as JPEG of quality 90.

        Args:
            longest_side: Maximum of the longer side in pixels. None means no limit.
        """
        image = self.image()
        if longest_side is not None and max(image.size) > longest_side:
            shrink = longest_side / max(image.size)
            image = image.resize((max(1, round(image.width * shrink)), max(1, round(image.height * shrink))), 2)
        out = io.BytesIO()
        if max(image.size) <= _LOSSLESS_SIDE:
            image.save(out, format="PNG")
            return "image/png", out.getvalue()
        image.save(out, format="JPEG", quality=90)
        return "image/jpeg", out.getvalue()

    def data_url(self, longest_side: int | None = None) -> str:
        """Return the encoded image as a data URL (see `encoded`)."""
        mime, data = self.encoded(longest_side)
        return f"data:{mime};base64,{base64.b64encode(data).decode()}"

    def block(self, longest_side: int | None = None) -> dict[str, Any]:
        """Return the encoded image as LangChain's standard content block."""
        mime, data = self.encoded(longest_side)
        return {"type": "image", "base64": base64.b64encode(data).decode(), "mime_type": mime}


class ImageReader(InputReader):
    """Reader for images, with limits on their size.

    Images are never fetched from the network, and strings are never opened as file paths. Otherwise an untrusted text
    could choose which local file is sent to the LLM.

    Prompt variables are `input` (a list with one human message that holds the image and its text, if any), `image_url`
    (a data URL) and, for conversations, `history` and `messages`. The file's metadata is removed from the first two.
    """

    max_bytes: int = Field(default=20 * 2**20, ge=1)
    """Maximum size of an encoded image, in bytes."""

    max_pixels: int = Field(default=50_000_000, ge=1)
    """Maximum of width times height, checked before decoding."""

    sent_side: int | None = Field(default=2048, ge=16)
    """Maximum of the longer side of images sent in prompts, in pixels. None sends the full size."""

    recorded_side: int | None = Field(default=512, ge=16)
    """Maximum of the longer side of recorded images, in pixels. None records the full size."""

    def read(self, value: Any) -> Picture:
        """Return the decoded image.

        Raises:
            InputError: The value contains no image, the image cannot be decoded, or it exceeds the limits.
        """
        return self._picture(self._found(value))

    def key(self, item: Any) -> bytes:
        """Return the digest of the image."""
        digest: bytes = item.digest
        return digest

    def lay_out(self, value: Any) -> dict[str, Any]:
        """Return the prompt variables described in the class docstring.

        Raises:
            InputError: The value contains no image, the image cannot be decoded, or it exceeds the limits.
        """
        inner, rest = value, {}
        if isinstance(value, Mapping) and self.input_key in value:
            inner, rest = value[self.input_key], dict(value)
        picture = self.read(inner)
        block = picture.block(self.sent_side)
        content: list[str | dict[str, Any]] = [block]
        laid_out: dict[str, Any] = {"image_url": f"data:{block['mime_type']};base64,{block['base64']}"}
        if (messages := _conversation(inner)) is not None:
            last = _last_with_image(messages)
            text = str(messages[last].text)
            content = [{"type": "text", "text": text}, block] if text else content
            before = rest.get("history")
            before = before if isinstance(before, list) else []
            laid_out |= {"history": [*before, *messages[:last]], "messages": messages}
        return {**laid_out, **rest, self.input_key: [HumanMessage(content)], **_only(laid_out, "history")}

    def snapshot(self, value: Any) -> Any:
        """Return the decoded image, or the value itself if it is not an image."""
        try:
            return self.read(value)
        except InputError:
            return value

    def write(self, value: Any) -> str:
        """Return the image as a data URL, or shortened JSON if the value is not an image."""
        try:
            return self.read(value).data_url(self.recorded_side)
        except InputError:
            return json.dumps(_in_short(value), default=_in_short, ensure_ascii=False)

    def _found(self, value: Any) -> Any:
        """Return the image in a mapping, a content block or a message."""
        if isinstance(value, Mapping):
            if value.get("type") in ("image", "image_url"):
                return _of_block(value)
            if self.input_key not in value:
                raise InputError(
                    f"The input mapping has no key {self.input_key!r}, only {sorted(map(str, value))}. Rename the "
                    f"key, or pass `input_key=` to the small model."
                )
            return self._found(value[self.input_key])
        if (messages := _conversation(value)) is not None:
            blocks = _image_blocks(messages[_last_with_image(messages)])
            if len(blocks) > 1:
                raise InputError(f"Expected one image in the message, got {len(blocks)}. Send one image.")
            return _of_block(blocks[0])
        return value

    def _picture(self, value: Any) -> Picture:
        if isinstance(value, Picture):
            self._check_size(value.pixels.shape[1], value.pixels.shape[0])
            return value
        if isinstance(value, np.ndarray):
            return self._of_array(value)
        if isinstance(value, str):
            return self._decoded(_bytes_of_url(value, self.max_bytes))
        if isinstance(value, Path):
            return self._decoded(self._file(value))
        if isinstance(value, bytes | bytearray | memoryview):
            return self._decoded(bytes(value))
        if isinstance(value, require("PIL.Image", "images").Image):
            return self._converted(value)
        raise InputError(f"Expected an image, got {type(value).__name__!r}. Pass {ACCEPTED}.")

    def _file(self, path: Path) -> bytes:
        try:
            if path.stat().st_size > self.max_bytes:
                raise InputError(self._too_many_bytes(path.stat().st_size, str(path)))
            return path.read_bytes()
        except OSError as error:
            raise InputError(
                f"The image file {path} cannot be read: {error.strerror}. Check its path and permissions."
            ) from error

    def _decoded(self, data: bytes) -> Picture:
        image_module = require("PIL.Image", "images")
        if len(data) > self.max_bytes:
            raise InputError(self._too_many_bytes(len(data), "the image"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's size warning is redundant: the reader has limits
                image = image_module.open(io.BytesIO(data), formats=FORMATS)
                self._check_size(*image.size)
                image.load()
        except InputError:
            raise
        except Exception as error:  # decoders raise any error on damaged data
            raise InputError(
                f"{len(data)} bytes cannot be decoded as an image ({type(error).__name__}: {error}). The file is "
                f"truncated, damaged or in an unsupported format. Supported formats: {', '.join(FORMATS)}."
            ) from error
        return self._converted(image)

    def _converted(self, image: Any) -> Picture:
        """Convert a PIL image: rotate it by its metadata and put transparency on white."""
        self._check_size(*image.size)
        operations, image_module = require("PIL.ImageOps", "images"), require("PIL.Image", "images")
        try:
            image.load()
            image = operations.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                solid = image.convert("RGBA")
                image = image_module.alpha_composite(image_module.new("RGBA", solid.size, "white"), solid)
            if image.mode.startswith("I;16"):
                image = image_module.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
            if image.mode == "I":
                image = image_module.fromarray(_in_bytes(np.asarray(image)))
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range, convert them to 8 bits first")
            grey = image.mode in ("1", "L")
            pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.uint8)
        except Exception as error:  # decoders raise any error on damaged data or metadata
            raise InputError(f"An image of mode {image.mode!r} cannot be read: {error}.") from error
        return Picture(pixels[..., None] if grey else pixels)

    def _of_array(self, array: NDArray[Any]) -> Picture:
        if array.dtype != np.uint8:
            raise InputError(f"Expected an image array of dtype uint8 (0 to 255), got {array.dtype}. Convert it.")
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
            raise InputError(
                f"Expected an image array of shape [h, w], or [h, w, c] with 1 (grey), 3 (RGB) or 4 (RGBA) "
                f"channels, got {list(array.shape)}."
            )
        self._check_size(array.shape[1], array.shape[0])
        if array.shape[2] == 4:
            return self._converted(require("PIL.Image", "images").fromarray(np.ascontiguousarray(array), "RGBA"))
        return Picture(array.copy())  # the caller may reuse its buffer

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise InputError(f"The image is empty: {width} x {height} pixels. Pass an image with at least one pixel.")
        if width * height > self.max_pixels:
            raise InputError(
                f"The image has {width} x {height} pixels, more than the limit of {self.max_pixels}. Resize it, or "
                f"increase `max_pixels` if you trust its source."
            )

    def _too_many_bytes(self, size: int, what: str) -> str:
        return f"{what} has {size} bytes, more than the limit of {self.max_bytes}. Resize it, or increase `max_bytes`."


def _in_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert integers of up to 32 bits to 8 bits.

    Values up to 255 stay, values up to 65,535 keep their high byte, and others are scaled to their range.
    """
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= 255:
        return values.astype(np.uint8)
    if low >= 0 and high <= 65535:
        return (values.astype(np.uint32) >> 8).astype(np.uint8)
    return ((values.astype(np.float64) - low) * (255.0 / (high - low))).round().astype(np.uint8)


def _only(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: values[name]} if name in values else {}


def _in_short(value: Any) -> Any:
    """Shorten a value that is not an image, because its long texts may be the data of a damaged one."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        return value if len(value) <= _LONG else f"{value[:60]}... ({len(value)} characters)"
    if isinstance(value, Mapping):
        return {str(key)[:60]: _in_short(one) for key, one in value.items()}
    if isinstance(value, BaseMessage):
        return {"type": value.type, "content": _in_short(value.content)}
    if isinstance(value, list | tuple):
        return [_in_short(one) for one in value[:100]]
    return value if isinstance(value, int | float | bool) or value is None else str(value)[:200]


def _conversation(value: Any) -> list[BaseMessage] | None:
    return None if isinstance(value, str | bytes | bytearray | np.ndarray) else messages_of(value)


def _image_blocks(message: BaseMessage) -> list[Mapping[str, Any]]:
    content = message.content if isinstance(message.content, list) else []
    return [block for block in content if isinstance(block, Mapping) and block.get("type") in ("image", "image_url")]


def _last_with_image(messages: list[BaseMessage]) -> int:
    """Return the position of the last human message, which must contain an image."""
    for i in range(len(messages) - 1, -1, -1):
        if isinstance(messages[i], HumanMessage):
            if _image_blocks(messages[i]):
                return i
            raise InputError("The last human message of the conversation contains no image. Add an image block to it.")
    raise InputError(
        f"The conversation has no human message, only {[one.type for one in messages]}. Add a human message with an "
        f"image."
    )


def _of_block(block: Mapping[str, Any]) -> Any:
    """Return the image of a content block: standard, the older form with `source_type`, or OpenAI's."""
    if block.get("type") == "image_url":
        url = block.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    data = block.get("base64") or block.get("data")
    if isinstance(data, str):
        return f"data:{block.get('mime_type') or 'image/png'};base64,{data}"
    if isinstance(url := block.get("url"), str):
        return url
    raise InputError(
        f"The image block contains neither base64 data nor a data URL, only {sorted(map(str, block))}. Images are "
        f"not fetched from the network. Put the data into the block."
    )


def _bytes_of_url(text: str, most: int) -> bytes:
    start = _DATA_URL.match(text)
    if start is None:
        shown = text if len(text) <= 60 else text[:60] + "..."
        raise InputError(
            f"The string {shown!r} is not a data URL of an image. Strings are neither opened as files nor fetched. "
            f"Pass {ACCEPTED}."
        )
    if (len(text) - start.end()) * 3 // 4 > most + 3:
        raise InputError(f"The data URL exceeds the limit of {most} bytes. Resize the image.")
    try:
        return base64.b64decode(text[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"The data URL of an image is damaged: {error}. Encode the image again.") from error
