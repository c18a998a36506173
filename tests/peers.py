"""Twins: models of diffusers and transformers with random weights that let no mistake pass, and ours over the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, load_tensors, native_state
from sdinpaint_weights.weights import Entry, Weights
from torch import Tensor, nn

from sdinpaint.configs import diffusers_configs
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
    """transformers' text encoder; not by way of meta, because its position ids are no parameter."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config))).eval()


def pipeline_twin(family: Family, tokenizer_folder: Path, residual: float = 1.0) -> Any:
    """diffusers' inpainting pipeline with random weights and the family's configuration."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
    from transformers import CLIPTokenizer

    configs = diffusers_configs(family)
    pipe = StableDiffusionInpaintPipeline(
        unet=fill(unet_twin(configs["unet/config.json"]), 1, residual),
        vae=fill(vae_twin(configs["vae/config.json"]), 2, residual),
        text_encoder=fill(text_twin(configs["text_encoder/config.json"]), 3),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        scheduler=DDIMScheduler.from_config(configs["scheduler/scheduler_config.json"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def fill(model: nn.Module, seed: int, residual: float = 1.0) -> nn.Module:
    """Random weights under which activations keep their size; no two norms are alike, so that none can be swapped.

    `residual` scales what residual branches add to a feature map, and all biases.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        scale = residual if weight.ndim == 1 or RESIDUAL_END.search(name) else 1.0
        bound = scale * (0.1 if weight.ndim == 1 else math.sqrt(3 / weight[0].numel()))
        middle, bound = (1.0, 0.3) if "norm" in name and name.endswith("weight") else (0.0, bound)
        weight.uniform_(middle - bound, middle + bound, generator=generator)
    return model


class InMemory(Weights):
    """A model's tensors as if they were those of a file; reading one copies nothing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        entries = {name: Entry(None, 0, tensor.dtype, tuple(tensor.shape), ()) for name, tensor in tensors.items()}
        super().__init__(Path("in memory"), "safetensors", entries)
        self.tensors = tensors

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
