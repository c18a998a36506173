"""Train a small 9-channel UNet with its text encoder on the inpainting objective of the released models.

The UNet predicts noise (eps). Masks are of several kinds, a tenth of them full, and captions are sometimes dropped.
The loss gives more weight to the hole than to the known area, and to high noise than to low, so that hours on a CPU
suffice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE, CLIPText, UNet
from sdinpaint.sampling import schedules
from sdinpaint.text.tokenizer import Tokenizer, train_tokenizer
from sdinpaint.training.loop import Trainer
from sdinpaint.training.scenes import (
    captions,
    empty_caption,
    object_mask,
    random_mask,
    random_scene,
    render,
    scene_caption,
    silhouette,
    without,
)

SIZE = 128
"""Height and width of the scenes in pixels."""
TEXT = dataclasses.replace(SD15_INPAINT.text, vocab_size=640, width=128, mlp_width=512, num_layers=2, num_heads=4)
UNET = dataclasses.replace(
    SD15_INPAINT.unet,
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1, 0),
    context_dim=TEXT.width,
    num_heads=4,
    norm_groups=8,
)
DROP_TEXT = 0.08
"""Fraction of the examples whose caption is replaced by the empty prompt."""
KNOWN_WEIGHT = 0.25
"""Weight of the known area in the loss; the hole has weight 1."""
MIN_SNR = 5.0
"""Signal-to-noise ratio from which on the loss has less weight, as low-noise steps would dominate it otherwise.

Source: https://arxiv.org/abs/2303.09556 (min-SNR weighting).
"""


class Example(NamedTuple):
    """An image (S, S, 3) uint8, its hole (S, S) bool, and a caption of the content in the hole."""

    image: NDArray[np.uint8]
    hole: NDArray[np.bool_]
    caption: str


def example(rng: np.random.Generator) -> Example:
    """Make a training example: mostly an object under a larger hole, sometimes another hole or an empty scene.

    Args:
        rng: generator of scene, hole and caption.

    Returns:
        The example, of size S = `SIZE`.
    """
    scene = random_scene(rng)
    kind = rng.random()
    if kind < 0.6:
        thing = scene.things[0]
        return Example(render(scene, SIZE), object_mask(rng, scene, thing, SIZE), captions(rng, scene, thing))
    if kind < 0.7:
        thing, emptied = scene.things[0], without(scene, scene.things[0])
        return Example(render(emptied, SIZE), object_mask(rng, scene, thing, SIZE), empty_caption(rng))
    hole = random_mask(rng, SIZE)
    shown = tuple(thing for thing in scene.things if hole[silhouette(thing, SIZE)].mean() > 0.5)
    caption = scene_caption(rng, dataclasses.replace(scene, things=shown))
    return Example(render(scene, SIZE), hole, caption)


def vocabulary() -> Tokenizer:
    """Learn a small vocabulary in CLIP's format from the captions of many scenes."""
    rng = np.random.default_rng(3)
    return train_tokenizer((example_caption(rng) for _ in range(5_000)), TEXT.vocab_size)


def example_caption(rng: np.random.Generator) -> str:
    """Make a caption without rendering its scene.

    Args:
        rng: generator of scene and caption.

    Returns:
        The caption.
    """
    scene = random_scene(rng)
    pick = rng.random()
    if pick < 0.1:
        return empty_caption(rng)
    return scene_caption(rng, scene) if pick < 0.4 else captions(rng, scene, scene.things[0])


class Bank:
    """A pool of encoded examples, which are reused with new noise because encoding is expensive.

    The oldest examples are replaced step by step. A resumed run begins with the pool of the first step again.

    Args:
        vae: the autoencoder.
        tokenizer: the tokenizer.
        size: number of examples, rounded up to a multiple of 64.
        device: device of the examples that `draw` returns.
    """

    def __init__(self, vae: VAE, tokenizer: Tokenizer, size: int, device: str) -> None:
        self.vae, self.tokenizer, self.device = vae, tokenizer, device
        self.items: tuple[Tensor, ...] = ()
        self.next = 0
        for start in range(0, size, 64):
            new = self._encode(np.random.default_rng((4, start)), 64)
            self.items = tuple(torch.cat(pair) for pair in zip(self.items, new, strict=True)) if self.items else new

    def renew(self, rng: np.random.Generator, count: int) -> None:
        """Replace the oldest examples by new ones.

        Args:
            rng: generator of the new examples.
            count: number of examples to replace.
        """
        where = (torch.arange(count, dtype=torch.int64, device="cpu") + self.next) % len(self)
        for kept, new in zip(self.items, self._encode(rng, count), strict=True):
            kept[where] = new
        self.next = (self.next + count) % len(self)

    def draw(self, rng: np.random.Generator, count: int) -> Iterator[Tensor]:
        """Draw random examples.

        Args:
            rng: generator of the choice.
            count: number of examples B.

        Returns:
            Latents (B, 4, H, W), masks (B, 1, H, W), masked latents (B, 4, H, W) and token ids (B, L).
        """
        where = torch.from_numpy(rng.integers(0, len(self), count))
        return (item[where].to(self.device) for item in self.items)

    def __len__(self) -> int:
        return len(self.items[0])

    @torch.no_grad()
    def _encode(self, rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        examples = [example(rng) for _ in range(count)]
        image = torch.from_numpy(np.stack([one.image for one in examples])).permute(0, 3, 1, 2).float() / 127.5 - 1
        mask = torch.from_numpy(np.stack([one.hole for one in examples]))[:, None].float()
        with torch.autocast(self.device, torch.bfloat16):
            mean, std = self.vae.posterior(torch.cat([image, image * (1 - mask)]).to(self.device))
        latents, masked = (mean + std * torch.randn_like(std)).float().cpu().chunk(2)
        prompts = ["" if rng.random() < DROP_TEXT else one.caption for one in examples]
        return latents, F.interpolate(mask, size=latents.shape[-2:]), masked, self.tokenizer(prompts)


@torch.random.fork_rng(devices=[])
def train(
    folder: Path, vae: VAE, *, steps: int, batch: int = 32, bank: int = 4096, device: str = "cpu", progress: bool = True
) -> tuple[UNet, CLIPText]:
    """Train the UNet and its text encoder, or resume their training.

    Args:
        folder: folder of the training state and the log.
        vae: the trained autoencoder.
        steps: number of training steps in total.
        batch: examples in each step.
        bank: number of encoded examples to keep.
        device: device to train on.
        progress: show a progress bar.

    Returns:
        UNet and text encoder with averaged (EMA) weights.
    """
    torch.manual_seed(1)
    tokenizer = vocabulary()
    unet, text = UNet(UNET), CLIPText(dataclasses.replace(TEXT, vocab_size=tokenizer.vocab_size))
    model = nn.ModuleDict({"unet": unet, "text": text}).to(device)
    _start_as_identity(unet)
    for embedding in (text.text_model.embeddings.token_embedding, text.text_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.02)
    examples = Bank(vae.to(device).eval(), tokenizer, bank, device)
    sigmas = schedules.train_sigmas(SD15_INPAINT.schedule).float().to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(step)
        rng = np.random.default_rng((5, step))
        examples.renew(rng, max(batch // 8, 1))
        latents, mask, masked, ids = examples.draw(rng, batch)
        t = torch.randint(0, len(sigmas), (batch,), dtype=torch.int64, device=device)
        sigma = sigmas[t][:, None, None, None]
        noise = torch.randn_like(latents)
        noisy = (latents + sigma * noise) / (1 + sigma**2).sqrt()
        eps = unet(torch.cat([noisy, mask, masked], dim=1), t, text(ids)).float()
        error = (eps - noise) ** 2
        snr = sigma**-2
        weight = (MIN_SNR / snr).clamp(max=1) * (KNOWN_WEIGHT + (1 - KNOWN_WEIGHT) * mask)
        value = (weight * error).mean()
        hole = (error.detach() * mask).sum() / (4 * mask.sum()).clamp(min=1)
        return value, {"loss": value.item(), "hole": hole.item()}

    trainer = Trainer(model, folder, steps=steps, peak_lr=1e-3)
    trainer.fit(loss, progress=progress)
    trainer.use_ema()
    return unet, text


def _start_as_identity(unet: UNet) -> None:
    """Set the last layer of every residual branch to zero, as in the released models before training."""
    for name, parameter in unet.named_parameters():
        if name.startswith("out.2.") or ".out_layers.3." in name or ".proj_out." in name:
            nn.init.zeros_(parameter)
