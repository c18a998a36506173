"""Conversion of images in other colour spaces to RGB, by their colour profiles where they have one."""

from __future__ import annotations

import io

from PIL import Image, ImageCms

from sdinpaint.errors import warn

__all__ = ["as_rgb"]

CONVERTED = {"CMYK": "CMYK", "YCbCr": "YCbCr", "HSV": "HSV", "LAB": "Lab"}
"""PIL mode -> its name; these are converted to RGB, which changes values."""
SPACES = {b"CMYK": ("CMYK",), b"GRAY": ("L", "LA"), b"Lab ": ("LAB",)}
"""Colour space of a profile -> the PIL modes that it describes."""


def as_rgb(image: Image.Image, subject: str) -> Image.Image:
    """Convert an image of 8 bits to RGB or RGBA, by its profile where it is of another colour space.

    Args:
        image: the image.
        subject: name that warnings give to it; there is one wherever colours change.

    Returns:
        The image in mode RGB or RGBA.
    """
    profile: bytes | None = image.info.get("icc_profile")
    if profile is not None and profile[16:20] != b"RGB ":
        if image.mode not in SPACES.get(profile[16:20], ()):
            warn(f"{subject}: its colour profile is for another kind of image, and is not used")
        elif (converted := _to_srgb(image, profile, subject)) is not None:
            return converted
    if image.mode in CONVERTED:
        name = CONVERTED[image.mode]
        warn(f"{subject}: {name} is converted to RGB without a colour profile, so colours may be off")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _to_srgb(image: Image.Image, profile: bytes, subject: str) -> Image.Image | None:
    """Convert an image to sRGB by its profile for another colour space, with its alpha; None where that fails."""
    alpha = image.getchannel("A") if image.mode == "LA" else None
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        plain = image.convert("L") if alpha is not None else image
        converted = ImageCms.profileToProfile(plain, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        message = f"{subject}: its colour profile cannot be used ({error}); colours may be off"
        warn(message)
        return None
    if converted is None:
        return None
    warn(f"{subject}: {CONVERTED.get(image.mode, 'grey')} is converted to sRGB by its colour profile")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
