"""docs/inpainting.md: all of its code runs, what was asked for is in the images, and it shows those very images."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import warnings
from itertools import pairwise

import numpy as np
import pytest
from closeness import same_image
from PIL import Image
from places import DOCS

from sdinpaint.errors import SdInpaintWarning
from sdinpaint.images.files import read_settings
from sdinpaint.training.judge import NONE, Verdict, judge
from sdinpaint.training.scenes import COLORS, Scene, render

MAX_BYTES, MAX_TOTAL = 250_000, 900_000
LIKE = 0.3
"""Levels of 255: how far an image may be, in the mean, from the committed one. One of another seed is off by 1.3."""


@pytest.fixture(scope="module")
def making():
    """The script that runs the document, as a module."""
    spec = importlib.util.spec_from_file_location("make_inpainting", DOCS / "make_inpainting.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(making):
    return making.DOCUMENT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(making, text, tmp_path_factory):
    """The document, run once: its folder, each block with what it wrote, its names, and the library's warnings."""
    folder = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(folder), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = list(making.run(text))
    told = [str(one.message) for one in caught if issubclass(one.category, SdInpaintWarning)]
    return folder, [(block, written) for block, written, _ in done], done[-1][2], told


@pytest.fixture(scope="module")
def folder(ran):
    return ran[0]


@pytest.fixture(scope="module")
def names(ran):
    """Return what the document's code has defined at its end."""
    return ran[2]


@pytest.fixture(scope="module")
def photo(folder):
    return np.asarray(Image.open(folder / "photo.png"))


@pytest.fixture(scope="module")
def empty(names):
    """The room of the photo without the ball."""
    return render(Scene(names["room"], ()), 128)


def found_in(image, mask, background):
    return judge(np.asarray(image), mask.hole, background)


# its code


def test_every_block_runs_or_says_why_not(making, text):
    found = making.blocks(text)
    assert 2 * len(found) == text.count("```")
    assert {block.language for block in found} == {"python", "sh", "text"}
    left_out = [block.note for block in found if block.note]
    assert left_out == ["not run: needs a released checkpoint", "not run: needs the weights of SAM and CLIPSeg"]
    for block in found:
        if block.language == "python":
            compile(block.text, "block", "exec")


def test_a_block_that_fails_is_told_with_its_line(making, tmp_path):
    with contextlib.chdir(tmp_path):
        with pytest.raises(ZeroDivisionError) as raised:
            list(making.run("Text.\n\n```python\none = 1\none / 0\n```\n"))
        assert raised.traceback[-1].lineno + 1 == 5
        with pytest.raises(RuntimeError, match="exit code 2"):
            list(making.run("```sh\nsdinpaint mask circle photo.png\n```\n"))


def test_it_prints_what_the_document_says(ran):
    said = [(block.text, printed) for (_, printed), (block, _) in pairwise(ran[1]) if block.language == "text"]
    assert len(said) == 2
    for text, printed in said:
        assert text == printed


def test_it_warns_of_what_the_document_says(ran):
    inverted, thin = (
        sum(words in told for told in ran[3]) for words in ("meant to be kept, use ~mask", "thinner than 8 pixels")
    )
    assert (inverted, thin, len(ran[3])) == (1, 1, 2)


# what was asked for


def test_known_pixels_are_the_same_bits(names):
    for name in ("first", "removed", "best", "backdrop", "added", "repaired", "wider", "softly", "apart", "tries"):
        assert [score.known_error for score in names[name].scores] == [0], name


def test_the_ball_is_removed_and_the_edge_of_the_hole_too(names, photo, empty):
    first, removed, best, mask = (names[name] for name in ("first", "removed", "best", "mask"))
    assert found_in(photo, mask, empty) == Verdict("red", "ball")
    for result in (first, removed, best):
        assert found_in(result.image, mask, empty) == Verdict(NONE, NONE)
    assert best.scores[0].seam <= removed.scores[0].seam < 0.3 < 1 < first.scores[0].seam


def test_the_background_is_another_one(names, photo):
    backdrop = names["backdrop"]
    assert backdrop.scores[0].changed > 0.9
    assert np.array_equal(np.asarray(backdrop.image)[names["keep"].hole], photo[names["keep"].hole])


def test_the_cone_is_added(names, empty):
    assert found_in(names["added"].image, names["place"], empty) == Verdict("yellow", "cone")


def test_the_scratch_is_repaired(names):
    assert names["after"] > names["before"] + 10


def test_the_image_goes_on_to_the_right(names, photo, empty):
    wider = np.asarray(names["wider"].image)
    assert wider.shape == (128, 192, 3)
    assert np.array_equal(wider[:, :112], photo[:, :112])
    hole = names["Mask"].box((128, 128), (48, 0, 128, 128))
    background = np.pad(empty, ((0, 0), (0, 64), (0, 0)), mode="edge")[:, 64:]
    assert found_in(wider[:, 64:], hole, background) == Verdict("yellow", "cone")


def test_the_higher_the_strength_the_more_is_varied(names, photo, empty):
    ball = names["keep"].hole
    purple = np.array(COLORS["purple"]) / np.linalg.norm(COLORS["purple"])
    means = [np.asarray(image)[ball].mean(axis=0) for image in (photo, *names["varied"][:2])]
    given, less, more = (np.linalg.norm(mean / np.linalg.norm(mean) - purple) for mean in means)
    assert more < less < given
    assert more < 0.15


def test_the_soft_mask_keeps_the_form_and_changes_the_colour(names, empty):
    assert found_in(names["softly"].image, names["soft"], empty) == Verdict("purple", "ball")


def test_each_region_has_its_star(names):
    background = render(Scene(names["room"], ()), 384)
    regions = names["both"].regions()
    assert len(regions) == len(names["apart"].crops[0]) == 2
    for region in regions:
        assert found_in(names["apart"].image, region, background) == Verdict("blue", "star")


def test_the_best_is_the_best(names):
    assert names["blueness"](names["bluest"].image) >= names["blueness"](names["tries"].image)


# what is kept


def test_the_replay_is_the_same_image(names, folder):
    assert names["made"].identical
    assert names["made"].differences == []
    assert read_settings(folder / "out.png")["manifest"]["model"] == "demo"


def test_the_command_line_makes_the_same_masks_and_images(names, folder):
    expected = {"cli.png": "removed", "added.png": "added", "wider.png": "wider"}
    images = {made: names[name].image for made, name in expected.items()} | {"varied.png": names["varied"][1]}
    images["added-sheet.png"] = Image.open(folder / "add.png")
    for made, image in images.items():
        assert same_image(Image.open(folder / made), image), made
    for made, mask in {"cli-mask.png": "mask.png", "cli-preview.png": "preview.png"}.items():
        assert np.array_equal(np.asarray(Image.open(folder / made)), np.asarray(Image.open(folder / mask))), made
    assert not same_image(Image.open(folder / "cli.png"), names["first"].image)


# the images it shows


def unlike(making, folder):
    """Names of the images that the document shows, which are not as its code makes them, in `folder`."""
    names = []
    for name in making.SHOWN.findall(making.DOCUMENT.read_text(encoding="utf-8")):
        shown, made = (np.asarray(making.as_shown(one / name), int) for one in (making.IMAGES, folder))
        if shown.shape != made.shape or np.abs(shown - made).mean() > LIKE:
            names.append(name)
    return names


def test_it_shows_the_images_that_its_code_makes(making, folder):
    assert unlike(making, folder) == []


def test_images_of_another_run_are_noticed(making, folder, tmp_path):
    for name in making.SHOWN.findall(making.DOCUMENT.read_text(encoding="utf-8")):
        shutil.copy(folder / name, tmp_path)
    shutil.copy(folder / "first.png", tmp_path / "remove.png")
    assert unlike(making, tmp_path) == ["remove.png"]


def test_every_image_is_shown_and_small(making, text):
    sizes = {path.name: path.stat().st_size for path in making.IMAGES.iterdir()}
    assert sorted(sizes) == sorted(making.SHOWN.findall(text))
    assert max(sizes.values()) < MAX_BYTES
    assert sum(sizes.values()) < MAX_TOTAL
