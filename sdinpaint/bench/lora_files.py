"""Random LoRAs of the size that people train, for the suite."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sdinpaint.adapters.dialects import kohya_tensors
from sdinpaint.adapters.stack import targets_in
from sdinpaint.checkpoints.building import build
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.load_options import LoadOptions

__all__ = ["RANK", "write_lora"]

RANK = 64
SIZE = 0.01
"""Standard deviation of the numbers."""


def write_lora(path: Path, checkpoint: str) -> None:
    """Write a LoRA in float16 of all linear layers of a UNet's transformers, under kohya's names.

    Args:
        path: the file.
        checkpoint: a checkpoint of the model.
    """
    opened = open_checkpoint(LoadOptions(source=checkpoint), progress=False)
    network = build(opened)["unet"]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (SIZE * torch.randn(*shape, generator=generator)).half()

    adapter = {}
    for target in targets_in({"unet": network}):
        weight = network.get_submodule(target.module).weight
        if ".attentions." in target.name and weight.ndim > 1:
            down, up = draw(RANK, *weight.shape[1:]), draw(len(weight), RANK, *[1] * (weight.ndim - 2))
            adapter[target] = {"down": down, "up": up, "alpha": torch.tensor(float(RANK), dtype=torch.float16)}
    save_file(kohya_tensors(adapter, opened.family.kind), path)
