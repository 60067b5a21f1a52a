from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from PIL import Image

from langchain_datashunt import load_small_model
from langchain_datashunt.exceptions import (
    BundleMismatchError,
    BundleTruncatedError,
    ConfigurationError,
    DataError,
    InputError,
)
from langchain_datashunt.images import ImageReader, Picture
from langchain_datashunt.small_models import ImageClassifier, TrainingSettings
from langchain_datashunt.small_models.kinds.image_inputs import ImageScale
from tests.benchmarks.reproduction.scenes import draw_scenes

READER = ImageReader()
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (12, 10, 3), dtype=np.uint8)


def png(pixels: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=options.pop("format", "PNG"), **options)
    return out.getvalue()


def url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few kilobytes whose header declares the given size in pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 4096)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def same(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "a.png"
    file.write_bytes(png(PIXELS))
    text, data = base64.b64encode(png(PIXELS)).decode(), png(PIXELS)
    return {
        "picture": Picture(PIXELS),
        "array": PIXELS,
        "PIL": Image.fromarray(PIXELS),
        "bytes": data,
        "bytearray": bytearray(data),
        "path": file,
        "data URL": url(data),
        "block": {"type": "image", "base64": text, "mime_type": "image/png"},
        "older block": {"type": "image", "source_type": "base64", "data": text, "mime_type": "image/png"},
        "block with a data URL": {"type": "image", "url": url(data)},
        "OpenAI's block": {"type": "image_url", "image_url": {"url": url(data)}},
        "message": HumanMessage([{"type": "text", "text": "what is it?"}, Picture(PIXELS).block()]),
        "conversation": [
            SystemMessage("hello"), HumanMessage([Picture(PIXELS).block()]), AIMessage("I see"),
        ],
        "mapping": {"input": url(data), "other": 1},
        "mapping with a block": {"input": Picture(PIXELS).block()},
    }  # fmt: skip


def test_image_reader_every_input_form_gives_the_same_picture(tmp_path: Path) -> None:
    for name, value in same(tmp_path).items():
        picture = READER.read(value)
        assert picture == Picture(PIXELS), name
        assert hash(picture) == hash(Picture(PIXELS))
        assert READER.key(picture) == Picture(PIXELS).digest
        assert READER.read(READER.write(value)) == picture, name


BAD: dict[str, tuple[Any, str]] = {
    "cut short": (png(PIXELS)[:-40], "cannot be decoded"),
    "no image": (b"hello", "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "a bomb": (bomb(10_000, 10_000), "10000 x 10000 pixels"),
    "a bomb in a URL": (url(bomb(10_000, 10_000)), "10000 x 10000 pixels"),
    "a format that starts programs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), "[4, 4, 5]"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), "[4, 4, 2]"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), "[0, 4, 3]"),
    "floats": (np.zeros((4, 4, 3)), "float64"),
    "a name of a file": ("/etc/passwd", "is not a data URL"),
    "an address": ("https://example.org/cat.png", "is not a data URL"),
    "a damaged URL": ("data:image/png;base64,@@@", "damaged"),
    "a missing file": (Path("/nowhere/cat.png"), "cannot be read"),
    "a block with an address": ({"type": "image", "url": "https://example.org/a.png"}, "is not a data URL"),
    "a block with nothing": ({"type": "image", "file_id": "x"}, "neither base64 data nor a data URL"),
    "text": (HumanMessage("hello"), "contains no image"),
    "two images": (
        HumanMessage([Picture(PIXELS).block(), Picture(PIXELS).block()]),
        "Expected one image in the message, got 2",
    ),
    "no human": ([AIMessage("hello")], "no human message"),
    "another key": ({"question": 1}, "no key 'input'"),
    "a number": (3, "Expected an image, got 'int'"),
}


@pytest.mark.parametrize("name", BAD)
def test_image_reader_invalid_input_raises_with_reason(name: str) -> None:
    value, words = BAD[name]
    with pytest.raises(InputError) as caught:
        READER.read(value)
    assert words in str(caught.value)


def test_image_reader_input_above_limits_raises(tmp_path: Path) -> None:
    data = png(PIXELS)
    with pytest.raises(InputError, match="`max_bytes`"):
        ImageReader(max_bytes=len(data) - 1).read(data)
    with pytest.raises(InputError, match="exceeds the limit of 10 bytes"):
        ImageReader(max_bytes=10).read(url(data))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png has"):
        ImageReader(max_bytes=10).read(tmp_path / "a.png")
    for value in (data, PIXELS, Image.fromarray(PIXELS), Picture(PIXELS)):
        with pytest.raises(InputError, match="10 x 12 pixels"):
            ImageReader(max_pixels=119).read(value)
    with pytest.raises(ConfigurationError, match="max_pixels"):
        ImageReader(max_pixels=0)


def test_image_reader_other_colour_modes_become_grey_or_rgb() -> None:
    colour = Image.fromarray(PIXELS)
    assert READER.read(colour.convert("L")).pixels.shape == (12, 10, 1)
    assert READER.read(colour.convert("1")).pixels.shape == (12, 10, 1)
    for mode in ("P", "CMYK", "HSV", "YCbCr"):
        assert READER.read(colour.convert(mode)).pixels.shape == (12, 10, 3)
    clear = np.zeros((4, 4, 4), np.uint8)
    for value in (clear, Image.fromarray(clear)):
        assert READER.read(value).pixels.tolist() == np.full((4, 4, 3), 255).tolist()  # transparent pixels become white
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert READER.read(deep).pixels[0, 0, 0] == 0x80


def test_image_reader_exif_applies_rotation_and_drops_metadata() -> None:
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "secret camera"  # orientation (a quarter turn) and camera maker
    out = io.BytesIO()
    image.save(out, format="PNG", exif=exif)
    assert b"secret camera" in out.getvalue()
    picture = READER.read(out.getvalue())
    assert picture.pixels.shape == (10, 12, 3)
    assert b"secret" not in picture.encoded()[1]
    large = Picture(np.tile(PIXELS, (20, 20, 1)))
    mime, data = large.encoded(100)
    assert mime == "image/jpeg"
    assert max(Image.open(io.BytesIO(data)).size) == 100


def test_image_reader_prompt_variables_include_message_url_and_history() -> None:
    laid_out = READER.lay_out(PIXELS)
    (message,) = laid_out["input"]
    assert message.content == [Picture(PIXELS).block()]
    assert READER.read(laid_out["image_url"]) == Picture(PIXELS)
    talk = [
        HumanMessage("hi"),
        AIMessage("yes?"),
        HumanMessage([{"type": "text", "text": "this"}, laid_out["input"][0].content[0]]),
    ]
    told = READER.lay_out({"input": talk, "tone": "kind", "history": [SystemMessage("first")]})
    assert told["tone"] == "kind"
    assert [part.content for part in told["history"]] == ["first", "hi", "yes?"]
    assert told["input"][0].content[0] == {"type": "text", "text": "this"}
    with pytest.raises(InputError):
        READER.lay_out("no image")


def test_image_reader_write_other_values_returns_json() -> None:
    assert json.loads(READER.write({"a": 1})) == {"a": 1}
    assert "hello" in READER.write(HumanMessage("hello"))
    assert READER.write(b"x" * 10) == '"10 bytes"'


def test_image_scale_known_processors_match_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    picture = READER.read(draw_scenes(1)[0].pixels[:, :40])
    makers = {
        "ViTImageProcessor": {"size": {"height": 32, "width": 24}},
        "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 30}},
        "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
    }
    for name, settings in makers.items():
        cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        processor = cls(**settings)
        scale = ImageScale.from_config(json.loads(processor.to_json_string()))
        ours = scale.tensor([scale.pixels(picture)], "cpu")[0].numpy()
        theirs = np.asarray(processor(picture.image(), return_tensors="np")["pixel_values"][0])
        assert ours.shape == theirs.shape, name
        assert np.abs(ours - theirs).max() < 0.06, name  # rounding may differ by one or two of 255 levels


def test_image_scale_invalid_size_or_missing_file_raises(tmp_path: Path) -> None:
    for config in ({"size": None}, {"size": {"longest_edge": 9}}):
        with pytest.raises(ConfigurationError, match="Expected `size`"):
            ImageScale.from_config({"image_mean": [0.5], "image_std": [0.5], **config})
    with pytest.raises(ConfigurationError, match=r"preprocessor_config\.json"):
        ImageScale.from_transformers(tmp_path)


# The classifier


def digits(n: int, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Draw vertical and horizontal bars on noise, which a small ResNet learns in a second."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(n):
        pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
        upright = bool(rng.integers(2))
        if upright:
            pixels[:, 3:5] = 220
        else:
            pixels[3:5] = 220
        images.append(pixels)
        labels.append("bar" if upright else "dash")
    return images, labels


@pytest.fixture(scope="module")
def bars() -> ImageClassifier:
    images, labels = digits(120)
    settings = TrainingSettings(progress=False, epochs=6)
    return ImageClassifier.train(images, labels, depth=8, width=8, augmentation="none", settings=settings)


def test_image_classifier_trained_resnet_is_restored_from_bundle(bars: ImageClassifier, tmp_path: Path) -> None:
    images, labels = digits(60, seed=1)
    batch = bars.predict_batch(images)
    assert np.mean([a == b for a, b in zip(batch.label_names(), labels, strict=True)]) > 0.95
    assert bars.lineage["examples"] + bars.lineage["validation_examples"] == 120
    loaded = load_small_model(bars.save(tmp_path / "bundle"))
    assert isinstance(loaded, ImageClassifier)
    np.testing.assert_array_equal(loaded.predict_batch(images).probabilities, batch.probabilities)
    assert loaded.scale == bars.scale
    one = loaded.invoke({"input": Picture(images[0][..., None]).data_url()})
    assert one.label == batch.label_names()[0]


def test_image_classifier_broken_image_fails_alone(bars: ImageClassifier) -> None:
    images, _ = digits(3)
    found = bars.batch([images[0], b"broken", images[1]], return_exceptions=True)
    assert isinstance(found[1], InputError)
    assert [found[0].label, found[2].label] == [one.label for one in bars.batch(images[:2])]
    with pytest.raises(InputError):
        bars.invoke("a text")


def test_image_classifier_repeated_images_hit_the_cache(bars: ImageClassifier) -> None:
    images, _ = digits(4)
    remembering = bars.model_copy(update={"cache_size": 10})
    first = remembering.predict_batch(images)
    again = remembering.predict_batch([Image.fromarray(image) for image in images])
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert remembering.cache is not None
    assert (remembering.cache.misses, remembering.cache.hits) == (4, 4)


def test_shifted_random_augmentation_shifts_and_mirrors() -> None:
    import torch

    from langchain_datashunt.small_models.kinds.image_modules import shifted

    torch.manual_seed(0)
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    assert torch.equal(shifted(images, 0, False), images)
    moved = shifted(images, 1, False)
    assert len({float(one[0, 4, 4]) for one in moved}) == 9
    flipped = shifted(images, 0, True)
    assert {tuple(one[0, 0].tolist()) for one in flipped} == {tuple(range(8)), tuple(range(7, -1, -1))}


def test_image_classifier_invalid_training_arguments_raises() -> None:
    images, labels = digits(6)
    with pytest.raises(DataError, match="Training image 1 cannot be used"):
        ImageClassifier.train([images[0], b"broken"], labels[:2])
    with pytest.raises(ConfigurationError, match="6 n \\+ 2"):
        ImageClassifier.train(images, labels, depth=9)
    with pytest.raises(ConfigurationError, match="no weights"):
        ImageClassifier(labels=("a", "b")).invoke(images[0])


def tiny_vit(folder: Path) -> str:
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    told = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return str(folder)


def test_image_classifier_transformers_model_loads_and_fine_tunes(tmp_path: Path) -> None:
    folder = tiny_vit(tmp_path / "vit")
    model = ImageClassifier(model=folder)
    assert model.labels == ("cat", "dog", "owl")
    scenes = [scene.pixels for scene in draw_scenes(5)]
    before = model.predict_batch(scenes)
    loaded = load_small_model(model.save(tmp_path / "bundle"))
    np.testing.assert_allclose(loaded.predict_batch(scenes).probabilities, before.probabilities, atol=1e-6)
    with pytest.raises(ConfigurationError, match="3 outputs"):
        ImageClassifier(model=folder, labels=("a", "b"))
    images, labels = digits(40)
    settings = TrainingSettings(progress=False, epochs=1)
    tuned = ImageClassifier.train(images, labels, base=folder, settings=settings)
    assert tuned.labels == ("bar", "dash")
    assert tuned.predict_batch(images).probabilities.shape == (40, 2)


def test_load_image_bundle_label_mismatch_raises(bars: ImageClassifier, tmp_path: Path) -> None:
    folder = bars.save(tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    config["labels"] = ["bar", "dash", "dot"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleMismatchError, match=r"output.*3 labels"):
        load_small_model(folder)


# Hostile and unusual inputs


def crafted() -> bytes:
    """Return a rotated JPEG with an EXIF tag of a wrong type, which may raise any exception when rewritten."""
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, format="JPEG", exif=exif)
    data = bytearray(out.getvalue())
    at = data.index(b"Exif\0\0") + 6
    order = ">" if data[at : at + 2] == b"MM" else "<"
    entry = struct.pack(f"{order}HHI4s", 0x0112, 3, 1, struct.pack(f"{order}HH", 6, 0))
    start = data.index(entry)
    data[start - 2 : start] = struct.pack(f"{order}H", 1)
    assert start
    return bytes(data)


def test_image_reader_decoder_exception_fails_only_that_image(
    bars: ImageClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageOps

    def broken(image: Any) -> Any:
        if image.size == (10, 12):
            raise AttributeError("'float' object has no attribute 'encode'")
        return image

    assert READER.read(crafted()).pixels.shape[2] == 3
    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    images, _ = digits(2)
    found = bars.batch([png(images[0]), crafted(), png(images[1])], return_exceptions=True)
    assert isinstance(found[1], InputError)
    assert [found[0].label, found[2].label] == [one.label for one in bars.batch(images)]


def test_recorder_changed_buffer_or_deleted_file_keeps_original_image(bars: ImageClassifier, tmp_path: Path) -> None:
    from langchain_datashunt import ShuntRunnable
    from langchain_datashunt.call_log import CallLog, Recorder

    images, _ = digits(2)
    buffer, file = images[0].copy(), tmp_path / "u.png"
    file.write_bytes(png(images[1]))
    held = READER.read(buffer)
    with CallLog(tmp_path / "calls.db") as store:
        recorder = Recorder(store, sample_small=1.0)
        shunt = ShuntRunnable(small=bars, large=lambda _: "bar", pruning=None, recorder=recorder)
        shunt.batch([buffer, file])
        buffer[:] = 255
        file.unlink()
        recorder.close()
        calls = [call for part in store.iterate() for call in part]
    assert {READER.read(call.input) for call in calls} == {READER.read(one) for one in images}
    assert held == READER.read(images[0])


def test_image_reader_write_damaged_image_is_shortened() -> None:
    damaged = "data:image/png;base64," + "A" * 10_000
    for value in (damaged, {"input": damaged}, HumanMessage([{"type": "image_url", "image_url": {"url": damaged}}])):
        assert len(READER.write(value)) < 1000


def test_image_reader_high_bit_depth_is_scaled_and_float_raises() -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    for data in (ramp.astype(np.int32), ramp.astype(np.uint16)):
        assert READER.read(Image.fromarray(data)).pixels.mean() == pytest.approx(127, abs=1)
    wide = READER.read(Image.fromarray((ramp * 1000 - 5_000_000).astype(np.int32))).pixels
    assert (wide.min(), wide.max()) == (0, 255)
    with pytest.raises(InputError, match="no known range"):
        READER.read(Image.fromarray(ramp.astype(np.float32)))
    with pytest.raises(InputError, match="image is empty"):
        READER.read(Image.new("RGB", (0, 5)))


def test_image_scale_very_long_picture_is_cropped() -> None:
    scale = ImageScale(height=28, width=28, shortest_edge=32)
    rng = np.random.default_rng(0)
    for shape in ((2, 2000, 3), (2000, 2, 3), (1, 50_000, 1), (40, 30, 3)):
        assert scale.pixels(Picture(rng.integers(0, 255, shape, dtype=np.uint8))).shape == (28, 28, 3)
    transformers = pytest.importorskip("transformers")
    picture = Picture(rng.integers(0, 255, (10, 300, 3), dtype=np.uint8))
    cls = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = cls(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    scale = ImageScale.from_config(json.loads(processor.to_json_string()))
    theirs = np.asarray(processor(picture.image(), return_tensors="np")["pixel_values"][0])
    ours = scale.tensor([scale.pixels(picture)], "cpu")[0].numpy()
    assert np.abs(ours - theirs).mean() < 0.2  # the centre crop may be off by half a pixel


def test_image_scale_unknown_processor_raises_and_legacy_config_loads() -> None:
    base = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    for more in (
        {"image_processor_type": "EfficientNetImageProcessor"}, {"image_processor_type": "PoolFormerImageProcessor"},
        {"do_flip_channel_order": True}, {"rescale_offset": True}, {"do_rescale": False},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match="not"):
            ImageScale.from_config({**base, **more})
    assert ImageScale.from_config({**base, "resample": 0}).resample == 0
    old = {**base, "size": 224, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"}
    found = ImageScale.from_config(old)
    assert (found.height, found.width, found.shortest_edge) == (224, 224, 256)


def test_image_classifier_duplicate_label_names_get_a_suffix(tmp_path: Path) -> None:
    folder = Path(tiny_vit(tmp_path / "vit"))
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "crane", "1": "dog", "2": "crane"}
    (folder / "config.json").write_text(json.dumps(config))
    assert ImageClassifier(model=str(folder)).labels == ("crane", "dog", "crane (2)")


def test_load_tampered_image_bundle_raises_and_drops_code_settings(bars: ImageClassifier, tmp_path: Path) -> None:
    from langchain_datashunt.exceptions import BundleError
    from langchain_datashunt.small_models.bundles.networks import safe_config

    folder = bars.save(tmp_path / "bundle")
    good = (folder / "config.json").read_text()

    def changed(change: Any) -> None:
        config = json.loads(good)
        change(config["settings"])
        (folder / "config.json").write_text(json.dumps(config))

    for change in (
        lambda settings: settings["architecture"].update(width=100_000),
        lambda settings: settings["architecture"].pop("model_type"),
        lambda settings: settings.pop("scale"),
        lambda settings: settings["architecture"].update(model_type="evil"),
    ):
        changed(change)
        with pytest.raises(BundleError):
            load_small_model(folder)
    kept = safe_config(
        {"model_type": "vit", "auto_map": {"AutoModel": "evil--x"}, "attn_implementation": "evil/kernels"}
    )
    assert not hasattr(kept, "auto_map")


def test_reader_wrapped_model_uses_wrapper_key_without_weights(bars: ImageClassifier, tmp_path: Path) -> None:
    from langchain_datashunt import ShuntRunnable
    from langchain_datashunt.small_models import BundledSmallModel, EnsembleClassifier, TextCNN

    images, labels = digits(4)
    folder = bars.save(tmp_path / "bundle")
    light = BundledSmallModel(path=str(folder), input_key="picture")
    assert light.reader == bars.reader.model_copy(update={"input_key": "picture"})
    assert light._model is None
    assert light.invoke({"picture": images[0]}).label == bars.invoke(images[0]).label
    both = EnsembleClassifier(members=(bars, bars), labels=bars.labels, input_key="picture")
    assert both.invoke({"picture": images[0]}).label == bars.invoke(images[0]).label
    broken = BundledSmallModel.from_folder(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 50)
    shunt = ShuntRunnable(small=broken, large=lambda asked: asked["input"][0].type)
    with pytest.raises(BundleTruncatedError):  # it would never answer, and every call would cost a large call
        shunt.invoke(images[0])
    text = TextCNN.train(["a b", "c d"] * 4, labels * 2, settings=TrainingSettings(progress=False, epochs=1))
    folder = text.save(tmp_path / "text")
    gone = BundledSmallModel.from_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BundleTruncatedError):
        ShuntRunnable(small=gone, large=lambda asked: asked["input"]).invoke("x")


async def test_shunt_async_call_reads_images_off_the_event_loop(bars: ImageClassifier) -> None:
    import asyncio
    import threading

    from langchain_datashunt import AlwaysLarge, ShuntRunnable

    here, where = threading.get_ident(), []

    class Watching(ImageReader):
        def lay_out(self, value: Any) -> dict[str, Any]:
            where.append(threading.get_ident())
            return super().lay_out(value)

    small = bars.model_copy(update={"images": Watching()})
    shunt = ShuntRunnable(small=small, large=lambda _: "x", policy=AlwaysLarge())
    images, _ = digits(1)
    await asyncio.gather(shunt.ainvoke(images[0]), shunt.abatch(images))
    assert len(where) == 2
    assert here not in where
