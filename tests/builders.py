"""Small random pipelines, and their weights written in every layout that is found in the wild."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sdinpaint_weights.export import ldm_state
from torch import nn

from sdinpaint.families import Family
from sdinpaint.models import VAE, CLIPText, UNet
from sdinpaint.pipeline import Pipeline
from sdinpaint.text.tokenizer import Tokenizer

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
SCHEDULE = {
    name: torch.linspace(0.001, 0.9, 1000) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "logvar")
}
"""Some of the buffers that the official files hold beside the weights."""
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names in the autoencoder's attention that diffusers had until 2022."""


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random weights that keep the size of activations; no norm is left at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        for name, weight in module.named_parameters(recurse=False):
            if norm and name == "weight":
                weight.uniform_(0.7, 1.3, generator=generator)
            else:
                bound = math.sqrt(3 / weight[0].numel()) if weight.ndim > 1 else 0.1
                weight.uniform_(-bound, bound, generator=generator)
    return model


def random_pipeline(family: Family, tokenizer: Tokenizer) -> Pipeline:
    """The same weights for the same family, in every process."""
    models = UNet(family.unet), VAE(family.vae), CLIPText(family.text)
    unet, vae, text = (fill(model, seed) for seed, model in enumerate(models))
    return Pipeline(family, unet, vae, text, tokenizer)


def four_channels(family: Family) -> Family:
    """The same family, made for text to image."""
    return replace(family, name="sd15", unet=replace(family.unet, in_channels=4))


def components(pipe: Pipeline) -> dict[str, dict[str, torch.Tensor]]:
    """Native names and tensors by component."""
    return {"unet": pipe.unet.state_dict(), "vae": pipe.vae.state_dict(), "text_encoder": pipe.text.state_dict()}


def single_file_state(pipe: Pipeline) -> dict[str, torch.Tensor]:
    """All tensors under the names of the official single files, with the buffers that those hold too."""
    ids = torch.arange(pipe.text.config.context_length)[None]
    return ldm_state(components(pipe)) | {f"{TEXT}text_model.embeddings.position_ids": ids} | SCHEDULE


def averages(unet: nn.Module) -> dict[str, torch.Tensor]:
    """A UNet's weights as LitEma names them, with its two counters."""
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    joined = {name.replace(".", ""): tensor for name, tensor in unet.state_dict().items()}
    return {f"model_ema.diffusion_model{name}": tensor for name, tensor in joined.items()} | counters


def save_ckpt(path: Path, state: dict[str, torch.Tensor], monkeypatch, *, legacy: bool = False) -> None:
    """What Lightning writes: `state` inside a dictionary, beside callbacks that are keyed by a class."""
    parts = LIGHTNING.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    sys.modules[LIGHTNING].ModelCheckpoint = kind
    around = {"epoch": 3, "global_step": 470_000, "callbacks": {kind: {"best_model_score": torch.tensor(0.5)}}}
    torch.save({"state_dict": state} | around, path, _use_new_zipfile_serialization=not legacy)
    for end in range(1, len(parts) + 1):
        monkeypatch.delitem(sys.modules, ".".join(parts[:end]))


class Runs:
    """Asks whoever unpickles it to write a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return exec, (f"open({str(self.sentinel)!r}, 'w').close()",)


def rewrite(folder: Path, file: str, change) -> Path:
    """Replace the tensors of one safetensors file in a model folder by `change(tensors)`."""
    path = folder / file
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
    return folder


def set_json(folder: Path, file: str, **values) -> Path:
    """Change some values of a JSON table in a model folder."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of half-precision zeros that takes next to no room on the disk, however large it is."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path

