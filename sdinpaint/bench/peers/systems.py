"""This library and its peers over one checkpoint, by the same verbs; a peer is imported when it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sdinpaint.bench.cases import GUIDANCE, PROMPT, SEED, Case, StepInputs, picture_and_mask
from sdinpaint.bench.peers import diffusers_peer, openvino_peer
from sdinpaint.checks import check_choice
from sdinpaint.loading import load
from sdinpaint.models.unet import timestep_embedding
from sdinpaint.sampling import Conditioning, Denoiser, Known

__all__ = ["OURS", "PEERS", "Peer", "SdInpaint", "System", "check_peers", "open_system"]

OURS = "sdinpaint"
IMPORTS = "from sdinpaint import load"


class System(Protocol):
    """A program with a checkpoint loaded."""

    def ready(self) -> None:
        """Do now what it would put off until a network first runs, as compiling."""

    def parameters(self) -> list[Tensor]:
        """The weights of all its models; none where it holds them in forms of its own."""

    def step(self) -> Tensor:
        """One guided step of `StepInputs` -> x0 (1, 4, H, W)."""

    def decode(self) -> Tensor:
        """Its latents -> image float32 (1, 3, 8H, 8W)."""

    def encode(self) -> Tensor:
        """Its image -> the mean of the latents, float32 (1, 4, H, W)."""

    def encode_text(self) -> Tensor:
        """The empty prompt and PROMPT -> contexts (2, 77, D)."""

    def picture(self) -> Image.Image:
        """The whole inpainted picture of `picture_and_mask`, without pasting back, by DDIM."""


class SdInpaint:
    """This library."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)

    def ready(self) -> None:
        """Nothing is put off."""

    def parameters(self) -> list[Tensor]:
        """The weights of UNet, VAE and text encoders."""
        return [weight for model in (self.pipe.unet, self.pipe.vae, self.pipe.text) for weight in model.parameters()]

    @cached_property
    def inputs(self) -> StepInputs:
        """Those of the case."""
        return StepInputs.draw(self.pipe.family, self.case)

    @cached_property
    def denoiser(self) -> Denoiser:
        """Made once, as a run does."""
        given = self.inputs
        uncond, cond = (self._conditioning(index) for index in range(2))
        return self.pipe.denoiser(Known(given.mask, given.masked_latents), cond, uncond, guidance_scale=GUIDANCE)

    def step(self) -> Tensor:
        """Through the pipeline's denoiser."""
        return self.denoiser(self.inputs.x, self.inputs.sigma)

    def decode(self) -> Tensor:
        """Through the pipeline."""
        return self.pipe.decode(self.inputs.latents)

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """Through the pipeline."""
        return self.pipe.sample_latents(self.inputs.image)

    @torch.inference_mode()
    def encode_text(self) -> Tensor:
        """Through the pipeline."""
        size = (self.case.size, self.case.size)
        return torch.cat([said.context for said in self.pipe.encode_prompts(["", PROMPT], size)])

    def picture(self) -> Image.Image:
        """As diffusers does it: a latent cell is repainted where its first pixel is."""
        image, mask = picture_and_mask(self.case.size)
        options: dict[str, Any] = {"paste_back": False, "cover": "nearest", "progress": False}
        result = self.pipe.inpaint(
            image, mask, PROMPT, steps=self.case.steps, guidance_scale=GUIDANCE, seed=SEED, **options
        )
        return result.image

    def _conditioning(self, index: int) -> Conditioning:
        given, width = self.inputs, self.pipe.family.unet.vector_dim
        context = given.contexts[index : index + 1]
        if given.pooled is None or width is None:
            return Conditioning(context)
        pooled = given.pooled[index : index + 1]
        sines = timestep_embedding(given.sizes, (width - pooled.shape[1]) // len(given.sizes)).view(1, -1)
        return Conditioning(context, torch.cat([pooled, sines], dim=1))


@dataclass(frozen=True)
class Peer:
    """How a peer is opened, and what has to be imported for it."""

    open: Callable[[Case], System]
    library: Callable[[], object]
    """Its package. Raises: SettingError where that is missing."""
    imports: str
    """The statement by which its users import what they open it with."""


PEERS = {
    "diffusers": Peer(diffusers_peer.Diffusers, diffusers_peer.library, diffusers_peer.IMPORTS),
    "diffusers-channels-last": Peer(diffusers_peer.ChannelsLast, diffusers_peer.library, diffusers_peer.IMPORTS),
    "diffusers-compiled": Peer(diffusers_peer.Compiled, diffusers_peer.library, diffusers_peer.IMPORTS),
    "openvino": Peer(openvino_peer.OpenVino, openvino_peer.library, openvino_peer.IMPORTS),
}


def check_peers(names: tuple[str, ...]) -> None:
    """Raises: SettingError for a peer that is not known or not installed, before anything is measured."""
    for name in names:
        check_choice("peer", name, PEERS, code="BENCH_PEER")
        PEERS[name].library()


def open_system(name: str, case: Case) -> System:
    """Load the case's checkpoint with one system."""
    return SdInpaint(case) if name == OURS else PEERS[name].open(case)
