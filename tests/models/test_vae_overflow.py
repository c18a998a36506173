"""An autoencoder that overflows float16, as SDXL's official one does: finite images, one warning, and little cost."""

from __future__ import annotations

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
from builders import random_pipeline, small
from closeness import close

from sdinpaint.errors import NumericError, SdInpaintWarning
from sdinpaint.models import guarded_vae

HALVES = "encode", "decode"
HALF = 5e-3
"""The relative norm of a difference: float16's rounding (5e-4), some times."""
LATENTS = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(1))
IMAGE = np.random.default_rng(2).integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), bool)
MASK[13:45, 22:57] = True


@pytest.fixture(scope="module")
def tame(tiny, vocabulary):
    return random_pipeline(small(tiny), vocabulary)


def loud(pipe, *halves, dtype=torch.float16):
    """A copy whose autoencoder makes values above 65504 on its way; the norm behind them brings the size down again."""
    pipe = copy.deepcopy(pipe)
    for half in halves:
        layer = getattr(pipe.vae, f"{half}r").conv_in
        layer.weight.mul_(30_000 / layer.weight.abs().max())
    pipe.vae.to(dtype)
    return pipe


def run(pipe, half):
    if half == "decode":
        return pipe.decode(LATENTS)
    return pipe.encode_image(IMAGE, MASK).latents


def quietly(pipe, half):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(pipe, half)


@pytest.mark.parametrize("half", HALVES)
def test_the_result_is_that_of_float32(tame, half):
    pipe = loud(tame, half)
    with pytest.warns(SdInpaintWarning, match=rf"overflowed in torch\.float16; the image is {half}d in float32"):
        found = run(pipe, half)
    wide = copy.deepcopy(pipe)
    wide.vae.float()
    assert found.isfinite().all()
    expected = quietly(wide, half)
    assert close(found, expected)
    assert not close(found, expected.half().float())
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("half", HALVES)
def test_the_guard_is_needed(tame, half, sabotage):
    """Without it, the same autoencoder makes no image at all."""
    pipe = loud(tame, half)
    sabotage(guarded_vae.GuardedVAE, "_widened", lambda self, *_: self.vae)
    with pytest.raises(NumericError, match="NaN or infinite"):
        run(pipe, half)


@pytest.mark.parametrize("half", HALVES)
def test_afterwards_it_goes_straight_to_float32_without_a_word(tame, half, forbid):
    pipe = loud(tame, half)
    with pytest.warns(SdInpaintWarning):
        first = run(pipe, half)
    forbid(copy, "deepcopy")
    forbid(pipe.vae, "posterior" if half == "encode" else "decode")
    assert torch.equal(quietly(pipe, half), first)


@pytest.mark.parametrize(("half", "other"), [HALVES, HALVES[::-1]])
def test_the_other_direction_keeps_its_dtype_and_its_results(tame, half, other):
    pipe = loud(tame, half)
    before = quietly(pipe, other)
    with pytest.warns(SdInpaintWarning):
        run(pipe, half)
    assert torch.equal(quietly(pipe, other), before)


def test_both_directions_share_one_copy(tame, spy):
    pipe = loud(tame, *HALVES)
    copies = spy(copy, "deepcopy")
    for half in HALVES:
        with pytest.warns(SdInpaintWarning, match=f"{half}d"):
            run(pipe, half)
    assert [copied for copied, *_ in copies if copied is pipe.vae] == [pipe.vae]


def test_nothing_changes_for_an_autoencoder_that_does_not_overflow(tame):
    pipe = loud(tame)
    for half in HALVES:
        assert quietly(pipe, half).isfinite().all()
    for half in HALVES:
        assert quietly(loud(tame, *HALVES, dtype=torch.bfloat16), half).isfinite().all()  # it has float32's range


def test_another_autoencoder_in_its_place_starts_anew(tame):
    pipe = loud(tame, "decode")
    with pytest.warns(SdInpaintWarning):
        run(pipe, "decode")
    wide = quietly(pipe, "decode")
    pipe.vae = loud(tame).vae
    expected = quietly(loud(tame), "decode")
    assert close(quietly(pipe, "decode"), expected, HALF)
    assert not close(wide, expected, HALF)
    pipe.vae = loud(tame, "decode").vae
    with pytest.warns(SdInpaintWarning):
        run(pipe, "decode")


def test_another_dtype_is_tried_by_itself(tame):
    pipe = loud(tame, "decode")
    with pytest.warns(SdInpaintWarning):
        wide = run(pipe, "decode")
    pipe.vae.to(torch.bfloat16)
    found = quietly(pipe, "decode")
    assert found.isfinite().all()
    assert not close(found, wide)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_finite_before_is_no_overflow(tame, dtype):
    with pytest.raises(NumericError):
        loud(tame, dtype=dtype).decode(LATENTS / 0)


def test_one_warning_and_one_copy_for_many_threads(tame, spy):
    pipe = loud(tame, "decode")
    copies = spy(copy, "deepcopy")
    ready, found = threading.Barrier(4), []

    def work():
        ready.wait()
        found.append(pipe.decode(LATENTS))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(copies) == len(caught) == 1
    assert len(found) == 4
    assert all(close(one, found[0]) for one in found)


def test_a_whole_run(tame):
    pipe, options = loud(tame, *HALVES), {"steps": 2, "seed": 5, "progress": False}
    with pytest.warns(SdInpaintWarning):
        first = pipe.inpaint(IMAGE, MASK, "a red fox", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pipe.inpaint(IMAGE, MASK, "a red fox", **options)
    assert np.array_equal(first.image, again.image)
    assert np.asarray(first.image)[MASK].std() > 10
    assert np.array_equal(np.asarray(first.image)[~MASK], IMAGE[~MASK])


def test_the_warning_names_who_decodes(tame):
    with pytest.warns(SdInpaintWarning) as caught:
        loud(tame, "decode").decode(LATENTS)
    assert [warning.filename for warning in caught] == [__file__]
