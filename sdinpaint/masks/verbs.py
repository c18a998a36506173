"""Operations on masks. A mask is float32 (H, W) in [0, 1]; its hole is where it is at least 0.5."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.checks import check_choice, check_number, check_whole, require_extra
from sdinpaint.images.boxes import Box
from sdinpaint.masks.checks import require_size
from sdinpaint.masks.reading import Hole, Soft, binarize, latent_cells
from sdinpaint.masks.report import Cover

__all__ = ["bounding_box", "drop_specks", "feather", "fill_holes", "grow", "on_lattice", "regions", "resize", "smooth"]

TOUCHING = np.ones((3, 3), dtype=np.bool_)
"""Neighbourhood of a pixel in a region: edges and corners. The kept areas that it encloses touch at edges only."""


def grow(mask: Soft, pixels: float, verb: str = "Mask.grow") -> Soft:
    """Take the highest value within a disc around each pixel; values beyond the border of the mask count as 0.

    Args:
        mask: (H, W).
        pixels: radius of the disc.
        verb: name of the operation in errors.

    Returns:
        The widened mask (H, W).

    Raises:
        SettingError: `pixels` is not a number from 0 on, or the extra `mask` is not installed.
    """
    radius = min(check_number("pixels", pixels, 0, of=verb), math.hypot(*mask.shape))
    cv2 = require_extra("cv2", extra="mask", what=verb)
    offsets = np.arange(-int(radius), int(radius) + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)
    grown: Soft = cv2.dilate(mask, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return grown


def feather(mask: Soft, pixels: float, verb: str = "Mask.feather") -> Soft:
    """Blur the edge with a Gaussian of sigma `pixels` / 2; straight edges of the hole stay where they are.

    Args:
        mask: (H, W).
        pixels: how far the soft edge reaches to either side.
        verb: name of the operation in errors.

    Returns:
        The blurred mask (H, W).

    Raises:
        SettingError: `pixels` is below 0, or above 64 and the diagonal, or the extra `mask` is not installed.
    """
    most = max(64, math.ceil(math.hypot(*mask.shape)))  # the time grows with it
    sigma = check_number("pixels", pixels, 0, most, of=verb) / 2
    ndimage = require_extra("scipy.ndimage", extra="mask", what=verb)
    blurred: Soft = ndimage.gaussian_filter(mask, sigma, mode="nearest")
    return np.clip(blurred, 0, 1)


def smooth(mask: Soft, pixels: float) -> Hole:
    """Round the outline of the hole, and remove parts thinner than about two thirds of `pixels`.

    Args:
        mask: (H, W).
        pixels: as for `feather`, whose hole this is.

    Returns:
        The hole of the feathered mask, bool (H, W).

    Raises:
        SettingError: `pixels` is below 0, or above 64 and the diagonal, or the extra `mask` is not installed.
    """
    return binarize(feather(mask, pixels, "Mask.smooth"))


def fill_holes(mask: Soft, max_area: int | None = None) -> Soft:
    """Repaint the kept areas that the hole encloses.

    Args:
        mask: (H, W).
        max_area: pixels of the largest area that is filled; None fills all.

    Returns:
        The mask (H, W) with 1 in these areas.

    Raises:
        SettingError: `max_area` is not a whole number from 0 on, or the extra `mask` is not installed.
    """
    verb = "Mask.fill_holes"
    largest = mask.size if max_area is None else check_whole("max_area", max_area, 0, of=verb)
    ndimage = require_extra("scipy.ndimage", extra="mask", what=verb)
    kept, count = ndimage.label(~binarize(mask))
    enclosed = np.bincount(kept.ravel(), minlength=count + 1) <= largest
    enclosed[np.concatenate([kept[0], kept[-1], kept[:, 0], kept[:, -1]])] = False
    enclosed[0] = False  # label 0 is the hole itself
    return np.where(enclosed[kept], np.float32(1), mask)


def drop_specks(mask: Soft, min_area: int = 64) -> Soft:
    """Keep the regions of the hole that are too small, with their soft edges.

    Args:
        mask: (H, W).
        min_area: pixels of the smallest region that is still repainted.

    Returns:
        The mask (H, W) with 0 in these regions.

    Raises:
        SettingError: `min_area` is not a whole number from 0 on, or the extra `mask` is not installed.
    """
    verb = "Mask.drop_specks"
    smallest = check_whole("min_area", min_area, 0, of=verb)
    owners, areas = _territories(mask, verb)
    return np.where((areas >= smallest)[owners], mask, np.float32(0))


def regions(mask: Soft) -> list[Soft]:
    """Split a mask into the connected regions of its hole; soft values go with the nearest region.

    Args:
        mask: (H, W).

    Returns:
        One mask (H, W) per region, the largest first.

    Raises:
        SettingError: the extra `mask` is not installed.
    """
    owners, areas = _territories(mask, "Mask.regions")
    largest_first = np.argsort(-areas[1:], kind="stable") + 1
    return [np.where(owners == region, mask, np.float32(0)) for region in largest_first]


def bounding_box(mask: Soft, threshold: float = 0.5) -> Box | None:
    """Find the smallest box that holds all values from a threshold on.

    Args:
        mask: (H, W).
        threshold: lowest value that counts.

    Returns:
        The box; None where no value is that high.

    Raises:
        SettingError: `threshold` is not a number from 0 to 1.
    """
    lowest = check_number("threshold", threshold, 0, 1, of="Mask.bounding_box")
    found = Image.fromarray(mask >= lowest).getbbox()
    return Box(*found) if found else None


def on_lattice(mask: Soft, cover: Cover = "max", cell: int = 8) -> Soft:
    """Give each cell of the latent grid one value, as mask downsampling (`to_latent`) does for a model.

    Args:
        mask: (H, W); where a side is no multiple of `cell`, the mask is padded by reflection, as images are.
        cover: the value of a cell: "max" takes its highest pixel, "nearest" its first.
        cell: height and width of a cell in pixels.

    Returns:
        The mask (H, W), constant within each cell.

    Raises:
        SettingError: `cover` is neither word, or `cell` is not a whole number from 1 to 1024.
    """
    check_choice("cover", cover, ("nearest", "max"), of="Mask.on_lattice")
    side = check_whole("cell", cell, 1, 1024, of="Mask.on_lattice")
    cells = latent_cells(mask, cover, side)
    return cells.repeat(side, axis=0).repeat(side, axis=1)[: mask.shape[0], : mask.shape[1]]


def resize(mask: Soft, size: tuple[int, int]) -> Soft:
    """Scale a mask by linear interpolation, and by averaging where it gets smaller.

    Args:
        mask: (H, W).
        size: the new (height, width).

    Returns:
        The mask at that size.

    Raises:
        MaskError: `size` is invalid.
    """
    height, width = require_size("Mask.resize", size)
    scaled = Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(scaled), 0, 1)


def _territories(mask: Soft, verb: str) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
    """Return the number (from 1) of the hole's region nearest to each pixel (H, W), and the area of each region."""
    ndimage = require_extra("scipy.ndimage", extra="mask", what=verb)
    hole = binarize(mask)
    labels, count = ndimage.label(hole, structure=TOUCHING)
    areas = np.bincount(labels[hole], minlength=count + 1)
    if not count:
        return labels, areas
    nearest = ndimage.distance_transform_edt(~hole, return_distances=False, return_indices=True)
    return labels[tuple(nearest)], areas
