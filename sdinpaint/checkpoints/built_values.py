"""Which values of a configuration are built: a table for each component, and the check of a file against it.

Every argument of the classes of diffusers 0.42 and transformers 5 that these files configure is in exactly one part of
its table, which a test compares with their signatures. A value outside of its table is refused, a key outside of it is
told, and null means the class's default, or false where that is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdinpaint.errors import CheckpointError
from sdinpaint.text.vocabulary import END, START

__all__ = ["CONTROLNET", "SCHEDULER", "SCHEDULERS", "TABLES", "TEXT", "TOKENIZER", "UNET", "VAE", "Json", "Table"]

Json = Mapping[str, Any]
HINT = "use a program that has it, such as diffusers; where the file is wrong, give the right one: config=FOLDER"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The keys of one component's configuration, each in one of four parts."""

    title: str
    """Path of the file in a diffusers folder, or the component's name."""
    built: Mapping[str, Sequence[Any]]
    """Key -> the values that are built; the first one is the class's default."""
    rows: Mapping[str, frozenset[Any]] = field(default_factory=dict)
    """Key of a list, or of one value for all of it -> what its members may be."""
    read: Mapping[str, Any]
    """Key that `configs` reads and checks -> the class's default."""
    proven: frozenset[str] = frozenset()
    """Sizes, which the shapes of the weights prove."""
    unused: frozenset[str] = frozenset()
    """Keys that change no result: of training, of precision, of files, or of choices that a run makes itself."""
    null_is_a_value: frozenset[str] = frozenset()
    """Keys of `built` whose null is not the default but a model of another kind."""

    @property
    def known(self) -> frozenset[str]:
        """The keys of all parts."""
        return frozenset({*self.built, *self.rows, *self.read, *self.proven, *self.unused})

    def settings(self, json: Json, where: Path) -> dict[str, Any]:
        """Check a configuration, and complete what is read of it by the class's defaults.

        Args:
            json: the configuration; it is empty where there is none, as beside a single file.
            where: the file or folder that errors name.

        Returns:
            Key -> value, without nulls, and with a default for each key of `read`; empty where `json` is.

        Raises:
            CheckpointError: a value is not built; it is named with those that are.
        """
        for key, values in self.built.items():
            given = json.get(key)
            # null switches off what is on by default
            is_value = key in self.null_is_a_value or values[0] is True
            absent = key not in json or (given is None and not is_value)
            if not absent and not any(_same(given, value) for value in values):
                self.refuse(where, key, given, " or ".join(map(_shown, values)))
        for key, members in self.rows.items():
            given = json.get(key)
            row = given if isinstance(given, list) else [given]
            if given is not None and not all(any(_same(one, member) for member in members) for one in row):
                self.refuse(where, key, given, " or ".join(sorted(map(_shown, members))))
        given = {key: value for key, value in json.items() if value is not None}
        return {**self.read, **given} if json else {}

    def unknown(self, json: Json) -> list[str]:
        """List the keys of a configuration that are in no part of the table; names of metadata begin with "_"."""
        return [key for key in json if key not in self.known and not key.startswith("_")]

    def refuse(self, where: Path, key: str, value: object, built: str) -> None:
        """Refuse a value that is not built.

        Args:
            where: the file or folder that the error names.
            key: the key.
            value: its value.
            built: what is built instead, in words.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            "CKPT_NOT_BUILT", where, f"{self.title}: {key} is {_shown(value)}", expected=built, hint=HINT
        )


def _same(given: object, value: object) -> bool:
    """Tell whether two values of JSON are equal, where true is no number."""
    return isinstance(given, bool) == isinstance(value, bool) and given == value


def _shown(value: object) -> str:
    """Return a value as JSON writes it, and of a long one the beginning."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


SILU = ("silu", "swish")
DOWN_BLOCKS = frozenset({"CrossAttnDownBlock2D", "DownBlock2D"})
EMA_OF_TRAINING = frozenset(
    {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
)
"""Keys that diffusers' training scripts leave in the configuration of averaged weights."""

_DENOISING = Table(
    title="unet",
    built={
        "act_fn": SILU,
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "downsample_padding": (1,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "flip_sin_to_cos": (True,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
    },
    rows={"down_block_types": DOWN_BLOCKS, "only_cross_attention": frozenset({False})},
    read={
        "attention_head_dim": 8,
        "freq_shift": 0,
        "in_channels": None,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
    },
    proven=frozenset(
        {
            "addition_time_embed_dim",
            "block_out_channels",
            "cross_attention_dim",
            "layers_per_block",
            "projection_class_embeddings_input_dim",
            "transformer_layers_per_block",
            "use_linear_projection",
        }
    ),
    # softmax is computed in float32 in any case; heads of the additional embedding are those of other kinds of it
    unused=frozenset({"addition_embed_type_num_heads", "upcast_attention", *EMA_OF_TRAINING}),
    null_is_a_value=frozenset({"mid_block_type"}),  # a UNet without a middle
)
"""The keys that UNets and ControlNets have in common."""

UNET = Table(
    title="unet",
    built={
        **_DENOISING.built,
        "_class_name": ("UNet2DConditionModel",),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embeddings_concat": (False,),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "num_attention_heads": (None,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    },
    rows={**_DENOISING.rows, "up_block_types": frozenset({"CrossAttnUpBlock2D", "UpBlock2D"})},
    read={**_DENOISING.read, "sample_size": None},
    proven=_DENOISING.proven
    | {
        "conv_in_kernel",
        "conv_out_kernel",
        "out_channels",
        "reverse_transformer_layers_per_block",
        "time_embedding_dim",
    },
    unused=_DENOISING.unused | {"dropout"},
    null_is_a_value=_DENOISING.null_is_a_value,
)
"""diffusers UNet2DConditionModel."""

CONTROLNET = Table(
    title="controlnet",
    built={
        **_DENOISING.built,
        "_class_name": ("ControlNetModel",),
        "controlnet_conditioning_channel_order": ("rgb",),
        "global_pool_conditions": (False,),
    },
    rows=_DENOISING.rows,
    read={**_DENOISING.read, "num_attention_heads": None},
    proven=_DENOISING.proven | {"conditioning_channels", "conditioning_embedding_out_channels"},
    # the sizes of the UNet that it was made from, which diffusers copies and does not read
    unused=_DENOISING.unused | {"sample_size"},
    null_is_a_value=_DENOISING.null_is_a_value,
)
"""diffusers ControlNetModel."""

VAE = Table(
    title="vae",
    built={
        "_class_name": ("AutoencoderKL",),
        "act_fn": SILU,
        "mid_block_add_attention": (True,),
        "shift_factor": (None, 0),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    rows={
        "down_block_types": frozenset({"DownEncoderBlock2D"}),
        "up_block_types": frozenset({"UpDecoderBlock2D"}),
    },
    read={"latents_mean": None, "latents_std": None, "norm_num_groups": 32, "scaling_factor": 0.18215},
    proven=frozenset({"block_out_channels", "in_channels", "latent_channels", "layers_per_block", "out_channels"}),
    # a VAE that overflows float16 is run again in float32, whatever its file says
    unused=frozenset({"force_upcast", "sample_size", *EMA_OF_TRAINING}),
)
"""diffusers AutoencoderKL."""

TEXT = Table(
    title="text_encoder",
    built={
        "add_cross_attention": (False,),
        "is_decoder": (False,),
        "is_encoder_decoder": (False,),
        "model_type": ("clip_text_model",),
        "pruned_heads": ({},),
    },
    read={
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
    },
    proven=frozenset({"hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim", "vocab_size"}),
    # the ids of start and padding are those of the tokenizer
    unused=frozenset(
        {
            "architectures",
            "attention_dropout",
            "attn_implementation",
            "bos_token_id",
            "chunk_size_feed_forward",
            "dropout",
            "dtype",
            "id2label",
            "initializer_factor",
            "initializer_range",
            "label2id",
            "output_attentions",
            "output_hidden_states",
            "pad_token_id",
            "problem_type",
            "return_dict",
            "tie_word_embeddings",
            "torch_dtype",
            "torchscript",
            "transformers_version",
            "use_bfloat16",
            "use_cache",
            "use_return_dict",
        }
    ),
)
"""transformers CLIPTextConfig."""

_LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_K_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_DISTILLED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": True}

SCHEDULERS: dict[str, Json] = {
    "DDIMParallelScheduler": {**_LINEAR, "clip_sample": True, "set_alpha_to_one": True},
    "DDIMScheduler": {**_LINEAR, "clip_sample": True, "set_alpha_to_one": True},
    "DDPMParallelScheduler": {**_LINEAR, "clip_sample": True},
    "DDPMScheduler": {**_LINEAR, "clip_sample": True},
    "DEISMultistepScheduler": _LINEAR,
    "DPMSolverMultistepScheduler": _LINEAR,
    "DPMSolverSDEScheduler": _K_DIFFUSION,
    "DPMSolverSinglestepScheduler": _LINEAR,
    "EulerAncestralDiscreteScheduler": _LINEAR,
    "EulerDiscreteScheduler": _LINEAR,
    "HeunDiscreteScheduler": _K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _K_DIFFUSION,
    "KDPM2DiscreteScheduler": _K_DIFFUSION,
    "LCMScheduler": _DISTILLED,
    "LMSDiscreteScheduler": _LINEAR,
    "PNDMScheduler": {**_LINEAR, "set_alpha_to_one": False},
    "SASolverScheduler": _LINEAR,
    "TCDScheduler": _DISTILLED,
    "UniPCMultistepScheduler": _LINEAR,
}
"""Classes of diffusers whose model is trained on discrete betas -> the defaults of what tells the noise schedule.

The class is a choice of sampler, which a run makes itself. Others (flow matching, EDM) belong to other kinds of models.
"""

SCHEDULER = Table(
    title="scheduler",
    built={
        "_class_name": tuple(SCHEDULERS),
        "beta_schedule": ("scaled_linear",),
        "final_sigmas_type": ("zero",),
        "interpolation_type": ("linear",),
        "lambda_min_clipped": (float("-inf"),),
        "predict_epsilon": (True,),
        "shift_terminal": (None,),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "tau_func": (None,),
        "thresholding": (False,),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "timestep_type": ("discrete",),
        "trained_betas": (None,),
        "use_dynamic_shifting": (False,),
        "use_flow_sigmas": (False,),
        "variance_type": (None, "fixed_small"),
    },
    read={
        "beta_end": None,
        "beta_start": None,
        "clip_sample": None,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": None,
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": None,
        "steps_offset": None,
    },
    # which sampler, of what order, with which spacing: `sampler=` and `spacing=` of a run say so
    unused=frozenset(
        {
            "algorithm_type",
            "corrector_order",
            "disable_corrector",
            "dynamic_thresholding_ratio",
            "euler_at_final",
            "flow_shift",
            "lower_order_final",
            "noise_sampler_seed",
            "original_inference_steps",
            "predict_x0",
            "predictor_order",
            "sample_max_value",
            "skip_prk_steps",
            "solver_order",
            "solver_p",
            "solver_type",
            "tensor_format",
            "time_shift_type",
            "timestep_scaling",
            "timestep_values",
            "use_beta_sigmas",
            "use_exponential_sigmas",
            "use_karras_sigmas",
            "use_lu_lambdas",
        }
    ),
)
"""diffusers' schedulers, all in one, as each of their files may be read by another one of them."""

TOKENIZER = Table(
    title="tokenizer",
    built={
        "add_prefix_space": (False,),
        "additional_special_tokens": ([],),
        "bos_token": (START,),
        "do_lower_case": (True,),
        "eos_token": (END,),
        "extra_special_tokens": ([], {}),
        "split_special_tokens": (False,),
        "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    },
    read={"pad_token": None},
    proven=frozenset({"model_max_length"}),
    unused=frozenset(
        {
            "add_bos_token",
            "add_special_tokens",
            "add_eos_token",
            "added_tokens_decoder",
            "backend",
            "cache_dir",
            "chat_template",
            "clean_up_tokenization_spaces",
            "errors",
            "force_download",
            "from_slow",
            "init_inputs",
            "is_local",
            "legacy",
            "local_files_only",
            "max_length",
            "model_input_names",
            "name_or_path",
            "pad_to_multiple_of",
            "pad_token_type_id",
            "padding_side",
            "processor_class",
            "return_tensors",
            "revision",
            "spaces_between_special_tokens",
            "special_tokens_map_file",
            "stride",
            "subfolder",
            "token",
            "trust_remote_code",
            "truncation_side",
            "truncation_strategy",
            "unk_token",
            "use_auth_token",
            "use_fast",
        }
    ),
)
"""transformers CLIPTokenizer: its tokenizer_config.json, in which transformers also keeps the options of a load."""

TABLES: dict[str, Table] = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": TEXT,
    "text_encoder_2": TEXT,
    "controlnet": CONTROLNET,
    "scheduler": SCHEDULER,
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER,
}
"""Component -> its table."""
