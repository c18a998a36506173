"""denoise(x, sigma) -> x0 from a UNet: the one place that knows what a UNet is fed and what its output means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sdinpaint.errors import SettingError
from sdinpaint.families import Prediction
from sdinpaint.sampling import schedules
from sdinpaint.sampling.graphs import Graphs, Tensors, shapes

UNetFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, Sequence[Tensor] | None], Tensor]
"""unet(x (B, C, H, W), t (B,), context (B, L, D), vector (B, V) | None, control | None) -> (B, 4, H, W)."""

ControlFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Sequence[Tensor] | None]
"""control(x (B, 4, H, W) as the UNet sees it, t (B,), context, vector, sigma) -> residuals; None where it is off."""


@dataclass(frozen=True)
class Conditioning:
    """What the text says: `context` (B, L, D), and for XL `vector` (B, V)."""

    context: Tensor
    vector: Tensor | None = None


class Prepared(Protocol):
    """A UNet with precomputed conditioning."""

    @property
    def key(self) -> str | None:
        """The same where a UNet computes in the same way with weights in the same places; None where it is unknown."""

    @property
    def kept(self) -> Tensors:
        """The precomputed tensors."""

    def is_current(self) -> bool:
        """Tell whether another preparation would give the same."""

    def embed(self, t: Tensor) -> Tensor:
        """t (S,) -> (S, ...): what it has to know of each t."""

    def __call__(self, x: Tensor, emb: Tensor, kept: Tensors, control: Tensors | None) -> Tensor:
        """x (B, C, H, W), which serves both halves of a guided batch, emb one of `embed` -> (B or 2 B, 4, H, W)."""


@dataclass(frozen=True)
class _Called:
    """Any function as a UNet of which nothing is precomputed: its layers see all of their inputs in every step."""

    unet: UNetFunction
    kept: Tensors
    """context, and vector if there is one."""
    key: str | None = None

    def is_current(self) -> bool:
        return True

    def embed(self, t: Tensor) -> Tensor:
        return t

    def __call__(self, x: Tensor, emb: Tensor, kept: Tensors, control: Tensors | None) -> Tensor:
        context, *vector = kept
        batch = len(context)
        x = torch.cat([x] * (batch // len(x)))
        return self.unet(x, emb.expand(batch), context, vector[0] if vector else None, control)


def _prepared(unet: Any, context: Tensor, vector: Tensor | None) -> Prepared | None:
    """Let a UNet precompute what it can; a wrapper may hand out the method of what it wraps, past its own call."""
    return unet.prepare(context, vector) if hasattr(type(unet), "prepare") else None


@dataclass(frozen=True)
class _Batch:
    """What all steps for B pictures have in common."""

    context: Tensor
    vector: Tensor | None
    prepared: Prepared
    constant: tuple[Tensor, ...]
    """The extra channels, then what the UNet keeps."""
    key: str | None
    """What else a recording of the step depends on."""
    levels: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By sigma: the numbers of a step, and what the UNet has to know of t."""


class Denoiser:
    """A UNet seen as denoise(x, sigma) -> x0, with guidance in one batch of 2 B ordered [uncond, cond].

    `extra` is (mask, masked_latents) for a 9-channel model, None for a 4-channel one. `control` gives a ControlNet's
    residuals. x keeps its own dtype; the UNet runs in `dtype`. A batch is B, not 2 B, where guidance_scale is 1 or
    `uncond` is None. Conditions of batch 1 serve every item of x.
    `sigmas` are those of the run, where they are known: what follows from them is computed at once. Anything that is
    called like a UNet serves as one. One with a method `prepare(context, vector)` precomputes its conditioning, while
    all of its layers are plain; with `graphs`, its steps on a GPU are captured and replayed. Within `using()` the UNet
    is ready.

    Raises: SettingError where the two conditions differ in shape or guidance_scale is not finite.
    """

    def __init__(
        self,
        unet: UNetFunction,
        train_sigmas: Tensor,
        prediction: Prediction,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        guidance_scale: float = 7.5,
        extra: tuple[Tensor, Tensor] | None = None,
        control: ControlFunction | None = None,
        dtype: torch.dtype = torch.float32,
        sigmas: Tensor | None = None,
        graphs: Graphs | None = None,
        using: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise SettingError("SETTING_GUIDANCE", "guidance_scale", f"{guidance_scale!r}", expected="a finite number")
        if prediction not in _FACTORS:
            raise SettingError("SETTING_PREDICTION", "prediction", f"{prediction!r}", expected="'eps' or 'v'")
        conditions = [cond] if uncond is None or guidance_scale == 1 else [uncond, cond]
        self._unet = unet
        self._control = control
        self._train_sigmas = train_sigmas
        self._factors = _FACTORS[prediction]
        self._guidance_scale = guidance_scale
        self._copies = len(conditions)
        self._dtype = dtype
        self._sigmas = [] if sigmas is None else sigmas.tolist()
        self._graphs = graphs
        self._using = using
        self._context = _stacked("context", [one.context for one in conditions]).to(dtype)
        vectors = [one.vector for one in conditions if one.vector is not None]
        if len(vectors) not in (0, len(conditions)):
            raise SettingError(
                "SETTING_CONDITIONS", "vector", "given for one prompt alone", expected="both, or neither"
            )
        self._vector = _stacked("vector", vectors).to(dtype) if vectors else None
        self._extra = [] if extra is None else [one.to(dtype) for one in extra]
        self._batches: dict[tuple[Any, ...], _Batch] = {}

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """x (B, 4, H, W) at `sigma` -> x0 (B, 4, H, W), in x's dtype.

        sigma: a number, or a tensor (), (1,) or (B,) of one value, as samplers from elsewhere give it.
        Raises: SettingError where the items are to have different sigmas.
        """
        with self._using():
            return self._denoised(x, _number(sigma, len(x)))

    def _denoised(self, x: Tensor, sigma: float) -> Tensor:
        batch = self._batches.get(self._key(x)) or self._begin(x)
        captured = self._graphs is not None and batch.key is not None and self._graphs.can_capture([x])
        if not captured and not batch.prepared.is_current():
            batch = self._begin(x)
        if sigma not in batch.levels:
            sigmas = self._sigmas if sigma in self._sigmas else [sigma]
            batch.levels.update(zip(sigmas, self._levels(batch.prepared, sigmas, x), strict=True))
        varying = [x, *batch.levels[sigma], *self._residuals(batch, x, sigma)]

        def step(varying: Tensors, constant: Tensors) -> Tensor:
            return self._step(batch.prepared, varying, constant)

        if self._graphs is None or batch.key is None or not captured:
            return step(varying, batch.constant)
        x0 = self._graphs(batch.key, step, varying, batch.constant)
        if batch.prepared.is_current():  # asked while the GPU is computing; a replay calls no layer
            return x0
        del self._batches[self._key(x)]
        return self._denoised(x, sigma)

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """Return the key of a `_Batch`; tensors that are made in one grad mode do not serve in every other."""
        return len(x), x.dtype, torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def showing(self, extra: tuple[Tensor, Tensor]) -> Denoiser:
        """This denoiser with another (mask, masked_latents) of the same shapes; what was prepared serves both."""
        other = copy.copy(self)
        other._extra = [one.to(self._dtype) for one in extra]
        other._batches = {}
        for key, batch in self._batches.items():
            shown = [_spread("extra channels", one, key[0], 1) for one in other._extra]
            other._batches[key] = replace(batch, constant=(*shown, *batch.prepared.kept))
        return other

    def _begin(self, x: Tensor) -> _Batch:
        batch = self._copies * len(x)
        context = _spread("context", self._context, batch, self._copies)
        vector = None if self._vector is None else _spread("vector", self._vector, batch, self._copies)
        given = [context] if vector is None else [context, vector]
        prepared: Prepared = _prepared(self._unet, context, vector) or _Called(self._unet, given)
        # both halves see the same picture: guidance is over the text alone
        extra = [_spread("extra channels", one, len(x), 1) for one in self._extra]
        constant = (*extra, *prepared.kept)
        key = None if prepared.key is None else f"{self._copies} {self._dtype} {shapes(constant)} {prepared.key}"
        begun = self._batches[self._key(x)] = _Batch(context, vector, prepared, constant, key)
        return begun

    def _levels(self, prepared: Prepared, sigmas: list[float], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each sigma: scale, guidance_scale and the two factors of x0 in one tensor (4,), and what t embeds to."""
        numbers = [(math.hypot(1, sigma), self._guidance_scale, *self._factors(sigma)) for sigma in sigmas]
        t = [schedules.timestep(self._train_sigmas, sigma) for sigma in sigmas]
        on_cpu = torch.tensor(t, dtype=torch.float32, device="cpu")
        on_device = torch.tensor(numbers, dtype=x.dtype, device="cpu").to(x.device)
        return list(zip(on_device, prepared.embed(on_cpu.to(x.device)), strict=True))

    def _residuals(self, batch: _Batch, x: Tensor, sigma: float) -> Tensors:
        """What a ControlNet adds; it sees the noisy channels alone, whatever the UNet takes."""
        if self._control is None:
            return []
        scaled = torch.cat([x / math.hypot(1, sigma)] * self._copies).to(self._dtype)
        index = schedules.timestep(self._train_sigmas, sigma)
        t = torch.full((len(scaled),), index, dtype=torch.float32, device=x.device)
        return self._control(scaled, t, batch.context, batch.vector, sigma) or []

    def _step(self, prepared: Prepared, varying: Tensors, constant: Tensors) -> Tensor:
        """Guided x0; `varying`: x, a level's two, residuals; `constant`: a batch's."""
        x, numbers, emb, *control = varying
        scale, guidance_scale, of_x, of_output = numbers
        extra, kept = constant[: len(self._extra)], constant[len(self._extra) :]
        # only the noisy channels are scaled; mask and masked latents enter as they were trained
        fed = torch.cat([(x / scale).to(self._dtype), *extra], dim=1)
        output = prepared(fed, emb, kept, control or None).to(x.dtype)
        if self._copies == 2:
            uncond, cond = output.chunk(2)
            output = uncond + guidance_scale * (cond - uncond)
        return of_x * x + of_output * output


def _from_eps(sigma: float) -> tuple[float, float]:
    return 1.0, -sigma


def _from_v(sigma: float) -> tuple[float, float]:
    """Source: Salimans and Ho 2022, appendix D, with alpha = 1 / sqrt(1 + sigma^2)."""
    return 1 / (1 + sigma**2), -sigma / math.hypot(1, sigma)


_FACTORS: dict[str, Callable[[float], tuple[float, float]]] = {"eps": _from_eps, "v": _from_v}
"""By prediction type, the factors of x and of the UNet's output in x0."""


def _number(sigma: float | Tensor, batch: int) -> float:
    """Return the one value of sigma. Raises: SettingError."""
    if not isinstance(sigma, Tensor):
        return float(sigma)
    values = sigma.detach().reshape(-1).tolist()
    if len(values) not in (1, batch) or len(set(values)) > 1:
        found = f"{len(values)} values from {min(values, default=0):g} to {max(values, default=0):g} for {batch} items"
        hint = "call denoise for the items of each sigma by themselves"
        raise SettingError("SETTING_SIGMA", "sigma", found, expected="one value for all items", hint=hint)
    return float(values[0])


def _stacked(what: str, parts: list[Tensor]) -> Tensor:
    """The parts one after the other along the batch; they must have one shape."""
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise SettingError(
            "SETTING_CONDITIONS",
            what,
            " and ".join(str(tuple(part.shape)) for part in parts) + " for the negative and the positive prompt",
            expected="one shape",
        )
    return torch.cat(parts)


def _spread(what: str, stacked: Tensor, batch: int, copies: int) -> Tensor:
    """`stacked` (batch, ...) as it is, or (copies, ...) with each one repeated for every item of a batch."""
    if len(stacked) == batch:
        return stacked
    if len(stacked) != copies:
        raise SettingError(
            "SETTING_BATCH",
            what,
            f"batch {len(stacked) // copies} beside latents of batch {batch // copies}",
            expected="the same batch, or 1",
        )
    return stacked.repeat_interleave(batch // copies, dim=0)
