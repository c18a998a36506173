"""Commands that paint pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import click

from sdinpaint.cli.common import check_output, hub_options, json_option, quiet_option, together
from sdinpaint.cli.values import CROP, DTYPE_OR_AUTO, SAMPLER, SIZE
from sdinpaint.images.files import save_png
from sdinpaint.load_options import LoadOptions

__all__ = ["LOADING", "inpaint", "model_options", "outpaint", "vary"]

SPACINGS = ("leading", "linspace", "trailing", "karras")
COVERS = ("max", "nearest")
FILLS = ("original", "noise", "blur", "edge", "telea", "neutral")
EDGES = ("edge", "reflect", "neutral")
ANCHORS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
REGIONS = ("together", "each")
BLENDS = ("none", "feather", "poisson")
LOADING = tuple(one.name for one in fields(LoadOptions) if one.name != "source")
"""Options of loading; all others are those of a request."""

run_options = together(
    click.option("--prompt", "-p", required=True, metavar="TEXT", help="What is to be painted."),
    click.option(
        "--model",
        required=True,
        metavar="PATH",
        help="A .safetensors or .ckpt file, a diffusers folder, owner/name on the hub, or demo.",
    ),
    click.option(
        "--out", "-o", required=True, type=click.Path(path_type=Path), help="A .png, .webp (lossless) or .jpg file."
    ),
    click.option("--negative", "-n", "negative_prompt", default="", metavar="TEXT", help="What is not to be seen."),
    click.option(
        "--seed", "-s", "seeds", type=int, multiple=True, help="Give several for several pictures. Default: drawn."
    ),
    click.option("--steps", default=30, show_default=True, help="More take longer; 20 to 50 are usual."),
    click.option(
        "--guidance", "--cfg-scale", "guidance_scale", default=7.5, show_default=True, help="Weight of the prompt."
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
        help="Sampler, by our name or another program's, such as 'Euler a'; `sdinpaint samplers` lists them.",
    ),
    click.option("--spacing", type=click.Choice(SPACINGS), help="Of the steps. Default: the sampler's own."),
    click.option("--eta", type=float, help="Fresh noise in each step, 0 to 1. Default: the sampler's own."),
    click.option(
        "--sheet", metavar="FILE", type=click.Path(path_type=Path), help="Also write a picture of before and after."
    ),
    click.option(
        "--batch-size",
        default=1,
        show_default=True,
        help="Seeds at a time; a picture differs by rounding alone.",
    ),
)
"""For a command that paints pictures: what is to be painted."""

hole_options = together(
    click.option(
        "--cover",
        type=click.Choice(COVERS),
        default="max",
        show_default=True,
        help="max repaints every 8 x 8 cell that the mask touches, nearest those whose first pixel it covers.",
    ),
    click.option(
        "--crop",
        type=CROP,
        metavar="auto|none|PIXELS",
        help="Show the model only the mask and so much around it, at the size it works at.  [default: none]",
    ),
    click.option(
        "--regions",
        type=click.Choice(REGIONS),
        default="together",
        show_default=True,
        help="each repaints separate parts of the mask one by one.",
    ),
    click.option(
        "--blend",
        type=click.Choice(BLENDS),
        default="none",
        show_default=True,
        help="Join what is repainted to the rest, inside the mask.",
    ),
    click.option("--match-color", is_flag=True, help="Correct its colours by those around the mask."),
    click.option(
        "--paste-back/--no-paste-back", default=True, help="Keep black pixels of the mask bit for bit.  [default: on]"
    ),
    click.option("--controlnet", metavar="PATH", help="A ControlNet, file or folder."),
    click.option("--control-scale", default=1.0, show_default=True, help="Weight of the ControlNet."),
    click.option("--control-start", default=0.0, show_default=True, help="Share of the steps before it is asked."),
    click.option("--control-end", default=1.0, show_default=True, help="Share of the steps after which it is not."),
    click.option("--control-image", metavar="PICTURE", help="What it is shown, if not the picture without the hole."),
)
"""For a command that repaints a part of the picture: which part, how it joins the rest, and by what it is led."""

model_options = together(
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:1. Default: the GPU where there is one."),
    click.option(
        "--dtype",
        type=DTYPE_OR_AUTO,
        default="auto",
        help="What the models compute in: float32, float16 or bfloat16. Default: float32 on a CPU, float16 on a GPU.",
    ),
    click.option(
        "--offload", is_flag=True, help="Keep models out of memory while they are not used: less memory, more time."
    ),
    click.option(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="Run the VAE on row strips of that many pixels squared, 0 for none. Default: from 1024 x 1024 pixels on.",
    ),
    click.option("--vae", metavar="PATH", help="Another autoencoder."),
    click.option(
        "--config", metavar="FOLDER", help="JSON files in the diffusers layout for a single file that needs them."
    ),
    click.option("--base", metavar="PATH", help="A model that supplies what a UNet alone lacks."),
    click.option("--tokenizer", metavar="PATH", help="CLIP's vocabulary, where it is not found by itself."),
    click.option(
        "--prediction", type=click.Choice(("eps", "v")), help="v for SD 2 at 768 pixels, where nothing tells it."
    ),
    click.option("--ema", is_flag=True, help="Use the averaged weights of the UNet."),
    hub_options,
    quiet_option,
    json_option,
)
"""For a command that paints pictures: which model does it, and where."""


@click.command()
@click.argument("image")
@click.option("--mask", "-m", required=True, metavar="PICTURE", help="White is repainted, black is kept.")
@run_options
@click.option(
    "--strength", default=1.0, show_default=True, help="Below 1, the repaint starts from what the picture shows."
)
@click.option(
    "--fill", type=click.Choice(FILLS), default="original", show_default=True, help="What that is, under the mask."
)
@click.option("--soft", is_flag=True, help="The darker the mask, the less a pixel changes.")
@hole_options
@model_options
def inpaint(**given: Any) -> None:
    """Repaint IMAGE where the mask is white.

    The result has the size of IMAGE, and its settings are stored inside: sdinpaint inspect OUT shows them.

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
@click.option("--strength", default=0.6, show_default=True, help="The higher, the less is left of the picture.")
@model_options
def vary(**given: Any) -> None:
    """Paint the whole of IMAGE anew: image to image, without a mask.

    \b
    Example:
      sdinpaint vary photo.jpg --prompt "an oil painting" --model sd-v1-5.ckpt --out out.png --strength 0.5
    """
    _paint("vary", **given)


@click.command()
@click.argument("image")
@click.option("--left", default=0, help="Pixels to add at that side.")
@click.option("--right", default=0, help="The same.")
@click.option("--top", default=0, help="The same.")
@click.option("--bottom", default=0, help="The same.")
@click.option("--size", type=SIZE, metavar="WIDTHxHEIGHT", help="Of the new picture, instead of pixels for each side.")
@click.option(
    "--anchor", type=click.Choice(ANCHORS), default="center", show_default=True, help="Where IMAGE is in that size."
)
@click.option("--overlap", default=16, show_default=True, help="Pixels of IMAGE that are repainted along the new ones.")
@run_options
@click.option(
    "--strength", default=1.0, show_default=True, help="Below 1, the new pixels start from what continues the picture."
)
@click.option(
    "--fill", type=click.Choice(EDGES), default="edge", show_default=True, help="What stands on the new pixels then."
)
@hole_options
@model_options
def outpaint(**given: Any) -> None:
    """Extend IMAGE at its sides; the rest of it stays bit for bit.

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
    inputs = [path for path in (image, mask, control_image) if path is not None]
    targets = _targets(out, len(drawn), inputs)
    sheets = [] if sheet is None else _targets(sheet, -(-len(drawn) // options["batch_size"]), [*inputs, *targets])
    loading = LoadOptions(source=model, **{name: options.pop(name) for name in LOADING if name in options})
    asked = {"kind": kind, "seed": drawn[0], "control_image": control_image, **options}
    request = Request(image, mask, prompt, negative_prompt, **asked)
    if loading.controlnet is None:
        require_no_control(request.settings, control_image)
    show_progress = not quiet and not as_json
    if show_progress and mask is not None and (item := request.items[0]) is not None:
        click.echo(f"mask {mask}\n{item.mask.report(request.settings.cover).table()}", err=True)
    pipe = load(loading, progress=show_progress)
    done: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, len(drawn), options["batch_size"])):
        batch = slice(first, first + options["batch_size"])
        started = time.perf_counter()
        result = pipe.run(request.replace(seed=drawn[batch]), progress=show_progress)
        seconds = round((time.perf_counter() - started) / len(result), 1)
        for index, target in enumerate(targets[batch]):
            used = result.settings_of(index)
            save_png(result.images[index], target, used)
            done.append({"path": str(target), "seconds": seconds, **used})
            if show_progress:
                size = " x ".join(map(str, result.images[index].size))
                click.echo(f"{target}: {size} pixels, seed {used['seed']}, {seconds} s; {result.scores[index]}")
        if sheets:
            save_png(result.sheet(), sheets[number], {})
    if as_json:
        click.echo(json.dumps({"pictures": done}, indent=2))


def _targets(out: Path, count: int, inputs: Sequence[str | Path]) -> list[Path]:
    """The files to write: `out`, or out-1, out-2, ... beside it; none of them is an input. Raises: ImageError."""
    names = [out] if count == 1 else [out.with_stem(f"{out.stem}-{index + 1}") for index in range(count)]
    for target in names:
        check_output(target, inputs)
    return names
