"""sdinpaint and the baselines behind one interface; the packages of a baseline are imported when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from sdinpaint_kernels import backend
from torch import Tensor

from sdinpaint.bench.cases import GUIDANCE, PROMPT, SEED, Case, StepInputs, picture_and_mask
from sdinpaint.bench.peers import diffusers_peer, openvino_peer
from sdinpaint.checks import check_choice
from sdinpaint.loading import load
from sdinpaint.models.prepared_unet import timestep_embedding
from sdinpaint.sampling import Conditioning, Denoiser, Known

__all__ = ["OURS", "PEERS", "Peer", "SdInpaint", "System", "check_peers", "open_system"]

OURS = "sdinpaint"
IMPORTS = "from sdinpaint import load"


class System(Protocol):
    """An inpainting library with a checkpoint loaded."""

    def ready(self) -> None:
        """Do what the library would put off until a network first runs, such as compiling."""

    def parameters(self) -> list[Tensor]:
        """Return the weights of all models; none where the library keeps them in a layout of its own."""

    def step(self) -> Tensor:
        """Run one guided step of `StepInputs`, and return x0 (1, 4, H, W)."""

    def decode(self) -> Tensor:
        """Decode the latents of `StepInputs` to an image, float32 (1, 3, 8H, 8W)."""

    def encode(self) -> Tensor:
        """Encode the image of `StepInputs` to the mean of its latents, float32 (1, 4, H, W)."""

    def encode_text(self) -> Tensor:
        """Encode the empty prompt and PROMPT to text embeddings (2, 77, D)."""

    def picture(self) -> Image.Image:
        """Inpaint the image of `picture_and_mask` by DDIM, without pasting the known pixels back."""

    def add_lora(self, path: Path) -> None:
        """Add a LoRA to the weights, so that a step costs what it costs without."""

    def remove_lora(self) -> None:
        """Take the LoRA off again."""


class SdInpaint:
    """sdinpaint with its defaults."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False)

    def ready(self) -> None:
        """Do nothing: nothing is put off."""

    def parameters(self) -> list[Tensor]:
        """Return the weights of UNet, VAE and text encoders."""
        return [weight for model in (self.pipe.unet, self.pipe.vae, self.pipe.text) for weight in model.parameters()]

    @cached_property
    def inputs(self) -> StepInputs:
        """The inputs of the case."""
        return StepInputs.draw(self.pipe.family, self.case)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The denoiser, made once as in a run."""
        given = self.inputs
        uncond, cond = (self._conditioning(index) for index in range(2))
        return self.pipe.denoiser(Known(given.mask, given.masked_latents), cond, uncond, guidance_scale=GUIDANCE)

    def step(self) -> Tensor:
        """Run one guided step, and return x0 (1, 4, H, W)."""
        return self.denoiser(self.inputs.x, self.inputs.sigma)

    def decode(self) -> Tensor:
        """Decode the latents to an image, float32 (1, 3, 8H, 8W)."""
        return self.pipe.decode(self.inputs.latents)

    @torch.inference_mode()
    def encode(self) -> Tensor:
        """Encode the image to the mean of its latents, float32 (1, 4, H, W)."""
        return self.pipe.sample_latents(self.inputs.image)

    @torch.inference_mode()
    def encode_text(self) -> Tensor:
        """Encode both prompts to text embeddings (2, 77, D)."""
        size = (self.case.size, self.case.size)
        return torch.cat([said.context for said in self.pipe.encode_prompts(["", PROMPT], size)])

    def picture(self) -> Image.Image:
        """Inpaint as diffusers does: a latent pixel is repainted where the first pixel of its block is."""
        image, mask = picture_and_mask(self.case.size)
        options: dict[str, Any] = {"paste_back": False, "cover": "nearest", "progress": False}
        result = self.pipe.inpaint(
            image, mask, PROMPT, steps=self.case.steps, guidance_scale=GUIDANCE, seed=SEED, **options
        )
        return result.image

    def add_lora(self, path: Path) -> None:
        """Add a LoRA."""
        self.pipe.add_lora(path)

    def remove_lora(self) -> None:
        """Take all LoRAs off."""
        self.pipe.clear_loras()

    def _conditioning(self, index: int) -> Conditioning:
        given, width = self.inputs, self.pipe.family.unet.vector_dim
        context = given.contexts[index : index + 1]
        if given.pooled is None or width is None:
            return Conditioning(context)
        pooled = given.pooled[index : index + 1]
        sines = timestep_embedding(given.sizes, (width - pooled.shape[1]) // len(given.sizes)).view(1, -1)
        return Conditioning(context, torch.cat([pooled, sines], dim=1))


class TorchOperations(SdInpaint):
    """sdinpaint with torch's operations in place of its own kernels."""

    def step(self) -> Tensor:
        """Run one guided step, and return x0 (1, 4, H, W)."""
        with _torch_operations():
            return super().step()

    def decode(self) -> Tensor:
        """Decode the latents to an image, float32 (1, 3, 8H, 8W)."""
        with _torch_operations():
            return super().decode()

    def encode(self) -> Tensor:
        """Encode the image to the mean of its latents, float32 (1, 4, H, W)."""
        with _torch_operations():
            return super().encode()

    def encode_text(self) -> Tensor:
        """Encode both prompts to text embeddings (2, 77, D)."""
        with _torch_operations():
            return super().encode_text()

    def picture(self) -> Image.Image:
        """Inpaint the image of the case."""
        with _torch_operations():
            return super().picture()


class Uncaptured(SdInpaint):
    """sdinpaint without CUDA graphs: every kernel of a step is launched on its own."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.pipe.graphs.enabled = self.pipe.control_graphs.enabled = False


@contextmanager
def _torch_operations() -> Iterator[None]:
    before, backend.SETTING = backend.SETTING, "torch"
    try:
        yield
    finally:
        backend.SETTING = before


@dataclass(frozen=True)
class Peer:
    """A baseline: how it is opened, and what has to be imported for it."""

    open: Callable[[Case], System]
    library: Callable[[], object]
    """Imports its package. Raises: SettingError where that is missing."""
    imports: str
    """The statement by which its users import what they load a checkpoint with."""


def _nothing() -> None:
    """Import nothing: the baseline is a setting of sdinpaint."""


PEERS = {
    "diffusers": Peer(diffusers_peer.Diffusers, diffusers_peer.library, diffusers_peer.IMPORTS),
    "diffusers-channels-last": Peer(diffusers_peer.ChannelsLast, diffusers_peer.library, diffusers_peer.IMPORTS),
    "diffusers-captured": Peer(diffusers_peer.Captured, diffusers_peer.library, diffusers_peer.IMPORTS),
    "diffusers-compiled": Peer(diffusers_peer.Compiled, diffusers_peer.library, diffusers_peer.IMPORTS),
    "openvino": Peer(openvino_peer.OpenVino, openvino_peer.library, openvino_peer.IMPORTS),
    "sdinpaint-torch": Peer(TorchOperations, _nothing, IMPORTS),
    "sdinpaint-uncaptured": Peer(Uncaptured, _nothing, IMPORTS),
}


def check_peers(names: tuple[str, ...]) -> None:
    """Check that every baseline is known and installed, before anything is measured.

    Args:
        names: names in PEERS.

    Raises:
        SettingError: one is not known, or a package is missing.
    """
    for name in names:
        check_choice("peer", name, PEERS, code="BENCH_PEER")
        PEERS[name].library()


def open_system(name: str, case: Case) -> System:
    """Load the case's checkpoint with one system.

    Args:
        name: OURS, or a name in PEERS.
        case: checkpoint, dtype and device.

    Returns:
        The system.

    Raises:
        SettingError: it cannot be run in this way.
    """
    return SdInpaint(case) if name == OURS else PEERS[name].open(case)
