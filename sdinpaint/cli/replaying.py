"""The command that makes an image again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sdinpaint.cli.common import FILE, check_output, given, replacing, say
from sdinpaint.cli.painting import LOADING, model_options
from sdinpaint.errors import shown

__all__ = ["replay"]

DIFFERENT = 1
INPUTS = ("image", "mask", "control_image")
"""Entries of a manifest that are read again, from their recorded paths."""


@click.command()
@click.argument("path", metavar="IMAGE")
@click.option("--image", metavar="PATH", help="Image that was repainted, if it is not at its recorded path any more.")
@click.option(
    "--mask", "-m", metavar="PATH", help="Mask, if it is neither stored in the image nor at its recorded path."
)
@click.option("--model", metavar="PATH", help="Model, if it is not at its recorded path any more.")
@click.option("--controlnet", metavar="PATH", help="ControlNet, if it is not at its recorded path any more.")
@click.option("--control-image", metavar="PATH", help="Conditioning image of the ControlNet, if one was given.")
@click.option("--out", "-o", type=FILE, help="Also write the new image.")
@model_options
@click.pass_context
def replay(
    ctx: click.Context,
    /,
    path: str,
    image: str | None,
    mask: str | None,
    model: str | None,
    control_image: str | None,
    out: Path | None,
    quiet: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Make IMAGE again from the settings that are stored in it, and say whether it is the same.

    The model is loaded as it was recorded, where no option says otherwise; other weights are an error. Exit code 0:
    every pixel is the same; 1: some differ.

    \b
    Example:
      sdinpaint replay out.png
    """
    from sdinpaint.images.reading import read_settings
    from sdinpaint.load_options import LoadOptions
    from sdinpaint.loading import load
    from sdinpaint.provenance.manifest import manifest_of
    from sdinpaint.replaying import replay as make_again

    manifest = manifest_of(read_settings(path))
    show_progress = not quiet and not as_json
    typed = {name: loading[name] for name in LOADING if given(ctx, name)}
    options = LoadOptions.from_manifest(manifest, **typed, **({"source": model} if model else {}))
    if out is not None:
        stored = (one.get("path") for name in INPUTS if isinstance(one := manifest.get(name), dict))
        inputs = (path, image, mask, control_image, *stored, *options.places)
        check_output(out, [one for one in inputs if one is not None])
    pipe = load(options, progress=show_progress)
    again = make_again(path, pipe, image=image, mask=mask, control_image=control_image, progress=show_progress)
    if out is not None:
        with replacing(out, quiet=quiet):
            again.result.save(out)
    if as_json:
        found = {"identical": again.identical, "changed": again.changed, "largest": again.largest}
        click.echo(json.dumps({**found, "differences": again.differences}, indent=2))
    elif not quiet:
        pixels = f"{again.changed} pixels differ, by {again.largest} of 255 levels at most"
        say("\n".join([f"{shown(path)}: {'identical' if again.identical else pixels}", *again.differences]))
    ctx.exit(0 if again.identical else DIFFERENT)
