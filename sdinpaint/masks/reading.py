"""Reading of masks, and their forms in a model: mask downsampling and the masked image.

A mask stays soft (0..1) as long as it can serve for blending; its hole, what is repainted, is where it is at least 0.5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.errors import MaskError, warn
from sdinpaint.images.input_image import ROUNDING, mirrored, require_plain, span
from sdinpaint.images.reading import DEEP_MODES, File, check_pixels, decode, is_file, open_image
from sdinpaint.on_demand import OnDemand, is_tensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import functional as F
else:
    F = OnDemand("torch.nn.functional")

__all__ = ["CELL", "Cover", "Hole", "Soft", "Source", "binarize", "is_empty", "looks_inverted", "masked_image"]
__all__ += ["latent_cells", "read_mask", "read_own_size", "to_latent"]


@runtime_checkable
class HasArray(Protocol):
    """Anything that numpy takes as an array, such as `Mask`."""

    def __array__(self) -> NDArray[Any]: ...


Hole = NDArray[np.bool_]
Soft = NDArray[np.float32]
Source: TypeAlias = "File | Image.Image | HasArray | Tensor"
Cover = Literal["max", "nearest"]
"""Mask downsampling: each latent cell takes its first pixel ("nearest") or its highest ("max")."""

NOISE = 4 / 255
"""Values below this are noise of a JPEG or the far edge of a soft brush."""
COLOUR = 24
"""Differences of red, green and blue above this are a colour; the noise of a JPEG is well below."""
WHITE = {"uint8": 255.0, "uint16": 65535.0, "int32": 65535.0}
"""Type of whole numbers -> value of white; int32 is PIL's mode I, in which 16-bit files come."""
MISTAKEN = {255.0: 1.0, 65535.0: 255.0}
"""Value of white -> highest value of a mask that is probably in a smaller range, and would repaint nothing."""
INVERTED_SHARE = 0.6
"""A hole that covers more of the image, and touches its four borders, was probably meant to be kept."""
ASPECT_TOLERANCE = 0.01
CELL = 8


def read_mask(source: Source, size: tuple[int, int], argument: str = "mask") -> Soft:
    """Read a mask for an image of a given size.

    Args:
        source: a mask, as in `read_own_size`.
        size: (height, width) of the image. A mask of another size is scaled with a warning if its aspect ratio is the
            same within 1 %.
        argument: name that errors give to the mask.

    Returns:
        The mask as float32 (H, W) in [0, 1], with values below 4 / 255 set to 0.

    Raises:
        MaskError: the mask is ambiguous, coloured, or of another shape or type.
        ImageError: the file cannot be read as an image.
    """
    return _without_noise(_fitted(read_own_size(source, argument), size, argument))


def read_own_size(source: Source, argument: str) -> Soft:
    """Read a mask in its own size; a mask in an alpha channel is read from there, with a warning.

    Args:
        source: a path, the bytes of an image file, an open binary file, a PIL image, or an array, tensor or Mask: bool,
            uint8 0..255, uint16 0..65535 or float 0..1.
        argument: name that errors give to the mask.

    Returns:
        The mask as float32 (H, W) in [0, 1].

    Raises:
        MaskError: the mask is ambiguous, coloured, or of another shape or type.
        ImageError: the file cannot be read as an image.
    """
    if is_file(source):
        return _without_noise(_from_pil(open_image(source, argument), argument))
    if isinstance(source, Image.Image):
        return _without_noise(_from_pil(decode(source, argument), argument))
    if is_tensor(source):
        require_plain(source, "MASK_TYPE", argument, MaskError)
        values = source.detach().cpu().resolve_neg()
        return _from_array((values.float() if values.is_floating_point() else values).numpy(), argument)
    if isinstance(source, HasArray):
        return _from_array(_as_array(source, argument), argument)
    expected = "a path, bytes of an image file, an open file, a PIL image, an array, a tensor or a Mask"
    raise MaskError("MASK_TYPE", argument, f"a {type(source).__name__}", expected=expected, hint="convert it first")


def _as_array(source: HasArray, argument: str) -> NDArray[Any]:
    try:
        return np.asarray(source)
    except Exception as error:  # whatever a class of the caller's does there
        found = f"a {type(source).__name__} that gives no array: {type(error).__name__}: {error}"
        raise MaskError("MASK_TYPE", argument, found, expected="an array", hint="convert it first") from error


def binarize(mask: Soft) -> Hole:
    """Compute the hole of a mask: 127 of 255 keeps, 128 repaints.

    Args:
        mask: (H, W) in [0, 1].

    Returns:
        A bool array (H, W), True where the mask is at least 0.5.

    Source: runwayml/stable-diffusion scripts/inpaint_st.py make_batch_sd.
    """
    return mask >= 0.5


def is_empty(mask: Soft) -> bool:
    """Tell whether a mask repaints nothing.

    Args:
        mask: (H, W) in [0, 1].

    Returns:
        True if no value is at least 0.5.
    """
    return not bool(binarize(mask).any())


def looks_inverted(hole: NDArray[np.bool_]) -> bool:
    """Tell whether a hole looks as if black and white were exchanged.

    Args:
        hole: bool (H, W).

    Returns:
        True if the hole covers more than 60 % of the image, but not all of it, and touches its four borders.
    """
    edges = (hole[0], hole[-1], hole[:, 0], hole[:, -1])
    return INVERTED_SHARE < float(hole.mean()) < 1 and all(bool(edge.any()) for edge in edges)


def to_latent(mask: Tensor, cover: Cover = "nearest", cell: int = CELL) -> Tensor:
    """Downsample a mask to the latent grid, which has one cell per 8 x 8 pixels.

    The models were trained with "nearest", which may miss a line thinner than 8 pixels.

    Args:
        mask: (B, 1, 8H, 8W).
        cover: the value of a cell: "nearest" takes its first pixel, "max" its highest.
        cell: height and width of a cell in pixels.

    Returns:
        The latent mask (B, 1, H, W).

    Source: diffusers pipeline_stable_diffusion_inpaint.py prepare_mask_latents.
    """
    if cover == "max":
        return F.max_pool2d(mask, cell)
    return F.interpolate(mask, size=(mask.shape[-2] // cell, mask.shape[-1] // cell))


def latent_cells(mask: NDArray[Any], cover: Cover = "nearest", cell: int = CELL) -> NDArray[Any]:
    """Downsample a mask as `to_latent` does, padded by reflection to whole cells.

    Args:
        mask: (H, W).
        cover: the value of a cell: "nearest" takes its first pixel, "max" its highest.
        cell: height and width of a cell in pixels.

    Returns:
        The cells, (ceil(H / cell), ceil(W / cell)).
    """
    rows, columns = (-(-side // cell) * cell for side in mask.shape)
    padded = mask[np.ix_(mirrored(mask.shape[0], rows), mirrored(mask.shape[1], columns))]
    blocks = padded.reshape(rows // cell, cell, columns // cell, cell)
    cells: NDArray[Any] = blocks.max(axis=(1, 3)) if cover == "max" else blocks[:, 0, :, 0]
    return cells


def masked_image(image: Tensor, mask: Tensor) -> Tensor:
    """Set the hole of an image to 0, which is mid grey.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W) in [0, 1].

    Returns:
        The image (B, 3, H, W) with 0 where the mask is at least 0.5.
    """
    return image * (mask < 0.5).to(image.dtype)


def _from_pil(image: Image.Image, argument: str) -> Soft:
    if image.mode in DEEP_MODES:
        return _from_array(np.asarray(image), argument)
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        alpha = pixels[..., 3]
        if alpha.min() < alpha.max():
            _require_one_colour(pixels[alpha > 0][:, :3], argument)
            message = f"{argument}: the mask is read from the alpha channel: opaque is repainted, transparent is kept"
            warn(message)
            return _scaled(alpha, argument)
    rgb = image.convert("RGB")
    _require_grey(np.asarray(rgb), argument)
    return _scaled(np.asarray(rgb.convert("L")), argument)


def _from_array(array: NDArray[np.generic], argument: str) -> Soft:
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (3, 4) and array.size:
        check_pixels(argument, *array.shape[:2])
        return _from_pil(Image.fromarray(array), argument)
    values = array if array.ndim == 2 else array.squeeze()
    if values.ndim == 2:
        check_pixels(argument, *values.shape)
    if values.ndim != 2 or not values.size:
        expected = "(height, width)"
        raise MaskError(
            "MASK_BAD_SHAPE", argument, f"shape {array.shape}", expected=expected, hint="one mask per image"
        )
    return _scaled(values, argument)


def _scaled(values: NDArray[np.generic], argument: str) -> Soft:
    """Convert values (H, W) to float32 in [0, 1]; their type decides which value is white."""
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    white = 1.0 if np.issubdtype(values.dtype, np.floating) else WHITE.get(values.dtype.name)
    if white is None:
        expected = "bool, uint8 or float"
        raise MaskError("MASK_TYPE", argument, f"values of {values.dtype}", expected=expected, hint="mask.astype(bool)")
    low, high = float(values.min()), float(values.max())
    expected = f"0 (keep) to {white:g} (repaint)"
    if math.isnan(low):
        found, hint = f"{np.isnan(values).sum()} of {values.size} values are nan", "np.nan_to_num(mask) keeps them"
        raise MaskError("MASK_BAD_VALUES", argument, found, expected=expected, hint=hint)
    slack = ROUNDING if white == 1 else 0
    if not -slack <= low <= high <= white + slack or 0 < high <= MISTAKEN.get(white, 0):
        found = f"{values.dtype} values {span(low, high)}"
        raise MaskError("MASK_BAD_VALUES", argument, found, expected=expected, hint="mask > 0 makes it bool")
    soft = values.astype(np.float32)
    soft /= np.float32(white)
    return np.clip(soft, 0, 1, out=soft) if slack else soft


def _without_noise(mask: Soft) -> Soft:
    return np.where(mask < NOISE, np.float32(0), mask)


def _require_one_colour(visible: NDArray[np.uint8], argument: str) -> None:
    if (visible.max(axis=0) - visible.min(axis=0)).max() > COLOUR:
        found = "both its colours and its transparency vary"
        hint = "give one channel: mask.getchannel('A'), or ImageOps.invert of it where transparent is to be repainted"
        raise MaskError("MASK_AMBIGUOUS", argument, found, expected="white = repaint, or one alpha", hint=hint)


def _require_grey(rgb: NDArray[np.uint8], argument: str) -> None:
    coloured = rgb.max(axis=2) - rgb.min(axis=2) > COLOUR
    if not coloured.any():
        return
    brush = rgb[coloured].mean(axis=0)
    others = rgb[~coloured].mean(axis=0) if not coloured.all() else np.zeros(3)
    channel = int(np.abs(brush - others).argmax())
    hint = f"the brush stands out in one channel: mask.convert('RGB').getchannel('{'RGB'[channel]}')"
    if brush[channel] < others[channel]:
        hint += ", inverted with ImageOps.invert"
    found = f"{coloured.mean():.1%} of it is coloured, on average {tuple(int(level) for level in brush)}"
    raise MaskError("MASK_COLOURED", argument, found, expected="grey: white = repaint, black = keep", hint=hint)


def _fitted(mask: Soft, size: tuple[int, int], argument: str) -> Soft:
    if mask.shape == size:
        return mask
    (height, width), (rows, columns) = size, mask.shape
    found, expected = f"{rows} rows, {columns} columns", f"{height} rows, {width} columns, as the image has"
    if abs(columns * height - rows * width) > ASPECT_TOLERANCE * rows * width:
        hint = "draw the mask over the image itself, at its size"
        raise MaskError("MASK_SIZE", argument, found, expected=expected, hint=hint)
    warn(f"{argument}: {found}; scaled to {expected}")
    return np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
