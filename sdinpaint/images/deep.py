"""Images of 16 bits a sample, which Pillow reads and writes for grey alone: PNG and TIFF files, exactly."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLEFORMAT

from sdinpaint.images.exif import Entry, Exif, Ifd, ifd_bytes, long, rational, short, undefined

__all__ = ["Samples", "misread", "png_bytes", "read_colour", "samples_of", "scaled", "tiff_bytes", "to_8_bits"]

Samples: TypeAlias = NDArray[Any]
"""Pixels (H, W, 3) or (H, W, 4): uint8 0 to 255, uint16 0 to 65535, or float32 0.0 to 1.0."""

TOP: dict[str, float] = {"uint8": 255, "uint16": 65535, "float32": 1.0}
"""Type of samples -> value of white."""
OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if np.little_endian else "16L"}
"""Byte order of 16-bit samples, of which Pillow keeps the high bytes -> the order in which it takes the low ones."""
STRIP = 1 << 20
"""Bytes of a strip of a TIFF file before compression."""
DEFLATE, DIFFERENCES, SIGNED = 8, 2, 2


def to_8_bits(samples: Samples) -> NDArray[np.uint8]:
    """Round samples to 8 bits, as the models see them.

    Args:
        samples: pixels of any shape.

    Returns:
        The levels 0 to 255.
    """
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == np.uint16:
        return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.rint(samples * np.float32(255)).astype(np.uint8)


def scaled(pixels: NDArray[np.uint8], dtype: np.dtype[Any]) -> Samples:
    """Express 8-bit levels in another type of samples.

    Args:
        pixels: levels 0 to 255.
        dtype: uint8, uint16 or float32.

    Returns:
        A new array of that type, in which white is white.
    """
    if dtype == np.float32:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(dtype) * dtype.type(TOP[dtype.name] // 255)


def samples_of(samples: Samples) -> Samples:
    """Return samples as files hold them: 8 or 16 bits.

    Args:
        samples: the pixels.

    Returns:
        The pixels; those of float32 are rounded to 16 bits.
    """
    return np.rint(samples * np.float64(65535)).astype(np.uint16) if samples.dtype == np.float32 else samples


def misread(tags: Mapping[int, Any]) -> str | None:
    """Say what of a TIFF file Pillow passes over, so that it decodes other pixels than the file holds.

    Args:
        tags: the tags of the file.

    Returns:
        The words; None for a file that is read as it is.
    """
    bits = tags.get(BITSPERSAMPLE, (1,))
    if tags.get(PLANAR_CONFIGURATION) == 2 and len(bits) > 1 and max(bits) > 8:
        return "of more than 8 bits in separate planes"
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 and max(bits) > 8:
        return "of more than 8 bits in which 0 is white"
    if SIGNED in tags.get(SAMPLEFORMAT, ()) and max(bits) <= 8:
        return "of 8-bit numbers with a sign"
    return None


def read_colour(image: Image.Image) -> Samples | None:
    """Read the samples of a colour image of 16 bits, of which Pillow's own decoding keeps the high bytes alone.

    Args:
        image: an image that was opened and not decoded yet; it stays so.

    Returns:
        The samples (H, W, 3) or (H, W, 4); None for any other image.
    """
    stream = getattr(image, "fp", None)
    tiles = getattr(image, "tile", None)
    if not isinstance(image, ImageFile.ImageFile) or stream is None or not tiles or image.mode not in ("RGB", "RGBA"):
        return None
    rawmode = _rawmode(tiles[0])
    kind, _, order = rawmode.partition(";")
    if order not in OTHER_BYTE or kind not in ("RGB", "RGBX", "RGBA", "RGBa", "LA"):
        return None
    position = stream.tell()
    try:
        if kind == "LA":  # four bytes a pixel, as RGBA has
            levels = _decoded(image, "RGBA")
            grey, alpha = (levels[..., i].astype(np.uint16) << 8 | levels[..., i + 1] for i in (0, 2))
            return np.stack([grey, grey, grey, alpha], axis=2)
        plain = "RGBA" if kind == "RGBa" else kind
        high: NDArray[Any] = _decoded(image, f"{plain};{order}").astype(np.uint16)
        samples = high << 8 | _decoded(image, f"{plain};{OTHER_BYTE[order]}")
        return _divided(samples) if kind == "RGBa" else samples
    finally:
        stream.seek(position)


def _divided(samples: Samples) -> Samples:
    """Divide colours by the alpha that they are multiplied with."""
    alpha = samples[..., 3:].astype(np.float64)
    colours = samples[..., :3] * np.divide(65535, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    return np.concatenate([np.rint(colours).clip(0, 65535).astype(np.uint16), samples[..., 3:]], axis=2)


def _decoded(image: ImageFile.ImageFile, rawmode: str) -> NDArray[np.uint8]:
    """Decode an image once more, with its bytes taken as another mode."""
    assert image.fp is not None
    image.fp.seek(0)
    again: Any = Image.open(image.fp, formats=[image.format or "PNG"])
    again.tile = [
        tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:])) for tile in again.tile
    ]
    return np.array(again)


def _rawmode(tile: Any) -> str:
    args = tile.args if isinstance(tile.args, str) else tile.args[0]
    return args if isinstance(args, str) else ""


def png_bytes(samples: Samples, **options: Any) -> bytes:
    """Encode a PNG file of 16 bits a sample.

    Args:
        samples: uint16 pixels (H, W, 3) or (H, W, 4).
        options: options of Pillow's `save`, for all that the file holds beside its pixels.

    Returns:
        The file.
    """
    height, width, channels = samples.shape
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG", **options)
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2  # each row as its difference from the one above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    own = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0),
        b"IDAT": zlib.compress(filtered.tobytes()),
    }
    parts = [(name, own.get(name, data)) for name, data in _chunks(stream.getvalue())]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        at += 12 + size


def tiff_bytes(
    samples: Samples,
    exif: Exif,
    *,
    dpi: tuple[float, float] | None = None,
    icc_profile: bytes | None = None,
    xmp: bytes | None = None,
) -> bytes:
    """Encode a TIFF file, compressed without loss.

    Args:
        samples: pixels (H, W, 1), (H, W, 3) or (H, W, 4) of 8 or 16 bits.
        exif: tags that the file holds beside those of its pixels.
        dpi: resolution in pixels per inch.
        icc_profile: colour profile.
        xmp: XMP data.

    Returns:
        The file.
    """
    order, (height, width, channels) = exif.order, samples.shape
    bits = 8 * samples.itemsize
    stored = samples.astype(samples.dtype.newbyteorder(order))
    stored[:, 1:] = samples[:, 1:] - samples[:, :-1]  # unsigned, so that it wraps around
    rows = max(STRIP // (width * channels * samples.itemsize), 1)
    strips = [zlib.compress(stored[row : row + rows].tobytes()) for row in range(0, height, rows)]
    offsets = np.cumsum([8, *map(len, strips)]).tolist()
    padding = bytes(offsets[-1] % 2)
    at = offsets.pop() + len(padding)
    ifd: Ifd = {
        **exif.ifd,
        0x0100: long(order, width),
        0x0101: long(order, height),
        0x0102: short(order, *[bits] * channels),
        0x0103: short(order, DEFLATE),
        0x0106: short(order, 1 if channels == 1 else 2),
        0x0111: long(order, *offsets),
        0x0115: short(order, channels),
        0x0116: long(order, rows),
        0x0117: long(order, *map(len, strips)),
        0x011C: short(order, 1),
        0x013D: short(order, DIFFERENCES),
    }
    if channels == 4:
        ifd[0x0152] = short(order, 2)  # alpha, with which the colours are not multiplied
    if dpi is not None:
        ifd |= {0x011A: rational(order, dpi[0]), 0x011B: rational(order, dpi[1]), 0x0128: short(order, 2)}
    if icc_profile:
        ifd[0x8773] = undefined(icc_profile)
    if xmp:
        ifd[0x02BC] = Entry(1, len(xmp), xmp)
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    return header + b"".join(strips) + padding + ifd_bytes(ifd, order, at)
