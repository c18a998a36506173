"""Data inside image files beside the pixels: the settings of a run, and what a camera or an editor wrote there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdinpaint.errors import warn
from sdinpaint.images.exif import (
    DESCRIPTION,
    EXIF,
    STORAGE,
    USER_COMMENT,
    Entry,
    Exif,
    long,
    parse,
    rational,
    short,
    text,
    undefined,
)
from sdinpaint.images.parameters import parameters, part

__all__ = ["MAX_METADATA", "SHORTENED", "Embedded", "png_options", "read_embedded", "settings_exif", "to_record"]

MAX_METADATA = 60_000
"""Bytes of settings in a file: an Exif block holds 64 kB at most, and Pillow refuses PNG texts above 1 MB."""
SHORTENED = "shortened_from_sha256"
"""Key of the sha256 of the full settings, where they were shortened."""
MAX_KEPT = 1 << 20
"""Bytes of XMP data, and of PNG texts in all, that a result keeps of its source."""
MAX_SEGMENT = 65_504
"""Bytes of Exif or XMP data that a JPEG file holds in one segment, beside the names of their kinds."""

SETTINGS, PARAMETERS, XMP = "sdinpaint", "parameters", "XML:com.adobe.xmp"
"""Keys of PNG texts."""
OWN_TEXTS = (SETTINGS, PARAMETERS, XMP)
TITLE, COMMENT, MAKER_NOTE, PIXEL_SIZE = 0x9C9B, 0x9C9C, 0x927C, (0xA002, 0xA003)
CODES = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16-be", bytes(8): "utf-8"}
"""First 8 bytes of a UserComment -> encoding of the rest."""
XMP_ORIENTATION = re.compile(rb'\s*tiff:Orientation="[0-9]"|<tiff:Orientation>[0-9]</tiff:Orientation>')


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Data of an image file that a result made from it keeps.

    Args:
        exif: Exif data, without those that say how the file stores its pixels.
        xmp: XMP data, without an orientation, which is applied.
        dpi: resolution in pixels per inch, across and down.
        texts: texts of a PNG file, by key.
        damaged: whether Exif data cannot be kept, or only in part.
    """

    exif: Exif | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    damaged: bool = False

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings that sdinpaint stored; None where there are none."""
        stored = self.texts.get(SETTINGS) or (self.exif and self.exif.text(DESCRIPTION))
        try:
            settings = json.loads(stored or "")
        except (ValueError, RecursionError):
            return None
        return settings if isinstance(settings, dict) else None


def read_embedded(image: Image.Image) -> Embedded:
    """Read what a result keeps of an image's file.

    Args:
        image: an opened image, whose size was checked; one of a TIFF file is not decoded yet.

    Returns:
        The data.
    """
    exif, damaged = None, False
    try:
        exif = _exif_of(image)
    except Exception:  # Pillow raises many kinds; whoever reads or saves the image tells that it is damaged
        damaged = True
    xmp = image.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    kept = XMP_ORIENTATION.sub(b"", xmp) if isinstance(xmp, bytes) and len(xmp) <= MAX_KEPT else None
    return Embedded(
        exif=exif or None,
        xmp=kept or None,
        dpi=_dpi_of(image.info.get("dpi")),
        texts=_texts_of(image),
        damaged=damaged or (exif is not None and not exif.whole),
    )


def to_record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to JSON values of at most MAX_METADATA bytes, with a sha256 of what was shortened.

    The copy of the mask is dropped first: the mask's file has to be given again then, but nothing else is lost.

    Args:
        settings: the settings, by name.

    Returns:
        The JSON values.
    """
    try:
        full = json.dumps(dict(settings), default=str, skipkeys=True)
    except (ValueError, RecursionError):
        return {"error": "these settings cannot be written as JSON"}
    record: dict[str, Any] = json.loads(full)
    mask = part(part(record, "manifest"), "mask")
    if len(full) > MAX_METADATA:
        mask.pop("png", None)
    if len(json.dumps(record)) <= MAX_METADATA:
        return record
    digest = {SHORTENED: hashlib.sha256(full.encode()).hexdigest()}
    short = {key: _shortened(value) for key, value in record.items()} | digest
    return short if len(json.dumps(short)) <= MAX_METADATA else digest


def png_options(record: Mapping[str, Any], source: Embedded, image: Image.Image) -> dict[str, Any]:
    """Make the options by which Pillow writes settings and a source's data into a PNG file.

    Args:
        record: settings as JSON values.
        source: data of the source.
        image: the image that is written.

    Returns:
        Options of Pillow's `save`.
    """
    info = PngInfo()
    info.add_itxt(SETTINGS, json.dumps(record))
    info.add_itxt(PARAMETERS, parameters(record))
    for key, value in source.texts.items():
        if key not in OWN_TEXTS:
            info.add_text(key, value)
    if source.xmp:
        info.add_itxt(XMP, source.xmp.decode("utf-8", "replace"))
    options: dict[str, Any] = {"pnginfo": info}
    if source.exif:
        options["exif"] = _sized(source.exif.copy(), image).to_bytes()
    return options | ({"dpi": source.dpi} if source.dpi else {})


def settings_exif(record: Mapping[str, Any], source: Embedded, image: Image.Image, subject: str, at_most: int) -> Exif:
    """Add settings to a source's Exif data: ours in the description, those for other programs in the UserComment.

    A description and a comment that the source has there move to the title and the comment of Windows (XPTitle and
    XPComment), where other programs show them.

    Args:
        record: settings as JSON values.
        source: data of the source.
        image: the image that is written.
        subject: name that a warning gives to the file.
        at_most: largest size in bytes; the source's data give way first, with a warning.

    Returns:
        The Exif data.
    """
    given = source.exif or Exif()
    if source.settings is not None:  # of an earlier run: this one's take their place
        given = _without(given, DESCRIPTION, USER_COMMENT)
    comment = undefined(b"UNICODE\0" + parameters(record).encode("utf-16-be"))
    choices = [(given, comment), (_without(given, MAKER_NOTE), comment), (Exif(), comment), (Exif(), None)]
    for kept, said in choices:
        exif = _with_settings(kept, json.dumps(record), said, source.dpi, image)
        if len(exif.to_bytes()) <= at_most:
            break
    if kept is not given and given.ifd:
        lost = "the maker note" if kept.ifd else "the Exif data"
        warn(f"{subject}: {lost} of the source did not fit beside the settings, and is left out")
    return exif


def _with_settings(
    given: Exif, stored: str, comment: Entry | None, dpi: tuple[float, float] | None, image: Image.Image
) -> Exif:
    exif = _sized(given.copy(), image)
    details = exif.part(EXIF)
    for told, tag in ((exif.text(DESCRIPTION), TITLE), (_comment_of(details.get(USER_COMMENT)), COMMENT)):
        if told and told.strip():
            data = told.encode("utf-16-le", "replace") + bytes(2)
            exif.ifd.setdefault(tag, Entry(1, len(data), data))
    exif.ifd[DESCRIPTION] = text(stored)
    if comment is not None:
        details[USER_COMMENT] = comment
    if not details:
        del exif.ifd[EXIF]
    if dpi is not None:
        across, down = (rational(exif.order, one) for one in dpi)
        exif.ifd |= {0x011A: across, 0x011B: down, 0x0128: short(exif.order, 2)}
    return exif


def _without(exif: Exif, *tags: int) -> Exif:
    """Return Exif data without some tags of the first two directories."""
    other = exif.copy()
    details = other.ifd.get(EXIF)
    for tag in tags:
        other.ifd.pop(tag, None)
        if isinstance(details, dict):
            details.pop(tag, None)
    return other


def _sized(exif: Exif, image: Image.Image) -> Exif:
    """Set the size in pixels where Exif data tell one."""
    details = exif.ifd.get(EXIF)
    if isinstance(details, dict):
        sides = zip(PIXEL_SIZE, image.size, strict=True)
        details |= {tag: long(exif.order, side) for tag, side in sides if tag in details}
    return exif


def _comment_of(entry: Any) -> str | None:
    """Return the text of a UserComment."""
    if not isinstance(entry, Entry) or entry.value[:8] not in CODES:
        return None
    return entry.value[8:].decode(CODES[entry.value[:8]], "replace").strip("\0 ")


def _exif_of(image: Image.Image) -> Exif | None:
    """Return the Exif data of an image, or those of its tags that a camera or an editor wrote."""
    stream = getattr(image, "fp", None)
    if image.format == "TIFF" and stream is not None:
        position = stream.tell()
        try:
            return parse(stream)
        finally:
            stream.seek(position)
    image.load()  # a PNG file may hold them after its pixels
    if isinstance(data := image.info.get("exif"), bytes):
        return parse(data)
    found, own = Image.Exif(), image.getexif()
    for tag in set(own) - STORAGE:
        found[tag] = own.get_ifd(tag) if tag == EXIF else own[tag]
    return parse(found.tobytes()) if found else None


def _dpi_of(dpi: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(one) for one in dpi)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if 1 <= across < 65535 and 1 <= down < 65535 else None


def _texts_of(image: Image.Image) -> dict[str, str]:
    """Return the texts of a PNG file, as many as MAX_KEPT bytes hold, the shortest first; ours in any case."""
    if image.format != "PNG":
        return {}
    given = image.info
    if not getattr(image, "is_animated", False):  # which would decode all frames
        with suppress(Exception):  # Pillow raises many kinds for broken data
            given = getattr(image, "text", given)  # with those after the pixels
    found = {str(key): str(value) for key, value in given.items() if isinstance(value, str)}
    kept, left = {}, MAX_KEPT
    for key, value in sorted(found.items(), key=lambda one: (one[0] not in OWN_TEXTS, len(one[1]))):
        left -= len(value)
        if key in OWN_TEXTS or (left >= 0 and not key.startswith("Raw profile type")):
            kept[key] = value
    return {key: kept[key] for key in found if key in kept}


def _shortened(value: Any) -> Any:
    return value[:1000] + "..." if isinstance(value, str) and len(value) > 1000 else value
