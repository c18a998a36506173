"""A mask as text: a PNG in base64, which the manifest of an image stores."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.errors import MaskError
from sdinpaint.images.reading import DECODER_ERRORS, decode
from sdinpaint.masks import Mask

__all__ = ["mask_from_text", "mask_to_text"]

Soft = NDArray[np.float32]
_DEPTHS: dict[int, type[np.generic]] = {1: np.bool_, 255: np.uint8, 65535: np.uint16}
"""Level of white in the PNG -> type of its pixels."""
_MAX_PNG = 24_000


def mask_to_text(mask: Soft) -> str | None:
    """Encode a mask as a PNG in base64.

    Args:
        mask: float32 (H, W) in [0, 1].

    Returns:
        The text; None where decoding would not give the same bits, or where the PNG exceeds 24,000 bytes.
    """
    for white, dtype in _DEPTHS.items():
        levels = np.rint(mask * np.float32(white)).astype(dtype)
        if _as_mask(levels, white).tobytes() == mask.tobytes():
            stream = io.BytesIO()
            Image.fromarray(levels).save(stream, format="PNG", optimize=True)
            return base64.b64encode(stream.getvalue()).decode() if stream.tell() <= _MAX_PNG else None
    return None


def mask_from_text(text: str, argument: str = "mask") -> Soft:
    """Decode a mask that `mask_to_text` encoded; it comes back bit for bit.

    Args:
        text: a grey PNG in base64.
        argument: name that an error gives to the text.

    Returns:
        The mask as float32 (H, W) in [0, 1].

    Raises:
        MaskError: `text` is not a grey PNG in base64.
        ImageError: the PNG is damaged or too large.
    """
    expected, hint = "a grey PNG in base64", "give the mask file that was used"
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except DECODER_ERRORS as error:
        found = f"not a PNG in base64: {error}"
        raise MaskError("MASK_TEXT", argument, found, expected=expected, hint=hint) from error
    levels = np.asarray(decode(image, argument))
    white = next((white for white, dtype in _DEPTHS.items() if levels.dtype == dtype and levels.ndim == 2), None)
    if white is None:
        raise MaskError("MASK_TEXT", argument, f"a PNG of mode {image.mode}", expected=expected, hint=hint)
    return _as_mask(levels, white)


def _as_mask(levels: NDArray[np.generic], white: int) -> Soft:
    return Mask(levels.astype(np.float32) / np.float32(white)).array
