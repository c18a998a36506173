"""Pictures of which the memory is measured: what is painted, and with which options of `load` that spare memory."""

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
"""By name, the options of `load`."""
KNOWN = 3 / 4
"""Of the canvas' height and width, what an outpainted picture has before."""
PAUSE = 0.002
"""Seconds between two looks at what is resident."""
DIGITS = 12
"""Of a digest: so many hexadecimal ones a float holds exactly."""

Picture = Image.Image


def inpaint(pipe: Pipeline, size: int, image: Picture, mask: Picture, **options: Any) -> Result:
    """A picture of that size, all of it shown to the model."""
    return pipe.inpaint(image, mask, PROMPT, **options)


def outpaint(pipe: Pipeline, size: int, image: Picture, mask: Picture, **options: Any) -> Result:
    """A picture onto a canvas of that size, which the model sees at the size that it works at."""
    return pipe.outpaint(image, PROMPT, size=(size, size), crop="auto", **options)


PAINTINGS: Mapping[str, tuple[Callable[..., Result], float]] = {INPAINT: (inpaint, 1), OUTPAINT: (outpaint, KNOWN)}
"""By name, what paints, and the side of its picture for each pixel of the size."""


def paint(name: str, case: Case) -> dict[str, float]:
    """Load and paint "WORK: MODE" -> bytes beyond those before: at the `peak`, and of them `own`, which no file holds.

    What is mapped from a file the system takes back where memory is short. On a GPU, `peak` is of its memory. `digest`:
    of the pixels; without Linux' /proc there is nothing else.
    """
    work, mode = name.split(": ")
    make, share = PAINTINGS[work]
    pictures, found = picture_and_mask(round(share * case.size)), {}

    def run() -> None:
        pipe = load(case.checkpoint, device=case.device, dtype=case.dtype, progress=False, **MODES[mode])
        options = {"steps": case.steps, "guidance_scale": GUIDANCE, "seed": SEED, "progress": False}
        made = make(pipe, case.size, *pictures, **options)
        found["digest"] = float(int(hashlib.sha256(np.asarray(made.image).tobytes()).hexdigest()[:DIGITS], 16))

    with _watching() as own:
        peak = peak_bytes(run, torch.device(case.device))
    if peak is not None:
        found |= {"peak": peak, "own": max(own) - own[0]}
    return found


@contextmanager
def _watching() -> Iterator[list[int]]:
    """Bytes of no file that are resident, looked at over and over by another thread."""
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
