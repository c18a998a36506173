"""Replay: make an image again from the settings that are stored in it, and compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdinpaint import loading
from sdinpaint.checks import check_path
from sdinpaint.errors import SettingError
from sdinpaint.images.input_image import InputImage, read_image
from sdinpaint.images.reading import read_settings
from sdinpaint.keywords import knowing_keywords
from sdinpaint.load_options import LoadOptions
from sdinpaint.masks import Mask
from sdinpaint.masks.text import mask_from_text
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.pipeline.requests import Kind, Request, stored_names
from sdinpaint.pipeline.results import Result
from sdinpaint.provenance.manifest import ALSO, Manifest, arguments, differences, manifest_of

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """An image that was made again, compared with the file."""

    result: Result
    changed: int
    """Number of pixels that differ from the file's."""
    largest: int
    """The largest difference, in levels of 255."""
    differences: list[str]
    """Sentences about the weights, versions, device and dtype that differ from the recorded ones."""

    @property
    def identical(self) -> bool:
        """True if every pixel is the same."""
        return self.changed == 0


@knowing_keywords(*ALSO)
def replay(
    path: Path | str,
    pipe: Pipeline | None = None,
    *,
    image: Any = None,
    mask: Any = None,
    load: Mapping[str, Any] | None = None,
    progress: bool = True,
    **inputs: Any,
) -> Replay:
    """Make the image in a file again, from the settings that `Result.save` or the command line stored in it.

    The same pipeline makes the same image again; a newly loaded one may change a few pixels by one level
    (docs/numerics.md).

    Args:
        path: the file.
        pipe: pipeline that made the image; without one, the recorded model is loaded with the recorded options.
        image: image that was repainted, where it is not at its recorded path any more.
        mask: the mask, where it is neither stored nor at its recorded path.
        load: options of `sdinpaint.load` that replace the recorded ones, such as {"device": "cpu"}.
        progress: show bars in a terminal or a notebook.
        inputs: inputs that the file lacks: `control_image`, `noise`, or a prompt that was given as conditioning.

    Returns:
        The new result, and how it differs from the file.

    Raises:
        ImageError: the file holds no settings.
        SettingError: the settings are broken, or an input is missing or not the recorded one.
        CheckpointError: the weights are not the recorded ones; the error names the components.
    """
    settings = read_settings(check_path("path", path))
    manifest = manifest_of(settings)
    kind: Kind = manifest["kind"]
    settings = arguments(settings, stored_names(kind))
    for name in ALSO:
        _check_given(name, inputs.get(name) is not None, name in manifest.get("also", []))
    given = {name: value for name, value in inputs.items() if value is not None}
    original = read_image(_found(image, manifest, "image"))
    hole = _mask(mask, manifest) if kind == "inpaint" else None
    request = Request(original, hole, kind=kind, **{**settings, **given})
    if pipe is None:
        pipe = loading.load(LoadOptions.from_manifest(manifest, **load or {}), progress=progress)
    made = pipe.run(request, progress=progress)
    before, after = read_image(path, "image"), read_image(made.image, "image")
    changed, largest = _compared(before, after)
    return Replay(made, changed, largest, differences(manifest, pipe))


def _check_given(name: str, given: bool, used: bool) -> None:
    if used and not given:
        found, hint = f"the image was made with a {name} of its own, which the file does not hold", "give it again"
        raise SettingError("MANIFEST_INPUT_MISSING", name, found, expected="the same one", hint=hint)
    if given and not used:
        found, hint = f"the image was made without a {name}", "leave it out"
        raise SettingError("MANIFEST_INPUT", name, found, expected="none", hint=hint)


def _mask(given: Any, manifest: Manifest) -> Any:
    stored = manifest["mask"].get("png")
    if given is None and stored is not None:
        return Mask(mask_from_text(stored))
    return _found(given, manifest, "mask")


def _found(given: Any, manifest: Manifest, argument: str) -> Any:
    """Return what was given, or the file at the stored path."""
    if given is not None:
        return given
    stored = manifest[argument]["path"]
    if stored is None or not Path(stored).is_file():
        found = "it was no file" if stored is None else f"there is no file {stored!r} any more"
        hint = f"give the {argument} that was used"
        raise SettingError("MANIFEST_INPUT_MISSING", argument, found, expected="the same one", hint=hint)
    return stored


def _compared(before: InputImage, after: InputImage) -> tuple[int, int]:
    """Return how many pixels differ, and by how much at most."""
    if before.size != after.size:
        return max(before.rgb[..., 0].size, after.rgb[..., 0].size), 255
    planes = [(before.rgb, after.rgb)]
    if before.alpha is not None and after.alpha is not None:
        planes.append((before.alpha[..., None], after.alpha[..., None]))
    far = [np.abs(one.astype(int) - other).max(axis=2) for one, other in planes]
    difference = np.maximum.reduce(far)
    return int((difference > 0).sum()), int(difference.max())
