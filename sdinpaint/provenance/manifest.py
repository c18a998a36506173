"""The manifest of an image: its inputs, model and versions, as plain JSON values, so that it can be made again.

It holds the values of `environment`, the kind of the run, and a record of each input by its name. It is stored as
"manifest" among the settings of a run, in a `Result` and in the image files that are written from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from sdinpaint.errors import CheckpointError, SettingError, said
from sdinpaint.families import deviations
from sdinpaint.images.embedded import SHORTENED
from sdinpaint.images.input_image import InputImage
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.masks import Mask, binarize
from sdinpaint.masks.text import Soft, mask_to_text
from sdinpaint.provenance.fingerprints import pixels_sha256, weights_of
from sdinpaint.version import __version__

__all__ = ["DRAWS", "Manifest", "arguments", "check_input", "check_manifest", "differences", "environment"]
__all__ += ["ALSO", "check_again", "image_record", "manifest_of", "mask_record", "record"]
__all__ += ["require_same_weights"]

Manifest = Mapping[str, Any]

FORM = 1
"""Version of the manifest's form, which rises when older versions of sdinpaint no longer understand it."""
DRAWS = "torch CPU mt19937, one generator per picture: picture's latents, start, masked picture's latents, steps"
"""The generator of noise and the order of draws. The text is compared with that of older manifests: never reword it."""
COMPARED = ("family", "dtype", "device", "draws", "torch", "sdinpaint")
"""Entries of a manifest that may change an image, beside the weights."""
EDITED = "the image was saved by another version of sdinpaint, or its settings were edited: run it from its prompt"

_INPUT: dict[str, Any] = {"path": (str, NoneType), "size": [int, int], "sha256": str}
_INPUTS = {"inpaint": ("image", "mask"), "vary": ("image",), "outpaint": ("image",)}
"""Kind of the run, which is the name of the pipeline's method -> the inputs that its manifest records."""
_MANIFEST: dict[str, Any] = {"form": int, "kind": str, "model": str, "weights": {}, **dict.fromkeys(COMPARED, str)}
_NUMBER = (int, float)
_ADAPTER: dict[str, Any] = {
    **dict.fromkeys(("kind", "name", "source", "sha256"), str),
    "weight": (*_NUMBER, NoneType),
    "text_weight": (*_NUMBER, NoneType),
    "blocks": (dict, NoneType),
}
_ADAPTERS = {"lora": {**_ADAPTER, "weight": _NUMBER}, "embedding": _ADAPTER, "ip_adapter": _ADAPTER}
"""Kind of an adapter -> the form of its record."""
_SETTINGS: dict[str, Any] = {"prompt": str, "negative_prompt": (str, NoneType), "seed": int, "manifest": {}}
ALSO = ("noise", "control_image", "prompt", "negative_prompt")
"""Inputs that an image file does not hold; a prompt is one where it was given as conditioning."""


def environment(pipe: LatentDiffusion) -> dict[str, Any]:
    """Describe what a pipeline makes images with.

    Args:
        pipe: the pipeline.

    Returns:
        Versions, device, dtype, family and source of the model, the fingerprint of every component, the values that
        the released family has otherwise, the load options that differ from their defaults, and what was added to the
        model: LoRAs and embeddings.
    """
    cuda = pipe.device.type == "cuda"
    load = {} if pipe.loaded is None else pipe.loaded.to_manifest()
    own = {name: repr(value) for name, value in deviations(pipe.family).items()}
    return {
        "form": FORM,
        "sdinpaint": __version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(pipe.device) if cuda else pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "family": pipe.family.name,
        "model": pipe.source,
        "weights": weights_of(pipe),
        "draws": DRAWS,
        **({"values": own} if own else {}),
        **({"load": load} if load else {}),
        **({"adapters": adapters} if (adapters := pipe.recorded_adapters()) else {}),
    }


def image_record(image: InputImage, path: str | Path | None = None) -> dict[str, Any]:
    """Record an image that a run is given.

    Args:
        image: the image.
        path: the file that it was read from, if any.

    Returns:
        The path as given, the size [height, width], and the SHA-256 digest of the pixels with their alpha.
    """
    given = None if path is None else str(path)
    return {"path": given, "size": list(image.size), "sha256": pixels_sha256(image)}


def mask_record(mask: Soft, path: str | Path | None = None) -> dict[str, Any]:
    """Record a mask that a run is given.

    Args:
        mask: (H, W), 1 = repaint.
        path: the file that it was read from, if any.

    Returns:
        Path, size and digest as for an image, the share of the pixels that are repainted, and a small enough mask
        itself as `png`.
    """
    given, png = None if path is None else str(path), mask_to_text(mask)
    share = round(float(binarize(mask).mean()), 6)
    record = {"path": given, "size": list(mask.shape), "sha256": pixels_sha256(mask), "share": share}
    return record if png is None else record | {"png": png}


def record(
    made_with: Mapping[str, Any],
    kind: str,
    also: Sequence[str],
    *,
    image: InputImage,
    mask: Mask,
    mask_path: str | None,
    **results: Any,
) -> dict[str, Any]:
    """Describe an image that a method of a pipeline made by all that went into it.

    Args:
        made_with: the pipeline's `environment` when the run began.
        kind: name of the method: "inpaint", "vary" or "outpaint".
        also: names of further inputs, as in `ALSO`.
        image: the image that was given, perhaps extended.
        mask: the mask that was given.
        mask_path: the file that the mask was read from, if any.
        results: further entries, about the image that was made.

    Returns:
        The manifest, as plain JSON values.
    """
    inputs: dict[str, Any] = {"image": image_record(as_given(image), image.path)}
    if kind == "inpaint":
        inputs["mask"] = mask_record(mask.array, mask_path)
    return {**made_with, "kind": kind, **inputs, "also": list(also), **results}


def check_again(
    manifests: Sequence[Manifest | None] | None,
    pipe: LatentDiffusion,
    inputs: Sequence[Mapping[str, InputImage | Mask] | None],
) -> None:
    """Refuse to repeat a run with other weights, images or masks.

    Args:
        manifests: manifests of the run, one for each image, from `as_manifests`; None checks nothing.
        pipe: the pipeline that is to repeat it.
        inputs: for each image its inputs by name, or None where the image is left out.

    Raises:
        CheckpointError: the weights are other ones.
        SettingError: a manifest is missing, or an image or mask is another one.
    """
    if manifests is None:
        return
    if len(manifests) != len(inputs):
        found, expected = f"{len(manifests)} manifests", f"one for each of {len(inputs)} images"
        raise SettingError("MANIFEST_COUNT", "manifest", found, expected=expected)
    for made, given in zip(manifests, inputs, strict=True):
        if made is None or given is None:  # an image that could not be made, then or now
            continue
        require_same_weights(made, pipe)
        require_same_adapters(made, pipe)
        for name in _INPUTS[made["kind"]]:
            if name in given:
                one = given[name]
                check_input(made[name], one.array if isinstance(one, Mask) else as_given(one), name)


def as_manifests(manifest: Any) -> list[Manifest | None]:
    """Return manifests as they were given: one, or a list with one for each image.

    Args:
        manifest: what was given.

    Returns:
        The manifests, None for an image that could not be made.

    Raises:
        SettingError: it is something else, or a manifest is not complete.
    """
    manifests = list(manifest) if isinstance(manifest, list | tuple) else [manifest]
    return [None if one is None else check_manifest(one) for one in manifests]


def as_given(image: InputImage) -> InputImage:
    """Cut the image that was given out of an extended one.

    Args:
        image: the image, perhaps extended by a canvas.

    Returns:
        The image before it was extended.
    """
    if image.old is None:
        return image
    part = image.old.slices
    return replace(image, rgb=image.rgb[part], alpha=None if image.alpha is None else image.alpha[part])


def manifest_of(settings: Any) -> Manifest:
    """Check the settings that an image file holds, and return their manifest.

    Args:
        settings: settings of the file.

    Returns:
        The manifest.

    Raises:
        SettingError: a key is missing or broken, which the error names, or the settings were shortened.
    """
    _require(settings, {}, "settings")
    if SHORTENED in settings:
        found, expected = "shortened, because they did not fit into the image file", "whole settings"
        hint = "run it again from its prompt, seed and settings"
        raise SettingError("MANIFEST_SHORTENED", "settings", found, expected=expected, hint=hint)
    _require(settings, {"manifest": {}}, "settings")
    manifest = check_manifest(settings["manifest"])
    needed = {name: form for name, form in _SETTINGS.items() if name not in manifest.get("also", [])}
    _require(settings, needed, "settings")
    return manifest


def check_manifest(manifest: Any) -> Manifest:
    """Check that a manifest is complete.

    Args:
        manifest: the manifest as it was stored.

    Returns:
        The manifest.

    Raises:
        SettingError: a key is missing or broken, which the error names, or the manifest has another form.
    """
    _require(manifest, {"form": int}, "manifest")
    if manifest["form"] != FORM:
        found, hint = str(manifest["form"]), f"replay it with the version that wrote it: this is {__version__}"
        raise SettingError("MANIFEST_FORM", "manifest.form", found, expected=str(FORM), hint=hint)
    _require(manifest, _MANIFEST, "manifest")
    if manifest["kind"] not in _INPUTS:
        found, expected, hint = said(manifest["kind"]), "one of " + ", ".join(_INPUTS), EDITED
        raise SettingError("MANIFEST_BROKEN", "manifest.kind", found, expected=expected, hint=hint)
    _require(manifest["weights"], dict.fromkeys(manifest["weights"], str), "manifest.weights")
    values = manifest.get("values", {})
    _require(values, dict.fromkeys(values, str) if isinstance(values, dict) else {}, "manifest.values")
    _require(manifest, dict.fromkeys(_INPUTS[manifest["kind"]], _INPUT), "manifest")
    _require_adapters(manifest.get("adapters", []))
    also = manifest.get("also", [])
    _require(also, [str] * len(also) if isinstance(also, list) else [], "manifest.also")
    return dict(manifest)


def arguments(settings: Any, known: Sequence[str]) -> dict[str, Any]:
    """Check that every setting that an image file holds is one that a request has.

    Args:
        settings: settings of the file.
        known: names of the settings of a request.

    Returns:
        The settings.

    Raises:
        SettingError: it names a key that is missing, broken or unknown.
    """
    manifest_of(settings)
    for name in settings:
        if name not in known:
            found, hint = "a setting that this version does not have", f"update sdinpaint: this is {__version__}"
            raise SettingError("MANIFEST_SETTING", f"settings.{name}", found, expected=", ".join(known), hint=hint)
    return dict(settings)


def differences(manifest: Manifest, pipe: LatentDiffusion) -> list[str]:
    """List the differences between a manifest and a pipeline on this machine.

    Args:
        manifest: manifest of an image.
        pipe: the pipeline to compare.

    Returns:
        A sentence for each difference, those of weights first.

    Raises:
        SettingError: the manifest is broken.
    """
    made, here = check_manifest(manifest), environment(pipe)
    other = [f"{key}: made with {made[key]}, here {here[key]}" for key in COMPARED if made[key] != here[key]]
    ours, theirs = made.get("values", {}), here.get("values", {})
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            usual = "the released value"
            other.append(f"{key}: made with {ours.get(key, usual)}, here {theirs.get(key, usual)}")
    adapters = _adapter_differences(made.get("adapters", []), here.get("adapters", []))
    return _weight_differences(made["weights"], here["weights"]) + adapters + other


def require_same_weights(manifest: Manifest, pipe: LatentDiffusion) -> None:
    """Refuse a pipeline whose weights are not those of a manifest.

    Args:
        manifest: manifest of an image.
        pipe: the pipeline.

    Raises:
        CheckpointError: the weights are other ones; the error names the components.
        SettingError: the manifest is broken.
    """
    made = check_manifest(manifest)
    if different := _weight_differences(made["weights"], weights_of(pipe)):
        expected, hint = "the weights that made the image", f"load them: {made['model']!r}, with the same load options"
        raise CheckpointError(
            "MANIFEST_WEIGHTS", pipe.source or "model", "; ".join(different), expected=expected, hint=hint
        )


def require_same_adapters(manifest: Manifest, pipe: LatentDiffusion) -> None:
    """Refuse a pipeline to which other adapters were added than those of a manifest, or at other weights.

    Args:
        manifest: manifest of an image; without the key "adapters" it was made with none.
        pipe: the pipeline.

    Raises:
        SettingError: the error names the adapters, or the manifest is broken.
    """
    made = check_manifest(manifest)
    if different := _adapter_differences(made.get("adapters", []), pipe.recorded_adapters()):
        expected = "those that made the image"
        hint = "add what is missing with its weight (loras=..., embeddings=...), and leave out the others"
        raise SettingError("MANIFEST_ADAPTERS", "adapters", "; ".join(different), expected=expected, hint=hint)


def check_input(record: Mapping[str, Any], given: InputImage | Soft, argument: str) -> None:
    """Refuse an image or mask other than the recorded one.

    Args:
        record: record of the image or mask in a manifest.
        given: the image, or the mask (H, W).
        argument: name that an error gives to it.

    Raises:
        SettingError: the pixels differ, or the record is broken.
    """
    _require(record, _INPUT, argument)
    digest, (height, width) = pixels_sha256(given), given.size if isinstance(given, InputImage) else given.shape
    if digest != record["sha256"]:
        found = f"pixels that differ from the recorded ones: {height} rows, {width} columns, sha256 {_short(digest)}"
        rows, columns = record["size"]
        expected = f"{rows} rows, {columns} columns, sha256 {_short(record['sha256'])}"
        hint = f"give the file that was used, {record['path'] or 'whose path is not known'}"
        raise SettingError("MANIFEST_INPUT", argument, found, expected=expected, hint=hint)


def _weight_differences(made: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: made with {_short(made.get(name))}, loaded {_short(here.get(name))}"
        for name in {**here, **made}
        if made.get(name) != here.get(name)
    ]


def _require_adapters(records: Any) -> None:
    """Check the records of adapters."""
    key = "manifest.adapters"
    _require(records, [{"kind": str}] * len(records) if isinstance(records, list) else [], key)
    for index, one in enumerate(records):
        if one["kind"] not in _ADAPTERS:
            found, expected = said(one["kind"]), "one of " + ", ".join(_ADAPTERS)
            raise SettingError("MANIFEST_BROKEN", f"{key}[{index}].kind", found, expected=expected, hint=EDITED)
        _require(one, _ADAPTERS[one["kind"]], f"{key}[{index}]")
        blocks = one["blocks"] or {}
        _require(blocks, dict.fromkeys(blocks, _NUMBER), f"{key}[{index}].blocks")


def _adapter_differences(made: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]) -> list[str]:
    ours, theirs = (  # wherever the files lie
        {(one["kind"], one["name"]): {name: one[name] for name in _ADAPTER if name != "source"} for one in records}
        for records in (made, here)
    )
    return [
        f"{' '.join(key)}: made with {_adapter(ours.get(key))}, here {_adapter(theirs.get(key))}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


def _adapter(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "none"
    weights = [f"{key.replace('_', ' ')} {record[key]}" for key in ("weight", "text_weight") if record[key] is not None]
    blocks = [f"{prefix} {factor}" for prefix, factor in sorted((record["blocks"] or {}).items())]
    return ", ".join([_short(record["sha256"]), *weights, *blocks])


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."


def _require(value: Any, form: Any, key: str) -> None:
    """Check a JSON value: a form is a type, several types, a list of forms, or forms by key, beside which more may be.

    Raises: SettingError.
    """
    if isinstance(form, dict):
        fits, parts = isinstance(value, dict), [(f"{key}.{name}", name, inner) for name, inner in form.items()]
    elif isinstance(form, list):
        fits = isinstance(value, list) and len(value) == len(form)
        parts = [(f"{key}[{index}]", index, inner) for index, inner in enumerate(form)]
    else:
        fits, parts = isinstance(value, form) and not isinstance(value, bool), []
    if not fits:
        raise SettingError("MANIFEST_BROKEN", key, said(value), expected=_in_words(form), hint=EDITED)
    for name, part, inner in parts:
        if isinstance(value, dict) and part not in value:
            raise SettingError("MANIFEST_BROKEN", name, "is missing", expected=_in_words(inner), hint=EDITED)
        _require(value[part], inner, name)


def _in_words(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_in_words, form))
    if isinstance(form, list):
        return f"a list of {len(form)}"
    words = {str: "a text", int: "a whole number", float: "a number", dict: "an object", NoneType: "null"}
    return "an object" if isinstance(form, dict) else words[form]
