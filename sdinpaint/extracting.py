"""Make a LoRA of the difference of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdinpaint.adapters.dialects import Dialect, checked_target, kohya_tensors, write_adapter
from sdinpaint.adapters.extracting import difference_of
from sdinpaint.checkpoints.building import find_dtype
from sdinpaint.checks import check_path, check_switch, check_whole
from sdinpaint.errors import AdapterError, explaining_memory
from sdinpaint.keywords import knowing_keywords
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.loading import load
from sdinpaint.version import __version__

__all__ = ["extract_lora"]

MAX_RANK = 2**14


@explaining_memory()
@knowing_keywords()
@torch.no_grad()
def extract_lora(
    base: str | Path | LatentDiffusion,
    tuned: str | Path | LatentDiffusion,
    rank: int = 32,
    out: str | Path | None = None,
    *,
    dialect: Dialect = "kohya",
    dtype: str | torch.dtype = "float32",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Make a LoRA that turns one model into another, as well as its rank allows.

    Each linear layer and convolution of the UNet and the text encoders is approximated by singular value decomposition;
    norms and biases are left out.

    Args:
        base: the model that the LoRA is to be added to: a source that `load` takes, or a pipeline.
        tuned: the model that it is to become.
        rank: the rank of each layer at most.
        out: the file to write (for "peft" the folder); None writes nothing.
        dialect: how it is written: "kohya", "diffusers" or "peft".
        dtype: dtype of the tensors.
        progress: show bars in a terminal or a notebook.

    Returns:
        The tensors of the LoRA by kohya's names.

    Raises:
        AdapterError: the models are of different families, no layer differs, or a difference is NaN or infinite.
        CheckpointError: a model cannot be loaded, or the file cannot be written.
        SettingError: an argument is wrong.
    """
    rank, progress = check_whole("rank", rank, 1, MAX_RANK), check_switch("progress", progress)
    stored = find_dtype(dtype)
    target = None if out is None else checked_target(check_path("out", out), dialect)
    pipes = [_loaded(name, model, progress) for name, model in {"base": base, "tuned": tuned}.items()]
    kinds = [pipe.family.kind for pipe in pipes]
    if kinds[0] != kinds[1]:
        raise AdapterError("ADAPTER_FAMILY", "tuned", f"a model of {kinds[1]}", expected=f"one of {kinds[0]}")
    adapter = difference_of(pipes[0].networks, pipes[1].networks, rank, stored, progress=progress)
    if target is not None:
        metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
        made = {"made_by": f"sdinpaint {__version__}", "sdinpaint.extracted": f"rank {rank} by SVD"}
        write_adapter(target, adapter, dialect, kinds[0], metadata | made)
    return kohya_tensors(adapter, kinds[0])


def _loaded(name: str, model: Any, progress: bool) -> LatentDiffusion:
    return (
        model if isinstance(model, LatentDiffusion) else load(check_path(name, model), device="cpu", progress=progress)
    )
