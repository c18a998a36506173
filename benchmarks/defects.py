"""Known defects of inpainting pipelines, measured in diffusers and in sdinpaint on the same inputs in one run.

    python benchmarks/defects.py [masks] [crops] [edits] [steps] [batches] [empty] [inputs] [numbers] [--quick]

Both run the included demo checkpoint, 128 pixels a side, in float32 on the CPU. Rows are appended to
results/defects.jsonl, and the table goes to the output.
"""

from __future__ import annotations

import argparse
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from defects_sides import Diffusers, Paint, SdInpaint, Side
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter
from recording import RESULTS, append
from torch import Tensor

from sdinpaint.errors import SdInpaintError
from sdinpaint.training.evaluate import held_out

Value = float | str | Sequence[float]
REFUSALS = (SdInpaintError, ValueError, TypeError, RuntimeError)
ALL_STRENGTHS = [percent / 100 for percent in range(10, 101)]
FEW_STRENGTHS = [0.1, 0.58]


@dataclass(frozen=True)
class Defect:
    """One row: what is measured, in which unit, by which function, and how."""

    name: str
    unit: str
    measure: Callable[[Side], Value]
    how: str


def scene() -> tuple[Image.Image, Image.Image]:
    """A picture and a mask with a hard edge, 128 x 128."""
    case = held_out(1)[0]
    return Image.fromarray(case.image), Image.fromarray(case.hole)


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """White in the box (left, top, right, bottom), black elsewhere."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def pixels(image: Image.Image) -> NDArray[np.int64]:
    """RGB (H, W, 3), 0 to 255."""
    return np.asarray(image.convert("RGB")).astype(np.int64)


def differing(a: NDArray[np.int64], b: NDArray[np.int64]) -> list[float]:
    """Of pixels (..., 3): percent of those that differ, and the largest difference in levels of 255."""
    difference = np.abs(a - b)
    return [100 * float(difference.any(axis=-1).mean()), int(difference.max())]


# masks


def lost(height: int, width: int, side: Side) -> float:
    """Percent of the positions within a latent cell at which a stroke leaves no trace in the latent mask."""
    tops = range(24, 32) if height < 64 else [0]
    boxes = [(left, top, left + width, top + height) for top in tops for left in range(24, 32)]
    return 100 * float(np.mean([not side.latent_mask(box_mask(64, 64, box)).any() for box in boxes]))


def mask_defects() -> list[Defect]:
    strokes = {"7-pixel line": (64, 7)} | {f"{side} x {side} square": (side, side) for side in (4, 6, 8)}
    unit, how = "% of positions where it is lost", "the latent mask, at all positions on the lattice of 8 pixels"
    return [Defect(f"{name} in the mask", unit, partial(lost, *size), how) for name, size in strokes.items()]


# crops


def inflated(side: Side) -> float:
    """How much larger the crop's area is with a pixel of value 1 of 255 in a corner of the mask."""
    mask = box_mask(512, 512, (192, 192, 320, 320))
    clean = math.prod(side.crop_box(mask).size)
    mask.putpixel((511, 0), 1)
    return math.prod(side.crop_box(mask).size) / clean


def crop_defects() -> list[Defect]:
    how = "value 1 of 255 in a corner; 512 x 512 with a square of 128"
    return [Defect("crop with a faint pixel in the mask", "area over that without", inflated, how)]


# edits


def known_changed(way: Callable[[Side], Paint], edits: int, blur: int, side: Side) -> list[float]:
    """How pixels below half in the mask change over edits with a seed each, saved as PNG in between."""
    image, mask = scene()
    mask = mask.convert("L").filter(ImageFilter.GaussianBlur(blur))
    edited = image
    for seed in range(edits):
        file = io.BytesIO()
        way(side)(edited, mask, seeds=[seed])[0].save(file, "PNG")
        edited = Image.open(file)
    known = np.asarray(mask) < 128
    return differing(pixels(image)[known], pixels(edited)[known])


def edit_defects(edits: int) -> list[Defect]:
    whole, pasted, cropped = map(attrgetter, ("paint", "paint_pasted", "paint_cropped"))
    ways = {
        "by default": (whole, 0, "hard mask"),
        "pasted back": (pasted, 0, "hard mask; diffusers: apply_overlay"),
        "pasted back, soft mask": (pasted, 4, "mask blurred by 4, known below half; diffusers: apply_overlay"),
        "masked region alone": (cropped, 0, "hard mask; diffusers: padding_mask_crop"),
    }
    unit = "% of known pixels changed; most levels"
    return [
        Defect(f"{name}, edits: {count}", unit, partial(known_changed, way, count, blur), f"{how}; PNG between edits")
        for name, (way, blur, how) in ways.items()
        for count in (1, edits)
    ]


# steps


def executed(side: Side, steps: int, strength: float) -> int:
    """Steps that call back."""
    called: list[Tensor] = []
    try:
        side.paint(*scene(), steps=steps, strength=strength, on_step=called.append)
    except REFUSALS:
        return 0
    return len(called)


def miscounted(steps: int, strengths: Sequence[float], side: Side) -> list[float]:
    """The strengths at which not floor(steps * strength) steps run, or not one where that is 0."""
    expected = {strength: max(1, math.floor(steps * strength + 1e-9)) for strength in strengths}
    with side.idle():
        return [strength for strength, count in expected.items() if executed(side, steps, strength) != count]


def step_defects(strengths: Sequence[float]) -> list[Defect]:
    unit = f"strengths, of {len(strengths)}, with a wrong count"
    how = "callbacks against floor(steps * strength) and at least 1; the UNet returns at once"
    return [Defect(f"steps run of {steps}", unit, partial(miscounted, steps, strengths), how) for steps in (50, 20, 7)]


# batches


def batch_against_single(count: int, side: Side) -> list[float]:
    """Largest difference of latents between the items of a batch of 3 and their single runs; `differing` of pictures.

    count: of pictures, 3, or one that stands for all.
    """
    cases = held_out(count)
    images, masks = [Image.fromarray(case.image) for case in cases], [Image.fromarray(case.hole) for case in cases]

    def run(images: list[Image.Image], masks: list[Image.Image], seeds: list[int]) -> tuple[list[Image.Image], Tensor]:
        seen: list[Tensor] = []
        return side.paint(images, masks, seeds=seeds, on_step=seen.append), seen[-1]

    together, latents = run(images, masks, [0, 1, 2])
    single = [run([images[seed % count]], [masks[seed % count]], [seed]) for seed in range(3)]
    far = float((latents - torch.cat([end for _, end in single])).abs().max())
    apart = [painted[0] for painted, _ in single]
    return [far, *differing(np.stack(list(map(pixels, together))), np.stack(list(map(pixels, apart))))]


def batch_defects() -> list[Defect]:
    unit, how = "most in latents; % of pixels; most levels", "3 at once, a seed or generator each, against 3 runs"
    return [
        Defect(f"batch of {name} against single runs", unit, partial(batch_against_single, count), how)
        for count, name in {1: "one picture", 3: "three pictures"}.items()
    ]


# empty masks


def painted_empty(way: Callable[[Side], Paint], side: Side) -> list[float]:
    """Steps that run, and how the picture changes."""
    called: list[Tensor] = []
    image, _ = scene()
    painted = way(side)(image, Image.new("L", image.size), on_step=called.append)[0]
    return [len(called), *differing(pixels(image), pixels(painted))]


def said_of_empty(side: Side) -> str:
    image, _ = scene()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        side.paint(image, Image.new("L", image.size))
    return "a warning" if any("mask is empty" in str(one.message) for one in caught) else "nothing"


def box_of_empty(side: Side) -> list[float]:
    return list(side.crop_box(Image.new("L", (512, 512))))


def empty_defects() -> list[Defect]:
    whole, cropped = attrgetter("paint"), attrgetter("paint_cropped")
    changed = "steps run; % of pixels changed; most levels"
    return [
        Defect("empty mask", changed, partial(painted_empty, whole), "by default"),
        Defect("empty mask: what is said", "", said_of_empty, "Python warnings"),
        Defect("empty mask, masked region alone", changed, partial(painted_empty, cropped), "the pipeline with a crop"),
        Defect("empty mask: the crop", "left; top; right; bottom", box_of_empty, "512 x 512"),
    ]


# inputs


def repainted(mask: Image.Image, side: Side) -> list[float]:
    """Percent of the latent cells that were meant that are repainted, and of the others."""
    meant = np.zeros((16, 16), dtype=bool)
    meant[4:12, 4:12] = True
    told = side.latent_mask(mask)
    return [100 * float(told[meant].mean()), 100 * float(told[~meant].mean())]


def red_brush() -> Image.Image:
    image = Image.new("RGB", (128, 128))
    image.paste((255, 0, 0), (32, 32, 96, 96))
    return image


def alpha_mask(colour: str) -> Image.Image:
    image = Image.new("RGB", (128, 128), colour)
    image.putalpha(box_mask(128, 128, (32, 32, 96, 96)))
    return image


def output_size(width: int, height: int, side: Side) -> str:
    image, _ = scene()
    painted = side.paint(image.resize((width, height)), box_mask(width, height, (32, 32, 64, 64)))[0]
    return f"{painted.width} x {painted.height}"


def output_of_sideways(side: Side) -> str:
    """What comes of a file that holds a picture of 96 x 128 turned by 90 degrees, and says so: size, and which way."""
    upright = scene()[0].crop((0, 0, 96, 128))
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    sideways.save(file, "PNG", exif=exif)
    painted = side.paint(Image.open(file), box_mask(96, 128, (0, 0, 8, 8)))[0]
    far = [np.abs(pixels(painted) - pixels(one.resize(painted.size))).mean() for one in (upright, sideways)]
    return f"{painted.width} x {painted.height}, {'upright' if far[0] < far[1] else 'sideways'}"


def input_defects() -> list[Defect]:
    unit, size = "% repainted of what was meant; of the rest", "width x height"
    return [
        Defect("mask by a red brush on black", unit, partial(repainted, red_brush()), "RGB, (255, 0, 0)"),
        Defect("mask in alpha, black paint", unit, partial(repainted, alpha_mask("black")), "RGBA, opaque is meant"),
        Defect("mask in alpha, white paint", unit, partial(repainted, alpha_mask("white")), "RGBA, opaque is meant"),
        Defect("picture of 128 x 96", size, partial(output_size, 128, 96), "the output, by default"),
        Defect("picture of 100 x 83", size, partial(output_size, 100, 83), "the output, by default"),
        Defect("picture of 96 x 128 stored sideways", size, output_of_sideways, "Exif orientation 6; PIL.Image.open"),
    ]


# numbers


def outcome(image: Image.Image) -> str:
    return "a picture" if pixels(image).any() else "a black picture"


def painted_nan(side: Side) -> str:
    image, mask = scene()
    values = side.tensor(image)
    values[..., 0, 0] = math.nan
    return outcome(side.paint(values, torch.from_numpy(np.array(mask)).float()[None, None])[0])


def painted_with_infinite_guidance(side: Side) -> str:
    return outcome(side.paint(*scene(), guidance_scale=math.inf)[0])


def number_defects() -> list[Defect]:
    return [
        Defect("NaN in a corner of the picture", "", painted_nan, "a float tensor"),
        Defect("guidance_scale of infinity", "", painted_with_infinite_guidance, "by default"),
    ]


# the run


def defects(edits: int, strengths: Sequence[float]) -> dict[str, list[Defect]]:
    """All rows by the name under which the command line knows them."""
    return {
        "masks": mask_defects(),
        "crops": crop_defects(),
        "edits": edit_defects(edits),
        "steps": step_defects(strengths),
        "batches": batch_defects(),
        "empty": empty_defects(),
        "inputs": input_defects(),
        "numbers": number_defects(),
    }


def attempt(defect: Defect, side: Side) -> Value:
    """What is measured, or the error that came instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return defect.measure(side)
        except REFUSALS as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def shown(value: Value) -> str:
    """A cell of the table."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "; ".join(map(shown, value)) or "none"
    return f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which rows; all where none is named")
    parser.add_argument("--quick", action="store_true", help="2 steps for 10, 2 edits for 10, 2 strengths for 91")
    parser.add_argument("--to", type=Path, default=RESULTS / "defects.jsonl", help="the file of rows")
    options = parser.parse_args()
    steps, edits, strengths = (2, 2, FEW_STRENGTHS) if options.quick else (10, 10, ALL_STRENGTHS)
    rows = defects(edits, strengths)
    sides = Diffusers(steps), SdInpaint(steps)
    print("| | unit |", " | ".join(f"{side.name} {version(side.name)}" for side in sides), "| how |")
    print("|---" * 5 + "|")
    for defect in (defect for name in options.names or rows for defect in rows[name]):
        values = {side.name: attempt(defect, side) for side in sides}
        append(options.to, {"what": defect.name, "unit": defect.unit, **values, "how": defect.how})
        print("|", " | ".join([defect.name, defect.unit, *map(shown, values.values()), defect.how]), "|", flush=True)


if __name__ == "__main__":
    main()
