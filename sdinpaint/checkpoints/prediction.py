"""Find out whether a UNet predicts noise or v, from files and metadata beside the tensors, as no shape tells it."""

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
"""Names of empty tensors that mark how an SDXL model was trained."""

PARAMETERIZATION = re.compile(r"^\s*parameterization\s*:\s*[\"']?(\w+)", re.MULTILINE)
PARAMETERIZATIONS: dict[str, Prediction] = {"eps": "eps", "v": "v"}
METADATA: dict[str, dict[str, Prediction]] = {
    "modelspec.prediction_type": {"epsilon": "eps", "v": "v", "v_prediction": "v"},
    "modelspec.architecture": {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"},
    "ss_v_parameterization": {"False": "eps", "True": "v"},
}
"""Metadata field of a safetensors file -> {value: prediction}.

Source: Stability-AI/ModelSpec; kohya-ss/sd-scripts library/sai_model_spec.py and train_util.py.
"""


class Evidence(NamedTuple):
    """The prediction of a UNet, with the reason."""

    prediction: Prediction | None
    """"eps" or "v"; None where nothing tells."""
    why: str
    """The reason, as a sentence."""


def find_prediction(
    asked: str | None, scheduler: Mapping[str, Any], path: Path, metadata: Mapping[str, str], keys: Collection[str]
) -> Evidence:
    """Find the strongest evidence of what a UNet predicts.

    The order is: the request; `scheduler_config.json`; a .yaml file beside the weights, as the original code uses; the
    metadata of a safetensors file; a marker among the tensors.

    Args:
        asked: "eps" or "v" as requested; None without a request.
        scheduler: the table of `scheduler_config.json`; it may be empty.
        path: the weights file.
        metadata: its metadata.
        keys: names of its tensors.

    Returns:
        The prediction, with the reason.

    Raises:
        SettingError: `asked` is neither "eps" nor "v".
        CheckpointError: `scheduler_config.json` has another kind of prediction.
    """
    if asked not in (None, "eps", "v"):
        raise SettingError("SETTING_PREDICTION", "prediction", f"{asked!r}", expected="'eps' or 'v'")
    nothing = Evidence(None, "no file or metadata beside the tensors says whether it predicts noise or v")
    return next(_evidence(asked, scheduler, path, metadata, keys), nothing)


def _evidence(
    asked: str | None, scheduler: Mapping[str, Any], path: Path, metadata: Mapping[str, str], keys: Collection[str]
) -> Iterator[Evidence]:
    if asked is not None:
        yield Evidence(cast(Prediction, asked), f"prediction={asked!r} was requested")
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
