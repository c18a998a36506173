"""Review and adjust: scores, sheets, runs with something changed, the best of several, and files."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from sdinpaint import Mask, metrics
from sdinpaint.errors import ImageError, SettingError
from sdinpaint.images.files import read_settings

SIZE = 64, 80
RNG = np.random.default_rng(9)
IMAGE, SECOND = RNG.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
MASK = Mask.ellipse(SIZE, (20, 12, 60, 50))
OTHER = Mask.box(SIZE, (8, 30, 40, 56))


def inpaint(pipe, image=IMAGE, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 2, "seed": 5, "progress": False} | options)


@pytest.fixture(scope="module")
def one(pipe):
    return inpaint(pipe)


@pytest.fixture(scope="module")
def two(pipe):
    return inpaint(pipe, [IMAGE, SECOND], [MASK, OTHER], ["a fox", "a cube"], seed=[1, 2])


def pixels(image):
    return np.asarray(image)


def test_scores_are_those_of_the_metrics(two):
    for scores, image, before, mask in zip(two.scores, two.images, (IMAGE, SECOND), (MASK, OTHER), strict=True):
        assert scores == metrics.scores(before, pixels(image), mask.hole)
        assert scores.known_error == 0
        assert scores.changed > 0.9


def test_a_result_is_a_sequence_of_its_images_and_says_in_a_line_what_it_is(pipe, one, two):
    assert (len(one), len(two)) == (1, 2)
    assert [*two] == two.images == two[:] == [two[0], two[-1]]
    with pytest.raises(IndexError):
        two[2]
    width, height = one.image.size
    assert repr(one) == f"Result(1 image, {width}x{height}, seed {one.seeds[0]})"
    assert repr(two).startswith("Result(2 images, ")
    many = pipe.inpaint(one.repainted[0].item.image, one.repainted[0].item.mask, "a", seed=[*range(9)], steps=1)
    assert repr(many).endswith("seeds 0, 1, 2, 3, ...)")


def test_reports_are_those_of_the_masks_for_the_cover_of_the_run(pipe, two):
    assert two.reports == [MASK.report("max"), OTHER.report("max")]
    assert inpaint(pipe, cover="nearest").reports == [MASK.report("nearest")]


def test_again_is_the_same_with_what_is_changed(pipe, one, two):
    assert (pixels(one.again().image) == pixels(one.image)).all()
    asked = one.again(prompt="a blue cube", strength=0.6, mask=OTHER)
    expected = inpaint(pipe, mask=OTHER, prompt="a blue cube", strength=0.6)
    assert (pixels(asked.image) == pixels(expected.image)).all()
    assert asked.seeds == one.seeds
    for again, before in zip(two.again().images, two.images, strict=True):
        assert (pixels(again) == pixels(before)).all()
    assert (pixels(two.again(seed=[1, 9]).images[1]) != pixels(two.images[1])).any()


def test_again_of_a_varied_and_of_an_extended_image(pipe):
    options = {"steps": 2, "seed": 3, "progress": False}
    for result in (pipe.vary(IMAGE, "a fox", **options), pipe.outpaint(IMAGE, "a fox", right=16, **options)):
        assert (pixels(result.again().image) == pixels(result.image)).all()
        assert (pixels(result.again(prompt="a cube").image) != pixels(result.image)).any()


@pytest.mark.parametrize("score", ["seam", "ring_delta_e"])
def test_best_of_by_a_score_is_the_lowest(pipe, one, score):
    best = one.best_of(4, score)
    tries = [inpaint(pipe, seed=5 + more) for more in range(4)]
    values = [getattr(result.scores[0], score) for result in tries]
    assert getattr(best.scores[0], score) == min(values)
    assert best.seeds == [5 + int(np.argmin(values))]
    assert (pixels(best.again().image) == pixels(best.image)).all()


def test_a_judge_may_change_what_it_is_shown(one):
    before = pixels(one.image).copy()

    def judge(image):
        image.thumbnail((8, 8))
        image.paste((0, 0, 0), (0, 0, 8, 8))
        return 1.0

    best = one.best_of(2, judge)
    assert np.array_equal(pixels(best.image), before)
    assert np.array_equal(pixels(one.image), before)


def test_an_index_is_that_of_an_image(two):
    assert np.array_equal(two.array(-1), two.array(np.int64(1)))
    assert two.settings_of(-1) == two.settings_of(1)
    for index in (2, -3, "1", None, 0.5, True, slice(1)):
        for of in (two.array, two.settings_of, lambda index: two.save_one(index, "never.png")):
            with pytest.raises(SettingError, match="index"):
                of(index)


def test_the_last_image_of_a_batch_that_failed_raises_its_error(pipe):
    result = inpaint(pipe, [IMAGE, IMAGE[:7, :7]], seed=[1, 2], on_error="skip")
    with pytest.raises(ImageError, match="image 2 of 2"):
        result.array(-1)


def test_best_of_by_a_function_is_the_highest(two):
    def brightness(image):
        return pixels(image).mean()

    best = two.best_of(3, brightness)
    tries = [two, two.again(seed=[2, 3]), two.again(seed=[3, 4])]
    for index, image in enumerate(best.images):
        rivals = [brightness(result.images[index]) for result in tries]
        assert brightness(image) == max(rivals)
    assert best.settings["seed"] == best.seeds
    assert best.best_of(1).seeds == best.seeds


def test_a_judge_that_returns_nan_does_not_choose_that_image(one):
    judged = iter([np.nan, 5.0, 9.0])
    assert one.best_of(3, lambda image: next(judged)).seeds == [one.seeds[0] + 2]


@pytest.mark.parametrize("value", [None, "good"])
def test_a_judge_that_returns_no_number_is_refused(one, value):
    with pytest.raises(SettingError) as caught:
        one.best_of(2, lambda image: value)
    assert caught.value.code == "SETTING_SCORE"


@pytest.mark.parametrize(("n", "score"), [(0, "seam"), (65, "seam"), (2.5, "seam"), (True, "seam"), (2, "beauty")])
def test_best_of_bad_arguments(one, n, score):
    with pytest.raises(SettingError) as caught:
        one.best_of(n, score)
    assert caught.value.code in ("SETTING_BEST_OF", "SETTING_SCORE")
    assert caught.value.expected


def test_a_sheet_has_a_row_for_each_image(pipe, one, two):
    first, both = one.sheet(), two.sheet()
    assert first.width == both.width
    assert both.height > 1.8 * first.height - 100
    assert inpaint(pipe, crop=4).sheet().width > first.width  # the crop is one more image
    assert Image.open(io.BytesIO(one._repr_png_())).size == first.size


def test_settings_hold_everything_as_plain_values(one, two):
    for result in (one, two):
        assert json.loads(json.dumps(result.settings)) == result.settings
    manifest = one.settings["manifest"]
    assert set(manifest["weights"]) == {"unet", "vae", "text_encoder", "tokenizer"}
    assert manifest["mask"]["share"] == pytest.approx(MASK.share, abs=1e-6)
    assert manifest["scores"]["known_error"] == 0
    assert manifest["size"] == "80x64"
    assert len(two.settings["manifest"]) == 2


def test_saving(two, one, tmp_path):
    assert [path.name for path in two.save(tmp_path / "out.png")] == ["out-1.png", "out-2.png"]
    for index in range(2):
        path = tmp_path / f"out-{index + 1}.png"
        assert (pixels(Image.open(path)) == pixels(two.images[index])).all()
        stored = read_settings(path)
        assert stored["prompt"] == ("a fox", "a cube")[index]
        assert stored["seed"] == two.seeds[index]
        assert stored["manifest"] == two.settings["manifest"][index]
    assert one.save(tmp_path / "single.webp") == [tmp_path / "single.webp"]
    parameters = Image.open(tmp_path / "out-1.png").text["parameters"]
    assert "Steps: 2" in parameters
    assert "Size: 80x64" in parameters
    assert one.save(tmp_path / "new" / "out.png") == [tmp_path / "new" / "out.png"]
    assert one.save(tmp_path / "new" / "folder" / "out.png")[0].is_file()
    with pytest.raises(ImageError):
        one.save(tmp_path / "out-1.png" / "out.png")
