"""Checkpoints to measure with: an existing one, or a random one of a family's full size, made when it is needed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sdinpaint.checkpoints.building import MODELS
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.families import SD2_INPAINT, SD15_INPAINT, SDXL_INPAINT, Family
from sdinpaint.loading import save_diffusers
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.text.tokenizer import Tokenizer, train_tokenizer

__all__ = ["DEMO_FAMILY", "FULL_SIZE", "checkpoint_of", "fill", "random_pipeline"]

FULL_SIZE = {"sd15": SD15_INPAINT, "sd2": SD2_INPAINT, "sdxl": SDXL_INPAINT}
DEMO_FAMILY = "demo"
CORPUS = ["a red fox on a red fox"]
"""The corpus of a random checkpoint's vocabulary, since CLIP's may not be on the machine."""


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Fill a model with random weights under which activations keep their size, and norms are not the identity.

    Args:
        model: any network, on the CPU.
        seed: the same seed gives the same weights.

    Returns:
        The model itself.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) and name == "weight":
                weight.uniform_(0.7, 1.3, generator=generator)
            else:
                bound = math.sqrt(3 / weight[0].numel()) if weight.ndim > 1 else 0.1
                weight.uniform_(-bound, bound, generator=generator)
    return model


def random_pipeline(
    family: Family, dtype: torch.dtype = torch.float32, seed: int = 0, tokenizer: Tokenizer | None = None
) -> Pipeline:
    """Make a pipeline of random weights on the CPU.

    Args:
        family: its networks.
        dtype: of the weights.
        seed: of the weights.
        tokenizer: by default one with a small vocabulary, to which the text encoders' embeddings are cut.

    Returns:
        The pipeline.
    """
    if tokenizer is None:
        tokenizer = train_tokenizer(CORPUS, 520)
        texts = [replace(text, vocab_size=tokenizer.vocab_size) for text in family.texts]
        family = replace(family, text=texts[0], text_2=texts[1] if len(texts) > 1 else None)
    models: list[Any] = []
    for index, (name, config) in enumerate(family.components.items()):
        with torch.device("meta"):
            model = MODELS[name](config).to(dtype)
        models.append(fill(model.to_empty(device="cpu"), 10 * seed + index))
    unet, vae, *texts_ = models
    return Pipeline(family, unet, vae, texts_, tokenizer)


@contextmanager
def checkpoint_of(family: str, dtype: torch.dtype) -> Iterator[str]:
    """Provide the folder of the included checkpoint, or of a random one for as long as the block lasts.

    Args:
        family: "demo" for the included checkpoint, or a family of FULL_SIZE.
        dtype: of a random checkpoint's files.
    """
    if family == DEMO_FAMILY:
        yield str(DEMO)
        return
    with tempfile.TemporaryDirectory(prefix="sdinpaint-bench-") as folder:
        save_diffusers(folder, random_pipeline(FULL_SIZE[family], dtype))
        yield folder
