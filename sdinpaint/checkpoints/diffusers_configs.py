"""Write a family's configuration as the JSON files of diffusers."""

from __future__ import annotations

from sdinpaint.checkpoints.schedule_config import PREDICTIONS
from sdinpaint.families import (
    TEXT_ENCODERS,
    TOKENIZERS,
    ControlNetConfig,
    Family,
    TextConfig,
    VAEConfig,
)

__all__ = ["controlnet_json", "diffusers_configs"]


def controlnet_json(config: ControlNetConfig) -> dict[str, object]:
    """Make diffusers' config.json of a ControlNet.

    Args:
        config: its configuration.

    Returns:
        The JSON table.
    """
    unet = config.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    table: dict[str, object] = {
        "_class_name": "ControlNetModel",
        "act_fn": "silu",
        "attention_head_dim": unet.num_heads or [width // (unet.head_dim or width) for width in widths],
        "block_out_channels": widths,
        "conditioning_embedding_out_channels": list(config.hint_widths),
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in unet.transformer_depth],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "freq_shift": unet.freq_shift,
        "norm_eps": unet.norm_eps,
        "norm_num_groups": unet.norm_groups,
        # diffusers ignores the number of a level without transformers, but takes the last one for the middle block.
        "transformer_layers_per_block": [depth or unet.middle_depth for depth in unet.transformer_depth],
        "use_linear_projection": unet.linear_projection,
    }
    if unet.vector_dim is not None:
        table |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": unet.vector_dim,
        }
    return table


def diffusers_configs(family: Family) -> dict[str, dict[str, object]]:
    """Make the JSON files that diffusers' pipelines need beside the weights.

    Args:
        family: the configuration.

    Returns:
        {relative path: JSON table}.
    """
    texts = {
        f"{name}/config.json": _text_json(config) for name, config in zip(TEXT_ENCODERS, family.texts, strict=False)
    }
    return {
        "unet/config.json": _unet_json(family),
        "vae/config.json": _vae_json(family.vae, family.size),
        **texts,
        "scheduler/scheduler_config.json": _scheduler_json(family),
        "model_index.json": _index_json(family),
    }


def _unet_json(family: Family) -> dict[str, object]:
    unet = family.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = ["CrossAttn" if depth else "" for depth in unet.transformer_depth]
    # diffusers takes the last number for the middle block too, where a level without attention has 0 here.
    depths = [*(max(depth, 1) for depth in unet.transformer_depth[:-1]), unet.middle_depth]
    pooled = family.texts[-1].projection_dim
    sizes = (
        {}
        if unet.vector_dim is None or pooled is None
        else {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (unet.vector_dim - pooled) // 6,
            "projection_class_embeddings_input_dim": unet.vector_dim,
        }
    )
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": unet.num_heads or [width // (unet.head_dim or width) for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attends],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attends)],
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "layers_per_block": unet.num_res_blocks,
        "freq_shift": unet.freq_shift,
        "norm_eps": unet.norm_eps,
        "norm_num_groups": unet.norm_groups,
        "sample_size": family.size // 8,
        "transformer_layers_per_block": depths,
        "use_linear_projection": unet.linear_projection,
        **sizes,
    }


def _vae_json(vae: VAEConfig, size: int) -> dict[str, object]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.num_res_blocks,
        "norm_num_groups": vae.norm_groups,
        "sample_size": size,
        "scaling_factor": vae.scaling_factor,
        **({} if vae.latents_mean is None else {"latents_mean": list(vae.latents_mean)}),
        **({} if vae.latents_std is None else {"latents_std": list(vae.latents_std)}),
    }


def _text_json(text: TextConfig) -> dict[str, object]:
    return {
        "architectures": [_text_class(text)],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        # transformers leaves out the last layers of a file that has more; for SDXL it skips one more by itself
        "num_hidden_layers": text.num_layers - text.skip_last + (not text.final_norm),
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.context_length,
        "hidden_act": text.activation,
        "layer_norm_eps": text.norm_eps,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1 if text.pad_id is None else text.pad_id,
        **({} if text.projection_dim is None else {"projection_dim": text.projection_dim}),
    }


def _text_class(text: TextConfig) -> str:
    return "CLIPTextModel" if text.projection_dim is None else "CLIPTextModelWithProjection"


def _scheduler_json(family: Family) -> dict[str, object]:
    schedule = family.schedule
    return {
        "_class_name": _scheduler_class(family),
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": next(theirs for theirs, ours in PREDICTIONS.items() if ours == schedule.prediction),
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.end_at_zero,
        "timestep_spacing": "leading",
        "clip_sample": schedule.clip_range is not None,
        "clip_sample_range": 1.0 if schedule.clip_range is None else schedule.clip_range,
        **({"rescale_betas_zero_snr": True} if schedule.zero_snr else {}),
    }


def _scheduler_class(family: Family) -> str:
    """Return the scheduler's class as in the releases; diffusers can make each of the two from either table."""
    return "DDIMScheduler" if family.text_2 is None else "EulerDiscreteScheduler"


def _index_json(family: Family) -> dict[str, object]:
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": _scheduler_class(family)}
    for name, tokenizer, text in zip(TEXT_ENCODERS, TOKENIZERS, family.texts, strict=False):
        parts |= {name: _text_class(text), tokenizer: "CLIPTokenizer"}
    libraries = {name: "transformers" if kind.startswith("CLIP") else "diffusers" for name, kind in parts.items()}
    index: dict[str, object] = {
        "_class_name": _pipeline_class(family),
        "_diffusers_version": "0.42.0",  # an inpainting folder without one is refused
        **{name: [libraries[name], part] for name, part in parts.items()},
    }
    if family.text_2 is not None:
        return index | {"force_zeros_for_empty_prompt": family.zeros_for_none}
    return index | {
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _pipeline_class(family: Family) -> str:
    kind = "" if family.text_2 is None else "XL"
    task = "" if family.unet.in_channels == family.unet.out_channels else "Inpaint"
    return f"StableDiffusion{kind}{task}Pipeline"
