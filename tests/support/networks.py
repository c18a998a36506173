"""Small random networks of every kind, and what each is called with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from builders import as_sd2, as_sdxl, fill, random_pipeline
from recordings import draw
from torch import Tensor, nn

from sdinpaint.models import ControlNet, ControlNetConfig

KINDS = ("UNet of SD1", "UNet of SD2", "UNet of SDXL", "VAE", "text encoder", "text encoder 2", "ControlNet")


@dataclass(frozen=True)
class Network:
    """A network, and a call of it that gives one tensor."""

    module: nn.Module
    call: Callable[[nn.Module], Tensor]

    def __call__(self, module: nn.Module | None = None) -> Tensor:
        return self.call(self.module if module is None else module)

    @property
    def leaves(self) -> dict[str, nn.Module]:
        """The layers that have weights of their own."""
        return {name: one for name, one in self.module.named_modules() if list(one.parameters(recurse=False))}


def one_of_each_kind(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The first layer of each class in each place of a block, whatever the block's number is."""
    kinds = {(type(layer), re.sub(r"\d+", "#", name)): name for name, layer in reversed(layers.items())}
    return {name: layers[name] for name in kinds.values()}


def together(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts if part is not None])


def network(kind: str, tiny, vocabulary) -> Network:
    """One of KINDS."""
    family = {"UNet of SD2": as_sd2, "UNet of SDXL": as_sdxl, "text encoder 2": as_sdxl}.get(kind, lambda one: one)(
        tiny
    )
    if kind == "ControlNet":
        unet = replace(tiny.unet, in_channels=4)
        net = fill(ControlNet(ControlNetConfig(unet=unet, hint_widths=(4, 6, 8, 10))), 7).eval().requires_grad_(False)
        given = draw(1, 2, 4, 8, 8), draw(2, 2, 3, 64, 64), torch.tensor([5.0, 700.0]), draw(3, 2, 7, 28)
        return Network(net, lambda module: together(module(given[0], net.hint_features(given[1]), *given[2:])))
    pipe = random_pipeline(family, vocabulary)
    if kind.startswith("UNet"):
        config = family.unet
        vector = None if config.vector_dim is None else draw(4, 2, config.vector_dim)
        inputs = draw(1, 2, 9, 8, 8), torch.tensor([5.0, 700.0]), draw(3, 2, 7, config.context_dim), vector
        return Network(pipe.unet, lambda module: module(*inputs))
    if kind == "VAE":
        image, latents = draw(1, 1, 3, 64, 48), draw(2, 1, 4, 6, 8)
        return Network(pipe.vae, lambda module: together((*module(image), *module(latents, "decode"))))
    ids = vocabulary(["a red fox", "a cube"])
    encoder = pipe.condition.encoders[1 if kind == "text encoder 2" else 0]
    return Network(encoder, lambda module: together(module(ids, pooled=True)))
