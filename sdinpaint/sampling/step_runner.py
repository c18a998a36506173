"""The runner of a denoiser's steps: it computes once what many steps share, and captures CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sdinpaint.errors import SettingError
from sdinpaint.sampling.conditioning import Conditioning, spread, stack
from sdinpaint.sampling.graphs import Graphs, Tensors, shapes

UNetFunction = Callable[[Tensor, Tensor, Any, Tensor | None, Sequence[Tensor] | None], Tensor]
"""unet(x (B, C, H, W), t (B,), context, vector (B, V) | None, control | None) -> (B, 4, H, W).

context is (B, L, D), or for conditions with several sources of attention a list of them with their weights.
"""

ControlFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Sequence[Tensor] | None]
"""control(x (B, 4, H, W) as the UNet sees it, t (B,), context, vector, sigma) -> residuals; None where it is off."""

Formula = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, Tensors], Tensor]
"""formula(unet, x, constants, extra) -> x0, where unet(latents (B, C, H, W)) -> (B or 2 B, 4, H, W)."""


class Prepared(Protocol):
    """A UNet with precomputed conditioning."""

    @property
    def key(self) -> str | None:
        """A name for how it computes and where its weights lie; None where that is unknown, and nothing is captured."""

    @property
    def conditioning_cache(self) -> Tensors:
        """The conditioning cache: keys and values, or the conditioning itself."""

    def is_current(self) -> bool:
        """Tell whether another preparation would give the same."""

    def embed(self, t: Tensor) -> Tensor:
        """Embed training indices t (S,) -> (S, ...)."""

    def __call__(self, x: Tensor, emb: Tensor, conditioning_cache: Tensors, control: Tensors | None) -> Tensor:
        """Compute the output (B or 2 B, 4, H, W) for x (B, C, H, W), which serves both halves of a guided batch."""


@dataclass(frozen=True)
class _Called:
    """Any function as a UNet of which nothing is precomputed: its layers see all of their inputs in every step."""

    unet: UNetFunction
    conditioning_cache: Tensors
    """The sources of attention, and vector if there is one."""
    weights: Sequence[float]
    """The weight of each source."""
    key: str | None = None

    def is_current(self) -> bool:
        return True

    def embed(self, t: Tensor) -> Tensor:
        return t

    def __call__(self, x: Tensor, emb: Tensor, conditioning_cache: Tensors, control: Tensors | None) -> Tensor:
        count = len(self.weights)
        sources, vector = conditioning_cache[:count], conditioning_cache[count:]
        batch = len(sources[0])
        x = torch.cat([x] * (batch // len(x)))
        context = _context(list(zip(sources, self.weights, strict=True)))
        return self.unet(x, emb.expand(batch), context, vector[0] if vector else None, control)


def _context(sources: list[tuple[Tensor, float]]) -> Any:
    """Return the sources as a UNet takes them: text alone as a tensor."""
    return sources[0][0] if len(sources) == 1 else sources


def _prepared(unet: Any, sources: list[tuple[Tensor, float]], vector: Tensor | None) -> Prepared:
    # asked of the class: a wrapper may hand out the method of what it wraps, past its own call
    prepared: Prepared | None = unet.prepare(_context(sources), vector) if hasattr(type(unet), "prepare") else None
    cache = [one for one, _ in sources] + ([] if vector is None else [vector])
    return prepared or _Called(unet, cache, [weight for _, weight in sources])


@dataclass(frozen=True)
class _Batch:
    """The tensors and the preparation that all steps for B items share."""

    context: Tensor
    vector: Tensor | None
    prepared: Prepared
    constant: tuple[Tensor, ...]
    """The extra channels, then the conditioning cache."""
    key: str | None
    """Properties of the step that a captured graph depends on; None where it is not captured."""
    step_constants: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By sigma: the constants of the formula, and the embedding of t."""


class StepRunner:
    """Runs one formula at every step of a run.

    Args:
        formula: what a step computes.
        constants: sigma -> the training index t, then the constants that the formula is given as one tensor.
        unet: the UNet; one with a method `prepare(context, vector)` precomputes its conditioning while all of its
            layers are plain.
        conditions: one conditioning, or uncond and cond; batches of 1 serve every item.
        extra: further input channels of the UNet, each (B or 1, C, H, W).
        control: residuals of a ControlNet.
        dtype: dtype of the UNet.
        sigmas: noise levels whose embeddings are computed at once.
        graphs: where steps on a GPU are captured.
        using: context in which the UNet is ready to be called.
        key: what else the formula depends on.
    """

    def __init__(
        self,
        formula: Formula,
        constants: Callable[[float], tuple[float, ...]],
        unet: UNetFunction,
        conditions: Sequence[Conditioning],
        extra: Sequence[Tensor],
        *,
        control: ControlFunction | None = None,
        dtype: torch.dtype = torch.float32,
        sigmas: Tensor | None = None,
        graphs: Graphs | None = None,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
        key: str = "",
    ) -> None:
        if len({len(one) for one in conditions}) > 1:
            found = " and ".join(str(len(one)) for one in conditions) + " items in the negative and the positive prompt"
            raise SettingError("SETTING_CONDITIONS", "context", found, expected="as many of each")
        stacked = stack(conditions)
        self._sources = [(one.to(dtype), weight) for one, weight in stacked.sources]
        self._formula, self._constants, self._unet, self._control = formula, constants, unet, control
        self._copies, self._dtype, self._graphs, self._using, self._formula_key = (
            len(conditions),
            dtype,
            graphs,
            using,
            key,
        )
        self._sigmas = [] if sigmas is None else sigmas.tolist()
        self._vector = None if stacked.vector is None else stacked.vector.to(dtype)
        self._extra = [one.to(dtype) for one in extra]
        self._batches: dict[tuple[Any, ...], _Batch] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Run a step.

        Args:
            x: noisy latents (B, 4, H, W).
            sigma: their noise level.

        Returns:
            x0 (B, 4, H, W).
        """
        with self._using():
            batch = self._batches.get(self._key(x)) or self._prepare(x)
            captured = self._graphs is not None and batch.key is not None and self._graphs.can_capture([x])
            if not captured and not batch.prepared.is_current():
                batch = self._prepare(x)
            if sigma not in batch.step_constants:
                sigmas = self._sigmas if sigma in self._sigmas else [sigma]
                batch.step_constants.update(zip(sigmas, self._step_constants(batch.prepared, sigmas, x), strict=True))
            varying = [x, *batch.step_constants[sigma], *self._residuals(batch, x, sigma)]

            def step(varying: Tensors, constant: Tensors) -> Tensor:
                x, constants, emb, *control = varying
                extra, cache = constant[: len(self._extra)], constant[len(self._extra) :]

                def unet(latents: Tensor) -> Tensor:
                    return batch.prepared(latents, emb, cache, control or None)

                return self._formula(unet, x, constants, extra)

            if self._graphs is None or batch.key is None or not captured:
                return step(varying, batch.constant)
            x0 = self._graphs(batch.key, step, varying, batch.constant)
            if batch.prepared.is_current():  # asked while the GPU is computing; a replay calls no layer
                return x0
            del self._batches[self._key(x)]
            return self(x, sigma)

    def showing(self, extra: Sequence[Tensor]) -> StepRunner:
        """Return this runner with other extra channels of the same shapes.

        Args:
            extra: further input channels, each (B or 1, C, H, W).

        Returns:
            A runner that shares what was precomputed.
        """
        other = copy.copy(self)
        other._extra = [one.to(self._dtype) for one in extra]
        other._batches = {}
        for key, batch in self._batches.items():
            shown = [spread("extra channels", one, key[0], 1) for one in other._extra]
            other._batches[key] = replace(batch, constant=(*shown, *batch.prepared.conditioning_cache))
        return other

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """Return the key of a `_Batch`; tensors that are made in one grad mode do not serve in every other."""
        return len(x), x.dtype, torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def _prepare(self, x: Tensor) -> _Batch:
        batch = self._copies * len(x)
        sources = [(spread("context", one, batch, self._copies), weight) for one, weight in self._sources]
        vector = None if self._vector is None else spread("vector", self._vector, batch, self._copies)
        prepared = _prepared(self._unet, sources, vector)
        # both halves see the same image: guidance is over the text alone
        extra = [spread("extra channels", one, len(x), 1) for one in self._extra]
        constant = (*extra, *prepared.conditioning_cache)
        known = f"{self._copies} {self._dtype} {self._formula_key} {shapes(constant)} {prepared.key}"
        key = None if prepared.key is None else known
        begun = self._batches[self._key(x)] = _Batch(sources[0][0], vector, prepared, constant, key)
        return begun

    def _step_constants(self, prepared: Prepared, sigmas: list[float], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each sigma the constants of the formula and the embedding of t, moved to the device at once."""
        rows = [self._constants(sigma) for sigma in sigmas]
        on_cpu = torch.tensor([t for t, *_ in rows], dtype=torch.float32, device="cpu")
        on_device = torch.tensor([constants for _, *constants in rows], dtype=x.dtype, device="cpu").to(x.device)
        return list(zip(on_device, prepared.embed(on_cpu.to(x.device)), strict=True))

    def _residuals(self, batch: _Batch, x: Tensor, sigma: float) -> Tensors:
        """Return the residuals of the ControlNet, which sees the noisy channels alone, whatever the UNet takes."""
        if self._control is None:
            return []
        t, scale, *_ = self._constants(sigma)
        scaled = torch.cat([x / scale] * self._copies).to(self._dtype)
        index = torch.full((len(scaled),), t, dtype=torch.float32, device=x.device)
        return self._control(scaled, index, batch.context, batch.vector, sigma) or []
