"""How much arithmetic and memory the networks of a checkpoint ask for, whoever runs them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from sdinpaint.bench.cases import Case, StepInputs
from sdinpaint.bench.floors import flop_count
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.load_options import LoadOptions

__all__ = ["float32_bytes", "flops_of"]


@torch.inference_mode()
def flops_of(case: Case) -> dict[str, int]:
    """By what the suite measures. A guided step is counted over its whole batch of two, though x is the same in both.

    The networks are on the meta device: nothing is loaded, and nothing computed.
    """
    checkpoint = open_checkpoint(LoadOptions(source=case.checkpoint))
    family, models = checkpoint.family, checkpoint.build()
    unet, vae = models["unet"], models["vae"]
    given = StepInputs.draw(family, replace(case, device="meta"))
    with torch.device("meta"):
        x = torch.empty(2, family.unet.in_channels, *given.x.shape[-2:])
        vector = None if family.unet.vector_dim is None else torch.empty(2, family.unet.vector_dim)
        t = torch.empty(2)
    return {
        "guided step": flop_count(lambda: unet(x, t, given.contexts, vector)),
        "VAE decode": flop_count(lambda: vae.decode(given.latents)),
        "VAE encode": flop_count(lambda: vae.posterior(given.image)),
    }


def float32_bytes(case: Case) -> int:
    """Of all its weights in float32."""
    states = open_checkpoint(LoadOptions(source=case.checkpoint)).states.values()
    return 4 * sum(math.prod(shape) for state in states for shape in state.shapes().values())
