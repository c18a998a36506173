"""The commands that make images: inpaint, vary, outpaint."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import click

from sdinpaint.cli.common import (
    FILE,
    check_output,
    hub_options,
    json_option,
    lora_option,
    quiet_option,
    replacing,
    say,
    together,
)
from sdinpaint.cli.values import CROP, DTYPE_OR_AUTO, EMBEDDING, SAMPLER, SIZE
from sdinpaint.cli.wording import as_typed
from sdinpaint.errors import shown
from sdinpaint.images.files import check_output_path, save_png
from sdinpaint.load_options import LoadOptions

__all__ = ["LOADING", "inpaint", "machine_options", "model_options", "outpaint", "vary"]

SPACINGS = ("leading", "linspace", "trailing", "karras")
COVERS = ("max", "nearest")
FILLS = ("original", "noise", "blur", "edge", "telea", "neutral")
EDGES = ("edge", "reflect", "neutral")
ANCHORS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
REGIONS = ("together", "each")
BLENDS = ("none", "feather", "poisson")
LOADING = tuple(one.name for one in fields(LoadOptions) if one.name != "source")
"""Names of the options of loading; all others belong to the request."""

run_options = together(
    click.option("--prompt", "-p", required=True, metavar="TEXT", help="What the new pixels shall show."),
    click.option(
        "--model",
        required=True,
        metavar="PATH",
        help="The model: a .safetensors or .ckpt file, a diffusers folder, owner/name on the hub, or demo.",
    ),
    click.option(
        "--out",
        "-o",
        required=True,
        type=FILE,
        help="The .png, .tiff, .webp (all lossless), .jpg or .avif file to write.",
    ),
    click.option(
        "--negative",
        "-n",
        "negative_prompt",
        default="",
        metavar="TEXT",
        help="Negative prompt: what the new pixels shall not show.",
    ),
    click.option(
        "--seed",
        "-s",
        "seeds",
        type=int,
        multiple=True,
        help="Seed of the noise; give several for several images.  [default: drawn]",
    ),
    click.option("--steps", default=30, show_default=True, help="Number of sampling steps; 20 to 50 are usual."),
    click.option(
        "--guidance",
        "--cfg-scale",
        "guidance_scale",
        default=7.5,
        show_default=True,
        help="Guidance scale: the weight of the prompt; 1 is no guidance.",
    ),
    click.option(
        "--guidance-rescale",
        default=0.0,
        show_default=True,
        help="How far a guided prediction is given the contrast of an unguided one, 0 to 1: less overexposure.",
    ),
    click.option(
        "--guidance-start", default=0.0, show_default=True, help="Share of the steps before guidance begins, 0 to 1."
    ),
    click.option(
        "--guidance-end", default=1.0, show_default=True, help="Share of the steps after which guidance ends, 0 to 1."
    ),
    click.option(
        "--sampler",
        type=SAMPLER,
        default="ddim",
        show_default=True,
        help="Sampler, also by another program's name, such as 'Euler a'; `sdinpaint samplers` lists them.",
    ),
    click.option(
        "--spacing", type=click.Choice(SPACINGS), help="How the steps are spaced.  [default: the sampler's own]"
    ),
    click.option(
        "--eta",
        type=float,
        help="Stochasticity of the steps, 0 to 1; 0 is deterministic.  [default: the sampler's own]",
    ),
    click.option(
        "--sheet",
        metavar="FILE",
        type=FILE,
        help="Also write a sheet of the images before and after.",
    ),
    click.option(
        "--batch-size",
        default=1,
        show_default=True,
        help="Number of seeds that are run at a time; images differ by rounding alone.",
    ),
)
"""The options of the image to make, and of sampling."""

hole_options = together(
    click.option(
        "--cover",
        type=click.Choice(COVERS),
        default="max",
        show_default=True,
        help="Mask downsampling: max repaints every 8 x 8 cell that the mask touches, nearest those whose first "
        "pixel it covers.",
    ),
    click.option(
        "--crop",
        type=CROP,
        metavar="auto|none|PIXELS",
        help="Show the model only the mask and so many pixels around it, at the size that it works at.  "
        "[default: none]",
    ),
    click.option(
        "--regions",
        type=click.Choice(REGIONS),
        default="together",
        show_default=True,
        help="Repaint separate parts of the mask together, or each after the other.",
    ),
    click.option(
        "--blend",
        type=click.Choice(BLENDS),
        default="none",
        show_default=True,
        help="How the repainted pixels join the rest, inside the mask.",
    ),
    click.option(
        "--match-color", is_flag=True, help="Correct the colours of the repainted pixels by those around the mask."
    ),
    click.option(
        "--paste-back/--no-paste-back",
        default=True,
        help="Keep pixels where the mask is black bit for bit.  [default: paste-back]",
    ),
    click.option("--controlnet", metavar="PATH", help="ControlNet that guides the run, a file or folder."),
    click.option("--control-scale", default=1.0, show_default=True, help="Weight of the ControlNet."),
    click.option(
        "--control-start",
        default=0.0,
        show_default=True,
        help="Share of the steps before the ControlNet is active, 0 to 1.",
    ),
    click.option(
        "--control-end",
        default=1.0,
        show_default=True,
        help="Share of the steps after which the ControlNet is not active, 0 to 1.",
    ),
    click.option(
        "--control-image",
        metavar="IMAGE",
        help="Conditioning image of the ControlNet.  [default: the image without the hole]",
    ),
)
"""The options of the mask, of blending, and of the ControlNet."""

machine_options = together(
    click.option(
        "--device",
        metavar="NAME",
        help="Device that computes: cpu, cuda or cuda:1.  [default: the GPU where there is one]",
    ),
    click.option(
        "--dtype",
        type=DTYPE_OR_AUTO,
        default="auto",
        help="Dtype of the models: float32, float16 or bfloat16.  [default: float32 on a CPU, float16 on a GPU]",
    ),
    click.option(
        "--offload", is_flag=True, help="Load each model only while it is used, which takes less memory and more time."
    ),
    click.option(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="Run the VAE on row strips of PIXELS squared, which takes less memory; 0 never does.  "
        "[default: strips from 1024 x 1024 pixels on]",
    ),
    click.option(
        "--mmap/--no-mmap",
        default=True,
        help="Map weights from their file, or read them into memory, for a drive that may change or vanish.  "
        "[default: map]",
    ),
)
"""Options of where the models run, and in how much memory."""

model_options = together(
    machine_options,
    click.option("--vae", metavar="PATH", help="Another VAE for the model, a file or folder."),
    click.option(
        "--config", metavar="FOLDER", help="Folder of JSON files in the diffusers layout, which a single file may need."
    ),
    click.option(
        "--base", metavar="PATH", help="Model that supplies VAE and text encoder where --model is a UNet alone."
    ),
    click.option(
        "--tokenizer", metavar="PATH", help="Folder or file of CLIP's vocabulary, where it is not found by itself."
    ),
    click.option(
        "--prediction",
        type=click.Choice(("eps", "v")),
        help="What the UNet predicts, where nothing in the checkpoint tells: v for SD 2 at 768 pixels.",
    ),
    click.option("--ema", is_flag=True, help="Use the averaged (EMA) weights of the UNet."),
    lora_option,
    click.option(
        "--embedding",
        "embeddings",
        type=EMBEDDING,
        multiple=True,
        metavar="[TOKEN=]FILE",
        help="Textual inversion to add; the word for it is the one in the file, or the file's name.  [repeatable]",
    ),
    hub_options,
    quiet_option,
    json_option,
)
"""The options of the model and of its loading."""


@click.command()
@click.argument("image")
@click.option("--mask", "-m", required=True, metavar="IMAGE", help="Mask image: white is repainted, black is kept.")
@run_options
@click.option(
    "--strength",
    default=1.0,
    show_default=True,
    help="Share of the steps that run; below 1, the run starts from the image under the mask.",
)
@click.option(
    "--fill",
    type=click.Choice(FILLS),
    default="original",
    show_default=True,
    help="How the image under the mask is filled before a run with --strength below 1.",
)
@click.option("--soft", is_flag=True, help="Take gray levels of the mask as the strength of each pixel.")
@hole_options
@model_options
def inpaint(**given: Any) -> None:
    """Repaint IMAGE where the mask is white.

    The new image has the size of IMAGE and holds its settings: sdinpaint inspect OUT shows them.

    \b
    Examples:
      sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model sd-v1-5-inpainting.ckpt --out out.png
      sdinpaint inpaint photo.jpg -m mask.png -p "a red fox" --model folder/ -o out.png -s 1 -s 2 --sampler euler
    The second writes out-1.png and out-2.png.
    """
    _paint("inpaint", **given)


@click.command()
@click.argument("image")
@run_options
@click.option(
    "--strength",
    default=0.6,
    show_default=True,
    help="Share of the steps that run: the higher, the less is left of the image.",
)
@model_options
def vary(**given: Any) -> None:
    """Regenerate the whole of IMAGE: image to image (img2img), without a mask.

    \b
    Example:
      sdinpaint vary photo.jpg --prompt "an oil painting" --model sd-v1-5.ckpt --out out.png --strength 0.5
    """
    _paint("vary", **given)


@click.command()
@click.argument("image")
@click.option("--left", default=0, help="Pixels to add at the left side.", show_default=True)
@click.option("--right", default=0, help="Pixels to add at the right side.", show_default=True)
@click.option("--top", default=0, help="Pixels to add at the top.", show_default=True)
@click.option("--bottom", default=0, help="Pixels to add at the bottom.", show_default=True)
@click.option(
    "--size", type=SIZE, metavar="WIDTHxHEIGHT", help="Size of the extended image, instead of pixels for each side."
)
@click.option(
    "--anchor", type=click.Choice(ANCHORS), default="center", show_default=True, help="Where IMAGE lies in --size."
)
@click.option(
    "--overlap", default=16, show_default=True, help="Pixels of IMAGE along the new ones that are repainted too."
)
@run_options
@click.option(
    "--strength",
    default=1.0,
    show_default=True,
    help="Share of the steps that run; below 1, the run starts from what continues the image.",
)
@click.option(
    "--fill",
    type=click.Choice(EDGES),
    default="edge",
    show_default=True,
    help="How the new pixels are filled before a run with --strength below 1.",
)
@hole_options
@model_options
def outpaint(**given: Any) -> None:
    """Extend IMAGE at its sides; its other pixels stay bit for bit.

    \b
    Examples:
      sdinpaint outpaint photo.jpg --right 256 --prompt "a beach" --model sd-v1-5-inpainting.ckpt --out out.png
      sdinpaint outpaint photo.jpg --size 1024x768 --anchor left -p "a beach" --model folder/ -o out.png --crop auto
    """
    _paint("outpaint", **given)


def _paint(
    kind: Literal["inpaint", "vary", "outpaint"],
    *,
    image: str,
    prompt: str,
    model: str,
    out: Path,
    sheet: Path | None,
    negative_prompt: str,
    seeds: tuple[int, ...],
    quiet: bool,
    as_json: bool,
    mask: str | None = None,
    control_image: str | None = None,
    **options: Any,
) -> None:
    """Run one request for every seed, and write each image as soon as it is made."""
    from sdinpaint.loading import load
    from sdinpaint.pipeline.requests import Request
    from sdinpaint.pipeline.settings import check_seed, require_no_control

    # All that can be wrong beside the model is found before the model is loaded.
    drawn = [check_seed(seed) for seed in seeds or (None,)]
    loading = LoadOptions(source=model, **{name: options.pop(name) for name in LOADING if name in options})
    inputs = [*(path for path in (image, mask, control_image) if path is not None), *loading.places]
    targets = _targets(out, len(drawn), inputs)
    sheets = [] if sheet is None else _targets(sheet, -(-len(drawn) // options["batch_size"]), [*inputs, *targets])
    asked = {"kind": kind, "seed": drawn[0], "control_image": control_image, **options}
    request = Request(image, mask, prompt, negative_prompt, **asked)
    if (item := request.items[0]) is not None:
        height, width = item.image.size
        for target in targets:
            check_output_path(target, (width, height))
    if loading.controlnet is None:
        require_no_control(request.settings, control_image is not None)
    show_progress = not quiet and not as_json
    if show_progress and mask is not None and item is not None:
        told = item.mask.report(request.settings.cover).table()
        say(f"mask {shown(mask)}\n{as_typed(told)}", err=True)
    pipe = load(loading, progress=show_progress)
    done: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, len(drawn), options["batch_size"])):
        batch = slice(first, first + options["batch_size"])
        started = time.perf_counter()
        result = pipe.run(request.replace(seed=drawn[batch]), progress=show_progress)
        seconds = round((time.perf_counter() - started) / len(result), 1)
        for index, target in enumerate(targets[batch]):
            with replacing(target, quiet=quiet):
                used = result.save_one(index, target)
            done.append({"path": str(target), "seconds": seconds, **used})
            if show_progress:
                size = " x ".join(map(str, result.images[index].size))
                say(f"{shown(target)}: {size} pixels, seed {used['seed']}, {seconds} s; {result.scores[index]}")
        if sheets:
            with replacing(sheets[number], quiet=quiet):
                save_png(result.sheet(), sheets[number], {})
    if as_json:
        click.echo(json.dumps({"pictures": done}, indent=2))


def _targets(out: Path, count: int, inputs: Sequence[str | Path]) -> list[Path]:
    """Return the files to write: `out`, or out-1, out-2, ... beside it; refuse one that is an input."""
    names = [out] if count == 1 else [out.with_stem(f"{out.stem}-{index + 1}") for index in range(count)]
    for target in names:
        check_output(target, inputs)
    return names
