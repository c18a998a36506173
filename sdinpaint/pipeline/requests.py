"""A request: all that a run is asked for, as a value that is read and checked without a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.checks import as_list, check_choice, check_tensor
from sdinpaint.errors import ImageError, Remark, SdInpaintError, SettingError, keeping_warnings, warn
from sdinpaint.families import Family
from sdinpaint.images.canvas import canvas_for
from sdinpaint.images.crops import check_context
from sdinpaint.images.input_image import InputImage, read_image
from sdinpaint.images.reading import in_memory, path_of
from sdinpaint.masks import Mask, read_mask
from sdinpaint.pipeline.prompts import checked_prompt, require_model_fits, split_prompts
from sdinpaint.pipeline.settings import (
    CanvasSettings,
    ControlSettings,
    MaskSettings,
    SamplingSettings,
    Settings,
    check_seed,
    common_length,
    names_of,
)
from sdinpaint.provenance.manifest import Manifest, as_given, as_manifests
from sdinpaint.sampling import Conditioning

__all__ = ["GivenMask", "Item", "Kind", "OnError", "Request", "image_name", "require_noise"]
__all__ += ["stored_names", "unbatched"]

Kind = Literal["inpaint", "vary", "outpaint"]
OnError = Literal["raise", "skip"]
Prompt = str | Conditioning | None

Row = tuple[Any, ...]
"""The arguments for one image, in the order of `_COLUMNS`."""
_COLUMNS = ("image", "mask", "prompt", "negative_prompt", "seed", "control_image", "noise")

VARY_STRENGTH = 0.6


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a request, read."""

    image: InputImage
    mask: Mask
    hole: NDArray[np.bool_]
    """The pixels (H, W) that are repainted at all."""
    prompt: str | Conditioning
    negative_prompt: str | Conditioning | None
    seed: int
    noise: Tensor | None
    control_image: InputImage | None
    """Conditioning image of a ControlNet, None for the image itself."""
    mask_path: str | None
    """The file that the mask was read from."""

    @property
    def row(self) -> Row:
        """The arguments of a request that make this item again."""
        mask, image = GivenMask(self.mask, self.mask_path), as_given(self.image)
        return image, mask, self.prompt, self.negative_prompt, self.seed, self.control_image, self.noise

    @property
    def inputs(self) -> dict[str, InputImage | Mask]:
        """The inputs of the item that a manifest records."""
        return {"image": self.image, "mask": self.mask}

    def __getstate__(self) -> dict[str, Any]:
        # torch hands a tensor to another process by a file that is gone when the first one ends
        noise = None if self.noise is None else self.noise.numpy()
        return {**vars(self), "noise": noise}

    def __setstate__(self, state: dict[str, Any]) -> None:
        noise = state["noise"]
        vars(self).update({**state, "noise": None if noise is None else torch.from_numpy(noise)})


@dataclass(frozen=True, eq=False)
class GivenMask:
    """A mask that an earlier request has read, and the file it was in."""

    mask: Mask
    path: str | None


class Request:
    """A run that is asked for: `pipe.run(Request(...))` is what `pipe.inpaint(...)` does.

    Images and masks are read, and every value is checked, without a model.

    Args:
        image: path, bytes of an image file, open file, PIL image, array (H, W, 3) of uint8, uint16 or floats in [0, 1],
            or float tensor in [-1, 1]; a list, an array (B, H, W, 3) or a tensor (B, 3, H, W) for a batch.
        mask: what is repainted (white, 1), of the same kinds; a list or a stack (B, H, W) for a batch; None for `kind`
            "vary" and "outpaint".
        prompt: text, or a `Conditioning` that was encoded before; a list for a batch.
        negative_prompt: text, a `Conditioning`, or None, which for SDXL is no text at all; a list for a batch.
        kind: "inpaint"; "vary" regenerates the whole image (img2img); "outpaint" extends it.
        seed: seed of the noise, drawn by default; a list for a batch.
        noise: initial noise of unit variance (B, 4, H, W) in place of drawn noise.
        control_image: conditioning image of a ControlNet, of the image's size, in place of the image itself.
        manifest: manifest of a run that is to be repeated: other weights or images are refused.
        on_error: "skip" leaves out the images of a batch that cannot be used, see `errors`; "raise" ends at the first.
        settings: settings of `Settings`, and for "outpaint" of `CanvasSettings`, by their names.

    Raises:
        ImageError: an image cannot be read or used.
        MaskError: a mask cannot be read or does not fit its image.
        SettingError: a value is of the wrong type or out of its bounds; it names the argument.
    """

    def __init__(
        self,
        image: Any,
        mask: Any = None,
        prompt: Prompt | Sequence[Prompt] = "",
        negative_prompt: Prompt | Sequence[Prompt] = "",
        *,
        kind: Kind = "inpaint",
        seed: Any = None,
        noise: Tensor | None = None,
        control_image: Any = None,
        manifest: Manifest | Sequence[Manifest] | None = None,
        on_error: OnError = "raise",
        **settings: Any,
    ) -> None:
        self.kind = check_choice("kind", kind, get_args(Kind))
        self.on_error = check_choice("on_error", on_error, get_args(OnError))
        self.manifest = None if manifest is None else as_manifests(manifest)
        extended = {name: settings.pop(name) for name in _canvas_names(kind) if name in settings}
        self.canvas = CanvasSettings(**extended) if kind == "outpaint" else None
        if kind == "vary":
            settings = {"strength": VARY_STRENGTH, **settings}
        _require_known(settings, kind)
        self.settings = Settings(**settings)
        self._require_mask(mask)
        self.errors: dict[int, SdInpaintError] = {}
        """Index of an image that `on_error="skip"` leaves out -> its error."""
        self._unusable: dict[int, Row] = {}
        """Index of an image that is left out -> what was given for it."""
        self.warnings: list[Remark] = []
        """Warnings that were issued while the images were read."""
        given = {
            "images": unbatched(image, "image"),
            "masks": unbatched(mask, "mask", is_mask=True),
            "prompts": split_prompts("prompt", prompt),
            "negative prompts": split_prompts("negative_prompt", negative_prompt),
            "seeds": as_list(seed),
            "control images": unbatched(control_image, "control_image"),
        }
        count = common_length(**given)
        columns = [values * (count // len(values)) for values in given.values()]
        rows = zip(*columns, _noises(noise, count), strict=True)
        reading = _Reading(self.settings, self.canvas, self.kind)
        self.items: list[Item | None] = [self._usable(index, count, reading, row) for index, row in enumerate(rows)]

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.given.items())
        return f"Request({len(self)} image{'s' * (len(self) > 1)}, kind={self.kind!r}{settings})"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def masked(self) -> bool:
        """Whether known pixels are shown to the model and kept."""
        return self.kind != "vary"

    def options(self) -> dict[str, Any]:
        """Return the keywords that make this request again, with what was read in place of files and arrays."""
        rows = [self._unusable[index] if item is None else item.row for index, item in enumerate(self.items)]
        columns = dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        noises = [noise for noise in columns["noise"] if noise is not None]
        return {
            **columns,
            "mask": columns["mask"] if self.kind == "inpaint" else None,
            "noise": torch.cat(noises) if noises else None,
            "kind": self.kind,
            "on_error": self.on_error,
            **self.settings.given,
            "strength": self.settings.strength,  # the default is another one for each kind
            **({} if self.canvas is None else vars(self.canvas)),
        }

    def replace(self, **changes: Any) -> Request:
        """Return this request with other arguments; what was not given follows them, such as a sampler's eta.

        Args:
            changes: arguments of `Request`.

        Returns:
            A new request, checked as a whole.

        Raises:
            SdInpaintError: as `Request` does.
        """
        return Request(**{**self.options(), **changes})

    def fitted(self, family: Family) -> Request:
        """Check what depends on the model, and return the request as that model understands it.

        Args:
            family: family of the model.

        Returns:
            A request whose negative prompts are None only where the family tells None from "".

        Raises:
            SettingError: the initial noise has another number of channels.
        """
        channels = family.vae.latent_channels
        for item in self.items:
            if item is not None and item.noise is not None and item.noise.shape[1] != channels:
                found, expected = f"{item.noise.shape[1]} channels", f"{channels}, as the model's latents have"
                raise SettingError("SETTING_NOISE", "noise", found, expected=expected)
            for given in () if item is None else (item.prompt, item.negative_prompt):
                if isinstance(given, Conditioning):
                    require_model_fits(given, family)
        other = object.__new__(Request)
        vars(other).update(vars(self))
        other.items, other.errors, other._unusable = list(self.items), dict(self.errors), dict(self._unusable)
        for index, item in enumerate(self.items):
            if item is not None and item.negative_prompt is None and not family.zeros_for_none:
                other.items[index] = replace(item, negative_prompt="")
        return other

    def _require_mask(self, mask: Any) -> None:
        if mask is not None and self.kind != "inpaint":
            hint = "call inpaint, or leave the mask out"
            raise SettingError("SETTING_MASK", "mask", f"given for {self.kind}, which takes none", hint=hint)
        unused = [name for name in names_of(MaskSettings, ControlSettings) if name in self.settings.given]
        if unused and self.kind == "vary":
            found, hint = "given for vary, which takes no mask and no ControlNet", "call inpaint, or leave it out"
            raise SettingError("SETTING_VARY", unused[0], found, hint=hint)

    def refuse(self, index: int, error: SdInpaintError) -> None:
        """Take an image as unusable: raise the error, or for `on_error="skip"` keep it and leave the image out.

        Args:
            index: index of the image.
            error: what is wrong with it.

        Raises:
            SdInpaintError: the error, whose subject names the image where there are several.
        """
        named = _named(error, index, len(self))
        if self.on_error == "raise":
            raise named.with_traceback(error.__traceback__) from error.__cause__
        self._unusable[index] = cast(Item, self.items[index]).row
        self.errors[index], self.items[index] = named, None

    def _usable(self, index: int, count: int, reading: _Reading, row: Row) -> Item | None:
        try:
            for unreadable in row:
                if isinstance(unreadable, ImageError):
                    raise unreadable
            with keeping_warnings() as kept:
                item = reading(*row)
            self.warnings += [replace(remark, index=index) for remark in kept]
            return item
        except SdInpaintError as error:
            named = _named(error, index, count)
            if self.on_error == "raise":
                raise named.with_traceback(error.__traceback__) from error.__cause__
            self.errors[index], self._unusable[index] = named, row
            return None


@dataclass(frozen=True)
class _Reading:
    """Reads one image of a request and what belongs to it."""

    settings: Settings
    canvas: CanvasSettings | None
    kind: str

    def __call__(
        self,
        image: Any,
        mask: Any,
        prompt: Any,
        negative_prompt: Any,
        seed: Any,
        control_image: Any,
        noise: Tensor | None,
    ) -> Item:
        text = checked_prompt("prompt", prompt)
        negative = None if negative_prompt is None else checked_prompt("negative_prompt", negative_prompt)
        seed = check_seed(seed)
        input_image = read_image(image)
        if self.canvas is not None:
            input_image, mask = canvas_for(input_image, **vars(self.canvas))
        elif self.kind == "vary":
            mask = np.ones(input_image.size, dtype=bool)
        given = mask if isinstance(mask, GivenMask) else GivenMask(mask, path_of(mask))
        read = Mask(read_mask(given.mask, input_image.size))
        hole = read.array >= self.settings.mask_threshold
        check_context(self.settings.crop, input_image.size)
        if noise is not None:
            _doubt_noise(noise)
            if self.settings.crop is None:
                require_noise(noise, input_image.size)
        control = None if control_image is None else _control_image(control_image, input_image.size)
        return Item(input_image, read, hole, text, negative, seed, noise, control, given.path)


def unbatched(value: Any, argument: str, *, is_mask: bool = False) -> list[Any]:
    """Return a list with open files read, and a batch in one array or tensor as a list of B.

    Args:
        value: what was given for images or masks: a batch is a tensor (B, C, H, W) or an array (B, H, W, C).
        argument: name of the argument.
        is_mask: whether a stack (B, H, W) and an array (B, 1, H, W) are batches too.

    Returns:
        One entry per image, or one for all; the error of an open file in its place, where it cannot be read.
    """
    if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
        return [value]  # it has no shape, or cannot be cut, and is refused where it is read
    if isinstance(value, np.ndarray | Tensor) and value.ndim != 1:
        channels_last = value.ndim > 2 and value.shape[-1] in (1, 2, 3, 4)
        stack = is_mask and value.ndim == 3 and not channels_last and len(value) > 1
        return list(value) if value.ndim == 4 or stack else [value]
    return [in_memory(one, argument) for one in as_list(value)]


def require_noise(noise: Tensor, size: tuple[int, int]) -> None:
    """Refuse initial noise that has not the size of the latents of an image.

    Args:
        noise: (1, C, H, W).
        size: height and width of the image that the model sees, in pixels.

    Raises:
        SettingError: it has another size.
    """
    given, needed = tuple(noise.shape[-2:]), tuple(-(-side // 8) for side in size)
    if given != needed:
        found = f"{given} latent rows and columns"
        raise SettingError("SETTING_NOISE", "noise", found, expected=f"{needed} for this image")


def stored_names(kind: Kind) -> tuple[str, ...]:
    """Return the names of a request's arguments that can be stored in an image file.

    Args:
        kind: kind of the request.

    Returns:
        The names of texts, numbers and words, and "manifest".
    """
    return "prompt", "negative_prompt", "seed", "manifest", *names_of(Settings), *_canvas_names(kind)


def _require_known(settings: Mapping[str, Any], kind: Kind) -> None:
    """Refuse names of no setting, as a call does that gets an unexpected keyword."""
    known = [*names_of(SamplingSettings, MaskSettings, ControlSettings), *_canvas_names(kind)]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; settings are {', '.join(known)}"
            raise TypeError(f"{kind}: unknown setting {name!r}{hint}")


def _canvas_names(kind: str) -> tuple[str, ...]:
    return names_of(CanvasSettings) if kind == "outpaint" else ()


def image_name(index: int, count: int) -> str:
    """Name an image of a batch at the beginning of a sentence.

    Args:
        index: its index.
        count: the number of images.

    Returns:
        "image 2 of 3: ", empty where there is one.
    """
    return f"image {index + 1} of {count}: " if count > 1 else ""


def _named(error: SdInpaintError, index: int, count: int) -> SdInpaintError:
    """Return the error with the image in its subject, where it is one of several."""
    subject = f"{image_name(index, count)}{error.subject}"
    return type(error)(error.code, subject, error.found, expected=error.expected, hint=error.hint)


def _control_image(control_image: Any, size: tuple[int, int]) -> InputImage:
    image = read_image(control_image, "control_image")
    if image.size != size:
        found, expected = (f"{height} rows, {width} columns" for height, width in (image.size, size))
        hint = "scale it to the size of the image"
        raise ImageError("IMAGE_CONTROL_SIZE", "control_image", found, expected=expected, hint=hint)
    return image


def _noises(noise: Tensor | None, count: int) -> list[Tensor | None]:
    """Return the given initial noise, one (1, C, H, W) per image."""
    if noise is None:
        return [None] * count
    check_tensor("noise", noise, f"({count}, C, rows / 8, columns / 8)", finite=True)
    noise = noise.detach().to("cpu", torch.float32)
    # a copy, which does not change with what was given, and of which none holds the others' memory
    return [one.clone() for one in noise.split(1)]


def _doubt_noise(noise: Tensor) -> None:
    """Warn of initial noise that is no noise, of which a model makes flat or burnt images."""
    mean, spread = float(noise.mean()), float(noise.std())
    if abs(mean) > 0.5 or not 0.5 <= spread <= 1.5:
        found = f"noise: its mean is {mean:.3g} and its standard deviation {spread:.3g}"
        warn(f"{found}; samplers start from 0 and 1, and other noise gives flat or burnt images")
