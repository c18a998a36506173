"""Conversion of images: from what callers give to 8-bit RGB, and to and from the tensors of the models."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from sdinpaint.errors import ImageError, NumericError, warn
from sdinpaint.images.boxes import Box
from sdinpaint.images.files import DEEP_MODES, MAX_PIXELS, decode, open_image
from sdinpaint.on_demand import OnDemand, is_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = OnDemand("torch")

__all__ = ["InputImage", "pad_to_multiple", "paste", "read_image", "to_tensor", "to_uint8"]

MIN_SIDE, SMALL_SIDE = 8, 64

Bytes = NDArray[np.uint8]
Crop = tuple[slice, slice]


@dataclass(frozen=True, kw_only=True, eq=False)
class InputImage:
    """An upright 8-bit image: rgb (H, W, 3), alpha (H, W) or None, and its RGB colour profile."""

    rgb: Bytes
    alpha: Bytes | None = None
    icc_profile: bytes | None = None
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


Source: TypeAlias = "Path | str | Image.Image | Bytes | Tensor | InputImage"


def read_image(source: Source, argument: str = "image") -> InputImage:
    """Read an image as 8-bit RGB, upright, with its transparency kept apart.

    Palette, grey, 16-bit and CMYK images are converted. An image below 64 pixels a side gives a warning, because a
    model sees next to nothing in it.

    Args:
        source: a path, PIL image, uint8 array (H, W, 3), or float tensor (3, H, W) or (1, 3, H, W) in [-1, 1].
        argument: name that errors give to the image.

    Returns:
        The image.

    Raises:
        ImageError: the image cannot be read, has another type or range, or is too large or too small.
    """
    if isinstance(source, InputImage):
        return source
    if isinstance(source, str | Path):
        image = replace(_from_pil(open_image(source, argument), f"{argument} {str(source)!r}"), path=str(source))
    elif isinstance(source, Image.Image):
        image = _from_pil(decode(source, argument), argument)
    elif isinstance(source, np.ndarray):
        image = InputImage(rgb=_from_array(source, argument))
    elif is_tensor(source):
        image = InputImage(rgb=_from_tensor(source, argument))
    else:
        expected = "a path, a PIL image, a uint8 array (H, W, 3) or a float tensor (3, H, W) in [-1, 1]"
        raise ImageError(
            "IMAGE_TYPE", argument, f"a {type(source).__name__}", expected=expected, hint="convert it first"
        )
    height, width = image.size
    found = f"{height} rows, {width} columns"
    if height * width > MAX_PIXELS:
        hint = "scale it down, or crop it"
        raise ImageError("IMAGE_TOO_LARGE", argument, found, expected=f"at most {MAX_PIXELS} pixels", hint=hint)
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


def _from_pil(image: Image.Image, subject: str) -> InputImage:
    profile: bytes | None = image.info.get("icc_profile")
    if image.mode in DEEP_MODES:
        grey = _deep_grey(image, subject)
        return InputImage(rgb=np.repeat(grey[..., None], 3, axis=2))
    if profile is not None and profile[16:20] != b"RGB ":
        image, profile = _to_srgb(image, profile, subject), None
    if image.has_transparency_data:
        pixels = np.array(image.convert("RGBA"))
        return InputImage(rgb=pixels[..., :3], alpha=pixels[..., 3], icc_profile=profile)
    return InputImage(rgb=np.array(image.convert("RGB")), icc_profile=profile)


def _deep_grey(image: Image.Image, subject: str) -> Bytes:
    """Convert 16-bit or 0..1 float grey to uint8 (H, W)."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= top:
        found = f"PIL mode {image.mode} with values from {low:g} to {high:g}"
        raise ImageError("IMAGE_BAD_VALUES", subject, found, expected=f"0 to {top:g}", hint="scale it, or give mode L")
    if image.mode == "I" and 0 < high <= 255:
        message = f"{subject}: PIL mode I is read as 16-bit, so values up to {high:g} are almost black; give mode L"
        warn(message)
    return np.rint(values * (255.0 / top)).astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes, subject: str) -> Image.Image:
    """Convert CMYK or grey to sRGB by its colour profile; leave it where the profile does not fit the image."""
    space = {b"CMYK": "CMYK", b"GRAY": "L"}.get(profile[16:20])
    if space != image.mode:
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        message = f"{subject}: its colour profile cannot be used ({error}); colours may be off"
        warn(message)
        return image
    return image if converted is None else converted


def _from_array(array: NDArray[np.generic], argument: str) -> Bytes:
    if array.dtype != np.uint8:
        found = f"an array of {array.dtype}"
        if array.size and np.issubdtype(array.dtype, np.number):
            found += f", values from {array.min():g} to {array.max():g}"
        hint = "(255 * array).round().astype('uint8') for values in 0..1"
        raise ImageError("IMAGE_TYPE", argument, found, expected="uint8, 0 to 255", hint=hint)
    if array.ndim != 3 or array.shape[2] != 3:
        expected = "(height, width, 3)"
        raise ImageError("IMAGE_BAD_SHAPE", argument, f"an array {array.shape}", expected=expected, hint="make it RGB")
    return np.array(array, dtype=np.uint8)


def _from_tensor(tensor: Tensor, argument: str) -> Bytes:
    if not tensor.is_floating_point():
        expected, hint = "float values in [-1, 1]", "give uint8 pixels as an array (H, W, 3): tensor.numpy()"
        raise ImageError("IMAGE_TYPE", argument, f"a tensor of {tensor.dtype}", expected=expected, hint=hint)
    image = tensor[None] if tensor.ndim == 3 else tensor
    if image.ndim != 4 or image.shape[:2] != (1, 3) or image.numel() == 0:
        expected = "(3, height, width), or (1, 3, height, width)"
        hint = "give a list for several images; latents are not images"
        raise ImageError("IMAGE_BAD_SHAPE", argument, f"a tensor {tuple(tensor.shape)}", expected=expected, hint=hint)
    if not bool(image.isfinite().all()):
        found = f"{int((~image.isfinite()).sum())} of {image.numel()} values are nan or inf"
        raise ImageError(
            "IMAGE_BAD_VALUES", argument, found, expected="finite values", hint="correct it where it is made"
        )
    low, high = float(image.min()), float(image.max())
    if not -1 <= low <= high <= 1:
        found = f"a tensor with values from {low:g} to {high:g}"
        raise ImageError("IMAGE_BAD_VALUES", argument, found, expected="[-1, 1]", hint="2 * x - 1 for x in 0..1")
    if low >= 0 < high:
        message = f"{argument}: a tensor with no value below 0; if it is in 0..1, give 2 * x - 1"
        warn(message)
    pixels: Bytes = to_uint8(image)[0]
    return pixels
