"""The manifest of a picture: what it was made of and with, as plain JSON values, so that it can be made again.

It holds what `environment` says, the kind of the run, and records of what went in by their names. It lies as "manifest"
among the settings of the run, in a `Result` and in the picture files that are written of it.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sdinpaint import __version__
from sdinpaint.errors import CheckpointError, MaskError, SettingError
from sdinpaint.images import Picture
from sdinpaint.masks import Mask, binarize
from sdinpaint.models.weights import Snapshot, all_weights
from sdinpaint.picture_io import DECODER_ERRORS, SHORTENED, decode
from sdinpaint.sources import COMPONENTS
from sdinpaint.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sdinpaint.pipeline import Pipeline
    from sdinpaint.results import Painting

__all__ = ["DRAWS", "Manifest", "arguments", "check_input", "check_manifest", "differences", "environment"]
__all__ += [
    "NOT_STORED",
    "check_again",
    "fingerprint",
    "manifest_of",
    "mask_from_text",
    "mask_record",
    "mask_to_text",
    "picture_record",
    "record",
]
__all__ += ["require_same_weights", "weights_of"]

Manifest = Mapping[str, Any]
Soft = NDArray[np.float32]

FORM = 1
"""Raised when what a manifest holds is no longer understood by versions before."""
DRAWS = "torch CPU mt19937, one generator per picture: picture's latents, start, masked picture's latents, steps"
"""How noise is drawn, and in which order."""
COMPARED = ("family", "dtype", "device", "draws", "torch", "sdinpaint")
"""What may change a picture, beside the weights."""
EDITED = "the picture was saved by another version of sdinpaint, or its settings were edited: run it from its prompt"

_INPUT: dict[str, Any] = {"path": (str, NoneType), "size": [int, int], "sha256": str}
_INPUTS = {"inpaint": ("image", "mask"), "vary": ("image",), "outpaint": ("image",)}
"""What went in, by the kind of the run, which is the name of the pipeline's method."""
_MANIFEST: dict[str, Any] = {"form": int, "kind": str, "model": str, "weights": {}, **dict.fromkeys(COMPARED, str)}
_SETTINGS: dict[str, Any] = {"prompt": str, "negative_prompt": (str, NoneType), "seed": int, "manifest": {}}
ALSO = ("noise", "control_image")
"""Inputs that no file holds."""
NOT_STORED = ("image", "mask", "control_image", "noise", "progress", "on_step")
"""Arguments of a run that are no settings."""

_THREADS = 4
_DEPTHS: dict[int, type[np.generic]] = {1: np.bool_, 255: np.uint8, 65535: np.uint16}
"""The values of white in a PNG that a mask may be kept as."""
_MAX_PNG = 24_000
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Snapshot, str]] = WeakKeyDictionary()
"""The weights with which a module was seen last, and their fingerprint."""
_VOCABULARIES: WeakKeyDictionary[Tokenizer, str] = WeakKeyDictionary()
COMPILED = "_orig_mod."
"""The part of a weight's name that `torch.compile` adds; the weight stays the same."""


def fingerprint(module: nn.Module) -> str:
    """sha256 of a model's weights by name, dtype, shape and bytes, wherever and in whatever layout they are.

    Beside the weights, a few of them at a time are copied, where they are not contiguous and on the CPU.
    """
    state = sorted((name.replace(COMPILED, ""), tensor) for name, tensor in module.state_dict().items())
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib lets them run side by side
        digests = pool.map(_bytes_sha256, (tensor for _, tensor in state))
        rows = [
            (name, str(getattr(tensor, "dtype", "")), list(getattr(tensor, "shape", ())), digest)
            for (name, tensor), digest in zip(state, digests, strict=True)
        ]
    return _json_sha256(rows)


def weights_of(pipe: Pipeline) -> dict[str, str]:
    """The fingerprint of each component by its name, and of the vocabulary, as they are now.

    What was taken before serves again where the weights are known to be the same, bit for bit.
    """
    modules: dict[str, nn.Module] = dict(zip(COMPONENTS, (pipe.unet, pipe.vae, *pipe.condition.encoders), strict=False))
    if pipe.controlnet is not None:
        modules["controlnet"] = pipe.controlnet
    found = {}
    for name, module in modules.items():
        known = _KNOWN.get(module)
        if known is None or not known[0].holds(all_weights(module)):
            snapshot = Snapshot(all_weights(module))
            with pipe.using(module):
                known = _KNOWN[module] = snapshot, fingerprint(module)
        found[name] = known[1]
    if pipe.tokenizer not in _VOCABULARIES:
        _VOCABULARIES[pipe.tokenizer] = _vocabulary_sha256(pipe.tokenizer)
    return found | {"tokenizer": _VOCABULARIES[pipe.tokenizer]}


def environment(pipe: Pipeline) -> dict[str, Any]:
    """What a pipeline makes pictures with: versions, device, dtype, model, and the fingerprint of every component."""
    cuda = pipe.device.type == "cuda"
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
    }


def picture_record(picture: Picture, path: str | Path | None = None) -> dict[str, Any]:
    """Path as given, size (height, width), and sha256 of the pixels with their alpha."""
    given = None if path is None else str(path)
    return {"path": given, "size": list(picture.size), "sha256": _pixels_sha256(picture)}


def mask_record(mask: Soft, path: str | Path | None = None) -> dict[str, Any]:
    """As of a picture; the share that is repainted; and where that is small enough, the mask itself as `png`."""
    given, png = None if path is None else str(path), mask_to_text(mask)
    share = round(float(binarize(mask).mean()), 6)
    record = {"path": given, "size": list(mask.shape), "sha256": _pixels_sha256(mask), "share": share}
    return record if png is None else record | {"png": png}


def mask_to_text(mask: Soft) -> str | None:
    """float32 (H, W) in [0, 1] as a PNG in base64; None where it would not come back bit for bit, or is large."""
    for white, dtype in _DEPTHS.items():
        levels = np.rint(mask * np.float32(white)).astype(dtype)
        if _as_mask(levels, white).tobytes() == mask.tobytes():
            stream = io.BytesIO()
            Image.fromarray(levels).save(stream, format="PNG", optimize=True)
            return base64.b64encode(stream.getvalue()).decode() if stream.tell() <= _MAX_PNG else None
    return None


def mask_from_text(text: str, argument: str = "mask") -> Soft:
    """What `mask_to_text` wrote, bit for bit. Raises: MaskError, ImageError."""
    expected, hint = "a grey PNG in base64", "give the mask file that was used"
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except DECODER_ERRORS as error:
        found = f"not a PNG in base64: {error}"
        raise MaskError("MASK_TEXT", argument, found, expected=expected, hint=hint) from error
    levels = np.asarray(decode(image, argument))
    white = next((white for white, dtype in _DEPTHS.items() if levels.dtype == dtype and levels.ndim == 2), None)
    if white is None:
        raise MaskError("MASK_TEXT", argument, f"a PNG of mode {image.mode}", expected=expected, hint=hint)
    return _as_mask(levels, white)


def record(made_with: Mapping[str, Any], kind: str, also: Sequence[str], painting: Painting) -> dict[str, Any]:
    """The manifest of a picture that the method `kind` of a pipeline made.

    Args:
        made_with: the pipeline's `environment` when the run began.
        kind: "inpaint", "vary" or "outpaint".
        also: names of what else went in.
        painting: the picture.
    """
    job = painting.job
    inputs: dict[str, Any] = {"image": picture_record(as_given(job.picture), job.picture.path)}
    if kind == "inpaint":
        inputs["mask"] = mask_record(job.mask.array, job.mask_path)
    size = "x".join(map(str, painting.image.size))
    made = {"kind": kind, **inputs, "also": list(also), "size": size}
    made |= {"crops": [list(box) for box in painting.boxes], "scores": painting.scores.to_json()}
    return {**made_with, **made}


def check_again(
    manifest: Manifest | Sequence[Manifest] | None, pipe: Pipeline, inputs: Sequence[Mapping[str, Picture | Mask]]
) -> None:
    """Refuse to repeat a run with other weights, pictures or masks. Raises: CheckpointError, SettingError."""
    if manifest is None:
        return
    manifests = [manifest] if isinstance(manifest, Mapping) else manifest
    if not isinstance(manifests, list | tuple):
        expected = "result.settings['manifest']"
        raise SettingError("MANIFEST_BROKEN", "manifest", f"a {type(manifest).__name__}", expected=expected)
    if len(manifests) != len(inputs):
        found, expected = f"of {len(manifests)} pictures", f"one for each of {len(inputs)}"
        raise SettingError("MANIFEST_COUNT", "manifest", found, expected=expected)
    for made, given in zip(manifests, inputs, strict=True):
        require_same_weights(made, pipe)
        for name in _INPUTS[made["kind"]]:
            if name in given:
                one = given[name]
                check_input(made[name], one.array if isinstance(one, Mask) else one, name)


def as_given(picture: Picture) -> Picture:
    """The picture before it was extended."""
    if picture.old is None:
        return picture
    part = picture.old.slices
    return replace(picture, rgb=picture.rgb[part], alpha=None if picture.alpha is None else picture.alpha[part])


def manifest_of(settings: Any) -> Manifest:
    """The manifest among the settings that a picture file holds, once these are known to be whole.

    Raises: SettingError naming the key.
    """
    _require(settings, {}, "settings")
    if SHORTENED in settings:
        found, expected = "shortened, because they did not fit into the picture", "whole settings"
        hint = "run it again from its prompt, seed and settings"
        raise SettingError("MANIFEST_SHORTENED", "settings", found, expected=expected, hint=hint)
    _require(settings, _SETTINGS, "settings")
    return check_manifest(settings["manifest"])


def check_manifest(manifest: Any) -> Manifest:
    """The manifest, once all that is asked of it here is known to be there. Raises: SettingError naming the key."""
    _require(manifest, {"form": int}, "manifest")
    if manifest["form"] != FORM:
        found, hint = str(manifest["form"]), f"replay it with the version that wrote it: this is {__version__}"
        raise SettingError("MANIFEST_FORM", "manifest.form", found, expected=str(FORM), hint=hint)
    _require(manifest, _MANIFEST, "manifest")
    if manifest["kind"] not in _INPUTS:
        found, expected, hint = f"{manifest['kind']!r}", "one of " + ", ".join(_INPUTS), EDITED
        raise SettingError("MANIFEST_BROKEN", "manifest.kind", found, expected=expected, hint=hint)
    _require(manifest["weights"], dict.fromkeys(manifest["weights"], str), "manifest.weights")
    _require(manifest, dict.fromkeys(_INPUTS[manifest["kind"]], _INPUT), "manifest")
    also = manifest.get("also", [])
    _require(also, [str] * len(also) if isinstance(also, list) else [], "manifest.also")
    return dict(manifest)


def arguments(settings: Any, *methods: Callable[..., Any]) -> dict[str, Any]:
    """The settings that a picture file holds, once each is known to be an argument of one of a pipeline's methods.

    Raises: SettingError naming the key.
    """
    manifest_of(settings)
    parameters = [name for method in methods for name in inspect.signature(method).parameters]
    known = [name for name in dict.fromkeys(parameters) if name not in NOT_STORED]
    for name in settings:
        if name not in known:
            found, hint = "a setting that this version does not have", f"update sdinpaint: this is {__version__}"
            raise SettingError("MANIFEST_SETTING", f"settings.{name}", found, expected=", ".join(known), hint=hint)
    return dict(settings)


def differences(manifest: Manifest, pipe: Pipeline) -> list[str]:
    """What of a manifest is not so here, in words, weights first. Raises: SettingError naming a broken key."""
    made, here = check_manifest(manifest), environment(pipe)
    other = [f"{key}: made with {made[key]}, here {here[key]}" for key in COMPARED if made[key] != here[key]]
    return _weight_differences(made["weights"], here["weights"]) + other


def require_same_weights(manifest: Manifest, pipe: Pipeline) -> None:
    """Refuse a manifest of other weights. Raises: CheckpointError that says which differ; SettingError."""
    made = check_manifest(manifest)
    if different := _weight_differences(made["weights"], weights_of(pipe)):
        expected, hint = "the weights that made the picture", f"load them: {made['model']!r}, with what it had beside"
        raise CheckpointError(
            "MANIFEST_WEIGHTS", pipe.source or "model", "; ".join(different), expected=expected, hint=hint
        )


def check_input(record: Mapping[str, Any], given: Picture | Soft, argument: str) -> None:
    """Refuse another picture or mask than the recorded one. Raises: SettingError naming `argument`."""
    _require(record, _INPUT, argument)
    digest, (height, width) = _pixels_sha256(given), given.size if isinstance(given, Picture) else given.shape
    if digest != record["sha256"]:
        found = f"other pixels than then: {height} rows, {width} columns, sha256 {_short(digest)}"
        rows, columns = record["size"]
        expected = f"{rows} rows, {columns} columns, sha256 {_short(record['sha256'])}"
        hint = f"give the file that was used, {record['path'] or 'of which no path is known'}"
        raise SettingError("MANIFEST_INPUT", argument, found, expected=expected, hint=hint)


def _as_mask(levels: NDArray[np.generic], white: int) -> Soft:
    return Mask(levels.astype(np.float32) / np.float32(white)).array


def _bytes_sha256(tensor: Any) -> str:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:  # what quantized layers hold in their state
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return hashlib.sha256(buffer.getbuffer()).hexdigest()
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _vocabulary_sha256(tokenizer: Tokenizer) -> str:
    padding = tokenizer.pad_id, tokenizer.pad_is_special
    return _json_sha256([sorted(tokenizer.vocab.items()), list(tokenizer.merges), padding])


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _pixels_sha256(given: Picture | Soft) -> str:
    planes = [given] if isinstance(given, np.ndarray) else [given.rgb, given.alpha]
    digest = hashlib.sha256()
    for plane in planes:
        if plane is not None:
            digest.update(f"{plane.dtype} {plane.shape} ".encode())
            digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


def _weight_differences(made: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: made with {_short(made.get(name))}, loaded {_short(here.get(name))}"
        for name in {**here, **made}
        if made.get(name) != here.get(name)
    ]


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
        raise SettingError("MANIFEST_BROKEN", key, f"{value!r:.60}", expected=_in_words(form), hint=EDITED)
    for name, part, inner in parts:
        if isinstance(value, dict) and part not in value:
            raise SettingError("MANIFEST_BROKEN", name, "is missing", expected=_in_words(inner), hint=EDITED)
        _require(value[part], inner, name)


def _in_words(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_in_words, form))
    if isinstance(form, list):
        return f"a list of {len(form)}"
    words = {str: "a text", int: "a whole number", NoneType: "null"}
    return "an object" if isinstance(form, dict) else words[form]
