"""A mask as a value: made from pictures, coordinates or segmentation, combined, changed, looked at and saved."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from sdinpaint.errors import ImageError, MaskError
from sdinpaint.images import picture
from sdinpaint.images.boxes import Box
from sdinpaint.images.files import check_output_path, write_picture
from sdinpaint.images.sheets import tinted
from sdinpaint.masks import picking, segmenting, shapes, verbs
from sdinpaint.masks.checks import require_size
from sdinpaint.masks.reading import Hole, Soft, Source, binarize, read_mask, read_own_size
from sdinpaint.masks.report import Cover, MaskReport, report

__all__ = ["Mask"]

STEPS = 2**24
"""Values are multiples of 1 / STEPS, the spacing of float32 just below 1. So 1 - value is such a multiple too, without
rounding, and complement, minimum and maximum obey the laws of algebra exactly."""


class Mask:
    """How much of each pixel is repainted: immutable float32 (H, W) in [0, 1]; 1 = repaint, 0 = keep.

    values: an array or tensor (bool, uint8 0..255, uint16 0..65535, float 0..1), a PIL image, or the path of a picture.
    Verbs and operators `|`, `&`, `-`, `~` return new masks. Sizes are (height, width), points (x, y), boxes (left, top,
    right, bottom), lengths pixels. Errors are MaskError or SettingError naming the verb or the argument.
    """

    __slots__ = ("_array",)

    def __init__(self, values: Source, argument: str = "mask") -> None:
        # rounded down, so that nothing reaches 0.5 that was below
        steps = (read_own_size(values, argument) * STEPS).astype(np.uint32)
        soft = steps.astype(np.float32)
        soft /= np.float32(STEPS)
        # an array over bytes is one that nobody can make writable
        self._array: Soft = np.frombuffer(soft.tobytes(), np.float32).reshape(soft.shape)

    # what it is

    @property
    def array(self) -> Soft:
        """Its values, float32 (H, W) in [0, 1], read-only."""
        return self._array

    @property
    def hole(self) -> Hole:
        """True where it is at least 0.5, (H, W): what is repainted."""
        return binarize(self._array)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._array.shape[0], self._array.shape[1]

    @property
    def share(self) -> float:
        """The share of the pixels that is repainted, in 0..1."""
        return float(self.hole.mean())

    @property
    def sha256(self) -> str:
        """The hash of its size and values, in hexadecimal digits."""
        return hashlib.sha256(repr(self.size).encode() + self._array.astype("<f4").tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return np.array_equal(self._array, other._array) if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.size, self._array.tobytes()))

    def __repr__(self) -> str:
        return f"Mask(size={self.size}, share={self.share:.4g})"

    def __reduce__(self) -> tuple[type[Mask], tuple[Soft]]:
        return Mask, (self._array,)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._array, dtype=dtype) if copy else np.asarray(self._array, dtype=dtype)

    # algebra

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, np.maximum)

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, np.minimum)

    def __sub__(self, other: Mask) -> Mask:
        return self._with(other, lambda one, two: np.minimum(one, 1 - two))

    def __invert__(self) -> Mask:
        return Mask(1 - self._array)

    def _with(self, other: Mask, combine: Callable[[Soft, Soft], Soft]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.size != other.size:
            found, hint = f"masks of {self.size} and {other.size} rows and columns", "mask.resize(size) scales one"
            raise MaskError("MASK_SIZE", "mask", found, expected="one size", hint=hint)
        return Mask(combine(self._array, other._array))

    # from files, pictures and labels

    @classmethod
    def open(cls, path: Path | str) -> Mask:
        """The mask in a picture file, read as `pipe.inpaint` reads it but in its own size."""
        return cls(read_own_size(path, "mask"))

    @classmethod
    def from_alpha(cls, image: picture.Source, *, opaque: bool = False) -> Mask:
        """What is transparent in a picture is repainted; with `opaque` what is opaque."""
        visible = cls(picking.by_alpha(picture.read_picture(image)))
        return visible if opaque else ~visible

    @classmethod
    def from_color(cls, image: picture.Source, color: str | Sequence[int], tolerance: float = 24) -> Mask:
        """The pixels of a colour: (red, green, blue) or a name; each may be off by `tolerance` of 255."""
        return cls(picking.by_color(picture.read_picture(image), color, tolerance))

    @classmethod
    def from_luminance(cls, image: picture.Source, low: float = 0.5, high: float = 1.0) -> Mask:
        """The pixels whose Rec. 601 luma is from `low` to `high`, where 0 is black and 1 is white."""
        return cls(picking.by_luminance(picture.read_picture(image), low, high))

    @classmethod
    def from_labels(cls, labels: Any, ids: int | Iterable[int], size: tuple[int, int] | None = None) -> Mask:
        """The pixels whose class is one of `ids`, scaled to `size` by nearest pixels.

        labels: an array of whole numbers, a picture of mode P, L or I or the path of one, or a text layout: rows of ids
        separated by spaces or commas, as a string of several lines or as the path of a .txt or .csv file.
        """
        hole = picking.by_label(labels, ids)
        if size is not None:
            height, width = require_size("Mask.from_labels", size)
            hole = np.asarray(Image.fromarray(hole).resize((width, height), Image.Resampling.NEAREST))
        return cls(hole)

    # drawn

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Mask:
        """Nothing is repainted."""
        return cls(np.zeros(require_size("Mask.empty", size), np.bool_))

    @classmethod
    def full(cls, size: tuple[int, int]) -> Mask:
        """Everything is repainted."""
        return cls(np.ones(require_size("Mask.full", size), np.bool_))

    @classmethod
    def box(cls, size: tuple[int, int], box: Sequence[int]) -> Mask:
        """The pixels inside a box; what of it lies outside the picture is cut off, here and in all that is drawn."""
        return cls(shapes.box(size, box))

    @classmethod
    def ellipse(cls, size: tuple[int, int], box: Sequence[int]) -> Mask:
        """The ellipse that touches the four sides of a box."""
        return cls(shapes.ellipse(size, box))

    @classmethod
    def polygon(cls, size: tuple[int, int], points: shapes.Points) -> Mask:
        """A closed outline of three points or more, with what is inside."""
        return cls(shapes.polygon(size, points))

    @classmethod
    def strokes(cls, size: tuple[int, int], strokes: Iterable[shapes.Points], width: int) -> Mask:
        """Brush strokes through lists of points, `width` pixels wide with round ends; a single point is a dot."""
        return cls(shapes.strokes(size, strokes, width))

    # by segmentation

    @classmethod
    def grabcut(
        cls,
        image: picture.Source,
        box: Sequence[int] | None = None,
        keep: Source | None = None,
        repaint: Source | None = None,
        iterations: int = 5,
    ) -> Mask:
        """The object in a box, or as scribbles (masks) say what to keep and what to repaint. See segmenting.grabcut."""
        rgb = _pixels(image)
        kept, repainted = _scribble(keep, rgb, "keep"), _scribble(repaint, rgb, "repaint")
        return cls(segmenting.grabcut(rgb, box, kept, repainted, iterations))

    @classmethod
    def flood(cls, image: picture.Source, point: Sequence[float], tolerance: float = 0.1) -> Mask:
        """What is coloured like the pixel at a point and joined to it. See segmenting.flood."""
        return cls(segmenting.flood(_pixels(image), point, tolerance))

    @classmethod
    def region(
        cls,
        image: picture.Source,
        point: Sequence[float],
        scale: float = 200.0,
        sigma: float = 0.8,
        min_size: int = 50,
    ) -> Mask:
        """The region at a point, of those that edges part a picture into. See segmenting.region."""
        return cls(segmenting.region(_pixels(image), point, scale, sigma, min_size))

    @classmethod
    def sam(
        cls,
        image: picture.Source,
        model: Any,
        *,
        points: Sequence[Sequence[float]] = (),
        keep_points: Sequence[Sequence[float]] = (),
        box: Sequence[float] | None = None,
        threshold: float = 0.0,
    ) -> Mask:
        """What a SAM or SAM 2 model sees at points or in a box, but not at `keep_points`. See prompting.sam."""
        from sdinpaint.masks import prompting  # noqa: PLC0415 - who draws a mask need not wait for the hub

        return cls(prompting.sam(_pixels(image), model, points, keep_points, box, threshold))

    @classmethod
    def clipseg(cls, image: picture.Source, text: str | Sequence[str], model: Any, threshold: float = 0.5) -> Mask:
        """What a CLIPSeg model takes for the thing that `text` names. See prompting.clipseg."""
        from sdinpaint.masks import prompting  # noqa: PLC0415 - as in sam

        return cls(prompting.clipseg(_pixels(image), text, model, threshold))

    # verbs

    def invert(self) -> Mask:
        """Repaint what was kept, and keep what was repainted: `~mask`."""
        return ~self

    def grow(self, pixels: float) -> Mask:
        """Widen by a disc: each pixel becomes the highest within `pixels` of it."""
        return Mask(verbs.grow(self._array, pixels))

    def shrink(self, pixels: float) -> Mask:
        """Narrow by a disc: each pixel becomes the lowest within `pixels` of it; the picture's borders stay."""
        return ~Mask(verbs.grow(1 - self._array, pixels, "Mask.shrink"))

    def feather(self, pixels: float) -> Mask:
        """A soft edge that reaches `pixels` to either side of where it was; straight edges of the hole stay."""
        return Mask(verbs.feather(self._array, pixels))

    def smooth(self, pixels: float) -> Mask:
        """Round the outline, and drop and close what is thinner than about two thirds of `pixels`; the edge is hard."""
        return Mask(verbs.smooth(self._array, pixels))

    def fill_holes(self, max_area: int | None = None) -> Mask:
        """Repaint also what is enclosed, where that is at most `max_area` pixels large."""
        return Mask(verbs.fill_holes(self._array, max_area))

    def drop_specks(self, min_area: int = 64) -> Mask:
        """Repaint no connected region of fewer than `min_area` pixels."""
        return Mask(verbs.drop_specks(self._array, min_area))

    def regions(self) -> list[Mask]:
        """One mask per connected region of the hole, the largest first; joined by `|` they are this mask again.

        Pixels are connected at corners too. Soft values go with the region nearest to them.
        """
        return [Mask(region) for region in verbs.regions(self._array)]

    def bounding_box(self, threshold: float = 0.5) -> Box | None:
        """The smallest box around all that is at least `threshold`; None where nothing is."""
        return verbs.bounding_box(self._array, threshold)

    def on_lattice(self, cover: Cover = "max", cell: int = 8) -> Mask:
        """What the models make of it: whole cells, by any pixel of each or, with "nearest", by the first pixel."""
        return Mask(verbs.on_lattice(self._array, cover, cell))

    def resize(self, size: tuple[int, int]) -> Mask:
        """At another size, by linear interpolation."""
        return Mask(verbs.resize(self._array, size))

    def report(self, cover: Cover = "max") -> MaskReport:
        """What a run would do with it, and what looks like a mistake."""
        return report(self._array, cover)

    # to look at and to keep

    def to_pil(self) -> Image.Image:
        """A picture of mode L: white is repainted. Soft values are rounded to 256 levels."""
        return Image.fromarray(np.rint(self._array * 255).astype(np.uint8))

    def over(self, image: picture.Source) -> Image.Image:
        """A picture (RGB) with the mask over it in a bright colour."""
        rgb = _pixels(image)
        mask = read_mask(self, rgb.shape[:2])
        return Image.composite(tinted(rgb, np.ones_like(mask, np.bool_)), Image.fromarray(rgb), Mask(mask).to_pil())

    def save(self, path: Path | str) -> None:
        """Write it as a grey PNG, whole or not at all. Raises: ImageError."""
        if check_output_path(path).suffix.lower() != ".png":
            found, hint = "a mask is saved as PNG alone, which keeps every value", "name it mask.png"
            raise ImageError("IMAGE_OUTPUT_TYPE", f"output {str(path)!r}", found, expected=".png", hint=hint)
        write_picture(self.to_pil(), path, "PNG")

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        stream = io.BytesIO()
        self.to_pil().save(stream, format="PNG")
        return stream.getvalue()


def _pixels(image: picture.Source) -> NDArray[np.uint8]:
    return picture.read_picture(image).opaque()


def _scribble(mask: Source | None, rgb: NDArray[np.uint8], argument: str) -> Hole | None:
    return None if mask is None else binarize(read_mask(mask, rgb.shape[:2], argument))
