"""Digests of the shapes of released networks: a file with exactly these is complete, and no network is built.

Building one needs torch, whose import takes longer than everything else that describing a checkpoint does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from sdinpaint.checkpoints.opening import Checkpoint

__all__ = ["KNOWN", "digest_of", "has_known_shapes"]

KNOWN: dict[str, str] = {
    "c55e62fe930cc437": "unet of sd15-inpainting",
    "ea87a060b3c34316": "vae of sd15-inpainting",
    "4920c67ccc737c69": "text_encoder of sd15-inpainting",
    "c3aa8c86710732a9": "unet of sd15",
    "a07b9109b738ba89": "unet of sd2-inpainting",
    "e6667ca281a1b0e9": "text_encoder of sd2-inpainting",
    "762c8a76409bec5d": "unet of sd2",
    "b199256d6df07129": "unet of sdxl-inpainting",
    "e6f43627d6985934": "vae of sdxl-inpainting",
    "60a836845667ff5a": "text_encoder of sdxl-inpainting",
    "b8fe8505cc7bbdf1": "text_encoder_2 of sdxl-inpainting",
    "7a06b21bef565db5": "unet of sdxl",
    "812d1c200444a80e": "unet of demo",
    "8162254b22039d27": "vae of demo",
    "62970a5973517bd2": "text_encoder of demo",
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
