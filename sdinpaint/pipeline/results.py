"""The result of a run: images, how they join, and ways to look at them, to change them and to make them again."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Never, cast, get_args, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdinpaint.checks import check_choice, check_whole
from sdinpaint.errors import Remark, SdInpaintError, SettingError, already_warned, said, warn
from sdinpaint.images.boxes import Box
from sdinpaint.images.deep import Samples
from sdinpaint.images.files import DEEP, SUFFIXES, as_stored, check_output_path, save_png
from sdinpaint.images.input_image import join_samples, read_image
from sdinpaint.images.sheets import Row, contact_sheet, review_row
from sdinpaint.masks import Cover, MaskReport
from sdinpaint.metrics import Scores, known_error, scores
from sdinpaint.pipeline.requests import Item, Request
from sdinpaint.pipeline.settings import MAX_SEED, ControlSettings, MaskSettings, names_of
from sdinpaint.provenance.manifest import record
from sdinpaint.sampling import Conditioning

__all__ = ["Repainted", "Result"]

ScoreName = Literal["seam", "ring_delta_e"]
Judge = Callable[[Image.Image], float]
"""A function of an image: the higher, the better."""
MAX_TRIES = 64
EACH = ("prompt", "negative_prompt", "seed", "manifest")
"""Settings that are lists where there are several images."""
WATCHING = ("progress", "on_step", "on_event")
"""Arguments of a run that are no part of its request."""


@dataclass(frozen=True, eq=False)
class Repainted:
    """One image that was made, and the item of the request that it answers."""

    image: Image.Image
    item: Item
    cover: Cover
    boxes: tuple[Box, ...]
    """The parts of the image that the model saw, in their order; none where nothing was to be repainted."""
    replaced: NDArray[np.bool_]
    """The pixels (H, W) that are not those of the source."""

    @property
    def array(self) -> Samples:
        """The image in the source's own type, in which every pixel that was not replaced is the source's."""
        return join_samples(self.item.image, self.image, self.replaced)

    def error_in(self, stored: Image.Image) -> int:
        """Measure the largest change of a known pixel in a file.

        Args:
            stored: the image that the file holds; where it lacks the alpha channel, it is over white.

        Returns:
            The change in levels, 0 to 255.
        """
        with already_warned():
            seen = read_image(stored).opaque()
        return known_error(self.item.image.opaque(), seen, self.item.hole)

    @cached_property
    def scores(self) -> Scores:
        """How well the hole joins the rest, and how much was changed on both sides of its edge."""
        return scores(self.item.image.rgb, self._rgb, self.item.hole)

    @cached_property
    def report(self) -> MaskReport:
        """The report on the mask."""
        return self.item.mask.report(self.cover)

    def manifest(self, made_with: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """Describe the image by all that went into it, see `provenance.manifest.record`.

        Args:
            made_with: environment of the pipeline when the run began.
            kind: kind of the request.

        Returns:
            The manifest, as plain JSON values.
        """
        item = self.item
        inputs = {"noise": item.noise, "control_image": item.control_image}
        prompts = {"prompt": item.prompt, "negative_prompt": item.negative_prompt}
        also = [name for name, value in inputs.items() if value is not None]
        also += [name for name, value in prompts.items() if isinstance(value, Conditioning)]
        results: dict[str, Any] = {
            "size": "x".join(map(str, self.image.size)),
            "crops": [list(box) for box in self.boxes],
            "scores": self.scores.to_json(),
        }
        return record(made_with, kind, also, image=item.image, mask=item.mask, mask_path=item.mask_path, **results)

    def row(self, prompt: str = "") -> Row:
        """Return the images of a review: before, the hole, after, and the difference.

        Args:
            prompt: text that the caption shows beside the seed.

        Returns:
            A row of a sheet.
        """
        caption = f"seed {self.item.seed}" + f": {prompt}" * bool(prompt)
        return review_row(self.item.image.rgb, self.item.hole, self._rgb, boxes=self.boxes, caption=caption)

    @property
    def _rgb(self) -> NDArray[np.uint8]:
        return np.asarray(self.image.convert("RGB"))


class Result:
    """The images of a run in the order of its inputs, and what they were made with.

    `len(result)`, `for image in result` and `result[i]` are about the images. With `on_error="skip"`, an image that
    could not be made is None, and `errors` says why. `settings` holds all of it:
    `pipe.inpaint(image, mask, **result.settings)` makes the same images again, and so do `pipe.vary(image, ...)` and
    `pipe.outpaint(image, ...)`; noise, a control image and prompts that were encoded before are given again too.
    A pickled result holds images and settings, and no model: `again` and `best_of` need the pipeline that made it.

    Args:
        request: the request of the run.
        repainted: one for each of its items, None where there is no image.
        made_with: environment of the pipeline when the run began.
        run: function that runs another request.
        warnings: the warnings of the run.
    """

    def __init__(
        self,
        request: Request,
        repainted: Sequence[Repainted | None],
        made_with: Mapping[str, Any],
        run: Callable[..., Result],
        warnings: Sequence[Remark] = (),
    ) -> None:
        self.request, self.repainted, self._made_with, self._run = request, list(repainted), made_with, run
        self.warnings = list(warnings)
        """Every warning of the run; `index` is that of the image, None where it is about the whole run."""

    def __repr__(self) -> str:
        made = [one for one in self.repainted if one is not None]
        shown = ", ".join(str(one.item.seed) for one in made[:4]) + ", ..." * (len(made) > 4)
        sizes = {one.image.size for one in made}
        size = "{}x{}".format(*sizes.pop()) if len(sizes) == 1 else "several sizes"
        count, s = len(made), "s" * (len(made) != 1)
        failed = f", {len(self.errors)} failed" if self.errors else ""
        return f"Result({count} image{s}, {size}, seed{s} {shown}{failed})" if made else f"Result(0 images{failed})"

    def __len__(self) -> int:
        return len(self.repainted)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...

    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self.images[index]

    def __getstate__(self) -> dict[str, Any]:
        settings = self.settings  # taken now: of the pipeline, only they are left
        return {**vars(self), "settings": settings, "_run": _NoPipeline(self.request.kind)}

    def __copy__(self) -> Result:
        other = object.__new__(Result)
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Result:
        """Copy the result; the same pipeline makes it again."""
        other = copy.copy(self)
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_run"})
        return other

    @property
    def errors(self) -> dict[int, SdInpaintError]:
        """For `on_error="skip"`: why an image could not be made, by its index."""
        return self.request.errors

    @property
    def image(self) -> Image.Image:
        """The first image. Raises its error where it could not be made."""
        if 0 in self.errors:
            raise self.errors[0]
        return self.images[0]

    @property
    def images(self) -> list[Image.Image]:
        """All images; None where one could not be made, which `on_error="skip"` alone allows."""
        return [cast(Image.Image, one and one.image) for one in self.repainted]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [cast(int, one and one.item.seed) for one in self.repainted]

    @property
    def scores(self) -> list[Scores]:
        """How well the hole of each image joins the rest of it, and how much was changed."""
        return [cast(Scores, one and one.scores) for one in self.repainted]

    @property
    def reports(self) -> list[MaskReport]:
        """The report on each mask."""
        return [cast(MaskReport, one and one.report) for one in self.repainted]

    @property
    def crops(self) -> list[tuple[Box, ...]]:
        """For each image, the parts of it that the model saw."""
        return [() if one is None else one.boxes for one in self.repainted]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The arguments that make these images again, and under "manifest" what they were made of and with."""
        made = [None if one is None else self._each(one) for one in self.repainted]
        names = dict.fromkeys(name for one in made if one is not None for name in one)
        each = {name: [None if one is None else one.get(name) for one in made] for name in names}
        manifest = each.pop("manifest", [])
        several = len(made) > 1
        flat = {name: values if several else values[0] for name, values in each.items()}
        return {**flat, **self._shared(), "manifest": manifest if several else next(iter(manifest), None)}

    def again(self, **changes: Any) -> Result:
        """Run the request again with other arguments, e.g. `again(prompt="a blue fox", strength=0.6)`.

        Seeds stay the same. What was not given follows the change: another sampler comes with its own spacing and eta.

        Args:
            changes: arguments of the method that made this result.

        Returns:
            The new result.

        Raises:
            SdInpaintError: as the run does; SETTING_NO_PIPELINE where this result was pickled.
        """
        watching = {name: changes.pop(name) for name in WATCHING if name in changes}
        return self._run(self.request.replace(**changes), **watching)

    def best_of(self, n: int, score: ScoreName | Judge = "seam") -> Result:
        """Make n - 1 more images of each item, with the seeds that follow, and keep the best of the n.

        Args:
            n: from 1 to 64.
            score: name of a score, of which the lowest is best; or a function of an image, the higher the better.

        Returns:
            A result of the best images.

        Raises:
            SettingError: another n or name of a score.
        """
        n = check_whole("n", n, 1, MAX_TRIES, code="SETTING_BEST_OF")
        cost = _cost(score)
        if isinstance(self._run, _NoPipeline):
            self._run()
        given = self.request.options()["seed"]  # for an image that could not be made, what was given stays

        def with_seeds(made: Sequence[Repainted | None], more: int = 0) -> Request:
            pairs = zip(made, given, strict=True)
            seeds = [seed if one is None else (one.item.seed + more) % (MAX_SEED + 1) for one, seed in pairs]
            return self.request.replace(seed=seeds)

        tries = [self, *(self._run(with_seeds(self.repainted, more)) for more in range(1, n))]
        rivals = zip(*(one.repainted for one in tries), strict=True)
        best = [min((one for one in each if one is not None), key=cost, default=None) for each in rivals]
        chosen = with_seeds(best)
        return Result(chosen, best, self._made_with, self._run, self.warnings)

    def sheet(self) -> Image.Image:
        """Draw a row for each image: the original, the hole, the result, what differs, and what a crop showed.

        Returns:
            The sheet.

        Raises:
            SdInpaintError: no image could be made; the error of the first.
        """
        made = [one for one in self.repainted if one is not None]
        if not made:
            raise next(iter(self.errors.values()))
        prompts = [one.item.prompt if isinstance(one.item.prompt, str) else "" for one in made]
        several = len(set(prompts)) > 1
        return contact_sheet(
            [one.row(prompt if several else "") for one, prompt in zip(made, prompts, strict=True)], scale=1
        )

    def save(self, path: Path | str) -> list[Path]:
        """Write the image with its settings inside, and several as NAME-1, NAME-2, ...

        A PNG, TIFF or WebP file keeps the known pixels bit for bit; PNG and TIFF hold 16 bits where the source has more
        than 8. A JPEG or AVIF file changes them: a warning says by how much. Exif data (camera, place and time, but not
        the orientation, which is applied), XMP data, colour profile and resolution of the source are kept, and the
        texts of a PNG file in a PNG file; `result.image.save(path)` writes the pixels alone.

        Args:
            path: a .png, .webp, .tiff, .jpg or .avif file.

        Returns:
            The files; an image that could not be made has none.

        Raises:
            ImageError: one cannot be written; those before it are whole.
        """
        first, count = check_output_path(path), len(self)
        targets = [first] if count == 1 else [first.with_stem(f"{first.stem}-{index + 1}") for index in range(count)]
        made = [(index, target) for index, target in enumerate(targets) if self.repainted[index] is not None]
        for index, target in made:
            self.save_one(index, target)
        return [target for _, target in made]

    def save_one(self, index: int, path: Path | str) -> dict[str, Any]:
        """Write one of the images with its settings inside, as `save` does.

        Args:
            index: index of the image.
            path: the file.

        Returns:
            The settings that the file holds. Of a file that changes known pixels, `known_error` is that of the file.

        Raises:
            ImageError: the file cannot be written.
            SdInpaintError: the image could not be made.
        """
        index = self._at(index)
        if index in self.errors:
            raise self.errors[index]
        one, settings = cast(Repainted, self.repainted[index]), self.settings_of(index)
        given, kind = one.item.image, SUFFIXES[check_output_path(path).suffix.lower()]
        with already_warned():
            stored = as_stored(one.image, path, settings, given.embedded)
        if stored is not None:
            error = one.error_in(stored)
            manifest = settings["manifest"]
            settings = {**settings, "manifest": {**manifest, "scores": {**manifest["scores"], "known_error": error}}}
            if error > one.scores.known_error:
                found = f"{kind} changes known pixels, by up to {error} of 255 levels"
                warn(f"output {str(path)!r}: {found}; PNG, TIFF and WebP keep every one", index)
        samples = None
        if given.samples is not None:
            if kind in DEEP:
                samples = one.array
            if samples is None or samples.dtype == np.float32:
                bits, better = (8, "save as .png or .tiff, or ") if samples is None else (16, "")
                found = f"the file holds {bits} bits a sample, and the source is {given.samples.dtype}"
                warn(f"output {str(path)!r}: {found}; {better}take result.array({index})", index)
        save_png(one.image, path, settings, source=given.embedded, samples=samples)
        return settings

    def array(self, index: int = 0) -> Samples:
        """Return one of the images in the type of its source, in which known pixels are the source's bit for bit.

        Args:
            index: index of the image.

        Returns:
            The pixels (H, W, 3), or (H, W, 4) with alpha: uint8, for a source of 16 bits uint16, for one of floats
            float32 in [0, 1]. A grey source has three equal channels.

        Raises:
            SdInpaintError: the image could not be made.
        """
        index = self._at(index)
        if index in self.errors:
            raise self.errors[index]
        return cast(Repainted, self.repainted[index]).array

    def settings_of(self, index: int) -> dict[str, Any]:
        """Return the arguments that make one of the images alone, and its manifest.

        Args:
            index: index of the image.

        Returns:
            As `settings`, of that image.
        """
        index = self._at(index)
        if len(self) == 1:
            return self.settings
        return {name: value[index] if name in EACH else value for name, value in self.settings.items()}

    def _at(self, index: int) -> int:
        """Return an index from 0 on; -1 is the last image, as in a list."""
        return check_whole("index", index, -len(self), len(self) - 1) % len(self)

    def _each(self, one: Repainted) -> dict[str, Any]:
        """Return the settings of one image; prompts that are no text cannot be stored."""
        texts = {"prompt": one.item.prompt, "negative_prompt": one.item.negative_prompt}
        stored = {name: text for name, text in texts.items() if not isinstance(text, Conditioning)}
        return {**stored, "seed": one.item.seed, "manifest": one.manifest(self._made_with, self.request.kind)}

    def _shared(self) -> dict[str, Any]:
        """Return the settings that all images share, without those that meant nothing in this run."""
        unused: tuple[str, ...] = ()
        if not self.request.masked:
            unused = names_of(MaskSettings, ControlSettings)
        elif "controlnet" not in self._made_with["weights"]:
            unused = names_of(ControlSettings)
        used = vars(self.request.settings.resolved())
        canvas = {} if self.request.canvas is None else vars(self.request.canvas)
        shared = {name: value for name, value in used.items() if name not in unused} | canvas
        return {name: value for name, value in shared.items() if value is not None}

    def _repr_png_(self) -> bytes | None:
        if len(self.errors) == len(self):
            return None  # a notebook shows the text then
        buffer = io.BytesIO()
        self.sheet().save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class _NoPipeline:
    """The run of a result that was pickled, and so has no pipeline to make images again."""

    kind: str

    def __call__(self, *_: object, **__: object) -> Never:
        given = "image, mask" if self.kind == "inpaint" else "image"
        found, expected = "the result was pickled, without its pipeline", "a result of this process"
        again = f"pipe.{self.kind}({given}, **result.settings)"
        hint = f"{again} makes the same images again, with a pipeline of the same weights"
        raise SettingError("SETTING_NO_PIPELINE", "again", found, expected=expected, hint=hint)


def _cost(score: str | Judge) -> Callable[[Repainted], float]:
    """Return what is to be as low as possible; NaN is the worst."""
    if callable(score):

        def judged(one: Repainted) -> float:
            value: Any = score(one.image.copy())  # which it may scale or draw on
            try:
                value = -float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                found, expected = (
                    f"a function that returned {said(value)}",
                    "a function of an image that returns a number",
                )
                raise SettingError("SETTING_SCORE", "score", found, expected=expected) from error
            return math.inf if math.isnan(value) else value

        return judged
    check_choice("score", score, get_args(ScoreName))

    def cost(one: Repainted) -> float:
        value = getattr(one.scores, score)
        return math.inf if value is None else float(value)

    return cost
