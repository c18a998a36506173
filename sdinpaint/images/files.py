"""Image files: read with limits, written whole or not at all, and the settings stored inside them."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from sdinpaint_weights.atomic import atomic_write
from sdinpaint_weights.targets import check_writable

from sdinpaint.errors import ImageError, warn

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "SHORTENED",
    "check_output_path",
    "decode",
    "open_image",
    "over_white",
    "read_settings",
    "save_png",
    "write_image",
]

# decoders in wide use; most of Pillow's security fixes concern the others
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 64 * 2**20

DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", *DEEP_MODES)

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# lossless WebP keeps known pixels bit for bit
ENCODING: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}

NO_SUCH_NAME = (errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP)
"""Reasons for which a file cannot be written that lie in its path, and not in the machine."""

MAX_METADATA = 60_000
"""Bytes of settings in a file: an Exif block holds 64 kB at most, and Pillow refuses PNG texts above 1 MB."""
SHORTENED = "shortened_from_sha256"
"""Key of the sha256 of the full settings, where they were shortened."""

# labels of the "parameters" text of AUTOMATIC1111's web UI, in its order
LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "strength": "Denoising strength",
    "sdinpaint": "Version",
}
SAMPLER_NAMES = {"ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M"}
SCHEDULE_TYPES = {"karras": "Karras", "linspace": "Uniform"}
"""Spacings that A1111 knows; without one, it assumes Karras for DPM++ 2M."""
PLAIN = re.compile(r"[\w.+/-]+( +[\w.+/-]+)*")
"""A value that readers of the text take as it stands; any other is quoted as in JSON."""
TAKEN_FOR_FIELDS = re.compile(r"\s*\n\s*(?=Negative prompt:|Steps:)")
"""A line break in a prompt, where readers would take the next line for the fields after the prompt."""

# Pillow's decoders validate little themselves, and raise any of these on broken files
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(path: Path | str, argument: str) -> Image.Image:
    """Read an image file and turn it upright by its Exif orientation.

    Args:
        path: the file.
        argument: name that an error gives to the image, beside the file.

    Returns:
        The decoded image.

    Raises:
        ImageError: the file is missing, is not an image of a known format, is damaged, or is too large.
    """
    path = Path(path)
    subject = f"{argument} {str(path)!r}"
    if not path.exists():
        hint = "URLs are not fetched: save the image first" if ":/" in str(path) else "check the path"
        raise ImageError("IMAGE_NOT_FOUND", subject, "no such file", expected="an image file", hint=hint)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not a regular file"
        raise ImageError("IMAGE_NOT_A_FILE", subject, found, expected="an image file", hint="give the path of one file")
    try:
        image = Image.open(path, formats=FORMATS)
    except (*BOMBS, *DECODER_ERRORS) as error:
        raise _unreadable(path, subject, error) from error
    with image:
        return decode(image, subject)


def decode(image: Image.Image, subject: str) -> Image.Image:
    """Decode the first frame of an image after a check of its size, and turn it upright by its Exif orientation.

    Args:
        image: an opened image.
        subject: name that an error gives to the image.

    Returns:
        The decoded image.

    Raises:
        ImageError: the image is too large, damaged, or of an unknown mode.
    """
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{image.width} x {image.height} pixels", subject)
    if image.mode not in MODES:
        raise ImageError("IMAGE_TYPE", subject, f"PIL mode {image.mode}", expected="RGB", hint="convert it to RGB")
    try:
        if getattr(image, "is_animated", False):
            warn(f"{subject}: only the first frame or page is used")
            image.seek(0)
        image.load()
        return ImageOps.exif_transpose(image)
    except BOMBS as error:
        raise _too_large(str(error), subject) from error
    except DECODER_ERRORS as error:
        ended = any(word in str(error).lower() for word in ("truncated", "not enough", "unexpected end"))
        found = "the file ends early" if ended else "the image data is damaged"
        code = "IMAGE_TRUNCATED" if ended else "IMAGE_UNREADABLE"
        hint = "copy or download the file again"
        raise ImageError(code, subject, f"{found}: {_reason(error)}", expected="a complete image", hint=hint) from error


def over_white(image: Image.Image) -> Image.Image:
    """Blend transparent pixels over white.

    Args:
        image: an image of any mode.

    Returns:
        The RGB image.
    """
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_output_path(path: Path | str) -> Path:
    """Check that an image can be written at a path, before anything is computed; nothing is left behind.

    Args:
        path: the file, which ends in .png, .jpg, .jpeg or .webp. Its folder is made when the image is written.

    Returns:
        The path.

    Raises:
        ImageError: the ending is unknown, the path is no file's, or the file or its folder is not writable.
    """
    path = Path(path)
    subject = f"output {str(path)!r}"
    if path.suffix.lower() not in SUFFIXES:
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise ImageError("IMAGE_OUTPUT_TYPE", subject, found, expected=" ".join(SUFFIXES), hint="save as .png")
    try:
        check_writable(path)
    except OSError as error:
        found = f"cannot be written: {error.strerror}: {error.filename!r}"
        if error.errno in NO_SUCH_NAME:
            raise ImageError("IMAGE_OUTPUT_PATH", subject, found, hint="choose another name") from error
        hint = "choose a folder that you may write to, or free some space"
        raise ImageError("IMAGE_NOT_WRITTEN", subject, found, hint=hint) from error
    return path


def save_png(image: Image.Image, path: Path | str, settings: Mapping[str, Any]) -> None:
    """Write an image with its settings inside; a write that fails leaves the previous file.

    Settings that cannot be stored in full are shortened; they never prevent a save.

    Args:
        image: the image; its colour profile is written too.
        path: the file: .png, .webp (lossless) or .jpg.
        settings: the settings, by name.

    Raises:
        ImageError: the file cannot be written.
    """
    kind = SUFFIXES[check_output_path(path).suffix.lower()]
    options = ENCODING[kind] | _metadata(kind, _record(settings)) | {"icc_profile": image.info.get("icc_profile")}
    if kind == "JPEG" and image.mode != "RGB":
        if image.has_transparency_data:
            message = f"output {str(path)!r}: JPEG has no transparency, so it is saved over white"
            warn(message)
        image = over_white(image)
    write_image(image, path, kind, **options)


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
    except (OSError, ValueError, struct.error) as error:
        found = f"could not be written: {_reason(error)}"
        hint = "a previous file of that name is untouched; check the free space and the folder"
        raise ImageError("IMAGE_NOT_WRITTEN", f"output {str(path)!r}", found, hint=hint) from error


def read_settings(path: Path | str) -> dict[str, Any]:
    """Read the settings that `save_png` stored in an image.

    Args:
        path: the file.

    Returns:
        The settings, by name.

    Raises:
        ImageError: the file cannot be read, or holds no settings.
    """
    image = open_image(path, "image")
    try:
        settings = json.loads(image.info.get("sdinpaint") or image.getexif()[ExifTags.Base.ImageDescription])
    except DECODER_ERRORS:
        settings = None
    if not isinstance(settings, dict):
        found, expected = "no settings inside", "an image saved by sdinpaint"
        hint = "a program that saved the image again may have removed them"
        raise ImageError("IMAGE_NO_SETTINGS", f"image {str(path)!r}", found, expected=expected, hint=hint)
    return settings


def _record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the settings to JSON values of at most MAX_METADATA bytes, with a sha256 of what was shortened.

    The copy of the mask is dropped first: the mask's file has to be given again then, but nothing else is lost.
    """
    try:
        text = json.dumps(dict(settings), default=str, skipkeys=True)
    except (ValueError, RecursionError):
        return {"error": "these settings cannot be written as JSON"}
    record: dict[str, Any] = json.loads(text)
    mask = _part(_part(record, "manifest"), "mask")
    if len(text) > MAX_METADATA:
        mask.pop("png", None)
    if len(json.dumps(record)) <= MAX_METADATA:
        return record
    digest = {SHORTENED: hashlib.sha256(text.encode()).hexdigest()}
    short = {key: _shortened(value) for key, value in record.items()} | digest
    return short if len(json.dumps(short)) <= MAX_METADATA else digest


def _part(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dictionary under a key, or an empty one."""
    part = record.get(key)
    return part if isinstance(part, dict) else {}


def _shortened(value: Any) -> Any:
    return value[:1000] + "..." if isinstance(value, str) and len(value) > 1000 else value


def _metadata(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("sdinpaint", json.dumps(record))
        info.add_itxt("parameters", _parameters(record))
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(record)
    return {"exif": exif}


def _parameters(record: Mapping[str, Any]) -> str:
    """Write the settings as text in A1111's form, which most programs read. Source: its modules/infotext_utils.py."""
    lines = [_as_prompt(record.get("prompt"))]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {_as_prompt(record['negative_prompt'])}")
    known = {**_part(record, "manifest"), **record}
    values = {label: _as_a1111(key, known.get(key)) for key, label in LABELS.items()}
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in values.items() if value))
    return "\n".join(lines).encode("utf-8", "replace").decode()


def _as_prompt(value: Any) -> str:
    return TAKEN_FOR_FIELDS.sub(" ", "" if value is None else str(value))


def _as_a1111(key: str, value: Any) -> str:
    """Write a setting in A1111's words; return an empty text where it has none."""
    text = "" if value is None else str(value)
    match key:
        case "sampler":
            return SAMPLER_NAMES.get(text, text)
        case "spacing":
            return SCHEDULE_TYPES.get(text, "")
        case "size" if isinstance(value, list):
            return "x".join(map(str, value))
        case "model":
            return text and re.sub(r"\.(safetensors|ckpt|pth)$", "", Path(text).name)
        case "sdinpaint":
            return text and f"sdinpaint {text}"
    return text


def _quoted(value: str) -> str:
    return value if PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _too_large(found: str, subject: str) -> ImageError:
    expected = f"at most {MAX_PIXELS} pixels"
    return ImageError("IMAGE_TOO_LARGE", subject, found, expected=expected, hint="scale it down, or crop it")


def _unreadable(path: Path, subject: str, error: Exception) -> ImageError:
    if isinstance(error, BOMBS):
        return _too_large(_reason(error), subject)
    expected = f"an image: {' '.join(FORMATS)}"
    hint = "save it as PNG"
    try:
        with path.open("rb") as stream:
            start = stream.read(12)
    except OSError:
        start, hint = b"", "check its permissions"
    found = f"not an image of a known format: it starts with {start!r}"
    if not isinstance(error, UnidentifiedImageError):
        found = _reason(error)
    if "MAX_TEXT" in found:
        found, hint = "its text chunks are too large", "remove its metadata, or save it again"
    elif not start and isinstance(error, UnidentifiedImageError):
        found, hint = "an empty file", "copy or download the file again"
    elif start[4:8] == b"ftyp":
        found = f"a HEIF or AVIF file ({start[8:].decode('latin-1')})"
        hint = "save it as PNG; or pip install pillow-heif, open it with PIL, and give the opened image"
    return ImageError("IMAGE_UNREADABLE", subject, found, expected=expected, hint=hint)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
