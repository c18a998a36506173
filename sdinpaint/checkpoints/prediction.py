"""Find out whether a UNet predicts noise or v, from files and metadata beside the tensors, as no shape tells it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from sdinpaint.checkpoints.schedule_config import prediction_in
from sdinpaint.checkpoints.yaml_files import Place, words_beside
from sdinpaint.errors import CheckpointError, SettingError, said
from sdinpaint.families import Prediction

__all__ = ["Evidence", "find_prediction", "has_marker"]

EDM_MARKERS = {
    "edm_vpred.sigma_max": "CosXL, over the noise levels of EDM",
    "edm_vpred.sigma_min": "CosXL, over the noise levels of EDM",
    "edm_mean": "Playground 2.5, with the preconditioning of EDM",
    "edm_std": "Playground 2.5, with the preconditioning of EDM",
}
"""Name of a tensor -> the model that has it, of a kind that is not built."""

BUILT = "a model that predicts noise (epsilon) or v, over the noise levels of Stable Diffusion"
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}
METADATA: dict[str, dict[str, Prediction]] = {
    "modelspec.prediction_type": PREDICTIONS,
    "modelspec.predict_key": PREDICTIONS,
    "modelspec.architecture": {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"},
    "ss_v_parameterization": {"False": "eps", "True": "v"},
}
"""Metadata field of a safetensors file -> {value: prediction}.

Source: Stability-AI/ModelSpec; kohya-ss/sd-scripts library/sai_model_spec.py and train_util.py.
"""
NOTHING_ELSE = ("modelspec.prediction_type", "modelspec.predict_key")
"""Fields that hold nothing but a prediction, so that another value in them is a kind that is not built."""

IN_YAML: dict[Place, dict[str, Prediction]] = {
    ("model", "params", "parameterization"): PREDICTIONS,
    ("model", "params", "denoiser_config", "params", "scaling_config", "target"): {
        "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling": "eps",
        "sgm.modules.diffusionmodules.denoiser_scaling.VScaling": "v",
    },
}
"""Place of a word in the configuration of the original code -> {word: prediction}.

Source: CompVis/latent-diffusion ddpm.py; Stability-AI/generative-models denoiser_scaling.py.
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

    The order is: the request; a marker among the tensors; the metadata of a safetensors file; `scheduler_config.json`;
    a .yaml file beside the weights, as the original code uses. A source that does not say is passed over.

    Args:
        asked: "eps" or "v" as requested, which decides where the others contradict one another; None without a request.
        scheduler: the table of `scheduler_config.json`; it may be empty.
        path: the weights file.
        metadata: its metadata.
        keys: names of its tensors.

    Returns:
        The prediction, with the reason.

    Raises:
        SettingError: `asked` is neither "eps" nor "v".
        CheckpointError: the model predicts something else, or two sources contradict one another.
    """
    if asked not in (None, "eps", "v"):
        raise SettingError("SETTING_PREDICTION", "prediction", said(asked), expected="'eps' or 'v'")
    if marker := next((name for name in EDM_MARKERS if has_marker(keys, name)), None):
        found = f"it holds a tensor {marker!r}: {EDM_MARKERS[marker]}, which is not built"
        raise CheckpointError("CKPT_NOT_BUILT", path, found, expected=BUILT, hint="give another checkpoint")
    if asked is not None:
        return Evidence(cast(Prediction, asked), f"prediction={asked!r} was requested")
    words = [*_evidence(scheduler, path, metadata, keys)]
    if not words:
        return Evidence(None, "no file or metadata beside the tensors says whether it predicts noise or v")
    first = words[0]
    other = next((one for one in words if one.prediction != first.prediction), None)
    if other is not None:
        hint = f"say which one is right: prediction={first.prediction!r} or prediction={other.prediction!r}"
        found = f"two sources contradict one another: {first.why}; {other.why}"
        raise CheckpointError("CKPT_CONTRADICTION", path, found, expected="one prediction, noise or v", hint=hint)
    return first


def has_marker(keys: Collection[str], name: str) -> bool:
    """Tell whether a tensor has a name, alone or behind a prefix.

    Args:
        keys: names of tensors.
        name: the name.

    Returns:
        True if one has.
    """
    return name in keys or any(key.endswith(f".{name}") for key in keys)


def _evidence(
    scheduler: Mapping[str, Any], path: Path, metadata: Mapping[str, str], keys: Collection[str]
) -> Iterator[Evidence]:
    """Yield all that is said, the strongest first."""
    if has_marker(keys, "v_pred"):
        yield Evidence("v", "it holds a tensor 'v_pred'")
    for key, meanings in METADATA.items():
        value = metadata.get(key, "")
        if value in meanings:
            yield Evidence(meanings[value], f"metadata: {key} {value}")
        elif value not in ("", "None", "null") and key in NOTHING_ELSE:
            _refuse(path, f"metadata: {key} {said(value)}")
    if scheduler.get("prediction_type") is not None:
        name = scheduler["prediction_type"]
        prediction = cast(Prediction, prediction_in(scheduler, path))
        yield Evidence(prediction, f"scheduler_config.json: prediction_type {name}")
    if path.is_file():
        yield from _in_yaml(path)


def _in_yaml(path: Path) -> Iterator[Evidence]:
    """Yield what the configuration of the original code says; none where there is no such file."""
    for file, place, value in words_beside(path, IN_YAML):
        word = f"{place[-1]} {value}"
        if value not in IN_YAML[place]:
            _refuse(file, word)
        yield Evidence(IN_YAML[place][value], f"{file.name}: {word}")


def _refuse(path: Path, found: str) -> None:
    hint = "give another checkpoint; or, where this is wrong, say prediction='eps' or prediction='v'"
    raise CheckpointError("CKPT_NOT_BUILT", path, f"{found}: this kind is not built", expected=BUILT, hint=hint)
