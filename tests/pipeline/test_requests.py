"""Requests: values that are read and checked without a model, and that pipelines run."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from closeness import same_image
from painting import IMAGE, MASK, inpaint, pixels
from PIL import Image

from sdinpaint.errors import ImageError, MaskError, SdInpaintError, SdInpaintWarning, SettingError
from sdinpaint.pipeline.requests import Request
from sdinpaint.replaying import replay
from sdinpaint.sampling import Conditioning

SHORT = {"steps": 2, "seed": 5}
SMALL = IMAGE[:5, :5]


def run(pipe, *given, **options):
    return pipe.run(Request(*given, **{**SHORT, **options}), progress=False)


def told(result):
    """The warnings of a run, without those that random networks make no images."""
    return [one for one in result.warnings if "probably burnt" not in one.message]


# a request without a model


GOOD = torch.zeros(1, 7, 28)


@pytest.mark.parametrize(
    "given",
    [
        Conditioning(None),
        Conditioning(GOOD[0]),
        Conditioning(GOOD.numpy()),
        Conditioning(GOOD[:, :0]),
        Conditioning(GOOD.long()),
        Conditioning(GOOD.to("meta")),
        Conditioning(GOOD * torch.nan),
        Conditioning(GOOD, GOOD),
        Conditioning(GOOD, others=(3,)),
        Conditioning(GOOD, others=((GOOD, "x"),)),
        Conditioning(GOOD, others=((GOOD, float("nan")),)),
        Conditioning(GOOD, others=((GOOD.expand(3, -1, -1), 1.0),)),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_conditioning_that_no_model_can_have_encoded_is_refused(given, name):
    for several in (given, ["a fox", given]):
        with pytest.raises(SettingError) as caught:
            Request(**{"image": IMAGE, "mask": MASK, "prompt": "a fox", name: several})
        assert caught.value.code == "SETTING_CONDITIONS"
        assert name in caught.value.subject
        assert ("image 2 of 2" in caught.value.subject) == (several is not given)
        assert caught.value.expected
    skipped = Request(**{"image": IMAGE, "mask": MASK, "prompt": "a fox", name: ["", given]}, on_error="skip")
    assert list(skipped.errors) == [1]


def test_a_conditioning_of_several_images_is_not_one_of_a_list():
    with pytest.raises(SettingError, match="a conditioning of 2 images"):
        Request(IMAGE, MASK, ["a fox", Conditioning(GOOD.expand(2, -1, -1))])


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("stepss", "inpaint", "inpaint: unknown setting 'stepss'; did you mean 'steps'?"),
        ("left", "inpaint", "inpaint: unknown setting 'left'; "),
        ("tpo", "outpaint", "outpaint: unknown setting 'tpo'; did you mean 'top'?"),
    ],
)
def test_an_unknown_name_is_told_with_the_closest_one(name, kind, said):
    with pytest.raises(TypeError) as caught:
        Request(IMAGE, None, "a fox", kind=kind, **{name: 1})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("SETTING_STEPS", {"steps": 0}),
        ("SETTING_STRENGTH", {"strength": 1.5}),
        ("SETTING_SAMPLER", {"sampler": "eulre"}),
        ("SETTING_SPACING", {"spacing": "even"}),
        ("SETTING_ETA", {"eta": 1.0, "sampler": "dpmpp_2m"}),
        ("SETTING_CROP", {"crop": -1}),
        ("SETTING_CROP", {"crop": 1000}),
        ("SETTING_NOISE", {"noise": torch.zeros(1, 4, 3, 3)}),
        ("SETTING_FILL", {"fill": "white"}),
        ("SETTING_SEED", {"seed": -2}),
        ("SETTING_PROMPT", {"prompt": 5}),
        ("SETTING_COUNTS", {"prompt": ["a", "b"], "seed": [1, 2, 3]}),
        ("SETTING_NOISE", {"noise": "white"}),
        ("SETTING_NOISE", {"noise": torch.zeros(1, 4, 8, 9, dtype=torch.int64)}),
        ("SETTING_NOISE", {"noise": torch.zeros(1, 4, 8, 9, dtype=torch.complex64)}),
        ("SETTING_NOISE", {"noise": torch.zeros(1, 4, 8, 9, device="meta")}),
        ("SETTING_NOISE", {"noise": torch.full((1, 4, 8, 9), 1e300, dtype=torch.float64)}),
        ("MANIFEST_BROKEN", {"manifest": 3}),
        ("MANIFEST_BROKEN", {"manifest": [{}]}),
        ("SETTING_KIND", {"kind": "paint"}),
        ("SETTING_ON_ERROR", {"on_error": "ignore"}),
        ("SETTING_MASK", {"kind": "vary"}),
        ("SETTING_VARY", {"kind": "vary", "mask": None, "fill": "blur"}),
        ("SETTING_VARY", {"kind": "vary", "mask": None, "crop": "auto"}),
        ("SETTING_VARY", {"kind": "vary", "mask": None, "control_scale": 0.5}),
        ("IMAGE_TYPE", {"image": None}),
        ("MASK_SIZE", {"mask": MASK[:8]}),
        ("IMAGE_CONTROL_SIZE", {"control_image": IMAGE[:32, :32]}),
        ("SETTING_CONTROL_START", {"control_start": 0.5, "control_end": 0.5}),
    ],
)
def test_every_bad_value_is_refused_without_a_model(code, options):
    with pytest.raises(SdInpaintError) as caught:
        Request(**{"image": IMAGE, "mask": MASK, "prompt": "a fox", **options})
    assert caught.value.code == code


@pytest.mark.parametrize(
    "options", [{"anchor": "middle", "size": (96, 96)}, {"left": -1}, {"fill": "noise", "left": 8}]
)
def test_so_are_those_of_outpainting(options):
    with pytest.raises(SettingError):
        Request(IMAGE, None, "a fox", kind="outpaint", **options)


def test_a_request_holds_what_was_read(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(IMAGE).save(path)
    request = Request(path, MASK, ["a fox", "a cube"], seed=[1, 2], crop="auto")
    path.unlink()
    assert len(request) == 2
    assert [item.prompt for item in request.items] == ["a fox", "a cube"]
    assert all(np.array_equal(item.image.rgb, IMAGE) and item.image.path == str(path) for item in request.items)
    assert repr(request) == "Request(2 images, kind='inpaint', crop='auto')"


# the verbs run requests


def test_each_method_runs_a_request(pipe):
    made = run(pipe, IMAGE, MASK, "a fox", guidance_scale=5.0)
    assert same_image(made.image, inpaint(pipe, prompt="a fox", guidance_scale=5.0, steps=2).image)
    varied = run(pipe, IMAGE, None, "a fox", kind="vary")
    assert same_image(varied.image, pipe.vary(IMAGE, "a fox", progress=False, **SHORT).image)
    assert varied.settings["strength"] == 0.6
    wider = run(pipe, IMAGE, None, "a fox", kind="outpaint", left=24, overlap=8)
    assert same_image(wider.image, pipe.outpaint(IMAGE, "a fox", 24, overlap=8, progress=False, **SHORT).image)


def test_a_request_goes_through_a_process_and_can_be_changed(pipe):
    request = pickle.loads(pickle.dumps(Request(IMAGE, MASK, "a fox", noise=torch.randn(1, 4, 8, 9), **SHORT)))
    assert same_image(pipe.run(request, progress=False).image, pipe.run(request.replace(), progress=False).image)
    other = request.replace(steps=3, noise=None)
    assert (other.settings.steps, other.items[0].noise, other.items[0].seed) == (3, None, 5)
    assert request.settings.steps == 2


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "DPM++ 2M Karras"])
def test_another_sampler_comes_with_its_own_defaults(pipe, sampler):
    first = inpaint(pipe)  # ddim, whose eta is 0 and whose spacing is leading
    again = first.again(sampler=sampler)
    asked = inpaint(pipe, sampler=sampler)
    assert same_image(again.image, asked.image)
    assert {name: again.settings[name] for name in ("sampler", "spacing", "eta")} == {
        name: asked.settings[name] for name in ("sampler", "spacing", "eta")
    }


@pytest.mark.parametrize("strength", [0.6, 0.8, 1.0])
def test_a_variation_keeps_its_strength(pipe, strength):
    first = pipe.vary(IMAGE, "a fox", strength, progress=False, **SHORT)
    assert first.again().settings["strength"] == strength
    assert same_image(first.again().image, first.image)


def test_what_was_given_stays(pipe):
    first = inpaint(pipe, spacing="karras", eta=0.5)
    again = first.again(sampler="euler").settings
    assert (again["spacing"], again["eta"]) == ("karras", 0.5)
    drawn = first.again(seed=[1, 2])
    assert drawn.seeds == [1, 2]
    assert drawn.again(seed=9).seeds == [9, 9]


# conditioning in place of a prompt


def test_conditioning_stands_for_a_prompt(pipe):
    cond, uncond = pipe.encode_prompts(["a red fox", "grey"], IMAGE.shape[:2])
    expected = inpaint(pipe, negative_prompt="grey")
    assert same_image(inpaint(pipe, prompt=cond, negative_prompt=uncond).image, expected.image)
    assert same_image(inpaint(pipe, prompt=cond, negative_prompt="grey").image, expected.image)
    assert same_image(inpaint(pipe, negative_prompt=uncond).image, expected.image)


def test_texts_and_conditioning_mix_in_a_batch(pipe):
    (both,) = pipe.encode_prompts([["a red fox", "a blue cube"]], IMAGE.shape[:2])
    expected = inpaint(pipe, prompt=["a red fox", "a blue cube"], seed=[1, 2]).images
    for prompt in (both, [both[:1], "a blue cube"], ["a red fox", both[1:]]):
        found = inpaint(pipe, prompt=prompt, seed=[1, 2]).images
        assert all(same_image(*pair) for pair in zip(found, expected, strict=True))


def test_conditioning_may_be_longer_than_the_other(pipe):
    (cond,) = pipe.encode_prompts(["a red fox"], IMAGE.shape[:2])
    twice = Conditioning(cond.context.repeat(1, 2, 1))
    assert same_image(inpaint(pipe, prompt=twice).image, inpaint(pipe, prompt=cond).image)


def test_conditioning_of_another_model_is_refused(pipe):
    with pytest.raises(SettingError, match="width 5") as caught:
        inpaint(pipe, prompt=Conditioning(torch.zeros(1, 77, 5)))
    assert caught.value.code == "SETTING_CONDITIONS"


def test_conditioning_is_given_again_for_a_replay(pipe, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    (cond,) = pipe.encode_prompts(["a red fox"], IMAGE.shape[:2])
    result = inpaint(pipe, image=tmp_path / "photo.png", prompt=cond)
    assert "prompt" not in result.settings
    (path,) = result.save(tmp_path / "out.png")
    assert replay(path, pipe, prompt=cond, progress=False).identical
    assert same_image(result.again().image, result.image)
    with pytest.raises(SettingError) as caught:
        replay(path, pipe, progress=False)
    assert (caught.value.code, caught.value.subject) == ("MANIFEST_INPUT_MISSING", "prompt")


# images that cannot be used


@pytest.mark.parametrize(
    ("error", "given"),
    [
        (ImageError, {"image": [IMAGE, SMALL, IMAGE]}),
        (MaskError, {"mask": [MASK, MASK[:8], MASK]}),
        (SettingError, {"prompt": ["a", 5, "b"]}),
        (SettingError, {"seed": [1, -7, 2]}),
    ],
)
def test_the_bad_one_of_a_batch_is_named_or_left_out(pipe, error, given):
    with pytest.raises(error) as caught:
        inpaint(pipe, **given)
    assert caught.value.subject.startswith("image 2 of 3: ")
    result = inpaint(pipe, on_error="skip", **given)
    assert list(result.errors) == [1]
    assert isinstance(result.errors[1], error)
    assert str(result.errors[1]) == str(caught.value)
    assert result.images[1] is None
    assert [image is None for image in result] == [False, True, False]
    assert "1 failed" in repr(result)
    good = {name: [values[0], values[2]] for name, values in given.items()}
    expected = inpaint(pipe, **{"seed": [5, 5], **good})
    assert same_image(result[0], expected[0])
    assert same_image(result[2], expected[1])


def test_what_was_left_out_stays_out(pipe, tmp_path):
    result = inpaint(pipe, image=[SMALL, IMAGE], on_error="skip")
    with pytest.raises(ImageError):
        _ = result.image
    again = result.again(prompt="a cube")
    assert list(again.errors) == [0]
    assert str(again.errors[0]) == str(result.errors[0])
    assert [path.name for path in result.save(tmp_path / "out.png")] == ["out-2.png"]
    mended = result.again(image=[IMAGE, IMAGE])
    assert (mended.errors, len(mended)) == ({}, 2)
    best = result.best_of(2)
    assert best.images[0] is None
    assert best.images[1] is not None
    assert result.sheet().size[0] > 0
    assert list(pickle.loads(pickle.dumps(result)).errors) == [0]


def test_an_image_that_a_model_cannot_be_shown_is_left_out_too(pipe):
    wide = np.concatenate([IMAGE] * 4, axis=1)
    masks = [MASK, np.concatenate([MASK] * 4, axis=1)]
    noise = torch.randn(2, 4, 8, 9)
    with pytest.raises(SettingError, match="latent rows") as caught:
        inpaint(pipe, image=[IMAGE, wide], mask=masks, noise=noise)
    assert caught.value.subject == "image 2 of 2: noise"
    result = inpaint(pipe, image=[IMAGE, wide], mask=masks, noise=noise, on_error="skip")
    assert list(result.errors) == [1]
    assert same_image(result.image, inpaint(pipe, noise=noise[:1]).image)


# warnings


def test_warnings_are_on_the_result_each_with_its_image(pipe):
    empty = np.zeros_like(MASK)
    with pytest.warns(SdInpaintWarning):
        result = inpaint(pipe, mask=[MASK, empty, empty], guidance_scale=40)
    found = [(one.index, one.message) for one in result.warnings if "empty" in one.message or "guidance" in one.message]
    assert [index for index, _ in found] == [None, 1, 2]
    assert str(result.warnings[0]) == result.warnings[0].message
    assert told(inpaint(pipe)) == []


def test_warnings_of_reading_are_there_too(pipe):
    small = IMAGE[:56, :48], MASK[:56, :48]
    with pytest.warns(SdInpaintWarning, match="very small"):
        result = inpaint(pipe, image=[IMAGE, small[0]], mask=[MASK, small[1]])
    assert [(one.index, "very small" in one.message) for one in told(result)] == [(1, True)]


def test_a_prompt_that_is_too_long_is_told_once_for_each_image(pipe):
    long, images = "red " * 200, [IMAGE, IMAGE, IMAGE]
    for options in ({}, {"batch_size": 1}):
        with pytest.warns(SdInpaintWarning) as caught:
            result = inpaint(
                pipe, image=images, prompt=[long, "a dog", long], negative_prompt=["", long, long], **options
            )
        found = [(one.index, one.message.partition(" has ")[0]) for one in told(result)]
        assert found == [
            (0, "image 1 of 3: prompt"),
            (1, "image 2 of 3: negative_prompt"),
            (2, "image 3 of 3: prompt"),
            (2, "image 3 of 3: negative_prompt"),
        ]
        assert [str(one.message) for one in caught] == [str(one) for one in result.warnings]


@pytest.mark.parametrize(("scale", "shift"), [(0, 0), (0, 1), (1, 3), (4, 0), (0.1, 0)])
def test_noise_that_is_no_noise_is_told(pipe, scale, shift):
    noise = scale * torch.randn(2, 4, IMAGE.shape[0] // 8, IMAGE.shape[1] // 8) + shift
    with pytest.warns(SdInpaintWarning, match="flat or burnt"):
        result = inpaint(pipe, image=[IMAGE, IMAGE], noise=noise)
    assert [one.index for one in told(result)] == [0, 1]


def test_syntax_of_other_programs_is_told_with_its_image(pipe):
    with pytest.warns(SdInpaintWarning, match="plain text"):
        result = inpaint(pipe, image=[IMAGE, IMAGE], prompt=["a fox", "a (fox:1.4)"], negative_prompt="<lora:x:1>")
    _, prompt, negative = told(result)
    assert [one.index for one in told(result)] == [0, 1, 1]
    assert "image 2 of 2: prompt has '(fox:1.4)'" in prompt.message
    assert "image 2 of 2: negative_prompt has '<lora:x:1>'" in negative.message


def test_images_that_are_not_repainted_have_no_prompt_to_warn_of(pipe):
    with pytest.warns(SdInpaintWarning):
        result = inpaint(pipe, mask=[MASK, np.zeros_like(MASK)], prompt=["a dog", "red " * 200])
    assert not any("tokens" in str(one) for one in result.warnings)


def test_a_loop_is_told_of_every_empty_mask(pipe):
    """Python shows a warning of one text and one line once; those of this library are about one image each."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for mask in (np.zeros_like(MASK), MASK, np.zeros_like(MASK)):
            inpaint(pipe, mask=mask)
    assert sum("mask is empty" in str(one.message) for one in seen) == 2


def test_a_strength_below_one_step_is_told(pipe):
    with pytest.warns(SdInpaintWarning, match="less than one step: one is run, as with strength 0.5"):
        result = inpaint(pipe, strength=0.01, steps=2)
    assert pixels(result.image).shape == IMAGE.shape


def test_seeds_may_be_an_array(pipe):
    assert inpaint(pipe, seed=np.array([3, 4])).seeds == [3, 4]
    assert inpaint(pipe, seed=torch.tensor([3, 4])).seeds == [3, 4]
    assert inpaint(pipe, seed=np.int64(3)).seeds == [3]


def test_an_image_that_could_not_be_made_stays_so(pipe):
    """Its seed was the fault: no other one is drawn for it."""
    result = inpaint(pipe, image=[IMAGE, IMAGE], seed=[5, "five"], on_error="skip")
    best = result.best_of(2)
    assert best.images[1] is None
    assert best.errors.keys() == result.errors.keys() == {1}


def test_where_no_image_was_made_the_sheet_says_why(pipe):
    result = inpaint(pipe, image=[SMALL, SMALL], on_error="skip")
    assert result._repr_png_() is None
    with pytest.raises(ImageError):
        result.sheet()
