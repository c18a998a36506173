"""Train the demo checkpoint with `python -m sdinpaint.training --out FOLDER`; an interrupted run resumes."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from sdinpaint.checks import find_device
from sdinpaint.errors import SdInpaintError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.loading import save_diffusers
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.training import autoencoder, curves, inpainting

REFUSED, MACHINE = 3, 5
DEVICE = "SETTING_DEVICE"


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for training states, logs and the result."
)
@click.option(
    "--autoencoder-steps",
    default=5000,
    type=click.IntRange(min=1),
    show_default=True,
    help="Training steps of the autoencoder; the default takes about 15 minutes on 2 CPU cores.",
)
@click.option(
    "--steps",
    default=2800,
    type=click.IntRange(min=1),
    show_default=True,
    help="Training steps of the UNet; the default takes about an hour on 2 CPU cores.",
)
@click.option("--device", default="cpu", show_default=True, help="Device to train on: cpu or cuda.")
def main(out: Path, autoencoder_steps: int, steps: int, device: str) -> None:
    """Train the autoencoder, then the UNet with its text encoder, and write OUT/model as a diffusers folder."""
    with _explained():
        _train(out, autoencoder_steps, steps, str(find_device(device)))


def _train(out: Path, autoencoder_steps: int, steps: int, device: str) -> None:
    curves.require_matplotlib()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saves the state, as Ctrl-C does
    vae = autoencoder.train(out / "autoencoder", steps=autoencoder_steps, device=device)
    unet, text = inpainting.train(out / "inpainting", vae, steps=steps, device=device)
    family = dataclasses.replace(SD15_INPAINT, unet=unet.config, vae=vae.config, text=text.config, size=inpainting.SIZE)
    pipe = Pipeline(family, unet, vae, text, inpainting.vocabulary(), source=str(out))
    save_diffusers(out / "model", pipe, torch.float16)
    curves.draw(out, out / "training.png")
    click.echo(f"wrote {out / 'model'} and {out / 'training.png'}")


@contextmanager
def _explained() -> Iterator[None]:
    """End with the explanation of an error and the exit code of the command line, instead of a traceback."""
    try:
        yield
    except (SdInpaintError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(REFUSED if getattr(error, "code", DEVICE) != DEVICE else MACHINE) from error


if __name__ == "__main__":
    main()
