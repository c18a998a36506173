"""Twins: models of diffusers and transformers with random weights that let no mistake pass, and ours over the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from sdinpaint_weights.dtypes import STORED
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, load_tensors, native_state
from sdinpaint_weights.weights import Entry, Weights
from torch import Tensor, nn

from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.families import Family

Json = Mapping[str, Any]

QUIET = 0.03
"""Far below 1: feature maps then stay as small as the input, and the eps of every norm counts."""
RESIDUAL_END = re.compile(r"resnets\.\d+\.conv2\.|attentions\.\d+\.(proj_out|to_out\.0)\.")
"""The last layer of every residual branch over a feature map, under diffusers' names."""


def unet_twin(config: Json) -> nn.Module:
    """diffusers' UNet; its memory holds nothing yet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(dict(config))
    return model.to_empty(device="cpu").eval()


def vae_twin(config: Json) -> nn.Module:
    """diffusers' autoencoder; its memory holds nothing yet."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL.from_config(dict(config))
    return model.to_empty(device="cpu").eval()


def text_twin(config: Json) -> nn.Module:
    """transformers' text encoder; its memory holds nothing yet but the position ids, which are no parameter."""
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = kind(transformers.CLIPTextConfig.from_dict(dict(config)))
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1]))
    return model.eval()


def pipeline_twin(family: Family, tokenizer_folder: Path, residual: float = 1.0) -> Any:
    """diffusers' pipeline for inpainting with random weights and the family's configuration."""
    import diffusers

    configs = diffusers_configs(family)
    texts = [text_twin(configs[f"{name}/config.json"]) for name in family.components if name.startswith("text")]
    parts = {
        "unet": fill(unet_twin(configs["unet/config.json"]), 1, residual),
        "vae": fill(vae_twin(configs["vae/config.json"]), 2, residual),
        "text_encoder": fill(texts[0], 3),
        "tokenizer": _padded(tokenizer_folder, family.text.pad_id),
        "scheduler": diffusers.DDIMScheduler.from_config(configs["scheduler/scheduler_config.json"]),
    }
    if family.text_2 is None:
        pipe = diffusers.StableDiffusionInpaintPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        parts |= {"text_encoder_2": fill(texts[1], 4), "tokenizer_2": _padded(tokenizer_folder, family.text_2.pad_id)}
        pipe = diffusers.StableDiffusionXLInpaintPipeline(
            **parts, force_zeros_for_empty_prompt=family.zeros_for_none, add_watermarker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _padded(tokenizer_folder: Path, pad_id: int | None) -> Any:
    """transformers' tokenizer, padding with a token of this id; None: as the folder says."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    if pad_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


@torch.no_grad()
def fill(model: nn.Module, seed: int, residual: float = 1.0) -> nn.Module:
    """Random weights under which activations keep their size; no two norms are alike, so that none can be swapped.

    `residual` scales what residual branches add to a feature map, and all biases.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(2**20 + 7).uniform_(-1, 1, generator=generator)
    for name, weight in model.named_parameters():
        scale = residual if weight.ndim == 1 or RESIDUAL_END.search(name) else 1.0
        bound = scale * (0.1 if weight.ndim == 1 else math.sqrt(3 / weight[0].numel()))
        middle, bound = (1.0, 0.3) if "norm" in name and name.endswith("weight") else (0.0, bound)
        if weight.numel() < len(drawn):
            weight.uniform_(middle - bound, middle + bound, generator=generator)
        else:  # the same numbers again and again, which takes a fifth of the time
            for part in weight.view(-1).split(len(drawn)):
                torch.mul(drawn[: len(part)], bound, out=part)
    return model


class InMemory(Weights):
    """A model's tensors as if they were those of a file; reading one copies nothing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        entries = {
            name: Entry(None, 0, STORED[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), ())
            for name, tensor in tensors.items()
        }
        super().__init__(Path("in memory"), "safetensors", entries)
        self.tensors = tensors

    def runs(self, keys: Iterable[str]) -> list[list[str]]:
        return [[key] for key in keys]

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[key].to(dtype or self.tensors[key].dtype)


def ours(kind: type[nn.Module], config: Any, component: str, twin: nn.Module) -> nn.Module:
    """Our model over the very tensors of its twin, through the name tables."""
    with torch.device("meta"):
        model = kind(config)
    weights = InMemory(twin.state_dict())
    state = native_state(weights, component, identify(weights.shapes()))
    check_complete(state, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict(load_tensors(state), strict=True, assign=True)
    return model.eval().requires_grad_(False)
