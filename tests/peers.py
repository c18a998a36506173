"""Twins: our configurations as models of diffusers and transformers, with random weights that hide no mistake."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, load_tensors, native_state
from sdinpaint_weights.weights import Entry, Weights
from torch import nn

from sdinpaint.families import Family, TextConfig, UNetConfig, VAEConfig

RESIDUAL_END = re.compile(r"resnets\.\d+\.conv2\.|attentions\.\d+\.(proj_out|to_out\.0)\.")
"""The last layer of every residual branch that is added to a feature map."""
QUIET = 0.03


def unet_twin(config: UNetConfig) -> nn.Module:
    """diffusers' UNet of our sizes; its memory is not filled yet."""
    from diffusers import UNet2DConditionModel

    attends = ["CrossAttn" if depth else "" for depth in config.transformer_depth]
    with torch.device("meta"):
        model = UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=[config.model_channels * mult for mult in config.channel_mult],
            layers_per_block=config.num_res_blocks,
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.num_heads,  # the released configurations give the number of heads by this name
            norm_num_groups=config.norm_groups,
            down_block_types=[f"{kind}DownBlock2D" for kind in attends],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attends)],
            sample_size=8,
        )
    return model.to_empty(device="cpu").eval()


def vae_twin(config: VAEConfig) -> nn.Module:
    """diffusers' autoencoder of our sizes; its memory is not filled yet."""
    from diffusers import AutoencoderKL

    widths = [config.channels * mult for mult in config.channel_mult]
    with torch.device("meta"):
        model = AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            latent_channels=config.latent_channels,
            block_out_channels=widths,
            layers_per_block=config.num_res_blocks,
            norm_num_groups=config.norm_groups,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            scaling_factor=config.scaling_factor,
        )
    return model.to_empty(device="cpu").eval()


def text_twin(config: TextConfig) -> nn.Module:
    """transformers' text encoder of our sizes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.context_length,
        hidden_act=config.activation,
        bos_token_id=config.vocab_size - 2,
        eos_token_id=config.vocab_size - 1,
        pad_token_id=config.vocab_size - 1,
    )
    return CLIPTextModel(sizes).eval()  # not on meta: its position ids are no parameter


@torch.no_grad()
def fill(model: nn.Module, seed: int, residual: float = 1.0) -> nn.Module:
    """Random weights that keep the size of activations; norms get weights of their own, so that none can be swapped.

    With `residual` far below 1 feature maps stay as small as the input, and then the eps of every norm counts.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        scale = residual if RESIDUAL_END.search(name) or weight.ndim == 1 else 1.0
        if "norm" in name and name.endswith("weight"):
            weight.uniform_(0.7, 1.3, generator=generator)
        else:
            bound = scale * (math.sqrt(3 / weight[0].numel()) if weight.ndim > 1 else 0.1)
            weight.uniform_(-bound, bound, generator=generator)
    return model


class InMemory(Weights):
    """A model's tensors as if they were those of a file; reading them copies nothing."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        entries = {name: Entry(None, 0, tensor.dtype, tuple(tensor.shape), ()) for name, tensor in tensors.items()}
        super().__init__(Path("in memory"), "safetensors", entries)
        self.tensors = tensors

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.tensors[key].to(dtype or self.tensors[key].dtype)


def ours(kind: type[nn.Module], config, component: str, twin: nn.Module) -> nn.Module:
    """Our model of a component over the very tensors of its twin, through the name tables."""
    with torch.device("meta"):
        model = kind(config)
    weights = InMemory(twin.state_dict())
    state = native_state(weights, component, identify(weights.shapes()))
    check_complete(state, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict(load_tensors(state), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def twin_pipeline(family: Family, tokenizer_folder: Path, residual: float = 1.0):
    """diffusers' inpainting pipeline of our sizes with random weights, and DDIM as released."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
    from transformers import CLIPTokenizer

    schedule = family.schedule
    pipe = StableDiffusionInpaintPipeline(
        unet=fill(unet_twin(family.unet), 1, residual),
        vae=fill(vae_twin(family.vae), 2, residual),
        text_encoder=fill(text_twin(family.text), 3),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
