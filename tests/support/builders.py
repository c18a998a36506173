"""Small random pipelines, and files made of their weights: in every layout found in the wild, or broken on purpose."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sdinpaint_weights.export import ldm_state
from torch import Tensor, nn

from sdinpaint.bench.checkpoints import fill
from sdinpaint.families import SD2_INPAINT, SDXL_INPAINT, Family, Prediction
from sdinpaint.models import VAE, CLIPText, UNet
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.text.tokenizer import Tokenizer

Tensors = dict[str, Tensor]

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
SCHEDULE = {"betas": BETAS.float(), "alphas_cumprod": ALPHAS.float(), "sqrt_alphas_cumprod": ALPHAS.sqrt().float()}
"""Some of the buffers that the official files hold beside the weights."""
POSITIONS = torch.arange(77)[None]
POSITIONS_KEYS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
}
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"
"""Where Lightning has the class by which its checkpoints' callbacks are keyed."""


def small(family: Family) -> Family:
    """The narrowest of the kind, for tests in which only the files or the arguments count."""
    unet = replace(family.unet, model_channels=12, num_res_blocks=1)
    return replace(family, unet=unet, vae=replace(family.vae, channels=5), text=replace(family.text, num_layers=1))


def for_text_to_image(family: Family) -> Family:
    """Return the family with 4 input channels: a model that is shown no mask."""
    name = family.name.removesuffix("-inpainting") + ("-v" if family.schedule.prediction == "v" else "")
    return replace(family, name=name, unet=replace(family.unet, in_channels=4))


def as_sd2(tiny: Family, prediction: Prediction = "eps") -> Family:
    """SD2's structure in the sizes of a tiny SD1: heads of one size, linear projections, gelu, padding with 0."""
    return replace(
        SD2_INPAINT,
        unet=replace(tiny.unet, num_heads=None, head_dim=12, linear_projection=True),
        vae=tiny.vae,
        text=replace(tiny.text, activation="gelu", pad_id=0),
        schedule=replace(tiny.schedule, prediction=prediction),
        size=tiny.size,
    )


def as_sdxl(tiny: Family) -> Family:
    """SDXL's structure in the sizes of a tiny SD1: two text encoders, a pooled text of 26, sizes of 14 numbers each."""
    text = replace(tiny.text, skip_last=1, final_norm=False)
    text_2 = replace(
        text, width=40, mlp_width=52, num_layers=4, num_heads=5, activation="gelu", pad_id=0, projection_dim=26
    )
    unet = replace(
        tiny.unet,
        transformer_depth=(0, 1, 2),
        middle_depth=2,
        context_dim=28 + 40,
        num_heads=None,
        head_dim=12,
        linear_projection=True,
        vector_dim=26 + 6 * 14,
    )
    return replace(SDXL_INPAINT, unet=unet, vae=tiny.vae, text=text, text_2=text_2, size=tiny.size)


def random_pipeline(family: Family, tokenizer: Tokenizer, seed: int = 0) -> Pipeline:
    """Return a pipeline with the same weights for the same family and seed, in every process."""
    with torch.device("meta"):
        models = UNet(family.unet), VAE(family.vae), *map(CLIPText, family.texts)
    unet, vae, *texts = (
        fill(model.to_empty(device="cpu"), len(models) * seed + i).eval().requires_grad_(False)
        for i, model in enumerate(models)
    )
    return Pipeline(family, unet, vae, texts, tokenizer)


def states(pipe: Pipeline) -> dict[str, Tensors]:
    """Native names and tensors by component."""
    models = pipe.unet, pipe.vae, *pipe.condition.encoders
    return {name: model.state_dict() for name, model in zip(pipe.family.components, models, strict=True)}


def single_file(pipe: Pipeline) -> Tensors:
    """All tensors as the official single files name them, with the buffers that those hold too."""
    positions = {POSITIONS_KEYS[pipe.family.kind]: POSITIONS} if pipe.family.kind in POSITIONS_KEYS else {}
    return ldm_state(states(pipe), pipe.family.kind) | positions | SCHEDULE


def averages(unet: nn.Module) -> Tensors:
    """A UNet's weights as LDM's LitEma names its averages, with its two counters."""
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    joined = {name.replace(".", ""): tensor for name, tensor in unet.state_dict().items()}
    return {f"model_ema.diffusion_model{name}": tensor for name, tensor in joined.items()} | counters


@contextmanager
def lightning_callback() -> Iterator[type]:
    """Give the class by which Lightning's checkpoints key a callback; within, it can be imported, as pickling needs."""
    parts = CALLBACK.split(".")
    modules = {".".join(parts[:end]): types.ModuleType(parts[end - 1]) for end in range(1, len(parts) + 1)}
    kind = modules[CALLBACK].ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": CALLBACK})
    with patch.dict(sys.modules, modules):
        yield kind


def save_lightning(path: Path, state: Tensors, *, legacy: bool = False) -> None:
    """A training checkpoint as Lightning writes it: the weights, beside callbacks that are keyed by a class."""
    with lightning_callback() as kind:
        around = {"epoch": 3, "global_step": 470_000, "callbacks": {kind: {"best_model_score": np.float64(0.5)}}}
        torch.save({**around, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)


class Runs:
    """Asks whoever unpickles it to write a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return exec, (f"open({str(self.sentinel)!r}, 'w').close()",)


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of a safetensors file by `change(tensors)`."""
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not views of the file to replace
    save_file({name: tensor.contiguous() for name, tensor in change(held).items()}, path)


def rewrite_json(path: Path, **values: object) -> None:
    """Set some values of a JSON table."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of half-precision zeros that takes no room on the disk, however large it is."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path
