"""Image files: written whole or not at all, with settings and with what their sources held beside the pixels."""

from __future__ import annotations

import errno
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.targets import check_writable

from sdinpaint.checks import check_path
from sdinpaint.errors import ImageError, warn
from sdinpaint.images.deep import Samples, png_bytes, samples_of, tiff_bytes
from sdinpaint.images.embedded import MAX_SEGMENT, Embedded, png_options, settings_exif, to_record
from sdinpaint.images.reading import MAX_PIXELS, open_image, read_settings

__all__ = ["LOSSLESS", "MAX_PIXELS", "SUFFIXES", "as_stored", "check_output_path", "open_image", "over_white"]
__all__ += ["read_settings", "save_png", "write_image"]

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SUFFIXES |= {".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF"}
ENCODING: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},  # exact: under transparent pixels too
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
"""Format -> options of Pillow's `save`; Pillow cannot write AVIF without loss."""
LONGEST = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_536}
"""Format -> the most pixels a side that its encoder takes, where there is a limit."""
LOSSLESS = ("PNG", "TIFF", "WEBP")
"""Formats in which every pixel comes back bit for bit."""
DEEP = ("PNG", "TIFF")
"""Formats that are written with 16 bits a sample where the source has more than 8."""
NO_SUCH_NAME = (errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP)
"""Reasons for which a file cannot be written that lie in its path, and not in the machine."""
ENCODER_ERRORS = (OSError, ValueError, RuntimeError, struct.error)
"""Errors of Pillow's encoders, and of the system while they write."""
MAX_FIELD = 1 << 21
"""Bytes of Exif data in a file of another format than JPEG."""


def over_white(image: Image.Image) -> Image.Image:
    """Blend transparent pixels over white.

    Args:
        image: an image of any mode.

    Returns:
        The RGB image.
    """
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_output_path(path: Path | str, size: tuple[int, int] | None = None) -> Path:
    """Check that an image can be written at a path, before anything is computed; nothing is left behind.

    Args:
        path: the file, whose ending is one of SUFFIXES. Its folder is made when the image is written.
        size: width and height of the image, where they are known.

    Returns:
        The path.

    Raises:
        ImageError: the ending is unknown, its format does not hold images of that size, the path is no file's, or the
            file or its folder is not writable.
    """
    if not isinstance(path, str | Path):
        check_path("path", path)
    path = Path(path)
    subject = f"output {str(path)!r}"
    if path.suffix.lower() not in SUFFIXES:
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise ImageError("IMAGE_OUTPUT_TYPE", subject, found, expected=" ".join(SUFFIXES), hint="save as .png")
    if path.suffix.lower() == ".avif" and not features.check("avif"):
        found, hint = "AVIF, which this installation of Pillow cannot write", "pip install --upgrade pillow"
        raise ImageError("IMAGE_OUTPUT_TYPE", subject, found, hint=hint)
    longest = LONGEST.get(SUFFIXES[path.suffix.lower()])
    if size is not None and longest is not None and max(size) > longest:
        found, expected = "an image of {} x {} pixels".format(*size), f"at most {longest} a side for {path.suffix}"
        raise ImageError("IMAGE_OUTPUT_TYPE", subject, found, expected=expected, hint="save as .png")
    try:
        check_writable(path)
    except OSError as error:
        found = f"cannot be written: {error.strerror}: {error.filename!r}"
        if error.errno in NO_SUCH_NAME:
            raise ImageError("IMAGE_OUTPUT_PATH", subject, found, hint="choose another name") from error
        hint = "choose a folder that you may write to, or free some space"
        raise ImageError("IMAGE_NOT_WRITTEN", subject, found, hint=hint) from error
    return path


def save_png(
    image: Image.Image,
    path: Path | str,
    settings: Mapping[str, Any],
    *,
    source: Embedded | None = None,
    samples: Samples | None = None,
) -> None:
    """Write an image with its settings inside; a write that fails leaves the previous file.

    Settings that cannot be stored in full are shortened; they never prevent a save.

    Args:
        image: the image; its colour profile is written too.
        path: the file: .png, .webp (lossless), .tiff, .jpg or .avif.
        settings: the settings, by name.
        source: data of the source's file that the new one keeps.
        samples: the image's own samples (H, W, 3 or 4), where they have more than 8 bits; PNG and TIFF files hold them
            with 16.

    Raises:
        ImageError: the file cannot be written.
    """
    file, kind, options = _prepared(image, path, settings, source or Embedded(), samples)
    write_image(file, path, kind, **options)


def as_stored(
    image: Image.Image, path: Path | str, settings: Mapping[str, Any], source: Embedded | None = None
) -> Image.Image | None:
    """Encode an image as `save_png` does, and decode it again.

    Args:
        image: the image.
        path: the file that it will be written to.
        settings: the settings, by name.
        source: data of the source's file that the new one keeps.

    Returns:
        The image that the file will hold; None where that is the same, bit for bit.

    Raises:
        ImageError: the path cannot be written, or the format cannot hold the image.
    """
    kind = SUFFIXES[check_output_path(path).suffix.lower()]
    if kind in LOSSLESS:
        return None
    file, kind, options = _prepared(image, path, settings, source or Embedded(), None)
    stream = io.BytesIO()
    try:
        file.save(stream, format=kind, **options)
    except ENCODER_ERRORS as error:
        found, hint = f"cannot be encoded: {_reason(error)}", "save as .png"
        raise ImageError("IMAGE_NOT_WRITTEN", f"output {str(path)!r}", found, hint=hint) from error
    return Image.open(stream, formats=[kind])


@dataclass(frozen=True)
class _Encoded:
    """An image file that is encoded already, which is written as an image is."""

    data: bytes

    def save(self, stream: BinaryIO, **_: Any) -> None:
        stream.write(self.data)


def _prepared(
    image: Image.Image, path: Path | str, settings: Mapping[str, Any], source: Embedded, samples: Samples | None
) -> tuple[Any, str, dict[str, Any]]:
    """Return what is written, its format, and the options of its `save`."""
    kind = SUFFIXES[check_output_path(path, image.size).suffix.lower()]
    subject, record, profile = f"output {str(path)!r}", to_record(settings), image.info.get("icc_profile")
    if kind == "JPEG" and image.mode != "RGB":
        if image.has_transparency_data:
            message = f"{subject}: JPEG has no transparency, so it is saved over white"
            warn(message)
        image = over_white(image)
    if kind == "PNG":
        options = png_options(record, source, image) | {"icc_profile": profile}
        if samples is not None:
            return _Encoded(png_bytes(samples_of(samples), **options)), kind, {}
        return image, kind, ENCODING[kind] | options
    limit = MAX_SEGMENT if kind == "JPEG" else MAX_FIELD
    exif = settings_exif(record, source, image, subject, limit)
    if kind == "TIFF":
        pixels = _pixels(image) if samples is None else samples_of(samples)
        file = tiff_bytes(pixels, exif, dpi=source.dpi, icc_profile=profile, xmp=source.xmp)
        return _Encoded(file), kind, {}
    options = ENCODING[kind] | {"exif": exif.to_bytes(), "icc_profile": profile}
    if source.xmp:
        if len(source.xmp) <= limit:
            options["xmp"] = source.xmp
        else:
            found = f"XMP data of the source, {len(source.xmp)} bytes, do not fit into {kind}"
            warn(f"{subject}: {found}, and are left out")
    if source.dpi and kind == "JPEG":
        options["dpi"] = source.dpi
    return image, kind, options


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels (H, W, C) of an image for a TIFF file."""
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(image).reshape(image.height, image.width, -1)


def write_image(image: Image.Image, path: Path | str, kind: str, **options: Any) -> None:
    """Write an image; a write that fails leaves the previous file.

    Args:
        image: the image.
        path: the file.
        kind: the format by Pillow's name, such as "PNG".
        options: options of Pillow's `save`.

    Raises:
        ImageError: the file cannot be written.
    """
    try:
        with atomic_write(path) as stream:
            image.save(stream, format=kind, **options)
    except ENCODER_ERRORS as error:
        found = f"could not be written: {_reason(error)}"
        hint = "a previous file of that name is untouched; check the free space and the folder"
        raise ImageError("IMAGE_NOT_WRITTEN", f"output {str(path)!r}", found, hint=hint) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
