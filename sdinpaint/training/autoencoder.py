"""Train the small KL autoencoder on procedural scenes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE
from sdinpaint.models.vae import Attention, Downsample, ResBlock, Upsample
from sdinpaint.training.loop import Trainer
from sdinpaint.training.scenes import random_scene, render, without

SIZE = 128
"""Height and width of the scenes in pixels."""
# A flat colour survives GroupNorm over half of the channels, but not over the few channels in each of 32 groups.
CONFIG = dataclasses.replace(SD15_INPAINT.vae, channels=16, num_res_blocks=1, norm_groups=2)
KL_WEIGHT = 5e-4
WINDOWED = 0.8
"""Fraction of the steps, from the first, that train on a quarter of each scene, which takes a quarter of the time."""


def drawn_images(rng: np.random.Generator, count: int, side: int = SIZE) -> Tensor:
    """Render random scenes, some without their object and some with a mid-grey hole, each cropped at random.

    Args:
        rng: generator of the scenes.
        count: batch size B.
        side: height and width of the crops in pixels, at most `SIZE`.

    Returns:
        Images in [-1, 1], (B, 3, side, side).
    """
    images = []
    for _ in range(count):
        scene = random_scene(rng)
        kind = rng.random()
        image = render(without(scene, scene.things[0]) if kind < 0.1 else scene, SIZE).astype(np.float32) / 127.5 - 1
        if kind > 0.7:
            top, left = rng.integers(0, 80, 2)
            height, width = rng.integers(32, 90, 2)
            image[top : top + height, left : left + width] = 0
        top, left = rng.integers(0, SIZE - side + 1, 2)
        images.append(image[top : top + side, left : left + side])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Compute a loss from errors of brightness and of two colour differences.

    It adds absolute errors, squared errors, errors of edges, and errors of 4 x 4 averages. Absolute errors alone leave
    the output grey for thousands of steps, because coloured objects cover a small part of the image.

    Args:
        output: reconstructed images, (B, 3, H, W).
        target: original images, (B, 3, H, W).

    Returns:
        The loss, a scalar.
    """
    error = _opponent(output - target)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return 0.5 * (error.abs().mean() + edges) + 4 * (error**2).mean() + 8 * (F.avg_pool2d(error, 4) ** 2).mean()


def _opponent(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(1)
    return torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], dim=1)


@torch.no_grad()
def start_as_average(vae: VAE) -> None:
    """Initialise an autoencoder so that latents are averages of 8 x 8 pixels, which decoding repeats.

    Each colour is stored as itself and as its negative, since silu(a) - silu(-a) = a, and the pair leaves the mean of
    its GroupNorm group at 0. A pair of constants stabilises the group's variance.

    Args:
        vae: the autoencoder, whose weights are changed in place.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(_bias(module.conv2))
            if module.has_shortcut:
                nn.init.dirac_(module.nin_shortcut.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, Downsample):
            nn.init.zeros_(module.conv.weight)
            weight, count = module.conv.weight, len(module.conv.weight)
            weight[:, :, :2, :2] = torch.eye(count, dtype=weight.dtype, device=weight.device)[:, :, None, None] / 4
        elif isinstance(module, Upsample):
            nn.init.dirac_(module.conv.weight)
    latent, colors = vae.config.latent_channels, vae.config.in_channels
    _carry(vae.encoder.conv_in, vae.encoder.conv_out, colors)
    _carry(vae.decoder.conv_in, vae.decoder.conv_out, colors)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(conv.weight)
    vae.encoder.conv_out.weight[latent:] *= 0.1
    nn.init.constant_(_bias(vae.quant_conv)[latent:], -4.0)  # a small standard deviation, as noise would hide the image


def _carry(first: nn.Conv2d, last: nn.Conv2d, count: int) -> None:
    """Make `first` copy `count` inputs and their negatives to its first outputs, and `last` return their difference."""
    weight, bias = first.weight, _bias(first)
    weight *= 0.3
    weight[: 2 * count] = 0
    for index in range(count):
        weight[index, index, 1, 1] = 1
        weight[count + index, index, 1, 1] = -1
    bias[2 * count : 2 * count + 2] = bias.new_tensor([1.0, -1.0])
    last.weight[:count] *= 0.1
    for index in range(count):
        last.weight[index, index, 1, 1] = 1
        last.weight[index, count + index, 1, 1] = -1


@torch.random.fork_rng(devices=[])
def train(folder: Path, *, steps: int, batch: int = 8, device: str = "cpu", progress: bool = True) -> VAE:
    """Train the autoencoder, or resume its training.

    Args:
        folder: folder of the training state and the log.
        steps: number of training steps in total.
        batch: images in each step.
        device: device to train on.
        progress: show a progress bar.

    Returns:
        The autoencoder with averaged (EMA) weights and normalised latents.
    """
    torch.manual_seed(0)
    vae = VAE(CONFIG).to(device)
    start_as_average(vae)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(step)
        side = SIZE if step >= WINDOWED * steps else SIZE // 2
        image = drawn_images(np.random.default_rng((1, step)), batch, side).to(device)
        mean, std = (part / CONFIG.scaling_factor for part in vae.posterior(image))
        output = vae.decode((mean + std * torch.randn_like(std)) * CONFIG.scaling_factor).float()
        reconstruction = reconstruction_loss(output, image)
        mean, std = mean.float(), std.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        psnr = -10 * (F.mse_loss(output.detach(), image) / 4).log10()
        figures = {"loss": reconstruction.item(), "kl": kl.item(), "psnr": psnr.item()}
        return reconstruction + KL_WEIGHT * kl, figures

    trainer = Trainer(vae, folder, steps=steps, peak_lr=2e-3, ema_decay=0.998)
    trainer.fit(loss, progress=progress)
    trainer.use_ema()
    normalise(vae, drawn_images(np.random.default_rng(2), 256).to(device))
    return vae


@torch.no_grad()
def normalise(vae: VAE, images: Tensor) -> None:
    """Normalise each channel of the scaled latents to mean 0 and standard deviation 1.

    The change is folded into `quant_conv` and `post_quant_conv`, and does not change reconstructions.

    Args:
        vae: the autoencoder, whose weights are changed in place.
        images: images to measure the latents of, (B, 3, H, W) in [-1, 1].
    """
    latents = torch.cat([vae.encode(chunk) for chunk in images.split(16)]) / vae.config.scaling_factor
    shift, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * vae.config.scaling_factor
    # latents' = (latents - shift) / scale; the second half of quant_conv's channels are log-variances.
    channels = vae.config.latent_channels
    weight, bias = vae.quant_conv.weight, _bias(vae.quant_conv)
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) / scale
    bias[channels:] -= 2 * scale.log()
    weight, bias = vae.post_quant_conv.weight, _bias(vae.post_quant_conv)
    bias += weight[:, :, 0, 0] @ shift
    weight *= scale[None, :, None, None]


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, conv.bias)
