"""The networks of one checkpoint, and what they do: encode prompts and images, denoise, decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from sdinpaint.adapters.adapted import Adaptable
from sdinpaint.checks import as_list, axes_of, check_call, check_tensor
from sdinpaint.errors import SettingError, explaining_memory
from sdinpaint.families import Family, deviations
from sdinpaint.load_options import LoadOptions
from sdinpaint.models.forking import let_children_compute
from sdinpaint.models.guarded_vae import GuardedVAE
from sdinpaint.models.offloading import Offloading
from sdinpaint.sampling import Conditioning, Denoiser, Known, schedules
from sdinpaint.sampling.graphs import Graphs
from sdinpaint.sampling.step_runner import ControlFunction
from sdinpaint.text.conditioning import PictureSize, TextConditioner
from sdinpaint.text.tokenizer import Tokenizer


class Mapped(Protocol):
    """The files that weights are mapped from; a copy of it, whose weights are copies too, has none."""

    def require_unchanged(self) -> None:
        """Raise CheckpointError where one of them has changed."""


class LatentDiffusion(Adaptable):
    """The networks of one checkpoint by name, and each step of latent diffusion with them.

    Args:
        family: sizes and trained constants of the networks.
        unet: the UNet, or anything that is called like one.
        vae: the VAE.
        text: the text encoder; for SDXL both of them.
        tokenizer: the tokenizer of the text encoder.
        controlnet: a ControlNet beside the UNet.
        source: name of the checkpoint.
        offloading: where models stay between uses; None keeps them where they are.
        tile: side of the VAE's tiles in pixels; 0 for none, None for tiles from 1024 x 1024 pixels on.
        loaded: options by which the checkpoint was loaded, for manifests.
        mapped: the files that weights are mapped from.
    """

    def __init__(
        self,
        family: Family,
        unet: nn.Module,
        vae: nn.Module,
        text: nn.Module | Sequence[nn.Module],
        tokenizer: Tokenizer,
        *,
        controlnet: nn.Module | None = None,
        source: str = "",
        offloading: Offloading | None = None,
        tile: int | None = None,
        loaded: LoadOptions | None = None,
        mapped: Mapped | None = None,
    ) -> None:
        let_children_compute()
        self.family = family
        self.unet, self.vae, self.controlnet = unet, vae, controlnet
        self._guarded_vae = GuardedVAE(self.vae)
        self.condition = TextConditioner(family, _encoders(text), tokenizer)
        self.source, self.loaded = source, loaded
        self.offloading, self.tile = offloading, tile
        self._mapped = mapped
        # captured graphs hold the addresses of weights, which change whenever an offloaded model is loaded again
        capture = None if offloading is None else False
        self.graphs, self.control_graphs = Graphs(capture), Graphs(capture)

    @property
    def text(self) -> nn.Module:
        """The text encoder; for SDXL both of them, in a list. What is assigned here, or to the list, is what runs."""
        encoders = self.condition.encoders
        return encoders[0] if len(encoders) == 1 else encoders

    @text.setter
    def text(self, text: nn.Module | Sequence[nn.Module]) -> None:
        encoders = _encoders(text)
        if len(encoders) != len(self.condition.encoders):
            found, expected = f"{len(encoders)} text encoders", f"{len(self.condition.encoders)}, as the family has"
            raise SettingError("SETTING_TEXT", "text", found, expected=expected)
        self.condition.encoders = nn.ModuleList(encoders)

    @property
    def tokenizer(self) -> Tokenizer:
        """Prompts -> int64 ids (B, 77), padded as the (first) text encoder was trained."""
        return self.condition.tokenizers[0]

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return next(self.unet.parameters()).device if self.offloading is None else self.offloading.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet."""
        return next(self.unet.parameters()).dtype if self.offloading is None else self.offloading.dtype

    @property
    def train_sigmas(self) -> Tensor:
        """The trained noise levels, rising: CPU float64 (1000,)."""
        return schedules.train_sigmas(self.family.schedule)

    @property
    def takes_mask(self) -> bool:
        """True where the UNet takes the mask and the masked image (9 channels), in place of noisy latents alone (4)."""
        return self.family.unet.in_channels == self.family.unet.out_channels + 1 + self.family.vae.latent_channels

    def __repr__(self) -> str:
        where = f"source={self.source!r}, device={self.device}, dtype={self.dtype}"
        own = "".join(f", {name}={value!r}" for name, value in deviations(self.family).items())
        return f"{type(self).__name__}({self.family.name!r}, {where}{own})"

    def using(self, *models: nn.Module) -> AbstractContextManager[None]:
        """Keep models of an offloaded pipeline on the device until the end of the block.

        It serves direct calls of a model, and many calls in a row: methods of the pipeline load the models that they
        need. Without offloading, all models are on the device anyway.

        Args:
            models: some of the pipeline's networks.

        Returns:
            A context.

        Raises:
            CheckpointError: a file that weights are mapped from has changed.
        """
        if self._mapped is not None:
            self._mapped.require_unchanged()
        return nullcontext() if self.offloading is None else self.offloading.using(*models)

    @explaining_memory()
    def encode_prompts(
        self, prompts: Iterable[str | Sequence[str | None] | None], size: PictureSize | tuple[int, int] | None = None
    ) -> list[Conditioning]:
        """Encode prompts to the conditioning of the UNet.

        Args:
            prompts: one entry per conditioning: a prompt for a batch of 1, or a list for a batch of its length.
                None is "", and for SDXL no prompt at all. A prompt alone is a list of one.
            size: height and width in pixels of the image to come, or all of SDXL's size and crop conditioning; the size
                that the model works at by default.

        Returns:
            One Conditioning per entry, whose context is (B, 77, D).

        Raises:
            SettingError: a prompt is no text, or `size` no size.
            OutOfMemoryError: memory does not suffice.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
            found, expected = f"a {type(prompts).__name__}", "a list with a prompt for each conditioning"
            raise SettingError("SETTING_PROMPTS", "prompts", found, expected=expected)
        if size is None:
            size = (self.family.size, self.family.size)
        told = size if isinstance(size, PictureSize) else PictureSize(size)
        with self.using(*self.condition.encoders):
            return [self.condition(as_list(entry), told) for entry in prompts]

    def denoiser(
        self,
        known: Known,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        control: ControlFunction | None = None,
        sigmas: Tensor | None = None,
    ) -> Denoiser:
        """Bind the UNet to an image and its prompts, as a function denoise(x, sigma) -> x0.

        Args:
            known: inpainting conditioning, which `encode_image` gives.
            cond: conditioning by the prompt.
            uncond: conditioning by the negative prompt; None for no guidance.
            guidance_scale: weight of the prompt; 1 is no guidance.
            guidance_rescale: from 0 to 1, how far a guided prediction is given the contrast of an unguided one.
            guidance_start: share of the steps before guidance begins; needs `sigmas`.
            guidance_end: share of the steps after which guidance ends; needs `sigmas`.
            control: a `Control`, for a ControlNet.
            sigmas: noise levels of the run (n + 1,), where they are known.

        Returns:
            The denoiser, which samplers take.

        Raises:
            SettingError: an argument is of another kind, the conditions do not fit together, or guidance is out of its
                bounds.
        """
        if not isinstance(known, Known):
            expected, hint = "a Known", "pipe.encode_image(image, mask) gives one"
            raise SettingError("SETTING_KNOWN", "known", f"a {type(known).__name__}", expected=expected, hint=hint)
        check_call("control", control)
        return Denoiser(
            self.unet,
            self.train_sigmas,
            self.family.schedule.prediction,
            cond,
            uncond,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            extra=(known.mask, known.masked_latents) if self.takes_mask else None,
            control=control,
            dtype=self.dtype,
            sigmas=sigmas,
            embed_ahead=self.device.type == "cuda",  # on a CPU nothing is gained
            graphs=self.graphs,
            using=partial(self.using, self.unet),
        )

    @explaining_memory()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to an image; a VAE that overflows its dtype is run again in float32, with a warning.

        Args:
            latents: latents (B, 4, H, W).

        Returns:
            The image, float32 (B, 3, 8H, 8W), about [-1, 1].

        Raises:
            SettingError: `latents` are of another kind or shape.
            NumericError: the VAE overflows float32, too.
            OutOfMemoryError: memory does not suffice.
        """
        check_tensor("latents", latents, f"(B, {self.family.vae.latent_channels}, H, W)")
        with self.using(self.vae):
            return self._through_vae().decode(latents, tile=self.tile, graphs=self.graphs)

    @explaining_memory()
    def sample_latents(self, image: Tensor, draw: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Encode an image to latents.

        Args:
            image: image (B, 3, 8H, 8W) in [-1, 1].
            draw: draw(mean) -> unit noise, for a sample of the posterior; None takes its mean.

        Returns:
            Latents, float32 (B, 4, H, W).

        Raises:
            SettingError: `image` is of another kind or shape, or `draw` returns another shape.
            NumericError: the VAE overflows float32, too.
            OutOfMemoryError: memory does not suffice.
        """
        check_tensor("image", image, f"(B, {self.family.vae.in_channels}, H, W)")
        check_call("draw", draw)
        if image.shape[-2] % 8 or image.shape[-1] % 8:
            found, hint = f"shape {tuple(image.shape)}", "pipe.encode_image pads an image"
            raise SettingError("SETTING_IMAGE", "image", found, expected="sides that are multiples of 8", hint=hint)
        with self.using(self.vae):
            mean, std = self._through_vae().encode(image, tile=self.tile)
        return mean if draw is None else mean + std * check_tensor("draw", draw(mean), axes_of(mean))

    def _through_vae(self) -> GuardedVAE:
        """Return the guarded VAE, with what is known of its overflows; `vae` may have been replaced by another one."""
        if self._guarded_vae.vae is not self.vae:
            self._guarded_vae = GuardedVAE(self.vae)
        return self._guarded_vae


def _encoders(text: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """Return one text encoder or several as a list."""
    return list(text) if isinstance(text, Sequence | nn.ModuleList) else [text]
