"""Checkpoints to measure with: one that exists, or a random one of a family's full size, made where it is needed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sdinpaint.checkpoints.opening import DEMO, MODELS
from sdinpaint.families import SD2_INPAINT, SD15_INPAINT, SDXL_INPAINT, Family
from sdinpaint.loading import save_diffusers
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.text.tokenizer import Tokenizer, train_tokenizer

__all__ = ["DEMO_FAMILY", "FULL_SIZE", "checkpoint_of", "fill", "random_pipeline"]

FULL_SIZE = {"sd15": SD15_INPAINT, "sd2": SD2_INPAINT, "sdxl": SDXL_INPAINT}
DEMO_FAMILY = "demo"
CORPUS = ["a red fox on a red fox"]
"""Learned by the vocabulary of a random checkpoint, since CLIP's may not be on the machine."""


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random weights under which activations keep their size, no norm left at 1 and 0; the same for the same seed."""
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
    """A pipeline of random weights; by default with a vocabulary of single letters, and as few rows for it."""
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
    """The folder of the included checkpoint, or of a random one in `dtype`, which is gone afterwards."""
    if family == DEMO_FAMILY:
        yield str(DEMO)
        return
    with tempfile.TemporaryDirectory(prefix="sdinpaint-bench-") as folder:
        save_diffusers(folder, random_pipeline(FULL_SIZE[family], dtype))
        yield folder
