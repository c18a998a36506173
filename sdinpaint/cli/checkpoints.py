"""The commands about checkpoints: inspect, convert, merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sdinpaint.cli.common import BAD_INPUT, FILE, hub_options, json_option, lora_option, quiet_option, say, together
from sdinpaint.cli.settings_page import settings_page
from sdinpaint.cli.values import DTYPE
from sdinpaint.errors import shown
from sdinpaint.images.files import SUFFIXES
from sdinpaint.images.reading import read_settings

__all__ = ["convert", "inspect", "merge"]


@click.command()
@click.argument("path")
@click.option("--hash", is_flag=True, help="Also compute the SHA-256 of the weights files, which reads them through.")
@click.option(
    "--verify",
    is_flag=True,
    help="Read all weights, and say what cannot be right (NaN, zeros, checksums) or is unusual; also --hash.",
)
@hub_options
@json_option
def inspect(path: str, as_json: bool, **options: Any) -> None:
    """Say what a checkpoint is, why, and whether it loads.

    PATH is a weights file, a diffusers folder, owner/name on the hub, or demo. Only headers are read, unless --hash or
    --verify is given. For an image that sdinpaint wrote, the settings that it was made with are shown.

    \b
    Examples:
      sdinpaint inspect sd-v1-5-inpainting.ckpt
      sdinpaint inspect out.png --json
    """
    if Path(path).suffix.lower() in SUFFIXES:
        settings = read_settings(path)
        if as_json:
            click.echo(json.dumps(settings, indent=2))
        else:
            say(settings_page(path, settings))
        return
    from sdinpaint.checkpoints.inspecting import inspect as report_on

    report = report_on(path, **options)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        say(str(report))
    if not report.usable:
        click.get_current_context().exit(BAD_INPUT)


writing_options = together(
    click.option(
        "--dtype",
        type=DTYPE,
        help="Dtype of the written weights: float32, float16 or bfloat16.  [default: each tensor keeps its own]",
    ),
    click.option("--vae", metavar="PATH", help="Another VAE for the model, a file or folder."),
    click.option(
        "--config", metavar="FOLDER", help="Folder of JSON files in the diffusers layout, which a single file may need."
    ),
    click.option(
        "--prediction",
        type=click.Choice(("eps", "v")),
        help="What the UNet predicts, where nothing in the checkpoint tells.",
    ),
    hub_options,
    click.option("--overwrite", is_flag=True, help="Replace the files of an earlier run."),
    quiet_option,
)
"""The options of commands that write a checkpoint."""


@click.command()
@click.argument("source")
@click.argument("target", type=FILE)
@click.option(
    "--layout",
    type=click.Choice(("diffusers", "ldm")),
    help="Layout to write.  [default: ldm, which is one file, if TARGET ends with .safetensors]",
)
@click.option("--ema", is_flag=True, help="Take the averaged (EMA) weights of the UNet.")
@click.option("--base", metavar="PATH", help="Model that supplies the components that SOURCE lacks.")
@lora_option
@writing_options
def convert(source: str, target: Path, quiet: bool, **options: Any) -> None:
    """Write SOURCE in another layout or dtype: TARGET is a diffusers folder, or one .safetensors file.

    SOURCE is a whole model, a VAE or a ControlNet. Without --dtype every bit is kept. With --lora the LoRA is merged
    into the weights.

    \b
    Examples:
      sdinpaint convert sd-v1-5-inpainting.ckpt sd-inpainting/ --dtype float16
      sdinpaint convert sd-inpainting/ sd-inpainting.safetensors
    """
    from sdinpaint.checkpoints.converting import convert as write

    write(source, target, progress=not quiet, **options)
    _say_written(target, quiet)


@click.command()
@click.argument("custom")
@click.argument("out", type=FILE)
@click.option("--base", metavar="PATH", help="Text-to-image model that CUSTOM was trained from.")
@click.option("--inpaint", metavar="PATH", help="Inpainting model that was trained from the same base.")
@writing_options
def merge(custom: str, out: Path, quiet: bool, **options: Any) -> None:
    """Make an inpainting model of CUSTOM, a text-to-image model: custom + inpaint - base.

    Without --base and --inpaint the new input channels are zeros: a start for training. VAE and text encoder are
    CUSTOM's. OUT is a .safetensors file, or a diffusers folder.

    \b
    Example:
      sdinpaint merge custom.safetensors out.safetensors --base v1-5.ckpt --inpaint sd-v1-5-inpainting.ckpt
    """
    from sdinpaint.checkpoints.merging import to_inpainting

    to_inpainting(custom, out, progress=not quiet, **options)
    _say_written(out, quiet)


def _say_written(target: Path, quiet: bool) -> None:
    if not quiet:
        files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
        say(f"{shown(target)}: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB")
