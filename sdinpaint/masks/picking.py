"""Masks from the values of pixels: by transparency, colour, brightness or label."""

from __future__ import annotations

import io
from collections.abc import Iterable
from numbers import Number
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from sdinpaint_weights.door import Refusal, read_whole

from sdinpaint.checks import check_number
from sdinpaint.errors import MaskError, SettingError, said
from sdinpaint.images.input_image import InputImage
from sdinpaint.images.reading import decode, is_file, open_image, path_of
from sdinpaint.masks.reading import Hole, Soft

__all__ = ["by_alpha", "by_color", "by_label", "by_luminance"]

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
TABLES = (".txt", ".csv")
MAX_TABLE = 32_000_000
"""Bytes of a table of ids at most: 16 million pixels of one digit each, which take two seconds."""
LISTED = 20
"""Largest number of ids that an error lists."""


def by_alpha(image: InputImage) -> Soft:
    """Read how opaque each pixel of an image is.

    Args:
        image: the image, (H, W) pixels.

    Returns:
        The alpha channel as float32 (H, W) in [0, 1].

    Raises:
        MaskError: the image has no alpha channel.
    """
    if image.alpha is None:
        found, hint = "every pixel is opaque", "save the image as PNG with its alpha channel"
        raise MaskError("MASK_NO_ALPHA", "Mask.from_alpha", found, expected="transparency", hint=hint)
    return image.alpha.astype(np.float32) / np.float32(255)


def by_color(image: InputImage, color: str | Iterable[int], tolerance: float) -> Hole:
    """Find the pixels that have a colour.

    Args:
        image: the image, (H, W) pixels.
        color: (red, green, blue) in 0..255, or a name such as "magenta" or "#ff00ff".
        tolerance: largest difference of red, green and blue each, in 0..255.

    Returns:
        A bool array (H, W), True at these pixels.

    Raises:
        SettingError: `color` is no colour, or `tolerance` is not from 0 to 255.
    """
    limit = check_number("tolerance", tolerance, 0, 255, of="Mask.from_color")
    difference = np.abs(image.opaque().astype(np.int16) - _rgb(color))
    hole: Hole = difference.max(axis=2) <= limit
    return hole


def by_luminance(image: InputImage, low: float, high: float) -> Hole:
    """Find the pixels whose brightness (Rec. 601 luma) lies in a range.

    Args:
        image: the image, (H, W) pixels.
        low: lowest luma; 0 is black.
        high: highest luma; 1 is white.

    Returns:
        A bool array (H, W), True at these pixels.

    Raises:
        SettingError: the bounds are not 0 <= low <= high <= 1.
    """
    top = check_number("high", high, 0, 1, of="Mask.from_luminance")
    bottom = check_number("low", low, 0, top, of="Mask.from_luminance")
    luma = np.asarray(Image.fromarray(image.opaque()).convert("L")) / 255
    hole: Hole = (bottom <= luma) & (luma <= top)
    return hole


def by_label(labels: Any, ids: int | Iterable[int]) -> Hole:
    """Find the pixels of a label map that hold one of some ids.

    Args:
        labels: an array of whole numbers (H, W); an image of mode P, L or I, or the path of one; or rows of ids
            separated by spaces or commas: the text itself, if it has several lines, or the path of a .txt or .csv file.
        ids: one id or several.

    Returns:
        A bool array (H, W), True at these pixels.

    Raises:
        MaskError: `labels` is no label map, or does not hold one of the ids.
        ImageError: the image file cannot be read.
    """
    found = _label_map(labels)
    several = isinstance(ids, Iterable) and not isinstance(ids, str | bytes) and getattr(ids, "ndim", 1) > 0
    wanted: list[Any] = list(cast(Iterable[Any], ids)) if several else [ids]
    known = np.unique(found).tolist()
    unknown = [label for label in wanted if not isinstance(label, Number) or label not in known]
    if unknown or not wanted:
        what = f"no pixel of {', '.join(map(said, unknown[:LISTED]))}" if unknown else "no ids"
        listed = ", ".join(map(str, known[:LISTED])) + ", ..." * (len(known) > LISTED)
        hint = "give ids that occur in the map"
        raise MaskError("MASK_UNKNOWN_LABEL", "Mask.from_labels", what, expected=f"some of {listed}", hint=hint)
    return np.isin(found, wanted)


def _rgb(color: Any) -> NDArray[np.int16]:
    try:
        levels = ImageColor.getrgb(color)[:3] if isinstance(color, str) else tuple(color)
    except (TypeError, ValueError):
        levels = ()
    if len(levels) != 3 or not all(isinstance(level, int | np.integer) and 0 <= level <= 255 for level in levels):
        expected = "(red, green, blue) from 0 to 255, or a name such as 'magenta' or '#ff00ff'"
        raise SettingError("SETTING_COLOR", "Mask.from_color: color", said(color), expected=expected)
    return np.array(levels, dtype=np.int16)


def _label_map(labels: Any) -> NDArray[np.integer[Any]]:
    if isinstance(labels, str) and "\n" in labels:
        return _table(labels)
    path = path_of(labels)
    if path is not None and Path(path).suffix.lower() in TABLES:
        return _table(_read_text(path))
    if is_file(labels):
        labels = open_image(labels, "labels")
    elif isinstance(labels, Image.Image):
        labels = decode(labels, "labels")
    if isinstance(labels, Image.Image) and labels.mode not in LABEL_MODES:
        hint = "colours are not ids: use Mask.from_color, or save the map with a palette"
        raise _no_map(f"an image of mode {labels.mode}", hint)
    try:
        array = np.asarray(labels)
    except Exception as error:  # whatever a class of the caller's does there
        found = f"a {type(labels).__name__} that gives no array: {type(error).__name__}: {error}"
        raise _no_map(found, "give an array (height, width)") from error
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iub":
        raise _no_map(f"an array {array.shape} of {array.dtype}", "labels.astype(int), one id per pixel")
    return array


def _read_text(path: str) -> str:
    try:
        return read_whole(path, MAX_TABLE).decode("utf-8")
    except Refusal as refusal:
        raise _no_map(f"{path!r}: {refusal.found}", refusal.hint or "give the path of a text file") from refusal
    except UnicodeDecodeError as error:
        raise _no_map(f"{path!r} cannot be read: {error}", "give the path of a text file") from error


def _table(text: str) -> NDArray[np.integer[Any]]:
    if len(text) > MAX_TABLE:
        raise _no_map(f"a text of {len(text)} characters", f"give at most {MAX_TABLE}, or an image of ids")
    lines = io.StringIO(text.replace(",", " "))
    try:
        return np.loadtxt(lines, dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise _no_map(f"no table: {error}", "give every row the same count of whole numbers") from error


def _no_map(found: str, hint: str) -> MaskError:
    return MaskError("MASK_LABELS", "Mask.from_labels", found, expected="one whole number per pixel", hint=hint)
