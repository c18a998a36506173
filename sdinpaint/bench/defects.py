"""The part `defects` of the suite: known defects of inpainting pipelines, in each system on the same inputs."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.inpainters import INPAINTERS, Inpainter, Paint
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.bench.timing import rounds_of
from sdinpaint.errors import SdInpaintError
from sdinpaint.training.evaluate import Case as Scene
from sdinpaint.training.evaluate import held_out

__all__ = ["Defect", "defects", "measure_defects"]

Row = dict[str, Any]
Value = float | str | Sequence[float]

REFUSALS = (SdInpaintError, ValueError, TypeError, RuntimeError)
STEPS, EDITS = 10, 10
STRENGTHS = tuple(percent / 100 for percent in range(10, 101))
SMALL = 64
"""Pixels a side of the image with which steps are counted."""
QUICK_STEPS, QUICK_EDITS = 1, 2
QUICK_STRENGTHS = (0.1, 0.58)
"""Two strengths at which diffusers runs a wrong number of steps."""


@dataclass(frozen=True)
class Defect:
    """A defect, and how it is measured."""

    name: str
    unit: str
    measure: Callable[[Inpainter], Value]
    how: str


def measure_defects(case: Case, commands: Sequence[Command]) -> Iterator[Row]:
    """Measure every defect in sdinpaint, and in the baselines that have an inpainter, on the same inputs.

    Args:
        case: the included checkpoint and the baselines.
        commands: unused.

    Returns:
        Rows whose `found` is a number, a list of numbers, or a text; there is no ratio.
    """
    steps, edits, strengths = (QUICK_STEPS, QUICK_EDITS, QUICK_STRENGTHS) if case.quick else (STEPS, EDITS, STRENGTHS)
    systems = [name for name in (OURS, *case.peers) if name in INPAINTERS]
    inpainters = {name: INPAINTERS[name](steps) for name in systems}
    for defect in rounds_of(defects(edits, strengths)):
        for name, inpainter in inpainters.items():
            yield {
                "part": "defects",
                "what": defect.name,
                **case.fields,
                "steps": steps,
                "system": name,
                "unit": defect.unit,
                "found": attempt(defect, inpainter),
                "ratio": None,
                "how": defect.how,
            }


def defects(edits: int, strengths: Sequence[float]) -> list[Defect]:
    """List the defects.

    Args:
        edits: the number of edits one after the other.
        strengths: those at which steps are counted.

    Returns:
        All defects, in the order of the table.
    """
    return [
        *_mask_defects(),
        *_crop_defects(),
        *_edit_defects(edits),
        *_step_defects(strengths),
        *_batch_defects(),
        *_empty_defects(),
        *_input_defects(),
        *_number_defects(),
    ]


def attempt(defect: Defect, inpainter: Inpainter) -> Value:
    """Measure one defect.

    Args:
        defect: the defect.
        inpainter: the system.

    Returns:
        The value, or the error in its place.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return defect.measure(inpainter)
        except REFUSALS as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _scene() -> tuple[Image.Image, Image.Image]:
    """Return an image and a mask with a hard edge, 128 x 128."""
    case = _held_out()[0]
    return Image.fromarray(case.image), Image.fromarray(case.hole)


@cache
def _held_out() -> list[Scene]:
    """Draw three scenes, once."""
    return held_out(3)


def _box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Draw a mask that is white in the box (left, top, right, bottom) and black elsewhere."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def _pixels(image: Image.Image) -> NDArray[np.int64]:
    """Return an image as RGB integers (H, W, 3), 0 to 255."""
    return np.asarray(image.convert("RGB")).astype(np.int64)


def _differing(a: NDArray[np.int64], b: NDArray[np.int64]) -> list[float]:
    """Return the percentage of pixels (..., 3) that differ, and the largest difference in levels of 255."""
    difference = np.abs(a - b)
    return [100 * float(difference.any(axis=-1).mean()), int(difference.max())]


# masks


def _lost(height: int, width: int, inpainter: Inpainter) -> float:
    """Return the percentage of positions within a latent pixel at which a stroke is lost in the latent mask."""
    tops = range(24, 32) if height < 64 else [0]
    boxes = [(left, top, left + width, top + height) for top in tops for left in range(24, 32)]
    return 100 * float(np.mean([not inpainter.latent_mask(_box_mask(64, 64, box)).any() for box in boxes]))


def _mask_defects() -> list[Defect]:
    strokes = {"7-pixel line": (64, 7)} | {f"{side} x {side} square": (side, side) for side in (4, 6, 8)}
    unit, how = "% of positions where it is lost", "the latent mask, at all positions on the lattice of 8 pixels"
    return [Defect(f"{name} in the mask", unit, partial(_lost, *size), how) for name, size in strokes.items()]


# crops


def _inflated(inpainter: Inpainter) -> float:
    """Return the crop's area with a pixel of value 1 of 255 in a corner of the mask, over that without it."""
    mask = _box_mask(512, 512, (192, 192, 320, 320))
    clean = math.prod(inpainter.crop_box(mask).size)
    mask.putpixel((511, 0), 1)
    return math.prod(inpainter.crop_box(mask).size) / clean


def _crop_defects() -> list[Defect]:
    how = "value 1 of 255 in a corner; 512 x 512 with a square of 128"
    return [Defect("crop with a faint pixel in the mask", "area over that without", _inflated, how)]


# edits


def _known_changed(way: Callable[[Inpainter], Paint], edits: int, blur: int, inpainter: Inpainter) -> list[float]:
    """Return `_differing` of the pixels below half in the mask after several edits, saved as PNG in between."""
    image, _ = _scene()
    known = np.asarray(_blurred_mask(blur)) < 128
    return _differing(_pixels(image)[known], _pixels(_edited(way(inpainter), edits, blur))[known])


def _blurred_mask(blur: int) -> Image.Image:
    _, mask = _scene()
    return mask.convert("L").filter(ImageFilter.GaussianBlur(blur))


@lru_cache(maxsize=32)  # rows of more edits begin with those of fewer
def _edited(paint: Paint, edits: int, blur: int) -> Image.Image:
    """Inpaint the scene `edits` times one after the other, with a seed each."""
    if edits == 0:
        return _scene()[0]
    file = io.BytesIO()
    paint(_edited(paint, edits - 1, blur), _blurred_mask(blur), seeds=[edits - 1])[0].save(file, "PNG")
    return Image.open(file)


def _edit_defects(edits: int) -> list[Defect]:
    whole, pasted, cropped = map(attrgetter, ("paint", "paint_pasted", "paint_cropped"))
    ways = {
        "by default": (whole, 0, "hard mask"),
        "pasted back": (pasted, 0, "hard mask; diffusers: apply_overlay"),
        "pasted back, soft mask": (pasted, 4, "mask blurred by 4, known below half; diffusers: apply_overlay"),
        "masked region alone": (cropped, 0, "hard mask; diffusers: padding_mask_crop"),
    }
    unit = "% of known pixels changed; most levels"
    return [
        Defect(f"{name}, edits: {count}", unit, partial(_known_changed, way, count, blur), f"{how}; PNG between edits")
        for name, (way, blur, how) in ways.items()
        for count in (1, edits)
    ]


# steps


def _executed(inpainter: Inpainter, steps: int, strength: float) -> int:
    """Count the steps that call back."""
    called: list[Tensor] = []
    small = [one.resize((SMALL, SMALL)) for one in _scene()]
    try:
        inpainter.paint(*small, steps=steps, strength=strength, on_step=called.append)
    except REFUSALS:
        return 0
    return len(called)


def _miscounted(steps: int, strengths: Sequence[float], inpainter: Inpainter) -> list[float]:
    """Return the strengths at which the number of steps is not max(1, floor(steps * strength))."""
    expected = {strength: max(1, math.floor(steps * strength + 1e-9)) for strength in strengths}
    with inpainter.idle():
        return [strength for strength, count in expected.items() if _executed(inpainter, steps, strength) != count]


def _step_defects(strengths: Sequence[float]) -> list[Defect]:
    unit = f"strengths, of {len(strengths)}, with a wrong count"
    how = "callbacks against floor(steps * strength) and at least 1; the UNet returns at once"
    return [Defect(f"steps run of {steps}", unit, partial(_miscounted, steps, strengths), how) for steps in (50, 20, 7)]


# batches


def _batch_against_single(count: int, inpainter: Inpainter) -> list[float]:
    """Return the largest difference of latents between a batch of 3 and single runs, and `_differing` of the images.

    The batch has `count` images: 3, or one for all.
    """
    together, latents = _painted(inpainter.paint, tuple(range(count)), (0, 1, 2), inpainter.steps)
    singles = [_painted(inpainter.paint, (seed % count,), (seed,), inpainter.steps) for seed in range(3)]
    far = float((latents - torch.cat([end for _, end in singles])).abs().max())
    apart = [painted[0] for painted, _ in singles]
    return [far, *_differing(np.stack(list(map(_pixels, together))), np.stack(list(map(_pixels, apart))))]


@lru_cache(maxsize=32)  # both batches share a single run
def _painted(
    paint: Paint, scenes: tuple[int, ...], seeds: tuple[int, ...], steps: int
) -> tuple[list[Image.Image], Tensor]:
    """Inpaint scenes with a seed each, and return the images and the last latents."""
    cases, seen = [_held_out()[scene] for scene in scenes], list[Tensor]()
    images, masks = [Image.fromarray(case.image) for case in cases], [Image.fromarray(case.hole) for case in cases]
    return paint(images, masks, seeds=seeds, steps=steps, on_step=seen.append), seen[-1]


def _batch_defects() -> list[Defect]:
    unit, how = "most in latents; % of pixels; most levels", "3 at once, a seed or generator each, against 3 runs"
    return [
        Defect(f"batch of {name} against single runs", unit, partial(_batch_against_single, count), how)
        for count, name in {1: "one picture", 3: "three pictures"}.items()
    ]


# empty masks


def _painted_empty(way: Callable[[Inpainter], Paint], inpainter: Inpainter) -> list[float]:
    """Return the number of steps that run, and `_differing` of the image."""
    called: list[Tensor] = []
    image, _ = _scene()
    painted = way(inpainter)(image, Image.new("L", image.size), on_step=called.append)[0]
    return [len(called), *_differing(_pixels(image), _pixels(painted))]


def _said_of_empty(inpainter: Inpainter) -> str:
    image, _ = _scene()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inpainter.paint(image, Image.new("L", image.size))
    return "a warning" if any("mask is empty" in str(one.message) for one in caught) else "nothing"


def _box_of_empty(inpainter: Inpainter) -> list[float]:
    return list(inpainter.crop_box(Image.new("L", (512, 512))))


def _empty_defects() -> list[Defect]:
    whole, cropped = attrgetter("paint"), attrgetter("paint_cropped")
    changed = "steps run; % of pixels changed; most levels"
    return [
        Defect("empty mask", changed, partial(_painted_empty, whole), "by default"),
        Defect("empty mask: what is said", "", _said_of_empty, "Python warnings"),
        Defect("empty mask, masked region alone", changed, partial(_painted_empty, cropped), "with a crop"),
        Defect("empty mask: the crop", "left; top; right; bottom", _box_of_empty, "512 x 512"),
    ]


# inputs


def _repainted(mask: Image.Image, inpainter: Inpainter) -> list[float]:
    """Return the percentage of intended latent pixels that are repainted, and of the others."""
    meant = np.zeros((16, 16), dtype=bool)
    meant[4:12, 4:12] = True
    repainted_cells = inpainter.latent_mask(mask)
    return [100 * float(repainted_cells[meant].mean()), 100 * float(repainted_cells[~meant].mean())]


def _red_brush() -> Image.Image:
    image = Image.new("RGB", (128, 128))
    image.paste((255, 0, 0), (32, 32, 96, 96))
    return image


def _alpha_mask(colour: str) -> Image.Image:
    image = Image.new("RGB", (128, 128), colour)
    image.putalpha(_box_mask(128, 128, (32, 32, 96, 96)))
    return image


def _output_size(width: int, height: int, inpainter: Inpainter) -> str:
    image, _ = _scene()
    painted = inpainter.paint(image.resize((width, height)), _box_mask(width, height, (32, 32, 64, 64)))[0]
    return f"{painted.width} x {painted.height}"


def _output_of_sideways(inpainter: Inpainter) -> str:
    """Return size and orientation of the result for an image of 96 x 128 that is stored rotated, with an Exif tag."""
    upright = _scene()[0].crop((0, 0, 96, 128))
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    sideways.save(file, "PNG", exif=exif)
    painted = inpainter.paint(Image.open(file), _box_mask(96, 128, (0, 0, 8, 8)))[0]
    far = [np.abs(_pixels(painted) - _pixels(one.resize(painted.size))).mean() for one in (upright, sideways)]
    return f"{painted.width} x {painted.height}, {'upright' if far[0] < far[1] else 'sideways'}"


def _input_defects() -> list[Defect]:
    unit, size = "% repainted of what was meant; of the rest", "width x height"
    return [
        Defect("mask by a red brush on black", unit, partial(_repainted, _red_brush()), "RGB, (255, 0, 0)"),
        Defect("mask in alpha, black paint", unit, partial(_repainted, _alpha_mask("black")), "RGBA, opaque is meant"),
        Defect("mask in alpha, white paint", unit, partial(_repainted, _alpha_mask("white")), "RGBA, opaque is meant"),
        Defect("picture of 128 x 96", size, partial(_output_size, 128, 96), "the output, by default"),
        Defect("picture of 100 x 83", size, partial(_output_size, 100, 83), "the output, by default"),
        Defect("picture of 96 x 128 stored sideways", size, _output_of_sideways, "Exif orientation 6; PIL.Image.open"),
    ]


# numbers


def _outcome(image: Image.Image) -> str:
    return "a picture" if _pixels(image).any() else "a black picture"


def _painted_nan(inpainter: Inpainter) -> str:
    image, mask = _scene()
    values = inpainter.tensor(image)
    values[..., 0, 0] = math.nan
    return _outcome(inpainter.paint(values, torch.from_numpy(np.array(mask)).float()[None, None])[0])


def _painted_with_infinite_guidance(inpainter: Inpainter) -> str:
    return _outcome(inpainter.paint(*_scene(), guidance_scale=math.inf)[0])


def _number_defects() -> list[Defect]:
    return [
        Defect("NaN in a corner of the picture", "", _painted_nan, "a float tensor"),
        Defect("guidance_scale of infinity", "", _painted_with_infinite_guidance, "by default"),
    ]
