"""Digests of the shapes of released networks: a file with exactly these is complete, and no network is built.

Building one needs torch, whose import takes longer than everything else that describing a checkpoint does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from sdinpaint.checkpoints.opening import Checkpoint

__all__ = ["KNOWN", "digest_of", "has_known_shapes"]

KNOWN: dict[str, str] = {
    "a0865e6d150e6493": "unet of sd15-inpainting",
    "37256aca0e7bfb87": "vae of sd15-inpainting",
    "b4cda0b102465008": "text_encoder of sd15-inpainting",
    "2a5a255187fa7651": "unet of sd15",
    "fe0363caad18e08a": "unet of sd2-inpainting",
    "91d552099ada20bf": "text_encoder of sd2-inpainting",
    "2b3074235d66439a": "unet of sd2",
    "5cfde3dd5620a663": "unet of sdxl-inpainting",
    "fd773bc69c2924b0": "vae of sdxl-inpainting",
    "e6285ddd4929eb1e": "text_encoder of sdxl-inpainting",
    "659a7f62abe90a6d": "text_encoder_2 of sdxl-inpainting",
    "3186701eb803b940": "unet of sdxl",
    "01e3bef473b47398": "unet of demo",
    "aa5a314ae85f92b3": "vae of demo",
    "8c1ef35e3eeccc7f": "text_encoder of demo",
}
"""Digest of a configuration and its shapes -> a network that has them; a test compares it with the networks."""


def digest_of(config: object, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Compute the digest of a network's configuration and the shapes of its tensors.

    Args:
        config: the configuration, a dataclass.
        shapes: native name -> shape.

    Returns:
        16 hexadecimal digits.
    """
    rows = [repr(config), *(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def has_known_shapes(checkpoint: Checkpoint) -> bool:
    """Tell whether every component has exactly the tensors of a released network, none missing and none too many.

    Args:
        checkpoint: the opened checkpoint.

    Returns:
        True if so; False where only a network that is built from the configuration can tell.
    """
    configs, states = checkpoint.family.components, checkpoint.states
    return states.keys() == configs.keys() and all(
        not states[name].unexpected and digest_of(config, states[name].shapes()) in KNOWN
        for name, config in configs.items()
    )
