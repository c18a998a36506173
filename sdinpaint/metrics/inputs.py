"""Checks of the images and holes that metrics take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdinpaint.errors import ImageError, MaskError

__all__ = ["check_hole", "check_images", "described"]


def check_images(*images: NDArray[np.uint8]) -> None:
    """Check that images are uint8 (H, W, 3) of one size.

    Args:
        images: the images.

    Raises:
        ImageError: an image is anything else.
    """
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            expected, hint = "a uint8 array (height, width, 3)", "np.asarray(image.convert('RGB'))"
            raise ImageError("IMAGE_TYPE", "image", described(image), expected=expected, hint=hint)
        if image.shape != images[0].shape:
            found, expected = described(image), f"{images[0].shape}, as the other image has"
            raise ImageError("IMAGE_BAD_SHAPE", "image", found, expected=expected, hint="compare images of one size")


def check_hole(hole: NDArray[np.bool_], image: NDArray[np.uint8], argument: str) -> None:
    """Check that a hole is bool (H, W) of the size of its image.

    Args:
        hole: the hole.
        image: the image (H, W, 3).
        argument: name that the error gives to the hole.

    Raises:
        MaskError: the hole is anything else.
    """
    if not isinstance(hole, np.ndarray) or hole.dtype != np.bool_ or hole.shape != image.shape[:2]:
        expected, hint = f"a bool array {image.shape[:2]}, as the image", "np.asarray(mask) >= 0.5 for a soft mask"
        raise MaskError("MASK_TYPE", argument, described(hole), expected=expected, hint=hint)


def described(given: Any) -> str:
    """Describe what was given in place of an array.

    Args:
        given: any value.

    Returns:
        Its dtype and shape, or its type.
    """
    return f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
