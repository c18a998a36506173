"""Saved results: what a file does to the known pixels is told and recorded, and no sample of a source is lost."""

from __future__ import annotations

import io
import pickle
import warnings

import cv2
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from sdinpaint import Mask, metrics, replay
from sdinpaint.errors import SdInpaintWarning
from sdinpaint.images.deep import png_bytes
from sdinpaint.images.files import read_settings

SIZE = 64, 80
RNG = np.random.default_rng(3)
IMAGE = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (*SIZE, 3), dtype=np.uint16)
MASK = Mask.ellipse(SIZE, (20, 12, 60, 50))
KNOWN = ~MASK.hole


def inpaint(pipe, image, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 1, "seed": 5, "progress": False} | options)


def told(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(one.message) for one in caught if issubclass(one.category, SdInpaintWarning)]


@pytest.fixture(scope="module")
def one(pipe):
    return inpaint(pipe, IMAGE)


@pytest.fixture(scope="module")
def deep(pipe):
    return inpaint(pipe, DEEP)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "tiff"])
def test_lossless_files_keep_every_known_pixel_without_a_word(one, tmp_path, suffix):
    assert told(one.save, tmp_path / f"out.{suffix}") == []
    with Image.open(tmp_path / f"out.{suffix}") as image:
        assert np.array_equal(np.asarray(image), np.asarray(one.image))
        assert np.array_equal(np.asarray(image)[KNOWN], IMAGE[KNOWN])
    assert read_settings(tmp_path / f"out.{suffix}")["manifest"]["scores"]["known_error"] == 0


@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_the_error_in_a_lossy_file_is_that_of_the_file(one, tmp_path, suffix):
    (message,) = told(one.save, tmp_path / f"out.{suffix}")
    with Image.open(tmp_path / f"out.{suffix}") as image:
        error = metrics.known_error(IMAGE, np.asarray(image.convert("RGB")), MASK.hole)
    assert error > 0
    assert f"by up to {error} of 255" in message
    assert read_settings(tmp_path / f"out.{suffix}")["manifest"]["scores"]["known_error"] == error
    assert one.settings["manifest"]["scores"]["known_error"] == 0


def test_a_lossy_file_that_changes_nothing_is_no_reason_to_warn(pipe, tmp_path):
    flat = inpaint(pipe, np.full((*SIZE, 3), 128, np.uint8), np.zeros(SIZE, bool))
    assert told(flat.save, tmp_path / "out.jpg") == []


def test_each_of_several_has_its_own_error(pipe, tmp_path):
    two = inpaint(pipe, [IMAGE, np.full_like(IMAGE, 99)], seed=[1, 2])
    messages = told(two.save, tmp_path / "out.jpg")
    stored = [read_settings(tmp_path / f"out-{n}.jpg")["manifest"]["scores"]["known_error"] for n in (1, 2)]
    assert stored[0] > stored[1]
    assert f"out-1.jpg': JPEG changes known pixels, by up to {stored[0]} of" in messages[0]


def test_transparent_pixels_keep_their_colours(pipe, tmp_path):
    rgba = np.dstack([IMAGE, RNG.integers(0, 2, SIZE, dtype=np.uint8) * 255])
    result = inpaint(pipe, rgba)
    for suffix in ("png", "webp", "tiff"):
        result.save(tmp_path / f"out.{suffix}")
        with Image.open(tmp_path / f"out.{suffix}") as image:
            assert np.array_equal(np.asarray(image)[KNOWN], rgba[KNOWN])
    messages = told(result.save, tmp_path / "out.jpg")
    assert len(messages) == 2  # that it is over white, and the largest change beside that
    assert read_settings(tmp_path / "out.jpg")["manifest"]["scores"]["known_error"] < 40


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_written_where_the_source_had_them(deep, tmp_path, suffix):
    assert told(deep.save, tmp_path / f"out.{suffix}") == []
    read = cv2.imread(str(tmp_path / f"out.{suffix}"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert np.array_equal(read, deep.array())
    assert np.array_equal(read[KNOWN], DEEP[KNOWN])
    assert np.array_equal(read[MASK.hole], np.asarray(deep.image)[MASK.hole].astype(np.uint16) * 257)
    assert read_settings(tmp_path / f"out.{suffix}")["manifest"]["scores"]["known_error"] == 0


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_what_a_file_cannot_hold_is_told(deep, tmp_path, suffix):
    messages = told(deep.save, tmp_path / f"out.{suffix}")
    assert any("holds 8 bits a sample, and the source is uint16; save as .png or .tiff" in one for one in messages)


def test_floats_are_exact_in_the_array_and_rounded_in_a_file(pipe, tmp_path):
    values = RNG.random((*SIZE, 3), dtype=np.float32)
    result = inpaint(pipe, values)
    assert result.array().dtype == np.float32
    assert np.array_equal(result.array()[KNOWN], values[KNOWN])
    assert any("holds 16 bits a sample" in one for one in told(result.save, tmp_path / "out.tiff"))
    assert np.abs(tifffile.imread(tmp_path / "out.tiff") / 65535 - result.array()).max() < 1 / 65535


def test_the_array_of_eight_bits_is_the_image(one, pipe):
    assert np.array_equal(one.array(), np.asarray(one.image))
    one.array()[:] = 0
    assert np.asarray(one.image).any()
    two = inpaint(pipe, [IMAGE, DEEP], seed=[1, 2])
    assert [two.array(index).dtype for index in range(2)] == [np.uint8, np.uint16]


def test_an_extended_image_keeps_its_samples(pipe):
    result = pipe.outpaint(DEEP, "a fox", left=16, overlap=8, steps=1, seed=1, progress=False)
    assert np.array_equal(result.array()[:, 16 + 8 :], DEEP[:, 8:])


def test_again_and_pickles_keep_the_samples(deep):
    assert np.array_equal(pickle.loads(pickle.dumps(deep)).array(), deep.array())
    assert np.array_equal(deep.again().array()[KNOWN], DEEP[KNOWN])


def test_a_sixteen_bit_result_replays(pipe, tmp_path):
    (tmp_path / "photo.png").write_bytes(png_bytes(DEEP))
    inpaint(pipe, tmp_path / "photo.png").save(tmp_path / "out.png")
    assert replay(tmp_path / "out.png", pipe, progress=False).identical
    grey = RNG.integers(0, 65536, SIZE, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    inpaint(pipe, tmp_path / "grey.png").save(tmp_path / "out.tiff")
    assert replay(tmp_path / "out.tiff", pipe, progress=False).identical


def test_a_photo_keeps_its_data_through_a_run(pipe, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "A Camera", 3
    stream = io.BytesIO()
    Image.fromarray(IMAGE).save(stream, "JPEG", exif=exif, dpi=(300, 300))
    result = inpaint(pipe, stream)
    for suffix in ("png", "jpg", "webp", "tiff", "avif"):
        result.save(tmp_path / f"out.{suffix}")
        with Image.open(tmp_path / f"out.{suffix}") as image:
            assert image.getexif()[ExifTags.Base.Make] == "A Camera"
            assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
