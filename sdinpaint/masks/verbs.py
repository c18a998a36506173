"""What can be done to a mask. Masks are float32 (H, W) in [0, 1]; the hole of one is where it is at least 0.5."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.checks import check_number, check_whole, require_extra
from sdinpaint.errors import SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.picture import pad_to_multiple
from sdinpaint.masks.checks import require_size
from sdinpaint.masks.reading import Hole, Soft, binarize, to_latent
from sdinpaint.masks.report import Cover

__all__ = ["bounding_box", "drop_specks", "feather", "fill_holes", "grow", "on_lattice", "regions", "resize", "smooth"]

TOUCHING = np.ones((3, 3), dtype=np.bool_)
"""Pixels of a region touch at edges and corners; so what it encloses is joined at edges alone."""


def grow(mask: Soft, pixels: float, verb: str = "Mask.grow") -> Soft:
    """The highest value within `pixels` of each pixel's centre; beyond the picture is nothing."""
    radius = min(check_number("pixels", pixels, 0, of=verb), math.hypot(*mask.shape))
    cv2 = require_extra("cv2", extra="mask", what=verb)
    offsets = np.arange(-int(radius), int(radius) + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)
    grown: Soft = cv2.dilate(mask, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return grown


def feather(mask: Soft, pixels: float, verb: str = "Mask.feather") -> Soft:
    """A soft edge that reaches `pixels` to either side: a Gaussian of half of that; straight edges of the hole stay."""
    sigma = check_number("pixels", pixels, 0, of=verb) / 2
    ndimage = require_extra("scipy.ndimage", extra="mask", what=verb)
    blurred: Soft = ndimage.gaussian_filter(mask, sigma, mode="nearest")
    return np.clip(blurred, 0, 1)


def smooth(mask: Soft, pixels: float) -> Hole:
    """The hole of the feathered mask: rounder, without what is thinner than about two thirds of `pixels`."""
    return binarize(feather(mask, pixels, "Mask.smooth"))


def fill_holes(mask: Soft, max_area: int | None = None) -> Soft:
    """Repaint also what the hole encloses, where that is at most `max_area` pixels large."""
    verb = "Mask.fill_holes"
    largest = mask.size if max_area is None else check_whole("max_area", max_area, 0, of=verb)
    ndimage = require_extra("scipy.ndimage", extra="mask", what=verb)
    kept, count = ndimage.label(~binarize(mask))
    enclosed = np.bincount(kept.ravel(), minlength=count + 1) <= largest
    enclosed[np.concatenate([kept[0], kept[-1], kept[:, 0], kept[:, -1]])] = False
    enclosed[0] = False  # the hole itself
    return np.where(enclosed[kept], np.float32(1), mask)


def drop_specks(mask: Soft, min_area: int = 64) -> Soft:
    """Repaint no region of fewer than `min_area` pixels, nor its soft edges."""
    verb = "Mask.drop_specks"
    smallest = check_whole("min_area", min_area, 0, of=verb)
    owners, areas = _territories(mask, verb)
    return np.where((areas >= smallest)[owners], mask, np.float32(0))


def regions(mask: Soft) -> list[Soft]:
    """The mask, parted into its connected regions with the soft values nearest to each; the largest comes first."""
    owners, areas = _territories(mask, "Mask.regions")
    largest_first = np.argsort(-areas[1:], kind="stable") + 1
    return [np.where(owners == region, mask, np.float32(0)) for region in largest_first]


def bounding_box(mask: Soft, threshold: float = 0.5) -> Box | None:
    """The smallest box that holds every value of at least `threshold`; None where there is none."""
    lowest = check_number("threshold", threshold, 0, 1, of="Mask.bounding_box")
    found = Image.fromarray(mask >= lowest).getbbox()
    return Box(*found) if found else None


def on_lattice(mask: Soft, cover: Cover = "max", cell: int = 8) -> Soft:
    """What the models make of a mask: each cell of `cell` x `cell` pixels has one value, as `to_latent` gives it.

    A size that does not divide is reflected up to the next that does, as pictures are.
    """
    if cover not in ("nearest", "max"):
        raise SettingError("SETTING_COVER", "Mask.on_lattice: cover", f"{cover!r}", expected="'nearest' or 'max'")
    side = check_whole("cell", cell, 1, 1024, of="Mask.on_lattice")
    padded, crop = pad_to_multiple(torch.from_numpy(mask.copy())[None, None], side)
    cells = to_latent(padded, cover, side)[0, 0].numpy()
    return cells.repeat(side, axis=0).repeat(side, axis=1)[crop]


def resize(mask: Soft, size: tuple[int, int]) -> Soft:
    """The mask at another (H, W), by linear interpolation; averaged where it gets smaller."""
    height, width = require_size("Mask.resize", size)
    scaled = Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(scaled), 0, 1)


def _territories(mask: Soft, verb: str) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
    """The region of the hole nearest to each pixel (H, W), from 1, and the area of each; 0 stands for none at all."""
    ndimage = require_extra("scipy.ndimage", extra="mask", what=verb)
    hole = binarize(mask)
    labels, count = ndimage.label(hole, structure=TOUCHING)
    areas = np.bincount(labels[hole], minlength=count + 1)
    if not count:
        return labels, areas
    nearest = ndimage.distance_transform_edt(~hole, return_distances=False, return_indices=True)
    return labels[tuple(nearest)], areas
