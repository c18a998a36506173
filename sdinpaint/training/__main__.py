"""Train the demo checkpoint with `python -m sdinpaint.training --out FOLDER`; an interrupted run resumes."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import click
import torch

from sdinpaint.families import SD15_INPAINT
from sdinpaint.loading import save_diffusers
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.training import autoencoder, curves, inpainting


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for training states, logs and the result."
)
@click.option(
    "--autoencoder-steps",
    default=5000,
    show_default=True,
    help="Training steps of the autoencoder; the default takes about 15 minutes on 2 CPU cores.",
)
@click.option(
    "--steps",
    default=2800,
    show_default=True,
    help="Training steps of the UNet; the default takes about an hour on 2 CPU cores.",
)
@click.option("--device", default="cpu", show_default=True, help="Device to train on: cpu or cuda.")
def main(out: Path, autoencoder_steps: int, steps: int, device: str) -> None:
    """Train the autoencoder, then the UNet with its text encoder, and write OUT/model as a diffusers folder."""
    curves.require_matplotlib()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saves the state, as Ctrl-C does
    vae = autoencoder.train(out / "autoencoder", steps=autoencoder_steps, device=device)
    unet, text = inpainting.train(out / "inpainting", vae, steps=steps, device=device)
    family = dataclasses.replace(SD15_INPAINT, unet=unet.config, vae=vae.config, text=text.config, size=inpainting.SIZE)
    pipe = Pipeline(family, unet, vae, text, inpainting.vocabulary(), source=str(out))
    save_diffusers(out / "model", pipe, torch.float16)
    curves.draw(out, out / "training.png")
    click.echo(f"wrote {out / 'model'} and {out / 'training.png'}")


if __name__ == "__main__":
    main()
