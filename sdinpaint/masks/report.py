"""A report on a mask before the run: its extent, its form on the latent grid, and likely mistakes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from sdinpaint.checks import check_choice, require_extra
from sdinpaint.errors import MaskError, SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.images.input_image import mirrored
from sdinpaint.masks.reading import CELL, Cover, Hole, binarize, latent_cells, looks_inverted

__all__ = ["Cover", "MaskReport", "report"]

SPECK = CELL * CELL
"""Area of a latent cell in pixels; smaller regions are specks. `Mask.drop_specks` has the same default."""
STRAY_SHARE = 0.05
"""Share of the repainted pixels below which specks are slips of the brush; more specks are drawn on purpose."""
MOSTLY = 0.5
"""Share of thin pixels above which a result is blurred; the rounded ends of a thick brush stay below."""
LOST_SHARE = 0.4
"""Share of lost pixels above which to warn: boxes and brushes lose less along their edges, thin strokes more."""


@dataclass(frozen=True, kw_only=True)
class MaskReport:
    """A report on what a run would do with a mask.

    `share` and `faint` are shares of all pixels; the other shares relate to the repainted pixels (0 if there are none).
    `regions`, `specks` and `speck_pixels` are None where scipy, which counts them, is not installed.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    cover: Cover
    """Mask downsampling of the run."""
    share: float
    """Share of the pixels that are repainted: those of at least 0.5."""
    bounds: Box | None
    """The smallest box that holds all repainted pixels."""
    regions: int | None
    """Number of repainted areas that do not touch each other, not even at a corner."""
    specks: int | None
    """Number of repainted areas of fewer than 64 pixels, the area of a latent cell."""
    speck_pixels: int | None
    """Number of pixels in specks."""
    thin_share: float
    """Share of the repainted pixels that no square of 8 x 8 repainted pixels holds: strokes thinner than a cell."""
    lost_share: float
    """Share of the repainted pixels whose latent cell is kept: the model takes the grey there for image content."""
    lost_share_nearest: float
    """Share of the repainted pixels that cover="nearest" loses or would lose."""
    grown_share_max: float
    """Pixels that cover="max" repaints or would repaint beyond the mask, as a multiple of the repainted pixels."""
    faint: float
    """Share of the pixels above 0 and below 0.5: they are kept, and only soften edges."""
    inverted: bool
    """True if black and white were probably exchanged."""

    @property
    def empty(self) -> bool:
        """True if nothing would be repainted."""
        return self.share == 0

    @property
    def full(self) -> bool:
        """True if nothing would be kept."""
        return self.share == 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each likely mistake, with its remedy."""
        if self.empty:
            seen = f"{self.faint:.1%} of the pixels are grey, but none is 0.5 or more" if self.faint else "it is black"
            return (f"nothing is repainted: {seen}; make the pixels to repaint white, or invert the mask: ~mask",)
        found = []
        if self.inverted:
            found.append(f"{self.share:.0%} is repainted, up to all borders; if that was meant to be kept, use ~mask")
        if self.lost_share > LOST_SHARE:
            found.append(f'{self.lost_share:.0%} of the mask is lost between latent cells; use cover="max"')
        if self.thin_share > MOSTLY:
            found.append(f"{self.thin_share:.0%} of the mask is thinner than {CELL} pixels; widen it: Mask.grow(4)")
        if self.specks and 0 < self._strays < STRAY_SHARE:
            found.append(f"{self.specks} of {self.regions} regions are specks; remove them: Mask.drop_specks()")
        return tuple(found)

    def table(self) -> str:
        """Return the figures as text, one per line."""
        rows = {
            "size": f"{self.size[0]} rows, {self.size[1]} columns",
            "repainted": f"{self.share:.2%} of the image" + (f", within {self.bounds}" if self.bounds else ""),
            "regions": "not counted: needs scipy (pip install 'sdinpaint[mask]')"
            if self.regions is None
            else f"{self.regions}, of which {self.specks} below {SPECK} pixels ({self.speck_pixels} pixels in all)",
            "thin": f"{self.thin_share:.1%} of the repainted pixels are in strokes thinner than {CELL} pixels",
            "latents": f'cover="nearest" loses {self.lost_share_nearest:.1%} of the repainted pixels, '
            f'cover="max" adds {self.grown_share_max:.1%}; this run uses "{self.cover}"',
            "faint": f"{self.faint:.1%} of the image is above 0 and below 0.5: kept",
        }
        return "\n".join(f"{name:<10}{text}" for name, text in rows.items())

    def __str__(self) -> str:
        return "\n".join([self.table(), *(f"warning: {text}" for text in self.warnings)])

    def to_json(self) -> dict[str, Any]:
        """Return all values by name, in types that JSON has."""
        more = {"empty": self.empty, "full": self.full, "warnings": list(self.warnings)}
        return asdict(self) | {"size": list(self.size), "bounds": self.bounds and list(self.bounds)} | more

    @property
    def _strays(self) -> float:
        """The share of the repainted pixels that lies in specks."""
        return (self.speck_pixels or 0) / (self.share * self.size[0] * self.size[1])


def report(mask: ArrayLike, cover: Cover = "max") -> MaskReport:
    """Report what a run would do with a mask, and what looks like a mistake.

    The latent cells are those of the run: 8 x 8 pixels of the mask, padded by reflection at the right and bottom.

    Args:
        mask: (H, W) in [0, 1].
        cover: mask downsampling of the run.

    Returns:
        The report.

    Raises:
        MaskError: `mask` has another shape.
        SettingError: `cover` is unknown.
    """
    soft = np.asarray(mask, dtype=np.float32)
    if soft.ndim != 2 or not soft.size:
        raise MaskError("MASK_BAD_SHAPE", "mask", f"shape {soft.shape}", expected="(height, width)")
    check_choice("cover", cover, ("nearest", "max"))
    hole = binarize(soft)
    cells: dict[Cover, Hole] = {"nearest": _covered(hole, "nearest"), "max": _covered(hole, "max")}
    regions, specks, speck_pixels = _counted(hole)
    repainted = max(int(hole.sum()), 1)
    return MaskReport(
        size=(soft.shape[0], soft.shape[1]),
        cover=cover,
        share=float(hole.mean()),
        bounds=Box(*corners) if (corners := Image.fromarray(hole).getbbox()) else None,
        regions=regions,
        specks=specks,
        speck_pixels=speck_pixels,
        thin_share=float((hole & ~_opened(hole)).sum() / repainted),
        lost_share=float((hole & ~cells[cover]).sum() / repainted),
        lost_share_nearest=float((hole & ~cells["nearest"]).sum() / repainted),
        grown_share_max=float((cells["max"] & ~hole).sum() / repainted),
        faint=float(((soft > 0) & ~hole).mean()),
        inverted=looks_inverted(hole),
    )


def _covered(hole: Hole, cover: Cover) -> Hole:
    """Return the pixels (H, W) of all latent cells that are repainted."""
    cells = latent_cells(hole, cover)
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)[: hole.shape[0], : hole.shape[1]]


def _opened(hole: Hole) -> Hole:
    """Return the morphological opening (H, W): the pixels inside some CELL x CELL square of repainted pixels."""
    rows, columns = (-(-side // CELL) * CELL for side in hole.shape)
    padded = hole[np.ix_(mirrored(hole.shape[0], rows), mirrored(hole.shape[1], columns))]
    corners = _windows(padded, np.logical_and)
    around = CELL - 1
    return _windows(np.pad(corners, around), np.logical_or)[: hole.shape[0], : hole.shape[1]]


def _windows(values: Hole, combine: np.ufunc) -> Hole:
    """Combine the values of each CELL x CELL window; in 2 log2(CELL) passes over the array."""
    for axis in (0, 1):
        for width in (1, 2, 4):
            first, second = (
                np.take(values, range(start, values.shape[axis] - width + start), axis) for start in (0, width)
            )
            values = combine(first, second)
    return values


def _counted(hole: Hole) -> tuple[int, int, int] | tuple[None, None, None]:
    """Count the regions, the specks and the pixels in specks; None for each without OpenCV."""
    try:
        cv2 = require_extra("cv2", extra="mask", what="the regions of a mask")
    except SettingError:
        return None, None, None
    count, _, found, _ = cv2.connectedComponentsWithStats(hole.astype(np.uint8), connectivity=8)
    pixels = found[1:, cv2.CC_STAT_AREA]  # the first one is the background
    specks = pixels[pixels < SPECK]
    return count - 1, len(specks), int(specks.sum())
