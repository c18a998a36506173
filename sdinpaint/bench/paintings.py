"""Images whose peak memory is measured: what is made, and the options of `load` that save memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdinpaint.bench.cases import GUIDANCE, PROMPT, SEED, Case, picture_and_mask
from sdinpaint.bench.growth import STATUS, peak_bytes
from sdinpaint.loading import load
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.pipeline.results import Result

__all__ = ["DEFAULT", "INPAINT", "MODES", "OUTPAINT", "paint"]

DEFAULT, INPAINT, OUTPAINT = "default", "inpaint", "outpaint"
MODES: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "offload": {"offload": True},
    "offload, tile 256": {"offload": True, "tile": 256},
}
"""The options of `load` for each mode."""
KNOWN = 3 / 4
"""The share of the canvas' height and width that is known before outpainting."""
PAUSE = 0.002
"""Seconds between two readings of resident memory."""
DIGITS = 12
"""Hexadecimal digits of a digest: as many as a float holds exactly."""
CELL, CELLS = "cell", 4
"""Name and number a side of the parts of an image whose mean levels tell it from another one."""


def inpaint(pipe: Pipeline, size: int, image: Image.Image, mask: Image.Image, **options: Any) -> Result:
    """Inpaint an image of that size, without a crop.

    Args:
        pipe: the pipeline.
        size: height and width in pixels.
        image: the image.
        mask: white is repainted.
        options: of `Pipeline.inpaint`.

    Returns:
        The result.
    """
    return pipe.inpaint(image, mask, PROMPT, **options)


def outpaint(pipe: Pipeline, size: int, image: Image.Image, mask: Image.Image, **options: Any) -> Result:
    """Outpaint an image onto a canvas of that size; the model sees it at the size that it was trained at.

    Args:
        pipe: the pipeline.
        size: height and width of the canvas in pixels.
        image: the image.
        mask: unused.
        options: of `Pipeline.outpaint`.

    Returns:
        The result.
    """
    return pipe.outpaint(image, PROMPT, size=(size, size), crop="auto", **options)


PAINTINGS: Mapping[str, tuple[Callable[..., Result], float]] = {INPAINT: (inpaint, 1), OUTPAINT: (outpaint, KNOWN)}
"""Functions by name, and the side of their input over that of the result."""


def paint(name: str, case: Case) -> dict[str, float]:
    """Load the checkpoint, and make one image.

    Args:
        name: "WORK: MODE", of PAINTINGS and MODES.
        case: checkpoint, size, steps, dtype and device.

    Returns:
        Bytes beyond those before: `peak`, on a GPU of its memory, and `own`, the peak of anonymous memory, while the
        operating system can reclaim what is mapped from a file; both are missing on a CPU without /proc. `digest` of
        the pixels, and "cell 0" and so on, the mean levels of parts of the image.
    """
    work, mode = name.split(": ")
    make, share = PAINTINGS[work]
    inputs, found = picture_and_mask(round(share * case.size)), {}

    def run() -> None:
        pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False, **MODES[mode])
        options = {"steps": case.steps, "guidance_scale": GUIDANCE, "seed": SEED, "progress": False}
        made = make(pipe, case.size, *inputs, **options)
        pixels = np.asarray(made.image)
        found["digest"] = float(int(hashlib.sha256(pixels.tobytes()).hexdigest()[:DIGITS], 16))
        rows = (part for half in np.array_split(pixels, CELLS) for part in np.array_split(half, CELLS, axis=1))
        found.update({f"{CELL} {number}": float(part.mean()) for number, part in enumerate(rows)})

    with _watching() as own:
        peak = peak_bytes(run, torch.device(case.device))
    if peak is not None:
        found |= {"peak": peak, "own": max(own) - own[0]}
    return found


@contextmanager
def _watching() -> Iterator[list[int]]:
    """Record the resident anonymous memory in bytes, read again and again by another thread."""
    seen, done = [_own()], threading.Event()

    def look() -> None:
        while not done.wait(PAUSE):
            seen.append(_own())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def _own() -> int:
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
