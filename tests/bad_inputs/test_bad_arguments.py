"""Images, masks, settings and prompts that cannot be used: refused before anything is computed."""

from __future__ import annotations

import warnings
import zlib

import numpy as np
import pytest
import refusals
import torch
from builders import rewrite_json
from PIL import Image
from refusals import IMAGE, INF, MASK, NAN, inpaint, load, refused

from sdinpaint import SdInpaintWarning
from sdinpaint.errors import ImageError, MaskError, SettingError
from sdinpaint.images.canvas import ANCHORS, EXTENDING_FILLS
from sdinpaint.images.fills import FILLS
from sdinpaint.pipeline.patch_sampling import PatchSampling
from sdinpaint.pipeline.settings import BLENDS, COVERS, REGIONS


@pytest.fixture
def nothing_computed(pipe, usual, no_harm_done, forbid):
    """From here to the end of the test, no model is shown anything."""
    forbid(PatchSampling, "__init__")


@pytest.mark.usefixtures("nothing_computed")
def test_what_is_computed_is_seen(pipe):
    for call in (
        lambda: inpaint(pipe),
        lambda: pipe.vary(IMAGE, "", progress=False),
        lambda: pipe.outpaint(IMAGE, "", 8, progress=False),
    ):
        with pytest.raises(pytest.fail.Exception, match="was called"):
            call()


# Images and masks


def png_header(path, width, height):
    """A PNG of next to nothing that says it is this large."""
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    chunks = (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
    framed = [(len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) for chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def truncated_png(path):
    Image.fromarray(IMAGE).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


def truncated_jpeg(path):
    Image.fromarray(IMAGE).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1000])


FILES = [
    (lambda path: None, "IMAGE_NOT_FOUND"),
    (lambda path: path.mkdir(), "IMAGE_NOT_A_FILE"),
    (lambda path: path.touch(), "IMAGE_UNREADABLE"),
    (lambda path: path.write_text("<svg/>"), "IMAGE_UNREADABLE"),
    (lambda path: path.write_bytes(b"%PDF-1.7"), "IMAGE_UNREADABLE"),
    (truncated_png, "IMAGE_TRUNCATED"),
    (truncated_jpeg, "IMAGE_TRUNCATED"),
    (lambda path: png_header(path, 0, 64), "IMAGE_UNREADABLE"),
    (lambda path: png_header(path, 64, 64), "IMAGE_TRUNCATED"),
    (lambda path: png_header(path, 13_000, 13_000), "IMAGE_TOO_LARGE"),
    (lambda path: png_header(path, 20_000, 20_000), "IMAGE_TOO_LARGE"),
    (lambda path: Image.new("RGB", (7, 64)).save(path), "IMAGE_TOO_SMALL"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("write", "code"), FILES)
def test_image_files(pipe, tmp_path, write, code):
    path = tmp_path / "image.png"
    write(path)
    subject = "image" if code == "IMAGE_TOO_SMALL" else f"image {str(path)!r}"
    assert refused(ImageError, code, lambda: inpaint(pipe, image=path)).subject == subject


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("write", "code"), FILES[:-1])
def test_mask_files(pipe, tmp_path, write, code):
    path = tmp_path / "mask.png"
    write(path)
    assert refused(ImageError, code, lambda: inpaint(pipe, mask=path)).subject == f"mask {str(path)!r}"


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (None, "IMAGE_TYPE"),
        (7, "IMAGE_TYPE"),
        (b"bytes", "IMAGE_UNREADABLE"),
        (np.full((64, 72, 3), 1.5), "IMAGE_BAD_VALUES"),
        (np.zeros((64, 72, 3), int), "IMAGE_TYPE"),
        (np.zeros((64, 72, 2), np.uint8), "IMAGE_BAD_SHAPE"),
        (np.zeros((0, 72, 3), np.uint8), "IMAGE_TOO_SMALL"),
        (np.zeros((7, 72, 3), np.uint8), "IMAGE_TOO_SMALL"),
        (torch.full((3, 64, 72), NAN), "IMAGE_BAD_VALUES"),
        (torch.full((3, 64, 72), 1.5), "IMAGE_BAD_VALUES"),
        (torch.zeros(4, 64, 72), "IMAGE_BAD_SHAPE"),
        (torch.zeros(64, 72, 3, dtype=torch.uint8), "IMAGE_TYPE"),
    ],
)
def test_what_is_no_image(pipe, image, code):
    assert refused(ImageError, code, lambda: inpaint(pipe, image=image)).subject == "image"


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (None, "MASK_TYPE"),
        (np.zeros((64, 73), bool), "MASK_SIZE"),
        (np.zeros((72, 64), bool), "MASK_SIZE"),
        (np.zeros((0, 0), bool), "MASK_BAD_SHAPE"),
        (np.zeros((64, 72, 2), np.float32), "MASK_BAD_SHAPE"),
        (MASK * NAN, "MASK_BAD_VALUES"),
        (MASK * 2.0, "MASK_BAD_VALUES"),
        (MASK.astype(np.uint8), "MASK_BAD_VALUES"),
        (np.where(MASK[..., None], np.uint8([255, 0, 0]), np.uint8(0)), "MASK_COLOURED"),
    ],
)
def test_what_is_no_mask(pipe, mask, code):
    assert refused(MaskError, code, lambda: inpaint(pipe, mask=mask)).subject == "mask"


def test_nothing_to_repaint(pipe):
    for options in ({"mask": np.zeros_like(MASK)}, {"mask": 0.2 * MASK}, {"strength": 0}, {"strength": 0.0}):
        with pytest.warns(SdInpaintWarning, match="comes back unchanged") as caught:
            result = inpaint(pipe, **options)
        assert np.array_equal(result.image, IMAGE)
        assert [warning.filename for warning in caught] == [refusals.__file__]


# Settings


SETTINGS = [
    ("steps", [0, -1, 2.5, None, 1001, "7", True, NAN, INF, 10**400, [5]], "SETTING_STEPS"),
    ("strength", [-0.1, 2, NAN, INF, None, "0.5", True, 10**400], "SETTING_STRENGTH"),
    ("guidance_scale", [NAN, INF, -INF, "7.5", None, False, 10**400], "SETTING_GUIDANCE"),
    ("seed", [-2, 2**63, 1.5, True, "5", NAN, b"5", -1.5], "SETTING_SEED"),
    ("eta", [NAN, INF, -0.1, "0"], "SETTING_ETA"),
    ("sampler", ["dimm", "DDIM a", "", None, 3, [], "Karras"], "SETTING_SAMPLER"),
    ("spacing", ["leadin", "Karras", "", 3], "SETTING_SPACING"),
    ("cover", ["all", "Max", "", None, 1, True, np.array(["max", "nearest"])], "SETTING_COVER"),
    ("fill", ["black", "Blur", "reflect", "", None, 0, ["blur"], np.array(["blur", "edge"])], "SETTING_FILL"),
    ("blend", ["multiband", "Poisson", "", None, 1, False], "SETTING_BLEND"),
    ("regions", ["all", "Each", "", None, 2, True], "SETTING_REGIONS"),
    ("soft", ["yes", 1, 0, None, 0.5, MASK], "SETTING_SOFT"),
    ("match_color", ["no", 1, None], "SETTING_MATCH_COLOR"),
    ("paste_back", ["no", 0, None], "SETTING_PASTE_BACK"),
    ("crop", ["everything", "Auto", "", "8", -1, 2.5, True, NAN, INF, [8], 10**400, 73], "SETTING_CROP"),
    ("crop", [IMAGE, np.array([8, 8]), torch.tensor([8, 8])], "SETTING_CROP"),
    ("batch_size", [0, -1, 1.5, True, "2", NAN, 10**400, [2]], "SETTING_BATCH_SIZE"),
    ("noise", [torch.zeros(4, 8, 9), torch.zeros(1, 3, 8, 9), torch.zeros(2, 4, 8, 9), 7, [1.0]], "SETTING_NOISE"),
    ("noise", [torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 9), NAN), np.zeros((1, 4, 8, 9))], "SETTING_NOISE"),
    ("prompt", [5, 0, b"a fox", b"", False, ["a", 5], "a \ud800 fox", {"a": 1}], "SETTING_PROMPT"),
    ("negative_prompt", [5, 0, b"a fox", ["a \udfff"]], "SETTING_PROMPT"),
]


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(("name", "values", "code"), SETTINGS)
def test_settings_out_of_bounds(pipe, name, values, code):
    for value in values:
        error = refused(SettingError, code, lambda: inpaint(pipe, **{name: value}))  # noqa: B023
        several = isinstance(value, list | tuple) and len(value) > 1
        assert error.subject == (f"image 2 of 2: {name}" if several else name)


@pytest.mark.usefixtures("nothing_computed")
def test_the_last_of_a_list_is_checked_before_anything_is_computed(pipe):
    images = [IMAGE, IMAGE[:32, :40]]
    masks = [MASK, MASK[:32, :40]]
    warnings.simplefilter("ignore", SdInpaintWarning)  # one of them is very small
    refused(SettingError, "SETTING_PROMPT", lambda: inpaint(pipe, images, masks, ["a", b"b"]))
    refused(SettingError, "SETTING_SEED", lambda: inpaint(pipe, images, masks, seed=[1, -2]))
    refused(MaskError, "MASK_SIZE", lambda: inpaint(pipe, images, MASK))
    refused(ImageError, "IMAGE_TYPE", lambda: inpaint(pipe, [IMAGE, None], MASK))


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("name", "words"), [("cover", COVERS), ("fill", FILLS), ("blend", BLENDS), ("regions", REGIONS)]
)
def test_an_unknown_word_is_refused_with_the_known_ones(pipe, name, words):
    code = f"SETTING_{name.upper()}"
    assert len(words) > 1
    refused(SettingError, code, lambda: inpaint(pipe, **{name: "unheard-of"}), "'unheard-of'", *words)


@pytest.mark.usefixtures("nothing_computed")
def test_a_crop_that_is_larger_than_the_image(pipe):
    square, hole = IMAGE[:, :64], MASK[:, :64]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)  # a refusal comes before what there is to say of the others
        error = refused(SettingError, "SETTING_CROP", lambda: inpaint(pipe, square, hole, crop=65), "65 pixels")
        assert error.expected == "0 to 64 pixels, the image's longer side"
        for regions in REGIONS:
            several = [IMAGE, square, IMAGE], [MASK, hole, np.zeros_like(MASK)]
            refused(SettingError, "SETTING_CROP", lambda: inpaint(pipe, *several, crop=72, regions=regions))  # noqa: B023


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("crop", [8, "auto"])
@pytest.mark.parametrize("options", [{}, {"regions": "each"}, {"soft": True}], ids=str)
def test_a_crop_around_nothing_leaves_the_image_as_it_is(pipe, crop, options):
    with pytest.warns(SdInpaintWarning, match="^the mask is empty"):
        result = inpaint(pipe, mask=np.zeros_like(MASK), crop=crop, **options)
    assert np.array_equal(result.image, IMAGE)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("given", [{"blend": "feather"}, {"blend": "poisson"}, {"match_color": True}], ids=str)
def test_joining_what_is_not_pasted_back(pipe, given):
    code = f"SETTING_{next(iter(given)).upper()}"
    error = refused(SettingError, code, lambda: inpaint(pipe, paste_back=False, **given), "paste_back=False")
    assert "leave paste_back on" in error.hint


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("scipy.sparse", {"blend": "poisson"}),
        ("scipy.ndimage", {"regions": "each"}),
        ("cv2", {"fill": "telea", "strength": 0.5}),
    ],
)
def test_a_missing_extra_is_refused_before_anything_is_computed(pipe, without, module, options):
    without(module)
    refused(SettingError, "SETTING_EXTRA", lambda: inpaint(pipe, **options), "sdinpaint[mask]")


OUTPAINTING = [
    *((side, [-1, 1.5, NAN, INF, True, "8", None, [8], 2**40], None) for side in ("left", "right", "top", "bottom")),
    ("size", [80, "80x80", (80,), (80, 80, 3), (80.5, 80), (True, 80), (0, 80), (63, 80), (80, 71)], "SETTING_SIZE"),
    ("anchor", ["middle", "Left", "left-top", "", None, ["left"]], None),
    ("overlap", [-1, 0.5, NAN, False, "8", None, 64], None),
    ("fill", ["original", "telea", "Edge", "", None], None),
    ("steps", [0, 2.5], None),
    ("crop", [-1, "everything", 1000], None),
    ("blend", ["multiband"], None),
]


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(("name", "values", "code"), OUTPAINTING)
def test_outpainting_out_of_bounds(pipe, name, values, code):
    for value in values:
        given = {name: value} if name == "size" else {"top": 8, name: value}
        error = refused(
            SettingError,
            code or f"SETTING_{name.upper()}",
            lambda: pipe.outpaint(IMAGE, "a fox", progress=False, **given),  # noqa: B023
        )
        assert error.subject == name


@pytest.mark.usefixtures("nothing_computed")
def test_what_outpainting_cannot_do(pipe):
    def outpaint(**given):
        return lambda: pipe.outpaint(IMAGE, "a fox", progress=False, **given)

    refused(SettingError, "SETTING_SIDES", outpaint(), "left, right, top, bottom")
    refused(SettingError, "SETTING_SIDES", outpaint(size=(64, 72)))
    refused(SettingError, "SETTING_SIZE", outpaint(size=(80, 80), left=8), "together with pixels for a side")
    refused(SettingError, "SETTING_SIZE", outpaint(size=(60, 80)), "at least the image's 64 rows, 72 columns")
    refused(SettingError, "SETTING_ANCHOR", outpaint(left=8, anchor="middle"), *ANCHORS)
    refused(SettingError, "SETTING_FILL", outpaint(left=8, fill="blur"), *EXTENDING_FILLS)
    refused(SettingError, "SETTING_OVERLAP", outpaint(left=8, right=8, overlap=36), "36 pixels", "72 columns")
    refused(ImageError, "IMAGE_TOO_LARGE", outpaint(bottom=2**20, left=2**10), "bottom")


def test_names_that_are_almost_right(pipe):
    almost = [("sampler", "eulr", "euler"), ("spacing", "leadin", "leading"), ("blend", "poison", "poisson")]
    for name, value, meant in [*almost, ("fill", "orginal", "original"), ("cover", "neares", "nearest")]:
        error = refused(SettingError, f"SETTING_{name.upper()}", lambda: inpaint(pipe, **{name: value}))  # noqa: B023
        assert error.hint == f"did you mean {meant!r}?"
        assert meant in error.expected


@pytest.mark.usefixtures("nothing_computed")
def test_fresh_noise_for_a_sampler_that_takes_none(pipe):
    refused(SettingError, "SETTING_ETA", lambda: inpaint(pipe, sampler="dpmpp_2m", eta=0.5), "eta", "dpmpp_2m")


def test_counts(pipe):
    words = "2 prompts", "3 images"
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, [IMAGE] * 3, MASK, ["a", "b"]), *words)
    for name in ("image", "mask", "prompt", "negative_prompt", "seed"):
        error = refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, **{name: []}))  # noqa: B023
        assert f"0 {name.replace('_', ' ')}s" in error.found
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, [IMAGE] * 2, [MASK] * 3))
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, seed=[1, 2], prompt=["a"] * 3))


def test_more_steps_than_were_trained(folder):
    rewrite_json(folder / "scheduler/scheduler_config.json", num_train_timesteps=20)
    refused(SettingError, "SETTING_STEPS", lambda: inpaint(load(folder), steps=21), "steps", "1 to 20")


def test_very_high_guidance_warns(pipe):
    with pytest.warns(SdInpaintWarning, match="guidance_scale 31") as caught:
        inpaint(pipe, guidance_scale=31)
    assert caught[0].filename == refusals.__file__


# Prompts


def test_no_prompt_is_the_empty_one(pipe):
    nothing = inpaint(pipe, prompt="")
    assert np.array_equal(inpaint(pipe, prompt=None).image, nothing.image)
    assert np.array_equal(inpaint(pipe, prompt=[None]).image, nothing.image)
    assert np.array_equal(inpaint(pipe, prompt="", negative_prompt=None).image, nothing.image)
    assert not np.array_equal(inpaint(pipe).image, nothing.image)
    assert inpaint(pipe, prompt=None).settings["prompt"] == ""


def test_a_prompt_that_is_too_long(pipe):
    words = " ".join(f"w{i}" for i in range(200))
    with pytest.warns(SdInpaintWarning, match="75 used; cut: '") as caught:
        long = inpaint(pipe, prompt=words)
    shown = str(caught[0].message).partition("cut: '")[2][:12]
    start = words.index(shown)
    assert start > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        assert np.array_equal(inpaint(pipe, prompt=words[:start]).image, long.image)


@pytest.mark.parametrize(
    "prompt",
    ["\0\a\x1b[31m", "\u202e fox", "狐狸 🦊", "e\u0301", "<|endoftext|> fox", "((fox:1.2"],
)
def test_unusual_prompts(pipe, prompt):
    assert inpaint(pipe, prompt=prompt).settings["prompt"] == prompt
