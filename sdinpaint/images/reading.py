"""Reading of image files, with limits: from a path, from bytes in memory, or from an open file."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias, TypeGuard

from PIL import ExifTags, Image, UnidentifiedImageError
from sdinpaint_weights.door import Refusal, open_regular

from sdinpaint.errors import ImageError, warn
from sdinpaint.images.deep import misread
from sdinpaint.images.embedded import read_embedded

__all__ = ["DECODER_ERRORS", "DEEP_MODES", "FORMATS", "MAX_PIXELS", "File", "check_pixels", "decode", "decoding"]
__all__ += ["in_memory", "is_file", "open_image", "opened", "orientation", "path_of", "read_settings"]
__all__ += ["require_usable", "upright"]

File: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"
"""An image file: its path, its content, or the open file."""

# decoders in wide use; most of Pillow's security fixes concern the others
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
MAX_PIXELS = 64 * 2**20
MAX_FILE, AT_ONCE = 2**30, 2**24
"""Bytes of an image file, MAX_PIXELS of 16 bits with alpha need half of it; and of what is read of it at a time."""

DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", *DEEP_MODES)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation of Exif -> how the stored image is turned to be upright."""

SHOWN = 120
"""Characters of a path that an error shows."""
TIFF_STARTS = (b"II*\0", b"MM\0*")
"""First bytes of a TIFF file."""
BASE64 = re.compile(r"data:|(iVBORw0KGgo|/9j/|UklGR|R0lGOD|SUkqA|TU0AK|Qk0)[A-Za-z0-9+/=\s]{20}")
"""A text that begins as the base64 of an image file does."""
DECODE_IT = "decode the text first: base64.b64decode(text.partition(',')[2] or text) gives bytes, which are read"

# Pillow's decoders validate little themselves, and raise any of these on broken files
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    AssertionError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def is_file(source: object) -> TypeGuard[File]:
    """Tell whether a value is an image file: a path, bytes, or an open file.

    Args:
        source: any value.

    Returns:
        True for one that `open_image` reads.
    """
    in_memory = isinstance(source, bytes | bytearray | memoryview) or callable(getattr(source, "read", None))
    return in_memory or path_of(source) is not None


def path_of(source: object) -> str | None:
    """Return the path of an image file, in which ~ is a home folder.

    Args:
        source: any value.

    Returns:
        The path; None where the value is no path.

    Raises:
        ImageError: the value is a path-like object that fails to give its path.
    """
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        return os.path.expanduser(os.fsdecode(source))
    except Exception as error:  # whatever a class of the caller's does there
        found = f"a {type(source).__name__} that gives no path: {type(error).__name__}: {error}"
        raise ImageError("IMAGE_TYPE", "path", found, expected="a path", hint="give the path as text") from error


def name_of(source: object, argument: str) -> str:
    """Return the name that messages give to an image file.

    Args:
        source: the file.
        argument: name of the argument that it was given for.

    Returns:
        The argument, and the path where there is one.
    """
    path = path_of(source)
    if path is None:
        return argument
    return f"{argument} {path!r}" if len(path) <= SHOWN else f"{argument} {path[:SHOWN]!r}... ({len(path)} characters)"


def in_memory(source: Any, argument: str) -> Any:
    """Read an open file, so that it can be used for several images.

    Args:
        source: any value.
        argument: name of the argument that it was given for.

    Returns:
        The content of such a file, or the error that explains why it cannot be read, which whoever needs the image
        raises; anything else as it is.
    """
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or not is_file(source):
        return source
    try:
        return _content(source, argument)
    except ImageError as error:
        return error


def open_image(source: File, argument: str) -> Image.Image:
    """Read an image file and turn it upright by its Exif orientation.

    Args:
        source: path, bytes, or open file, which is read from its beginning if it can be rewound.
        argument: name that an error gives to the image, beside the path.

    Returns:
        The decoded image, the first of an animation.

    Raises:
        ImageError: the file is missing, is not an image of a known format, is damaged, or is too large.
    """
    with opened(source, argument) as (image, subject):
        return decode(image, subject)


@contextmanager
def opened(source: File, argument: str) -> Iterator[tuple[Image.Image, str]]:
    """Open an image file until the end of the block, without decoding it.

    Args:
        source: path, bytes, or open file.
        argument: name that an error gives to the image, beside the path.

    Yields:
        The image, at its first frame, and its name in messages.

    Raises:
        ImageError: the file is missing, is not an image of a known format, or is too large.
    """
    subject = name_of(source, argument)
    stream = _stream(source, subject)
    try:
        try:
            image = Image.open(stream, formats=FORMATS)
        except (*BOMBS, *DECODER_ERRORS) as error:
            raise _unreadable(stream, subject, error) from error
        if getattr(image, "is_animated", False):
            warn(f"{subject}: only the first frame or page is used")
        yield image, subject
    finally:
        if path_of(source) is not None:
            stream.close()


def decode(image: Image.Image, subject: str) -> Image.Image:
    """Decode an image after a check of its size, and turn it upright by its Exif orientation.

    Args:
        image: an opened image; of an animation, the frame that it is at.
        subject: name that an error gives to the image.

    Returns:
        The decoded image.

    Raises:
        ImageError: the image is too large, damaged, or of an unknown mode.
    """
    require_usable(image, subject)
    with decoding(image, subject):
        image.load()
        return upright(image, subject, orientation(image))


def require_usable(image: Image.Image, subject: str) -> None:
    """Check size and mode of an image before it is decoded.

    Args:
        image: an opened image.
        subject: name that an error gives to the image.

    Raises:
        ImageError: the image is too large, or of an unknown mode.
    """
    check_pixels(subject, image.height, image.width)
    if image.mode not in MODES:
        raise ImageError("IMAGE_TYPE", subject, f"PIL mode {image.mode}", expected="RGB", hint="convert it to RGB")
    if (found := misread(getattr(image, "tag_v2", {}))) is not None:
        expected, hint = "a TIFF file as most programs write it", "save it again with another program, or as PNG"
        raise ImageError("IMAGE_TYPE", subject, f"a TIFF file {found}", expected=expected, hint=hint)


def check_pixels(subject: str, height: int, width: int) -> None:
    """Refuse an image of too many pixels.

    Args:
        subject: name that the error gives to the image.
        height: rows.
        width: columns.

    Raises:
        ImageError: there are more than MAX_PIXELS; it says how much memory they would take.
    """
    if height * width > MAX_PIXELS:
        raise _too_large(f"{width} x {height} pixels, {height * width * 3 / 2**30:.1f} GiB once decoded", subject)


@contextmanager
def decoding(image: Image.Image, subject: str) -> Iterator[None]:
    """Explain the errors of decoders until the end of the block.

    Args:
        image: the image that is decoded.
        subject: name that an error gives to it.

    Raises:
        ImageError: the image is damaged, or too large for the memory.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        found = f"{image.width} x {image.height} pixels, for which the memory does not suffice"
        raise _too_large(found, subject) from error
    except BOMBS as error:
        raise _too_large(str(error), subject) from error
    except DECODER_ERRORS as error:
        ended = any(word in str(error).lower() for word in ("truncated", "not enough", "unexpected end"))
        found = "the file ends early" if ended else "the image data is damaged"
        code = "IMAGE_TRUNCATED" if ended else "IMAGE_UNREADABLE"
        hint = "copy or download the file again"
        raise ImageError(code, subject, f"{found}: {_reason(error)}", expected="a complete image", hint=hint) from error


def orientation(image: Image.Image) -> int | None:
    """Read how an image has to be turned.

    Args:
        image: a decoded image.

    Returns:
        Exif's orientation, 1 for an upright image; None where the Exif data cannot be read.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds for broken data; `upright` tells that they cannot be read
        return None
    return 1 if value == 0 else value if value in (1, *TURNS) else None  # some cameras write 0


def upright(image: Image.Image, subject: str, turn: int | None) -> Image.Image:
    """Turn an image upright.

    Args:
        image: a decoded image.
        subject: name that a warning gives to it.
        turn: its orientation; None, for which the image is taken as it is, gives a warning.

    Returns:
        A new image.
    """
    if turn is None:
        warn(f"{subject}: its Exif data cannot be read, so it is taken as upright, and a result does not keep them")
    if turn in (None, 1):
        return image.copy()
    turned = image.transpose(TURNS[turn])
    for name in ("exif", "xmp", "XML:com.adobe.xmp"):  # where the orientation may be, which is applied now
        turned.info.pop(name, None)
    return turned


def read_settings(path: File) -> dict[str, Any]:
    """Read the settings that `save_png` stored in an image.

    Args:
        path: the file.

    Returns:
        The settings, by name.

    Raises:
        ImageError: the file cannot be read, or holds no settings.
    """
    with opened(path, "image") as (image, subject):
        require_usable(image, subject)
        with decoding(image, subject):
            settings = read_embedded(image).settings
            image.load()
    if settings is None:
        found, expected = "no settings inside", "an image saved by sdinpaint"
        hint = "a program that saved the image again may have removed them"
        raise ImageError("IMAGE_NO_SETTINGS", subject, found, expected=expected, hint=hint)
    return settings


def _stream(source: File, subject: str) -> BinaryIO:
    """Return what can be read and rewound."""
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fsdecode(source), subject)
    return io.BytesIO(_content(source, subject))


def _content(source: Any, subject: str) -> bytes:
    """Return what bytes hold, or an open file from its beginning, where it can be rewound, to its end."""
    parts: list[memoryview] = []
    part: Any = b""
    size = 0
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            return bytes(source)
        if source.seekable() if hasattr(source, "seekable") else hasattr(source, "seek"):
            source.seek(0)
        while size <= MAX_FILE and (part := source.read(AT_ONCE)):  # which may be less: a socket, a pipe
            parts.append(memoryview(part))
            size += parts[-1].nbytes
    except Exception as error:  # whatever a class of the caller's does there
        found, hint = f"the file object: {_reason(error)}", "open it with open(path, 'rb'), and close it later"
        if isinstance(part, str):
            found = "a file that was opened as text"
        raise ImageError("IMAGE_UNREADABLE", subject, found, expected="a binary file", hint=hint) from error
    if size > MAX_FILE:
        raise _too_large(f"more than {MAX_FILE} bytes", subject)
    return b"".join(parts)


def _open_path(path: str, subject: str) -> BinaryIO:
    try:
        stream = open_regular(path)
    except Refusal as refusal:
        found, hint, expected = refusal.found, refusal.hint, "an image file"
        if refusal.reason in ("folder", "special"):
            raise ImageError("IMAGE_NOT_A_FILE", subject, found, expected=expected, hint=hint) from refusal
        if refusal.reason != "missing":
            raise ImageError("IMAGE_UNREADABLE", subject, found, expected=expected, hint=hint) from refusal
        if BASE64.match(path):
            found, hint = "an encoded image, in place of a path", DECODE_IT
        elif ":/" in path:
            hint = "URLs are not fetched: save the image first"
        raise ImageError("IMAGE_NOT_FOUND", subject, found, expected=expected, hint=hint) from refusal
    if os.fstat(stream.fileno()).st_size > MAX_FILE:
        stream.close()
        raise _too_large(f"more than {MAX_FILE} bytes", subject)
    return io.BufferedReader(stream)


def _too_large(found: str, subject: str) -> ImageError:
    expected = f"at most {MAX_PIXELS} pixels"
    return ImageError("IMAGE_TOO_LARGE", subject, found, expected=expected, hint="scale it down, or crop it")


def _unreadable(stream: BinaryIO, subject: str, error: Exception) -> ImageError:
    if isinstance(error, BOMBS):
        return _too_large(_reason(error), subject)
    expected = f"an image: {' '.join(FORMATS)}"
    hint = "save it as PNG"
    try:
        stream.seek(0)
        start = stream.read(32)
    except (OSError, ValueError):
        start = b""
    found = f"not an image of a known format: it starts with {start[:12]!r}"
    if not isinstance(error, UnidentifiedImageError):
        found = _reason(error)
    if "MAX_TEXT" in found:
        found, hint = "its text chunks are too large", "remove its metadata, or save it again"
    elif not start and isinstance(error, UnidentifiedImageError):
        found, hint = "an empty file", "copy or download the file again"
    elif start[:4] in TIFF_STARTS:
        found, hint = "a TIFF file of a kind that Pillow cannot read", "save it as PNG, or as TIFF of 8 or 16 bits"
    elif start[4:8] == b"ftyp":
        found = f"a HEIF file ({start[8:12].decode('latin-1')})"
        hint = "save it as PNG; or pip install pillow-heif, open it with PIL, and give the opened image"
    elif BASE64.match(start.decode("latin-1")):
        hint = DECODE_IT
    return ImageError("IMAGE_UNREADABLE", subject, found, expected=expected, hint=hint)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
