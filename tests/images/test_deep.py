"""Images of 16 bits or floats: read and written exactly, as independent readers see them."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdinpaint.errors import ImageError, MaskError
from sdinpaint.images.boxes import Box
from sdinpaint.images.canvas import extend
from sdinpaint.images.deep import png_bytes, samples_of, scaled, tiff_bytes, to_8_bits
from sdinpaint.images.exif import Exif
from sdinpaint.images.input_image import join_samples, paste, read_image
from sdinpaint.masks import Mask

SIZE = 72, 97
RNG = np.random.default_rng(0)


def noise(channels: int, dtype: str = "uint16", size: tuple[int, int] = SIZE) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, (*size, channels)).astype(dtype)


def in_cv2_order(array: np.ndarray) -> np.ndarray:
    return array[..., [2, 1, 0, *range(3, array.shape[2])]]


def by_cv2(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, in_cv2_order(array))[1].tobytes()


def by_tifffile(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    extra = {"extrasamples": ["unassalpha"]} if array.shape[2] == 4 else {}
    tifffile.imwrite(stream, array, photometric="rgb", **extra, **options)
    return stream.getvalue()


ENCODERS = {
    "png": lambda array: by_cv2(array, ".png"),
    "our png": png_bytes,
    "tiff by cv2": lambda array: by_cv2(array, ".tiff"),
    "tiff": by_tifffile,
    "big-endian tiff": lambda array: by_tifffile(array, byteorder=">"),
    "deflated tiff": lambda array: by_tifffile(array, compression="zlib", predictor=True),
    "big-endian deflated tiff": lambda array: by_tifffile(array, byteorder=">", compression="zlib"),
    "tiff in tiles": lambda array: by_tifffile(array, tile=(32, 32)),
    "our tiff": lambda array: tiff_bytes(array, Exif("<")),
    "our big-endian tiff": lambda array: tiff_bytes(array, Exif(">")),
}


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("opened", [False, True])
def test_sixteen_bit_colour_is_read_whole(encoder, channels, opened):
    array = noise(channels)
    source = ENCODERS[encoder](array)
    image = read_image(Image.open(io.BytesIO(source)) if opened else source)
    assert image.samples.dtype == np.uint16
    assert np.array_equal(image.samples, array)
    eight = np.rint(array / 257).astype(np.uint8)
    assert np.array_equal(image.rgb, eight[..., :3])
    assert (image.alpha is None) == (channels == 3)
    assert channels == 3 or np.array_equal(image.alpha, eight[..., 3])


MISREAD = {
    "separate planes": (noise(3).transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
    "0 is white": (noise(1)[..., 0], {"photometric": "miniswhite"}),
    "more than 8 bits in which": (RNG.random(SIZE).astype(np.float32), {"photometric": "miniswhite"}),
    "with a sign": (noise(1, "uint8")[..., 0].view(np.int8), {}),
    "kind that Pillow cannot read": (RNG.random((*SIZE, 3)).astype(np.float32), {"photometric": "rgb"}),
}


@pytest.mark.parametrize("found", MISREAD)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_what_pillow_would_misread_is_refused(found, compression):
    array, options = MISREAD[found]
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.ascontiguousarray(array), compression=compression, **options)
    for read in (read_image, Mask.open):
        with pytest.raises((ImageError, MaskError), match=found):
            read(stream)


@pytest.mark.parametrize("order", "<>")
def test_white_may_be_0_where_pillow_knows_it(order):
    array = noise(1, "uint8")[..., 0]
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, photometric="miniswhite", byteorder=order)
    assert np.array_equal(read_image(stream).rgb[..., 0], 255 - array)


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bits_beside_a_channel_without_a_meaning_are_read_whole(order):
    array, stream = noise(4), io.BytesIO()
    tifffile.imwrite(stream, array, photometric="rgb", extrasamples=["unspecified"], byteorder=order)
    assert np.array_equal(read_image(stream).samples, array[..., :3])


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bits_that_are_multiplied_with_alpha_are_read_whole(order):
    array = noise(4)
    array[:9, :, 3], array[9:18, :, 3] = 0, 65535
    alpha = array[..., 3:] / 65535
    multiplied = np.concatenate([np.rint(array[..., :3] * alpha).astype(np.uint16), array[..., 3:]], axis=2)
    stream = io.BytesIO()
    tifffile.imwrite(stream, multiplied, photometric="rgb", extrasamples=["assocalpha"], byteorder=order)
    read = read_image(stream).samples
    assert np.array_equal(read[..., 3], array[..., 3])
    assert np.array_equal(read[9:18], array[9:18])
    assert np.array_equal(np.rint(read[..., :3] * alpha), multiplied[..., :3])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_sixteen_bit_grey_with_alpha_is_read_whole():
    """Neither Pillow nor OpenCV writes such a file; 4 is its colour type."""
    array = noise(2)
    rows = np.zeros((SIZE[0], 1 + 4 * SIZE[1]), np.uint8)
    rows[:, 1:] = array.astype(">u2").view(np.uint8).reshape(SIZE[0], -1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 4, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    assert np.array_equal(read_image(data).samples, array[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_files_are_what_others_read(order, dtype, channels):
    array = noise(channels, dtype, (300, 97 * 8))  # of several strips
    data = tiff_bytes(array, Exif(order), dpi=(300, 150.5), icc_profile=b"profile", xmp=b"<x/>")
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        assert np.array_equal(read.asarray().reshape(array.shape), array)
        tags = read.pages[0].tags
        assert tags[0x8773].value == b"profile"
        assert tags[0x02BC].value == b"<x/>"
    with Image.open(io.BytesIO(data)) as image:
        assert tuple(map(float, image.info["dpi"])) == (300, 150.5)
        if dtype == "uint8":
            assert np.array_equal(np.asarray(image).reshape(array.shape), array)
    if channels == 3:
        assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), in_cv2_order(array))


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 4]))
@settings(max_examples=30, deadline=None)
def test_png_files_are_what_others_read(height, width, channels):
    array = noise(channels, size=(height, width))
    read = cv2.imdecode(np.frombuffer(png_bytes(array), np.uint8), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    assert np.array_equal(read, in_cv2_order(array))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_samples_are_turned_as_the_image_is(orientation):
    array = noise(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = read_image(png_bytes(array, exif=exif.tobytes()))
    stream = io.BytesIO()
    Image.fromarray(to_8_bits(array)).save(stream, "PNG", exif=exif)
    assert np.array_equal(deep.rgb, read_image(stream).rgb)
    assert np.array_equal(to_8_bits(deep.samples), deep.rgb)


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 1), (*SIZE, 3), (*SIZE, 4)])
def test_arrays_keep_their_own_samples(dtype, shape):
    array = RNG.random(shape) if np.dtype(dtype).kind == "f" else RNG.integers(0, 65536, shape)
    array = array.astype(dtype)
    image = read_image(array)
    own = np.float32 if np.dtype(dtype).kind == "f" else np.uint16
    expected = array.reshape(*SIZE, -1).astype(own)
    expected = np.repeat(expected, 3, axis=2) if expected.shape[2] == 1 else expected
    assert image.samples.dtype == own
    assert np.array_equal(image.samples, expected)
    assert np.abs(image.rgb - expected[..., :3] * (255 / (1 if own == np.float32 else 65535))).max() <= 0.5 + 1e-4
    array[:] = 0
    assert image.samples.any()


@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 1), (*SIZE, 4)])
def test_eight_bit_arrays_of_grey_and_with_alpha(shape):
    array = noise(1, "uint8", shape[:2])[..., 0] if len(shape) == 2 else noise(shape[2], "uint8")
    image = read_image(array)
    assert image.samples is None
    assert np.array_equal(image.rgb, array.reshape(*SIZE, -1)[..., :3].repeat(1 if shape[-1] == 4 else 3, axis=2))
    assert shape[-1] != 4 or np.array_equal(image.alpha, array[..., 3])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_modes_keep_their_own_samples(mode):
    values = RNG.integers(0, 65536, SIZE).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    values = values / np.float32(65535) if mode == "F" else values
    image = read_image(Image.fromarray(values))
    assert np.array_equal(image.samples[..., 1], values)
    assert image.samples.dtype == (np.float32 if mode == "F" else np.uint16)


def test_a_colour_that_stands_for_transparency_is_compared_with_all_its_bits():
    array = noise(3)
    array[:10], array[10:20] = (1000, 2000, 3000), (1001, 2000, 3000)
    data = png_bytes(array)
    image = read_image(data[:33] + chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000)) + data[33:])
    assert (image.samples[:10, :, 3] == 0).all()
    assert (image.samples[10:20, :, 3] == 65535).all()
    assert (image.alpha[10:20] == 255).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_scaling_and_rounding_are_inverse(dtype):
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_8_bits(scaled(levels, np.dtype(dtype))), levels)
    assert scaled(levels, np.dtype(dtype))[-1] == {"uint8": 255, "uint16": 65535, "float32": 1}[np.dtype(dtype).name]
    assert np.array_equal(to_8_bits(samples_of(scaled(levels, np.dtype(dtype)))), levels)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("extended", [False, True])
def test_joining_keeps_every_known_sample(channels, dtype, extended):
    array = noise(channels).astype(dtype) / (1 if dtype == np.uint16 else np.float32(65535))
    image = read_image(array.astype(dtype))
    replaced = RNG.random(SIZE) < 0.3
    box = Box(0, 0, SIZE[1], SIZE[0])
    if extended:
        image, mask = extend(image, left=16, bottom=8, overlap=4)
        replaced, box = mask > 0, image.old
    generated = noise(3, "uint8", image.size)
    joined = join_samples(image, paste(image, generated, replaced), replaced)
    assert joined.dtype == dtype
    assert joined.shape == (*image.size, channels)
    known = ~replaced[box.slices]
    assert np.array_equal(joined[box.slices][known], array.astype(dtype)[known])
    assert np.array_equal(to_8_bits(joined)[replaced][:, :3], generated[replaced])
