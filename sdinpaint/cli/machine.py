"""Commands about this machine: demo, samplers, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

import click

from sdinpaint.cli.common import FILE, json_option, say
from sdinpaint.cli.painting import machine_options

__all__ = ["demo", "doctor", "samplers"]


@click.command()
@click.option(
    "--out",
    "-o",
    default=".",
    show_default=True,
    metavar="FOLDER",
    type=FILE,
    help="Folder for the sheet, which is made if need be.",
)
@machine_options
def demo(out: Path, **loading: Any) -> None:
    """Repaint some drawn scenes with the included checkpoint.

    Writes one sheet of images, FOLDER/sdinpaint-demo.png, and one scene with its mask. Needs no network, and less than
    a minute on two CPU cores.

    \b
    Example:
      sdinpaint demo --out out
    """
    from sdinpaint.cli.demonstration import demonstrate
    from sdinpaint.load_options import LoadOptions
    from sdinpaint.loading import load

    say("Repainting drawn scenes with the included checkpoint ...")
    done = demonstrate(out, load(LoadOptions(source="demo", **loading), progress=False))
    say(f"{done.images} images in {done.seconds:.0f} s, each with all its known pixels kept bit for bit.")
    say(f"Look at them: {done.path}")
    photo, mask, out_file = (
        quote(str(path)) for path in (done.photo, done.mask, done.photo.with_name("repainted.png"))
    )
    say("\nOne of them by hand: white in the mask is repainted.")
    say(f'  sdinpaint inpaint {photo} --mask {mask} --prompt "a green cube" --model demo --out {out_file}')
    say(f"  sdinpaint replay {out_file}")
    say("With released weights, --model is a file, a diffusers folder, or owner/name on the hub.")


@click.command()
@json_option
def samplers(as_json: bool) -> None:
    """List the samplers: their spacings, the default first, and the names that other programs have for them.

    \b
    Example:
      sdinpaint samplers
    """
    from sdinpaint.sampling import SAMPLERS

    spacings = {name: [one.spacing, *sorted({*one.spacings} - {one.spacing})] for name, one in SAMPLERS.items()}
    if as_json:
        rows = {
            name: {"spacings": spacings[name], "eta": one.eta if one.stochastic else None, "aliases": one.aliases}
            for name, one in SAMPLERS.items()
        }
        click.echo(json.dumps(rows, indent=2))
        return
    for name, one in SAMPLERS.items():
        eta = f"eta {one.eta:g} unless another is given" if one.stochastic else "adds no noise in its steps"
        also = ", ".join(one.aliases)
        say(f"{name}: {eta}\n  spacings: {', '.join(spacings[name])}\n  also: {also}")
    say("A last word Karras names that spacing: 'DPM++ 2M Karras' is dpmpp_2m with the spacing karras.")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Print what a bug report needs: versions, devices, memory.

    \b
    Example:
      sdinpaint doctor
    """
    from sdinpaint.cli.doctor import examine

    found = examine()
    width = max(map(len, found))
    lines = (f"{name:<{width}}  {value}" for name, value in found.items())
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        say("\n".join(lines))
