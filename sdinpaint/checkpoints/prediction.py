"""Whether a UNet predicts the noise or v. No shape tells, so everything that lies beside the tensors is looked at."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from sdinpaint.checkpoints.configs import prediction_in
from sdinpaint.errors import SettingError
from sdinpaint.families import Prediction

__all__ = ["MARKERS", "Evidence", "find_prediction"]

MARKERS = frozenset({"v_pred", "ztsnr"})
"""Names of empty tensors by which files of SDXL models say how they were trained."""

PARAMETERIZATION = re.compile(r"^\s*parameterization\s*:\s*[\"']?(\w+)", re.MULTILINE)
PARAMETERIZATIONS: dict[str, Prediction] = {"eps": "eps", "v": "v"}
# Stability-AI/ModelSpec; kohya-ss/sd-scripts library/sai_model_spec.py and train_util.py
METADATA: dict[str, dict[str, Prediction]] = {
    "modelspec.prediction_type": {"epsilon": "eps", "v": "v", "v_prediction": "v"},
    "modelspec.architecture": {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"},
    "ss_v_parameterization": {"False": "eps", "True": "v"},
}


class Evidence(NamedTuple):
    """What a UNet predicts, None where nothing tells, and from what that was concluded."""

    prediction: Prediction | None
    why: str


def find_prediction(
    asked: str | None, scheduler: Mapping[str, Any], path: Path, metadata: Mapping[str, str], keys: Collection[str]
) -> Evidence:
    """The strongest evidence that there is.

    In this order: what was asked for; scheduler_config.json; a .yaml file of the weights' name, as the original code
    wants one; the metadata of a safetensors file; a marker among the tensors.
    Raises: SettingError where `asked` is neither "eps" nor "v"; CheckpointError for a scheduler's unknown prediction.
    """
    if asked not in (None, "eps", "v"):
        raise SettingError("SETTING_PREDICTION", "prediction", f"{asked!r}", expected="'eps' or 'v'")
    nothing = Evidence(None, "nothing beside the tensors says whether it predicts noise or v")
    return next(_evidence(asked, scheduler, path, metadata, keys), nothing)


def _evidence(
    asked: str | None, scheduler: Mapping[str, Any], path: Path, metadata: Mapping[str, str], keys: Collection[str]
) -> Iterator[Evidence]:
    if asked is not None:
        yield Evidence(cast(Prediction, asked), f"prediction={asked!r} was asked for")
    if scheduler:
        name = scheduler.get("prediction_type", "not given, so epsilon")  # as diffusers reads it
        yield Evidence(prediction_in(scheduler, path) or "eps", f"scheduler_config.json: prediction_type {name}")
    yaml = path.with_suffix(".yaml")
    if path.is_file() and yaml.is_file():
        match = PARAMETERIZATION.search(yaml.read_text("utf-8", errors="replace"))
        name = match[1] if match else "eps"  # as ldm reads it
        if name in PARAMETERIZATIONS:
            yield Evidence(PARAMETERIZATIONS[name], f"{yaml.name}: parameterization {name}")
    for key, meanings in METADATA.items():
        if (value := metadata.get(key, "")) in meanings:
            yield Evidence(meanings[value], f"metadata: {key} {value}")
    if "v_pred" in keys:
        yield Evidence("v", "it holds a tensor 'v_pred'")
