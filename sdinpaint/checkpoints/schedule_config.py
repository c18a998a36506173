"""Read the noise schedule and the prediction of a checkpoint from `scheduler_config.json`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sdinpaint.checkpoints.built_values import SCHEDULER, SCHEDULERS
from sdinpaint.checkpoints.config_values import Json, positive, refuse, switch, whole_number, without_nulls
from sdinpaint.families import Prediction, ScheduleConfig

__all__ = ["PREDICTIONS", "prediction_in", "schedule_config"]

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
"""Name of a prediction in diffusers -> name here."""


def schedule_config(json: Json, base: ScheduleConfig, where: Path) -> ScheduleConfig:
    """Read the trained noise schedule from `scheduler_config.json`.

    Args:
        json: the table of that file; it may be empty.
        base: the family's schedule, for what the table does not say.
        where: the file or folder that errors name.

    Returns:
        The schedule.

    Raises:
        CheckpointError: a kind of schedule that is not supported, or a value that no schedule can have.
    """
    named = json.get("_class_name")
    json = {**SCHEDULERS.get(named if isinstance(named, str) else "", {}), **without_nulls(json)}
    SCHEDULER.settings(json, where)
    clips = switch(json, "clip_sample", base.clip_range is not None, where)
    schedule = replace(
        base,
        train_steps=whole_number(json, "num_train_timesteps", base.train_steps, where),
        beta_start=positive(json, "beta_start", base.beta_start, where),
        beta_end=positive(json, "beta_end", base.beta_end, where),
        prediction=prediction_in(json, where) or base.prediction,
        # a class's default is 0, which diffusers' pipelines replace by this
        steps_offset=whole_number({"steps_offset": 1, **json}, "steps_offset", base.steps_offset, where, low=0),
        end_at_zero=switch(json, "set_alpha_to_one", base.end_at_zero, where),
        clip_range=positive(json, "clip_sample_range", base.clip_range or 1.0, where) if clips else None,
    )
    switch(json, "rescale_betas_zero_snr", False, where)
    if schedule.beta_end < schedule.beta_start:
        refuse(where, "beta_end", schedule.beta_end, f"at least beta_start, which is {schedule.beta_start!r}")
    if not _keeps_signal(schedule):
        refuse(where, "beta_end", schedule.beta_end, "betas below 1 that leave some signal at the last step")
    return schedule


def _keeps_signal(schedule: ScheduleConfig) -> bool:
    """Tell whether the noise level is finite and rises at every training index; see `sdinpaint.sampling.schedules`."""
    roots = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.train_steps)
    with np.errstate(all="ignore"):
        alphas_cumprod = np.cumprod(1 - roots**2)
        sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        return bool(np.isfinite(sigmas).all() and sigmas[0] > 0 and (np.diff(sigmas) > 0).all())


def prediction_in(json: Json, where: Path) -> Prediction | None:
    """Read from `scheduler_config.json` whether the UNet predicts noise or v.

    Args:
        json: the table of that file; it may be empty.
        where: the file or folder that errors name.

    Returns:
        "eps" or "v"; None where the file does not say.

    Raises:
        CheckpointError: another kind of prediction.
    """
    name = json.get("prediction_type")
    if name is None:
        return None
    if not isinstance(name, str) or name not in PREDICTIONS:
        SCHEDULER.refuse(where, "prediction_type", name, " or ".join(map(repr, PREDICTIONS)))
    return PREDICTIONS[name]
