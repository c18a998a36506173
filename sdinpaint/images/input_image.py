"""Conversion of images: from what callers give to 8-bit RGB, and to and from the tensors of the models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.errors import ImageError, NumericError, SdInpaintError, warn
from sdinpaint.images.boxes import Box
from sdinpaint.images.colour_spaces import as_rgb
from sdinpaint.images.deep import Samples, read_colour, scaled, to_8_bits
from sdinpaint.images.embedded import Embedded, read_embedded
from sdinpaint.images.reading import (
    DEEP_MODES,
    MAX_PIXELS,
    File,
    check_pixels,
    decoding,
    is_file,
    opened,
    orientation,
    path_of,
    require_usable,
    upright,
)
from sdinpaint.on_demand import OnDemand, is_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = OnDemand("torch")

__all__ = ["InputImage", "join_samples", "mirrored", "pad_to_multiple", "paste", "read_image", "require_plain"]
__all__ += ["span", "to_tensor", "to_uint8"]

MIN_SIDE, SMALL_SIDE = 8, 64
ROUNDING = 1e-5
"""Values that leave their range by less are rounding errors of what computed them, and are clamped."""

TOPS = {"uint8": 255, "uint16": 65535, "float32": 1}
"""Type of samples -> white."""

Bytes = NDArray[np.uint8]
Crop = tuple[slice, slice]


@dataclass(frozen=True, kw_only=True, eq=False)
class InputImage:
    """An upright image: the 8-bit rgb (H, W, 3) that models see, alpha (H, W) or None, and its RGB colour profile."""

    rgb: Bytes
    alpha: Bytes | None = None
    icc_profile: bytes | None = None
    samples: Samples | None = None
    """The source's own pixels (H, W, 3), or (H, W, 4) with alpha, where they have more than 8 bits: uint16, or float32
    in [0, 1]. Those of an extended image are of its `old` box."""
    embedded: Embedded = field(default_factory=Embedded)
    """Data of the source's file beside the pixels, which an output keeps."""
    path: str | None = None
    """The file that the image was read from."""
    old: Box | None = None
    """The box of the original image in an extended one."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]

    def opaque(self) -> Bytes:
        """Return rgb (H, W, 3) with transparent pixels blended over white, as the models see it."""
        if self.alpha is None:
            return self.rgb
        alpha = self.alpha[..., None].astype(np.uint32)
        return ((self.rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


Source: TypeAlias = "File | Image.Image | NDArray[Any] | Tensor | InputImage"


def read_image(source: Source, argument: str = "image") -> InputImage:
    """Read an image as 8-bit RGB, upright, with its transparency and its own samples of more bits kept apart.

    Palette, grey, CMYK and other images are converted, by their colour profile where they have one; a warning says so
    where colours change. An image below 64 pixels a side gives a warning, because a model sees next to nothing in it.

    Args:
        source: a path, the bytes of an image file, an open binary file, a PIL image, an array (H, W), (H, W, 3) or
            (H, W, 4) of uint8, uint16 or floats in [0, 1], or a float tensor (3, H, W) or (1, 3, H, W) in [-1, 1].
        argument: name that errors give to the image.

    Returns:
        The image.

    Raises:
        ImageError: the image cannot be read, has another type or range, or is too large or too small.
    """
    if isinstance(source, InputImage):
        return source
    if is_file(source):
        with opened(source, argument) as (opened_image, subject):
            image = replace(_from_pil(opened_image, subject), path=path_of(source))
    elif isinstance(source, Image.Image):
        image = _from_pil(source, argument)
    elif isinstance(source, np.ndarray):
        image = _from_array(source, argument)
    elif is_tensor(source):
        image = InputImage(rgb=_from_tensor(source, argument))
    else:
        expected = "a path, bytes of an image file, an open file, a PIL image, an array (H, W, 3) or a float tensor"
        raise ImageError(
            "IMAGE_TYPE", argument, f"a {type(source).__name__}", expected=expected, hint="convert it first"
        )
    samples = image.rgb if image.samples is None else image.samples[..., :3]
    if image.rgb.max(initial=0) <= 1 and samples.any():
        highest = f"its highest sample is {samples.max():g} of {TOPS[samples.dtype.name]}"
        warn(f"{argument}: {highest}, so it is almost black; scale values that are meant for another range")
    height, width = image.size
    found = f"{height} rows, {width} columns"
    if min(height, width) < MIN_SIDE:
        raise ImageError("IMAGE_TOO_SMALL", argument, found, expected=f"at least {MIN_SIDE} a side", hint="scale it up")
    if min(height, width) < SMALL_SIDE:
        message = f"{argument}: {found} is very small for a model; scale the image up first"
        warn(message)
    return image


def to_tensor(rgb: Bytes) -> Tensor:
    """Convert an image to the range of the models.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        float32 (1, 3, H, W) in [-1, 1].
    """
    return (2.0 * (torch.from_numpy(rgb.copy()).float() / 255.0) - 1.0).permute(2, 0, 1)[None].contiguous()


def to_uint8(image: Tensor) -> Bytes:
    """Convert the models' images to 8 bits, rounded and clamped.

    Args:
        image: (B, 3, H, W) in [-1, 1].

    Returns:
        uint8 (B, H, W, 3).

    Raises:
        NumericError: `image` has NaN or infinity.
    """
    if not bool(image.isfinite().all()):
        count = int(image.numel() - image.isfinite().sum())
        hint = "run the VAE in float32 or bfloat16"
        found = f"{count} of {image.numel()} values are NaN or infinite"
        raise NumericError("NUMERIC_NOT_FINITE", "image", found, expected="finite pixels", hint=hint)
    scaled = (image.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    pixels: Bytes = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def pad_to_multiple(image: Tensor, multiple: int = 8) -> tuple[Tensor, Crop]:
    """Pad an image by reflection at the right and bottom.

    Args:
        image: (B, C, H, W).
        multiple: pixels that the padded sides are multiples of.

    Returns:
        The padded image, and the slices of its rows and columns that hold the original: `padded[..., *crop]`.
    """
    height, width = image.shape[-2:]
    rows, columns = height + -height % multiple, width + -width % multiple
    crop = slice(0, height), slice(0, width)
    across = torch.from_numpy(mirrored(width, columns)).to(image.device)
    down = torch.from_numpy(mirrored(height, rows)).to(image.device)
    return image.index_select(-2, down).index_select(-1, across), crop


def mirrored(size: int, length: int) -> NDArray[np.int64]:
    """Count 0 .. size - 1 and back again: indices of padding by reflection, which work from a single pixel on.

    Args:
        size: rows or columns of the image.
        length: rows or columns of the padded image.

    Returns:
        The row or column of the image that each one of the padded image shows (length,).
    """
    period = max(2 * size - 2, 1)
    i = np.arange(length, dtype=np.int64) % period
    return np.minimum(i, period - i) if size > 1 else i


def paste(original: InputImage, generated: Bytes, mask: NDArray[np.bool_]) -> Image.Image:
    """Put generated pixels into an image where a mask is True; all others stay bit for bit, with their alpha.

    Args:
        original: the image, (H, W) pixels.
        generated: uint8 (H, W, 3).
        mask: bool (H, W).

    Returns:
        The image, in which generated pixels are opaque; the original's colour profile is in its `info`.

    Raises:
        ImageError: the sizes differ.
    """
    height, width = original.size
    if generated.shape != (height, width, 3) or mask.shape != (height, width):
        found = f"generated {generated.shape} and mask {mask.shape} for an image of {(height, width)}"
        raise ImageError("IMAGE_BAD_SHAPE", "generated", found, expected="one size", hint="crop the padding off")
    pixels = np.where(mask[..., None], generated, original.rgb)
    if original.alpha is not None:
        alpha = np.where(mask, np.uint8(255), original.alpha)
        pixels = np.concatenate([pixels, alpha[..., None]], axis=2)
    image = Image.fromarray(pixels)
    if original.icc_profile is not None:
        image.info["icc_profile"] = original.icc_profile
    return image


def join_samples(original: InputImage, image: Image.Image, replaced: NDArray[np.bool_]) -> Samples:
    """Join generated pixels to the source's own samples, in the source's type.

    Args:
        original: the image that was given, perhaps extended.
        image: the 8-bit result of `paste`.
        replaced: bool (H, W), the pixels that were generated.

    Returns:
        A new array (H, W, 3), or (H, W, 4) with alpha: uint8, uint16, or float32 in [0, 1]; every pixel of the source
        that was not replaced is there bit for bit.
    """
    pixels = np.array(image)
    if original.samples is None:
        return pixels
    joined = scaled(pixels, original.samples.dtype)
    box = (slice(None), slice(None)) if original.old is None else original.old.slices
    known = ~replaced[box]
    joined[box][known] = original.samples[known]
    return joined


def span(low: float, high: float) -> str:
    """Write the range of some values with as many digits as tell them from the bounds.

    Args:
        low: lowest value.
        high: highest value.

    Returns:
        The words.
    """
    return f"from {low:.7g} to {high:.7g}"


def require_plain(tensor: Tensor, code: str, argument: str, error: type[SdInpaintError]) -> None:
    """Refuse a tensor whose values cannot be read.

    Args:
        tensor: the tensor.
        code: code of the error.
        argument: name that the error gives to the tensor.
        error: class of the error.

    Raises:
        SdInpaintError: the tensor is nested, sparse or quantized, or has no data.
    """
    kinds = {"nested": tensor.is_nested, "meta": tensor.is_meta, "quantized": tensor.is_quantized}
    kind = next((name for name, is_one in kinds.items() if is_one), str(tensor.layout))
    if kind != "torch.strided":
        found, hint = f"a tensor of the kind {kind}", "make it an ordinary one, e.g. by to_dense()"
        raise error(code, argument, found, expected="a dense tensor with data", hint=hint)


def _from_pil(image: Image.Image, subject: str) -> InputImage:
    require_usable(image, subject)
    with decoding(image, subject):
        colour = read_colour(image)
        embedded = read_embedded(image)
        image.load()
        turn = orientation(image)
        if turn is not None and embedded.damaged:
            warn(f"{subject}: a part of its Exif data cannot be read, and a result does not keep it")
        profile: bytes | None = image.info.get("icc_profile")
        rgb_profile = profile if profile is not None and profile[16:20] == b"RGB " else None
        samples = _deep_grey(image, subject) if image.mode in DEEP_MODES else colour
        if samples is not None:
            samples = _turned(samples, turn)
        image = upright(image, subject, turn)
        if samples is None:
            pixels = np.array(as_rgb(image, subject))
        else:
            if profile is not None and rgb_profile is None:
                warn(f"{subject}: its colour profile is not used, because it is not for RGB; brightness may be off")
            pixels, samples = _eight_bits(samples, image)
    alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
    return InputImage(rgb=pixels[..., :3], alpha=alpha, icc_profile=rgb_profile, samples=samples, embedded=embedded)


def _eight_bits(samples: Samples, image: Image.Image) -> tuple[Bytes, Samples]:
    """Return samples as the models see them, and the samples with an alpha channel where the image has one."""
    # one colour may stand for transparent pixels
    if samples.dtype == np.uint16 and samples.shape[2] == 3 and image.has_transparency_data:
        key = np.asarray(image.info["transparency"], samples.dtype)
        alpha = (samples != key).any(axis=2, keepdims=True) * np.uint16(65535)
        samples = np.concatenate([samples, alpha], axis=2)
    return to_8_bits(samples), samples


def _turned(samples: Samples, turn: int | None) -> Samples:
    """Turn samples (H, W, C) upright by Exif's orientation."""
    if turn in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        samples = samples[::-1]
    if turn in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)


def _deep_grey(image: Image.Image, subject: str) -> Samples:
    """Read 16-bit or 0..1 float grey as samples (H, W, 3)."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    slack = ROUNDING if image.mode == "F" else 0
    if not -slack <= low <= high <= top + slack:
        found = f"PIL mode {image.mode} with values {span(low, high)}"
        raise ImageError("IMAGE_BAD_VALUES", subject, found, expected=f"0 to {top:g}", hint="scale it, or give mode L")
    grey = values.clip(0, 1).astype(np.float32) if image.mode == "F" else values.astype(np.uint16)
    return np.repeat(grey[..., None], 3, axis=2)


def _from_array(array: NDArray[Any], argument: str) -> InputImage:
    array = np.asarray(array)  # a matrix would keep two axes
    is_float = np.issubdtype(array.dtype, np.floating)
    low, high = _range(array)
    if array.dtype.name not in ("uint8", "uint16") and not is_float:
        found = f"an array of {array.dtype}" + (f", values {span(low, high)}" if low <= high else "")
        hint = "array.astype('uint8') for values from 0 to 255"
        raise ImageError("IMAGE_TYPE", argument, found, expected="uint8, uint16, or floats in 0..1", hint=hint)
    if array.ndim == 2 or array.shape[2:] == (1,):  # grey
        array = np.broadcast_to(array.reshape(*array.shape[:2], 1), (*array.shape[:2], 3))
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        expected = "(height, width, 3), (height, width, 4) or (height, width)"
        raise ImageError("IMAGE_BAD_SHAPE", argument, f"an array {array.shape}", expected=expected, hint="make it RGB")
    check_pixels(argument, *array.shape[:2])
    if is_float:
        if array.size and not -ROUNDING <= low <= high <= 1 + ROUNDING:
            found, hint = f"a float array with values {span(low, high)}", "divide values from 0 to 255 by 255"
            raise ImageError("IMAGE_BAD_VALUES", argument, found, expected="0 to 1", hint=hint)
        array = array.clip(0, 1).astype(np.float32)
    samples = np.array(array, dtype=array.dtype.newbyteorder("="))
    pixels = to_8_bits(samples)
    alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
    return InputImage(rgb=pixels[..., :3], alpha=alpha, samples=None if samples.dtype == np.uint8 else samples)


def _range(array: NDArray[Any]) -> tuple[float, float]:
    """Return the lowest and the highest value; nothing lies between them where the values are no numbers."""
    small = array.size and array.size <= 8 * MAX_PIXELS
    if not small or not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        return math.inf, -math.inf
    return float(array.min()), float(array.max())


def _from_tensor(tensor: Tensor, argument: str) -> Bytes:
    require_plain(tensor, "IMAGE_TYPE", argument, ImageError)
    if not tensor.is_floating_point():
        expected, hint = "float values in [-1, 1]", "give uint8 pixels as an array (H, W, 3): tensor.numpy()"
        raise ImageError("IMAGE_TYPE", argument, f"a tensor of {tensor.dtype}", expected=expected, hint=hint)
    tensor = tensor.detach().float()
    image = tensor[None] if tensor.ndim == 3 else tensor
    if image.ndim != 4 or image.shape[:2] != (1, 3) or image.numel() == 0:
        expected = "(3, height, width), or (1, 3, height, width)"
        hint = "give a list for several images; latents are not images"
        raise ImageError("IMAGE_BAD_SHAPE", argument, f"a tensor {tuple(tensor.shape)}", expected=expected, hint=hint)
    check_pixels(argument, *image.shape[2:])
    if not bool(image.isfinite().all()):
        found = f"{int((~image.isfinite()).sum())} of {image.numel()} values are nan or inf"
        raise ImageError(
            "IMAGE_BAD_VALUES", argument, found, expected="finite values", hint="correct it where it is made"
        )
    low, high = float(image.min()), float(image.max())
    if not -1 - ROUNDING <= low <= high <= 1 + ROUNDING:
        found = f"a tensor with values {span(low, high)}"
        raise ImageError("IMAGE_BAD_VALUES", argument, found, expected="[-1, 1]", hint="2 * x - 1 for x in 0..1")
    if low >= 0 < high:
        message = f"{argument}: a tensor with no value below 0; if it is in 0..1, give 2 * x - 1"
        warn(message)
    pixels: Bytes = to_uint8(image)[0]
    return pixels
