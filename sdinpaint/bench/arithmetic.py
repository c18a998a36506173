"""The arithmetic and memory that the networks of a checkpoint need, the same for every system."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from sdinpaint.bench.cases import STEP, Case, StepInputs
from sdinpaint.bench.roofline import flop_count
from sdinpaint.checkpoints.building import build
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.load_options import LoadOptions

__all__ = ["float32_bytes", "flops_of"]


def flops_of(case: Case) -> dict[str, int]:
    """Count the operations of the networks on the meta device, where nothing is loaded and nothing computed.

    A guided step is counted over its whole batch of two, although x is the same in both halves.

    Args:
        case: checkpoint and size.

    Returns:
        Operations by the name of the measurement.
    """
    return _flops(replace(case, device="meta", dtype="float32", peers=(), steps=1, rounds=1))


@functools.cache  # several parts of the suite ask for the same
@torch.inference_mode()
def _flops(case: Case) -> dict[str, int]:
    checkpoint = open_checkpoint(LoadOptions(source=case.checkpoint))
    family, models = checkpoint.family, build(checkpoint)
    unet, vae = models["unet"], models["vae"]
    given = StepInputs.draw(family, case)
    with torch.device("meta"):
        count = 2 * len(given.x)
        x = torch.empty(count, family.unet.in_channels, *given.x.shape[-2:])
        vector = None if family.unet.vector_dim is None else torch.empty(count, family.unet.vector_dim)
        contexts = given.contexts.repeat_interleave(len(given.x), dim=0)
        t = torch.empty(count)
    return {
        STEP: flop_count(lambda: unet(x, t, contexts, vector)),
        "VAE decode": flop_count(lambda: vae.decode(given.latents)),
        "VAE encode": flop_count(lambda: vae.posterior(given.image)),
    }


def float32_bytes(case: Case) -> int:
    """Compute the size of a checkpoint's weights in float32.

    Args:
        case: the checkpoint.

    Returns:
        Bytes.
    """
    states = open_checkpoint(LoadOptions(source=case.checkpoint)).states.values()
    return 4 * sum(math.prod(shape) for state in states for shape in state.shapes().values())
