"""Compare the buffers of a noise schedule, which single files hold beside the weights, with the schedule of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sdinpaint_weights.weights import Weights

from sdinpaint.errors import CheckpointError
from sdinpaint.families import ScheduleConfig

__all__ = ["check_buffers"]

Numbers = NDArray[np.float64]

CLOSE = 0.02
"""Largest relative difference that rounding to half precision makes."""
READABLE = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
FROM_ALPHAS: dict[str, Callable[[Numbers], Numbers]] = {
    "alphas_cumprod": lambda alphas: alphas,
    "betas": lambda alphas: 1 - alphas / np.concatenate([[1.0], alphas[:-1]]),
    "denoiser.sigmas": lambda alphas: np.sqrt((1 - alphas) / np.maximum(alphas, 1e-30)),
}
"""Name of a buffer -> its values by the products of 1 - beta.

Source: register_schedule in CompVis/latent-diffusion ddpm.py; DiscreteDenoiser in Stability-AI/generative-models.
"""


def check_buffers(weights: Weights, schedule: ScheduleConfig) -> bool:
    """Check that the buffers of a noise schedule in a file are those of the schedule that is used.

    Args:
        weights: the file; most folders have no such buffers.
        schedule: the schedule that is used.

    Returns:
        True where they are those of this schedule rescaled to no signal at the last step (zero terminal SNR).

    Raises:
        CheckpointError: they are those of another schedule.
    """
    roots = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.train_steps)
    alphas = np.cumprod(1 - roots**2)
    rescaled = False
    for name, made in FROM_ALPHAS.items():
        stored = _numbers(weights, name)
        if stored is None or not stored.any() or _close(stored, made(alphas)):  # zeros are a hole in the file
            continue
        if _close(stored, made(_to_zero(alphas))):
            rescaled = True
            continue
        found = f"its buffer {name!r} is of another noise schedule: {_shown(stored)}"
        expected = f"{_shown(made(alphas))}, by its configuration or its family"
        hint = "give the configuration that belongs to these weights: config=FOLDER"
        raise CheckpointError("CKPT_CONTRADICTION", weights.path, found, expected=expected, hint=hint)
    return rescaled


def _numbers(weights: Weights, name: str) -> Numbers | None:
    """Read a vector of numbers without torch, which takes seconds to import; None where there is none."""
    entry = weights.entries.get(name)
    if entry is None or len(entry.shape) != 1 or entry.dtype.name not in READABLE or not entry.extent:
        return None
    raw: Any = entry.storage.file.read(entry.begin, entry.extent * entry.dtype.itemsize)
    values = np.frombuffer(raw, READABLE[entry.dtype.name])[:: entry.stride[0] or 1]
    if entry.dtype.name == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def _close(stored: Numbers, expected: Numbers) -> bool:
    if stored.shape != expected.shape:
        return False
    if stored[0] > stored[-1] and expected[0] < expected[-1]:  # some files hold the noise levels falling
        stored = stored[::-1]
    return bool(np.all(np.abs(stored - expected) <= CLOSE * np.abs(expected)))


def _to_zero(alphas: Numbers) -> Numbers:
    """Rescale to zero terminal SNR. Source: Lin et al. 2024, algorithm 1."""
    roots = np.sqrt(alphas)
    first, last = roots[0], roots[-1]
    return np.asarray(((roots - last) * first / (first - last)) ** 2, dtype=np.float64)


def _shown(values: Numbers) -> str:
    return f"{len(values)} values from {values[0]:.6g} to {values[-1]:.6g}"
