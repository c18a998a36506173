"""A ControlNet beside a UNet: its configuration, the hint that it is shown, and the steps in which it is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdinpaint.configs import Json, Shapes, unet_config
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.families import UNetConfig
from sdinpaint.models import ControlNet, ControlNetConfig
from sdinpaint.models.layers import is_plain
from sdinpaint.models.weights import Places, Snapshot, all_weights
from sdinpaint.sampling import schedules
from sdinpaint.sampling.graphs import Graphs, Tensors, shapes

__all__ = ["Control", "controlnet_config", "controlnet_json", "inpaint_hint"]

HINT_WIDTHS = (16, 32, 96, 256)
"""Of all released ones; a file's own are read off its shapes."""
HINT_WEIGHT = re.compile(r"input_hint_block\.(\d+)\.weight")
ALIKE = ("model_channels", "channel_mult", "num_res_blocks", "context_dim", "vector_dim")
"""What a ControlNet shares with its UNet."""
BUILT = {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}
"""Settings of diffusers that change what is computed, with what is built here; no shape tells them."""
KINDS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""By the width of the text states."""


def inpaint_hint(image: Tensor, hole: Tensor) -> Tensor:
    """image (B, 3, 8H, 8W) in [-1, 1], hole (B, 1, 8H, 8W) -> RGB in [0, 1], and -1 where it is repainted.

    Source: the model card of lllyasviel/control_v11p_sd15_inpaint.
    """
    return torch.where(hole >= 0.5, -1.0, image / 2 + 0.5)


class Control:
    """control(x, t, context, vector, sigma) -> what a `Denoiser` takes: residuals, or None where it is off.

    hint (B, 3, 8H, 8W): see `inpaint_hint`; sigmas (n + 1,): those of the run. Step i of n is on if i / n >= start and
    (i + 1) / n <= end. scale: factor of every residual. With `graphs`, it is recorded on a GPU and replayed.
    """

    def __init__(
        self,
        net: nn.Module,
        hint: Tensor,
        sigmas: Tensor,
        *,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        graphs: Graphs | None = None,
    ) -> None:
        self._graphs = Graphs(False) if graphs is None else graphs
        self._net, self._scale, self._start, self._end = net, scale, start, end
        self._sigmas, self._hint = sigmas, hint
        self._of_hint: tuple[Tensor, Snapshot] | None = None
        self._constant: tuple[Tensor, ...] = ()
        self._made_of: tuple[Tensor, Tensor] | None = None
        self._places: Places | None = None

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None, sigma: float
    ) -> Sequence[Tensor] | None:
        """x (m B, 4, H, W) as the UNet sees it: m halves of guidance, one after the other."""
        if self._scale == 0 or not self._is_on(sigma):
            return None
        features = self._features()
        if self._made_of is None or self._made_of[0] is not features or self._made_of[1] is not context:
            halves = features.repeat(len(x) // len(features), 1, 1, 1)
            self._constant = (halves, context) if vector is None else (halves, context, vector)
            self._made_of = features, context
        constant = self._constant
        if not self._graphs.can_capture([x, t, *constant]) or (self._places is None and not is_plain(self._net)):
            return self._residuals([x, t], constant)
        places = self._places = self._places or Places(self._net)
        residuals = self._graphs(f"{shapes(constant)} {self._scale} {places.key}", self._residuals, [x, t], constant)
        if is_plain(self._net) and places.hold(self._net):  # asked while a GPU is computing, and not before
            return residuals
        self._places = None
        return self(x, t, context, vector, sigma)

    def _features(self) -> Tensor:
        """Return the features of the hint; made anew only where its layers changed, are not plain or are trained."""
        net = _find_controlnet(self._net)
        layers, kept = net.input_hint_block, self._of_hint
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in layers.parameters())
        if (
            kept is not None
            and not trained
            and is_plain(layers)
            and kept[1].holds(all_weights(layers), read_devices=False)
        ):
            return kept[0]
        snapshot, features = Snapshot(all_weights(layers)), net.hint_features(self._hint.to(next(net.parameters())))
        self._of_hint = None if features.requires_grad else (features, snapshot)
        return features

    def _residuals(self, varying: Tensors, constant: Tensors) -> list[Tensor]:
        """varying: x and t; constant: features, context and, for XL, vector."""
        (x, t), (features, context, *vector) = varying, constant
        return [self._scale * residual for residual in self._net(x, features, t, context, *vector)]

    def _is_on(self, sigma: float) -> bool:
        """Whether the step that starts at `sigma`, or passes it, is one of those that were asked for."""
        steps, step = len(self._sigmas) - 1, schedules.step_at(self._sigmas, sigma)
        return step / steps >= self._start and (step + 1) / steps <= self._end


def _find_controlnet(net: nn.Module) -> ControlNet:
    """Return the network itself, also of one that was wrapped or compiled. Raises: SettingError."""
    for module in net.modules():
        if isinstance(module, ControlNet):
            return module
    found = f"a {type(net).__name__} without one"
    raise SettingError("SETTING_CONTROL", "controlnet", found, expected="a ControlNet, or a module that wraps one")


def controlnet_config(shapes: Shapes, json: Json, unet: UNetConfig, where: Path) -> ControlNetConfig:
    """The ControlNet of which these are the native shapes, for this UNet.

    Raises: CheckpointError for one of another family or kind, and for a number that fits no shape.
    """
    for name, built in BUILT.items():
        if json.get(name) not in (None, built):
            said, hint = f"{name} is {json[name]!r}", "give another ControlNet"
            raise CheckpointError("CKPT_BAD_CONFIG", where, said, expected=repr(built), hint=hint)
    # its way down is the UNet's; of the way up, which it lacks, only the last layer tells a size
    end = {"out.2.weight": (unet.out_channels, unet.model_channels, 3, 3)}
    found = unet_config({**shapes, **end}, json, unet, where)
    if any(getattr(found, name) != getattr(unet, name) for name in ALIKE):
        hint = "give a ControlNet that was trained for the family of the checkpoint"
        raise CheckpointError(
            "CKPT_MISMATCH",
            where,
            f"a ControlNet for {_kind(found)}",
            expected=f"one for {_kind(unet)}, as the UNet has them",
            hint=hint,
        )
    rows = sorted(int(match[1]) for name in shapes if (match := HINT_WEIGHT.fullmatch(name)))
    widths = tuple(shapes[f"input_hint_block.{row}.weight"][0] for row in rows[:-1:2])
    return ControlNetConfig(unet=replace(found, in_channels=unet.out_channels), hint_widths=widths or HINT_WIDTHS)


def controlnet_json(config: ControlNetConfig) -> dict[str, object]:
    """diffusers' config.json for it."""
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
        "norm_num_groups": unet.norm_groups,
        # of a level without transformers the number is not looked at, but the last one counts for the middle
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


def _kind(unet: UNetConfig) -> str:
    name = KINDS.get(unet.context_dim, "an unknown model")
    return f"{name}: text states {unet.context_dim} wide, {unet.model_channels} channels times {unet.channel_mult}"
