"""Tests of the text and size conditioning of SDXL, and of the text conditioning of the other families."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import as_sd2, as_sdxl, random_pipeline, small
from closeness import close

from sdinpaint import latent_diffusion
from sdinpaint.errors import SettingError
from sdinpaint.models.unet import timestep_embedding
from sdinpaint.text.conditioning import PictureSize

IMAGE = np.random.default_rng(0).integers(0, 256, (72, 80, 3), dtype=np.uint8)
MASK = np.zeros((72, 80), dtype=bool)
MASK[16:50, 20:60] = True
POOLED, SINES = 26, 14


@pytest.fixture(scope="module")
def xl(tiny, vocabulary):
    return random_pipeline(as_sdxl(small(tiny)), vocabulary)


@pytest.fixture(scope="module")
def sd2(tiny, vocabulary):
    return random_pipeline(as_sd2(small(tiny)), vocabulary)


def sizes_in(vector):
    """The six embeddings of the sizes (B, 6, SINES)."""
    return vector[:, POOLED:].unflatten(1, (6, SINES))


def test_shapes(xl, sd2):
    one, two = xl.encode_prompts(["a red fox", ["a", "b"]])
    assert (one.context.shape, one.vector.shape) == ((1, 77, 68), (1, POOLED + 6 * SINES))
    assert (two.context.shape, two.vector.shape) == ((2, 77, 68), (2, POOLED + 6 * SINES))
    (cond,) = sd2.encode_prompts(["a red fox"])
    assert (cond.context.shape, cond.vector) == ((1, 77, 28), None)


def test_the_context_is_that_of_both_encoders_side_by_side(xl):
    first, second = xl.text
    ids, ids_2 = (tokenizer("a red fox") for tokenizer in xl.condition.tokenizers)
    (cond,) = xl.encode_prompts(["a red fox"])
    context, pooled = second.encode(ids_2)
    assert torch.equal(cond.context, torch.cat([first(ids), context], dim=-1))
    assert torch.equal(cond.vector[:, :POOLED], pooled)
    assert torch.equal(xl.tokenizer("a red fox"), ids)
    assert (ids[0, -1], ids_2[0, -1]) == (xl.tokenizer.end_id, 0)


@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        (None, (64, 64, 0, 0, 64, 64)),
        ((64, 72), (64, 72, 0, 0, 64, 72)),
        (PictureSize((64, 72)), (64, 72, 0, 0, 64, 72)),
        (PictureSize((64, 72), original=(128, 136), crop=(8, 16)), (128, 136, 8, 16, 64, 72)),
    ],
)
def test_sizes(xl, size, numbers):
    for cond in xl.encode_prompts(["a red fox", None], size):
        assert torch.equal(sizes_in(cond.vector)[0], timestep_embedding(torch.tensor(numbers), SINES))


def test_no_prompt_is_zeros_for_xl_and_the_empty_prompt_elsewhere(xl, sd2):
    mixed, empty, fox = xl.encode_prompts([[None, "a red fox"], "", "a red fox"])
    assert not mixed.context[0].any()
    assert not mixed.vector[0, :POOLED].any()
    assert sizes_in(mixed.vector)[0].any()
    torch.testing.assert_close(mixed.context[1:], fox.context, rtol=0, atol=1e-5)
    assert empty.context.any()
    none, empty, fox = sd2.encode_prompts([None, "", "a red fox"])
    assert close(none.context, empty.context)
    assert not close(none.context, fox.context, 0.1)


def test_the_size_and_the_missing_prompt_reach_the_denoiser(xl, spy):
    made = spy(latent_diffusion, "Denoiser")
    result = xl.inpaint(IMAGE[:68], MASK[:68], "a fox", negative_prompt=None, steps=1, seed=1, progress=False)
    _, _, _, cond, uncond = made[0]
    assert not uncond.context.any()
    assert cond.context.any()
    # 68 rows are padded to 72, which is the image that the model sees
    expected = timestep_embedding(torch.tensor((72, 80, 0, 0, 72, 80)), SINES)[None]
    assert torch.equal(sizes_in(cond.vector), expected)
    assert torch.equal(sizes_in(uncond.vector), expected)
    assert result.settings["negative_prompt"] is None
    again = xl.inpaint(IMAGE[:68], MASK[:68], progress=False, **result.settings)
    assert np.array_equal(np.asarray(result.image), np.asarray(again.image))


def test_an_item_of_a_batch_is_its_single_run(xl):
    negatives = [None, "", "a cube"]
    batch = xl.inpaint(IMAGE, MASK, "a fox", negative_prompt=negatives, steps=3, seed=[1, 2, 3], progress=False)
    assert batch.settings["negative_prompt"] == negatives
    for seed, negative, found in zip((1, 2, 3), negatives, batch.images, strict=True):
        alone = xl.inpaint(IMAGE, MASK, "a fox", negative_prompt=negative, steps=3, seed=seed, progress=False).image
        assert np.abs(np.asarray(found).astype(int) - np.asarray(alone)).max() <= 1


def test_other_families_replay_none_as_the_empty_prompt(sd2):
    result = sd2.inpaint(IMAGE, MASK, "a fox", negative_prompt=None, steps=1, seed=1, progress=False)
    assert result.settings["negative_prompt"] == ""


def test_half_precision_keeps_the_sizes_exact(xl, tiny, vocabulary):
    half = random_pipeline(xl.family, vocabulary)
    for encoder in half.condition.encoders:
        encoder.to(torch.bfloat16)
    (cond,) = half.encode_prompts(["a fox"], (1000, 1016))
    expected = timestep_embedding(torch.tensor((1000, 1016, 0, 0, 1000, 1016)), SINES)
    assert torch.equal(sizes_in(cond.vector)[0], expected)


def test_a_model_may_encode_no_prompt_as_the_empty_one(xl, vocabulary):
    pipe = random_pipeline(replace(xl.family, zeros_for_none=False), vocabulary)
    none, empty, fox = pipe.encode_prompts([None, "", "a red fox"])
    assert close(none.context, empty.context)
    assert close(none.vector[:, :POOLED], empty.vector[:, :POOLED])
    assert not close(none.vector[:, :POOLED], fox.vector[:, :POOLED], 0.1)


@pytest.mark.parametrize(
    "size",
    [64, "64x64", (64,), (1, 2, 3), (0, 64), (-1, 64), (64.5, 64), (float("nan"), 64), (10**30, 64), [None, 64]],
    ids=str,
)
def test_what_is_no_size_is_refused(xl, sd2, size):
    for pipe in (xl, sd2):
        with pytest.raises(SettingError) as caught:
            pipe.encode_prompts("a red fox", size)
        assert caught.value.code == "SETTING_SIZE"
