"""Making a picture again from what is stored in it, and saying whether it is the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdinpaint.errors import SettingError
from sdinpaint.images.files import read_settings
from sdinpaint.images.picture import Picture, read_picture
from sdinpaint.loading import load
from sdinpaint.masks import Mask
from sdinpaint.masks.text import mask_from_text
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.pipeline.results import Result
from sdinpaint.provenance.manifest import ALSO, Manifest, arguments, differences, manifest_of

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """What came of making a picture again."""

    result: Result
    changed: int
    """Pixels that differ from the file's."""
    largest: int
    """The largest difference, in levels of 255."""
    differences: list[str]
    """What is not as it was then: versions, device, dtype."""

    @property
    def identical(self) -> bool:
        """Whether every pixel is the same."""
        return self.changed == 0


def replay(
    path: Path | str, pipe: Pipeline | None = None, *, image: Any = None, mask: Any = None, **options: Any
) -> Replay:
    """Make the picture in a file again, from the settings that `Result.save` or the command line stored in it.

    pipe: as it was made with; without one, the stored model is loaded in the stored dtype. The same pipeline makes the
    same picture again; one that is loaded anew may change a few pixels by one level (docs/numerics.md). image, mask:
    where they are not found any more at the stored paths; most masks are stored themselves. options: e.g. `progress`,
    `control_image`.
    Raises: ImageError for a file without settings; SettingError for broken ones, and for inputs that are missing or
    other ones; CheckpointError for other weights, naming the components.
    """
    settings = read_settings(path)
    manifest = manifest_of(settings)
    kind = manifest["kind"]
    also = {name: options.pop(name, None) for name in ALSO}
    for name, value in also.items():
        _check_given(name, value is not None, name in manifest.get("also", []))
    inputs = {"image": read_picture(_found(image, manifest, "image"))}
    if kind == "inpaint":
        inputs["mask"] = _mask(mask, manifest)
    if pipe is None:
        pipe = load(manifest["model"], dtype=manifest["dtype"], progress=options.get("progress", True))
    make = getattr(pipe, kind)
    inputs |= {name: value for name, value in also.items() if value is not None}
    made = make(**inputs, **arguments(settings, make, pipe.inpaint if kind == "outpaint" else make), **options)
    before, after = read_picture(path, "picture"), read_picture(made.image, "picture")
    changed, largest = _compared(before, after)
    return Replay(made, changed, largest, differences(manifest, pipe))


def _check_given(name: str, given: bool, used: bool) -> None:
    if used and not given:
        found, hint = f"the picture was made with a {name} of its own, which it does not hold", "give it again"
        raise SettingError("MANIFEST_INPUT_MISSING", name, found, expected="the same one", hint=hint)
    if given and not used:
        found, hint = f"the picture was made without a {name}", "leave it out"
        raise SettingError("MANIFEST_INPUT", name, found, expected="none", hint=hint)


def _mask(given: Any, manifest: Manifest) -> Any:
    stored = manifest["mask"].get("png")
    if given is None and stored is not None:
        return Mask(mask_from_text(stored))
    return _found(given, manifest, "mask")


def _found(given: Any, manifest: Manifest, argument: str) -> Any:
    """What was given, or the file at the stored path."""
    if given is not None:
        return given
    stored = manifest[argument]["path"]
    if stored is None or not Path(stored).is_file():
        found = "it was no file" if stored is None else f"there is no file {stored!r} any more"
        hint = f"give the {argument} that was used"
        raise SettingError("MANIFEST_INPUT_MISSING", argument, found, expected="the same one", hint=hint)
    return stored


def _compared(before: Picture, after: Picture) -> tuple[int, int]:
    """How many pixels differ, and by how much at most."""
    if before.size != after.size:
        return max(before.rgb[..., 0].size, after.rgb[..., 0].size), 255
    planes = [(before.rgb, after.rgb)]
    if before.alpha is not None and after.alpha is not None:
        planes.append((before.alpha[..., None], after.alpha[..., None]))
    far = [np.abs(one.astype(int) - other).max(axis=2) for one, other in planes]
    difference = np.maximum.reduce(far)
    return int((difference > 0).sum()), int(difference.max())
