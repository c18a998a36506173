"""A ControlNet beside a UNet: its configuration, its conditioning image, and the steps in which it is active."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdinpaint.errors import SettingError
from sdinpaint.models import ControlNet
from sdinpaint.models.layers import is_plain
from sdinpaint.models.weights import Places, Snapshot, all_weights
from sdinpaint.sampling import schedules
from sdinpaint.sampling.graphs import Graphs, Tensors, shapes

__all__ = ["Control", "inpaint_hint"]


def inpaint_hint(image: Tensor, hole: Tensor) -> Tensor:
    """Make the conditioning image of an inpainting ControlNet.

    Args:
        image: (B, 3, 8H, 8W) in [-1, 1].
        hole: (B, 1, 8H, 8W), 1 = repaint.

    Returns:
        RGB (B, 3, 8H, 8W) in [0, 1], and -1 where it is repainted.

    Source: the model card of lllyasviel/control_v11p_sd15_inpaint.
    """
    return torch.where(hole >= 0.5, -1.0, image / 2 + 0.5)


class Control:
    """A ControlNet with its conditioning image, as a function that a `Denoiser` calls in each step.

    Args:
        net: the ControlNet, or a module that wraps one.
        hint: conditioning image (B, 3, 8H, 8W), see `inpaint_hint`.
        sigmas: noise levels of the run, falling, (steps + 1,).
        scale: factor of every residual; 0 turns the ControlNet off.
        start: share of the steps before it is active: step i of n is left out where i / n < start.
        end: share of the steps after which it is not active: step i of n is left out where (i + 1) / n > end.
        graphs: where its calls on a GPU are captured; without it they are not.
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
        """Compute the residuals of a step.

        Args:
            x: scaled noisy latents (m B, 4, H, W) as the UNet sees them: m halves of guidance, one after the other.
            t: training indices (m B,).
            context: text embeddings (m B, L, D).
            vector: pooled text with size and crop conditioning (m B, V), for SDXL.
            sigma: noise level of the step.

        Returns:
            The residuals for the UNet's skip connections and middle block; None where the ControlNet is not active.
        """
        if self._scale == 0 or not schedules.is_between(self._sigmas, sigma, self._start, self._end):
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
        if is_plain(self._net) and places.hold(self._net):  # checked while a GPU is computing, and not before
            return residuals
        self._places = None
        return self(x, t, context, vector, sigma)

    def _features(self) -> Tensor:
        """Return the hint's features, computed again where its layers changed, are not plain or are trained."""
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
        """Compute the residuals; `varying` is x and t, `constant` features, context and, for SDXL, vector."""
        (x, t), (features, context, *vector) = varying, constant
        return [self._scale * residual for residual in self._net(x, features, t, context, *vector)]


def _find_controlnet(net: nn.Module) -> ControlNet:
    """Return the ControlNet in a module that may wrap or compile it."""
    for module in net.modules():
        if isinstance(module, ControlNet):
            return module
    found = f"a {type(net).__name__} without one"
    raise SettingError("SETTING_CONTROL", "controlnet", found, expected="a ControlNet, or a module that wraps one")
