"""Helpers of the tests of bad inputs: a good image, a quick run, and what every refusal must have."""

from __future__ import annotations

import math

import numpy as np
import pytest

import sdinpaint
from sdinpaint import SdInpaintError

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), dtype=bool)
MASK[16:50, 20:60] = True
NAN, INF = math.nan, math.inf


def load(source, **options):
    return sdinpaint.load(source, device="cpu", progress=False, **options)


def inpaint(pipe, image=IMAGE, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 1, "seed": 5, "progress": False} | options)


def refused(kind, code, call, *words):
    """The error of a call, after checking what every error must have."""
    with pytest.raises(SdInpaintError) as caught:
        call()
    error = caught.value
    assert isinstance(error, kind)
    assert isinstance(error, OSError | ValueError)
    assert error.code == code
    assert error.found
    assert error.expected or error.hint
    for word in (error.subject, *words):
        assert str(word) in str(error)
    return error
