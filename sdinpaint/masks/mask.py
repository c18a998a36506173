"""A mask as a value: made from images, coordinates or segmentation, combined, changed, shown and saved."""

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
from sdinpaint.images import input_image
from sdinpaint.images.boxes import Box
from sdinpaint.images.files import check_output_path, write_image
from sdinpaint.images.sheets import tinted
from sdinpaint.masks import picking, segmenting, shapes, verbs
from sdinpaint.masks.checks import require_size
from sdinpaint.masks.reading import Hole, Soft, Source, binarize, read_mask, read_own_size
from sdinpaint.masks.report import Cover, MaskReport, report

__all__ = ["Mask"]

STEPS = 2**24
"""Values are multiples of 1 / STEPS, the spacing of float32 just below 1. So is 1 - value, without rounding: the
operators obey the laws of algebra exactly."""


class Mask:
    """An immutable mask, float32 (H, W) in [0, 1]: how far each pixel is repainted, where 1 = repaint and 0 = keep.

    Methods and the operators `|`, `&`, `-` and `~` return new masks. Sizes are (height, width), points (x, y), boxes
    (left, top, right, bottom), and lengths are pixels. Errors name the method or the argument.

    Args:
        values: an array or tensor (bool, uint8 0..255, uint16 0..65535, float 0..1), a PIL image, a Mask, or the path
            of an image file.
        argument: name that errors give to `values`.

    Raises:
        MaskError: `values` is ambiguous, coloured, or of another shape or type.
        ImageError: the file cannot be read as an image.
    """

    __slots__ = ("_array",)

    def __init__(self, values: Source, argument: str = "mask") -> None:
        # rounded down, so that no value below 0.5 reaches it
        steps = (read_own_size(values, argument) * STEPS).astype(np.uint32)
        soft = steps.astype(np.float32)
        soft /= np.float32(STEPS)
        # nobody can make an array over bytes writable
        self._array: Soft = np.frombuffer(soft.tobytes(), np.float32).reshape(soft.shape)

    @property
    def array(self) -> Soft:
        """The values, float32 (H, W) in [0, 1], read-only."""
        return self._array

    @property
    def hole(self) -> Hole:
        """The repainted pixels, bool (H, W): True where the mask is at least 0.5."""
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
        """The SHA-256 hash of the size and the values, in hexadecimal digits."""
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

    def __or__(self, other: Mask) -> Mask:
        """Repaint what either mask repaints: the higher value of each pixel."""
        return self._with(other, np.maximum)

    def __and__(self, other: Mask) -> Mask:
        """Repaint what both masks repaint: the lower value of each pixel."""
        return self._with(other, np.minimum)

    def __sub__(self, other: Mask) -> Mask:
        """Repaint what the first mask repaints and the second keeps."""
        return self._with(other, lambda one, two: np.minimum(one, 1 - two))

    def __invert__(self) -> Mask:
        """Repaint what was kept, and keep what was repainted."""
        return Mask(1 - self._array)

    def _with(self, other: Mask, combine: Callable[[Soft, Soft], Soft]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.size != other.size:
            found, hint = f"masks of {self.size} and {other.size} rows and columns", "mask.resize(size) scales one"
            raise MaskError("MASK_SIZE", "mask", found, expected="one size", hint=hint)
        return Mask(combine(self._array, other._array))

    @classmethod
    def open(cls, path: Path | str) -> Mask:
        """Read a mask from an image file, in its own size.

        Args:
            path: the file.

        Returns:
            The mask.

        Raises:
            MaskError: the image is ambiguous or coloured.
            ImageError: the file cannot be read as an image.
        """
        return cls(read_own_size(path, "mask"))

    @classmethod
    def from_alpha(cls, image: input_image.Source, *, opaque: bool = False) -> Mask:
        """Repaint the transparent pixels of an image.

        Args:
            image: a path, PIL image, array or tensor.
            opaque: repaint the opaque pixels instead.

        Returns:
            The mask.

        Raises:
            MaskError: the image has no alpha channel.
            ImageError: the image cannot be read.
        """
        visible = cls(picking.by_alpha(input_image.read_image(image)))
        return visible if opaque else ~visible

    @classmethod
    def from_color(cls, image: input_image.Source, color: str | Sequence[int], tolerance: float = 24) -> Mask:
        """Repaint the pixels that have a colour.

        Args:
            image: a path, PIL image, array or tensor.
            color: (red, green, blue) in 0..255, or a name such as "magenta" or "#ff00ff".
            tolerance: largest difference of red, green and blue each, in 0..255.

        Returns:
            The mask.

        Raises:
            SettingError: `color` is no colour, or `tolerance` is not from 0 to 255.
            ImageError: the image cannot be read.
        """
        return cls(picking.by_color(input_image.read_image(image), color, tolerance))

    @classmethod
    def from_luminance(cls, image: input_image.Source, low: float = 0.5, high: float = 1.0) -> Mask:
        """Repaint the pixels whose brightness (Rec. 601 luma) lies in a range.

        Args:
            image: a path, PIL image, array or tensor.
            low: lowest luma; 0 is black.
            high: highest luma; 1 is white.

        Returns:
            The mask.

        Raises:
            SettingError: the bounds are not 0 <= low <= high <= 1.
            ImageError: the image cannot be read.
        """
        return cls(picking.by_luminance(input_image.read_image(image), low, high))

    @classmethod
    def from_labels(cls, labels: Any, ids: int | Iterable[int], size: tuple[int, int] | None = None) -> Mask:
        """Repaint the pixels whose class is one of some ids.

        Args:
            labels: an array of whole numbers (H, W); an image of mode P, L or I, or the path of one; or rows of ids
                separated by spaces or commas: the text itself, if it has several lines, or the path of a .txt or .csv
                file.
            ids: one id or several.
            size: (height, width) of the mask, scaled by nearest neighbours; None is the size of the labels.

        Returns:
            The mask.

        Raises:
            MaskError: `labels` is no label map, or does not hold one of the ids, or `size` is invalid.
            ImageError: the image file cannot be read.
        """
        hole = picking.by_label(labels, ids)
        if size is not None:
            height, width = require_size("Mask.from_labels", size)
            hole = np.asarray(Image.fromarray(hole).resize((width, height), Image.Resampling.NEAREST))
        return cls(hole)

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Mask:
        """Make a mask that repaints nothing.

        Args:
            size: (height, width) in pixels.

        Returns:
            The mask.

        Raises:
            MaskError: `size` is invalid.
        """
        return cls(np.zeros(require_size("Mask.empty", size), np.bool_))

    @classmethod
    def full(cls, size: tuple[int, int]) -> Mask:
        """Make a mask that repaints everything.

        Args:
            size: (height, width) in pixels.

        Returns:
            The mask.

        Raises:
            MaskError: `size` is invalid.
        """
        return cls(np.ones(require_size("Mask.full", size), np.bool_))

    @classmethod
    def box(cls, size: tuple[int, int], box: Sequence[int]) -> Mask:
        """Draw a filled box.

        Args:
            size: (height, width) of the mask.
            box: (left, top, right, bottom); right and bottom are exclusive. What lies outside the mask is cut off.

        Returns:
            The mask.

        Raises:
            MaskError: `size` or `box` is invalid, or no pixel of the box lies inside the mask.
        """
        return cls(shapes.box(size, box))

    @classmethod
    def ellipse(cls, size: tuple[int, int], box: Sequence[int]) -> Mask:
        """Draw the filled ellipse that touches the four sides of a box.

        Args:
            size: (height, width) of the mask.
            box: (left, top, right, bottom); right and bottom are exclusive. What lies outside the mask is cut off.

        Returns:
            The mask.

        Raises:
            MaskError: `size` or `box` is invalid, or no pixel of the ellipse lies inside the mask.
        """
        return cls(shapes.ellipse(size, box))

    @classmethod
    def polygon(cls, size: tuple[int, int], points: shapes.Points) -> Mask:
        """Draw a filled polygon with its outline.

        Args:
            size: (height, width) of the mask.
            points: the corners (x, y) in order, at least three. What lies outside the mask is cut off.

        Returns:
            The mask.

        Raises:
            MaskError: `size` or `points` is invalid, or no pixel of the polygon lies inside the mask.
        """
        return cls(shapes.polygon(size, points))

    @classmethod
    def strokes(cls, size: tuple[int, int], strokes: Iterable[shapes.Points], width: int) -> Mask:
        """Draw strokes of a round brush.

        Args:
            size: (height, width) of the mask.
            strokes: lists of points (x, y); a list with a single point makes a dot. What lies outside the mask is cut
                off.
            width: diameter of the brush in whole pixels.

        Returns:
            The mask.

        Raises:
            MaskError: `size` or a stroke is invalid, or no pixel of the strokes lies inside the mask.
            SettingError: `width` is not a whole number from 1 on.
        """
        return cls(shapes.strokes(size, strokes, width))

    @classmethod
    def grabcut(
        cls,
        image: input_image.Source,
        box: Sequence[int] | None = None,
        keep: Source | None = None,
        repaint: Source | None = None,
        iterations: int = 5,
    ) -> Mask:
        """Repaint the object in a box or under scribbles, found by GrabCut.

        Args:
            image: a path, PIL image, array or tensor.
            box: (left, top, right, bottom) around the object; everything outside is kept, except for what `repaint`
                covers.
            keep: a mask over pixels that are surely kept.
            repaint: a mask over pixels that surely belong to the object.
            iterations: rounds of fitting the colours of both sides.

        Returns:
            The mask.

        Raises:
            MaskError: there is neither a box nor `repaint`, they leave only one side, or one is invalid.
            SettingError: `iterations` is not a whole number from 1 to 1000, or the extra `mask` is not installed.
            ImageError: the image cannot be read.
        """
        rgb = _pixels(image)
        kept, repainted = _scribble(keep, rgb, "keep"), _scribble(repaint, rgb, "repaint")
        return cls(segmenting.grabcut(rgb, box, kept, repainted, iterations))

    @classmethod
    def flood(cls, image: input_image.Source, point: Sequence[float], tolerance: float = 0.1) -> Mask:
        """Repaint the area that is coloured like a point and joined to it.

        Args:
            image: a path, PIL image, array or tensor.
            point: (x, y) in pixels.
            tolerance: largest distance in CIELAB from the colour at the point; 0 is the same colour, 1 is black to
                white.

        Returns:
            The mask.

        Raises:
            MaskError: `point` is not inside the image.
            SettingError: `tolerance` is not from 0 to 1, or the extra `mask` is not installed.
            ImageError: the image cannot be read.
        """
        return cls(segmenting.flood(_pixels(image), point, tolerance))

    @classmethod
    def region(
        cls,
        image: input_image.Source,
        point: Sequence[float],
        scale: float = 200.0,
        sigma: float = 0.8,
        min_size: int = 50,
    ) -> Mask:
        """Divide the image into regions along its edges, and repaint the region that holds a point.

        Args:
            image: a path, PIL image, array or tensor.
            point: (x, y) in pixels.
            scale: a larger value gives larger regions.
            sigma: width in pixels of the Gaussian that smooths the image first.
            min_size: pixels of the smallest region.

        Returns:
            The mask.

        Raises:
            MaskError: `point` is not inside the image.
            SettingError: another argument is out of range, or the extra `mask` is not installed.
            ImageError: the image cannot be read.
        """
        return cls(segmenting.region(_pixels(image), point, scale, sigma, min_size))

    @classmethod
    def sam(
        cls,
        image: input_image.Source,
        model: Any,
        *,
        points: Sequence[Sequence[float]] = (),
        keep_points: Sequence[Sequence[float]] = (),
        box: Sequence[float] | None = None,
        threshold: float = 0.0,
        device: str | None = None,
    ) -> Mask:
        """Repaint the object at points or in a box, found by SAM or SAM 2.

        Args:
            image: a path, PIL image, array or tensor.
            model: a folder, a hub id, or the result of `sdinpaint.masks.prompting.load_segmenter`.
            points: points (x, y) on the object.
            keep_points: points (x, y) beside it.
            box: (left, top, right, bottom) around the object.
            threshold: logit above which a pixel belongs to the object.
            device: device that computes, such as "cuda"; by default where the model is.

        Returns:
            The mask.

        Raises:
            MaskError: there is neither a point nor a box, or one lies outside the image.
            SettingError: `threshold` is no number, or the model cannot be loaded.
            NumericError: the model returns NaN or infinity.
            ImageError: the image cannot be read.
        """
        from sdinpaint.masks import prompting  # noqa: PLC0415 - drawing a mask need not import the hub

        return cls(prompting.sam(_pixels(image), model, points, keep_points, box, threshold, device))

    @classmethod
    def clipseg(
        cls,
        image: input_image.Source,
        text: str | Sequence[str],
        model: Any,
        threshold: float = 0.5,
        device: str | None = None,
    ) -> Mask:
        """Repaint what a text names, found by CLIPSeg.

        Args:
            image: a path, PIL image, array or tensor.
            text: the name of a thing, or a list of names, any of which is taken.
            model: a folder, a hub id, or the result of `sdinpaint.masks.prompting.load_segmenter`.
            threshold: probability from which a pixel belongs to the thing.
            device: device that computes, such as "cuda"; by default where the model is.

        Returns:
            The mask.

        Raises:
            MaskError: `text` is empty or too long.
            SettingError: `threshold` is not from 0 to 1, or the model cannot be loaded.
            NumericError: the model returns NaN or infinity.
            ImageError: the image cannot be read.
        """
        from sdinpaint.masks import prompting  # noqa: PLC0415 - as in sam

        return cls(prompting.clipseg(_pixels(image), text, model, threshold, device))

    def invert(self) -> Mask:
        """Repaint what was kept, and keep what was repainted; the same as `~mask`."""
        return ~self

    def grow(self, pixels: float) -> Mask:
        """Widen by a disc: each pixel takes the highest value within a radius.

        Args:
            pixels: radius of the disc.

        Returns:
            The widened mask.

        Raises:
            SettingError: `pixels` is not a number from 0 on, or the extra `mask` is not installed.
        """
        return Mask(verbs.grow(self._array, pixels))

    def shrink(self, pixels: float) -> Mask:
        """Narrow by a disc: each pixel takes the lowest value within a radius; edges at the border of the image stay.

        Args:
            pixels: radius of the disc.

        Returns:
            The narrowed mask.

        Raises:
            SettingError: `pixels` is not a number from 0 on, or the extra `mask` is not installed.
        """
        return ~Mask(verbs.grow(1 - self._array, pixels, "Mask.shrink"))

    def feather(self, pixels: float) -> Mask:
        """Soften the edge; straight edges of the hole stay where they are.

        Args:
            pixels: how far the soft edge reaches to either side.

        Returns:
            The soft mask.

        Raises:
            SettingError: `pixels` is below 0, or above 64 and the diagonal, or the extra `mask` is not installed.
        """
        return Mask(verbs.feather(self._array, pixels))

    def smooth(self, pixels: float) -> Mask:
        """Round the outline, and remove parts and gaps thinner than about two thirds of a length; the new edge is hard.

        Args:
            pixels: that length.

        Returns:
            The smooth mask.

        Raises:
            SettingError: `pixels` is below 0, or above 64 and the diagonal, or the extra `mask` is not installed.
        """
        return Mask(verbs.smooth(self._array, pixels))

    def fill_holes(self, max_area: int | None = None) -> Mask:
        """Repaint also the kept areas that the repainted pixels enclose.

        Args:
            max_area: pixels of the largest area that is filled; None fills all.

        Returns:
            The filled mask.

        Raises:
            SettingError: `max_area` is not a whole number from 0 on, or the extra `mask` is not installed.
        """
        return Mask(verbs.fill_holes(self._array, max_area))

    def drop_specks(self, min_area: int = 64) -> Mask:
        """Keep the connected regions that are too small.

        Args:
            min_area: pixels of the smallest region that is still repainted.

        Returns:
            The mask without specks.

        Raises:
            SettingError: `min_area` is not a whole number from 0 on, or the extra `mask` is not installed.
        """
        return Mask(verbs.drop_specks(self._array, min_area))

    def regions(self) -> list[Mask]:
        """Split into one mask per connected region; joined by `|`, they give this mask again.

        Pixels are connected at corners too. Soft values go with the nearest region.

        Returns:
            The masks, the largest region first.

        Raises:
            SettingError: the extra `mask` is not installed.
        """
        return [Mask(region) for region in verbs.regions(self._array)]

    def bounding_box(self, threshold: float = 0.5) -> Box | None:
        """Find the smallest box that holds all values from a threshold on.

        Args:
            threshold: lowest value that counts.

        Returns:
            The box; None where no value is that high.

        Raises:
            SettingError: `threshold` is not a number from 0 to 1.
        """
        return verbs.bounding_box(self._array, threshold)

    def on_lattice(self, cover: Cover = "max", cell: int = 8) -> Mask:
        """Give each cell of the latent grid one value, as mask downsampling does for a model.

        Args:
            cover: the value of a cell: "max" takes its highest pixel, "nearest" its first.
            cell: height and width of a cell in pixels.

        Returns:
            The mask, constant within each cell.

        Raises:
            SettingError: `cover` is neither word, or `cell` is not a whole number from 1 to 1024.
        """
        return Mask(verbs.on_lattice(self._array, cover, cell))

    def resize(self, size: tuple[int, int]) -> Mask:
        """Scale by linear interpolation, and by averaging where the mask gets smaller.

        Args:
            size: the new (height, width).

        Returns:
            The mask at that size.

        Raises:
            MaskError: `size` is invalid.
        """
        return Mask(verbs.resize(self._array, size))

    def report(self, cover: Cover = "max") -> MaskReport:
        """Report what a run would do with the mask, and what looks like a mistake.

        Args:
            cover: mask downsampling of the run.

        Returns:
            The report, which prints as text.

        Raises:
            SettingError: `cover` is unknown.
        """
        return report(self._array, cover)

    def to_pil(self) -> Image.Image:
        """Return a grey image (mode L) in which white is repainted; soft values are rounded to 256 levels."""
        return Image.fromarray(np.rint(self._array * 255).astype(np.uint8))

    def over(self, image: input_image.Source) -> Image.Image:
        """Show the mask over an image in a bright colour.

        Args:
            image: a path, PIL image, array or tensor; the mask is scaled to it, with a warning, if its aspect ratio is
                the same.

        Returns:
            The RGB image.

        Raises:
            MaskError: the image has another aspect ratio.
            ImageError: the image cannot be read.
        """
        rgb = _pixels(image)
        mask = read_mask(self, rgb.shape[:2])
        return Image.composite(tinted(rgb, np.ones_like(mask, np.bool_)), Image.fromarray(rgb), Mask(mask).to_pil())

    def save(self, path: Path | str) -> None:
        """Write the mask as a grey PNG; a write that fails leaves the previous file.

        Args:
            path: the file, which ends in .png.

        Raises:
            ImageError: the file has another ending, or cannot be written.
        """
        if check_output_path(path).suffix.lower() != ".png":
            found, hint = "a mask can only be saved as PNG, which keeps every value", "name it mask.png"
            raise ImageError("IMAGE_OUTPUT_TYPE", f"output {str(path)!r}", found, expected=".png", hint=hint)
        write_image(self.to_pil(), path, "PNG")

    def _repr_png_(self) -> bytes:
        """Return the PNG that a notebook shows."""
        stream = io.BytesIO()
        self.to_pil().save(stream, format="PNG")
        return stream.getvalue()


def _pixels(image: input_image.Source) -> NDArray[np.uint8]:
    return input_image.read_image(image).opaque()


def _scribble(mask: Source | None, rgb: NDArray[np.uint8], argument: str) -> Hole | None:
    return None if mask is None else binarize(read_mask(mask, rgb.shape[:2], argument))
