"""The demo: its sheet is laid out as promised, its tasks are what they say, and known pixels stay what they were."""

from __future__ import annotations

import numpy as np
import pytest
from builders import random_pipeline, small
from PIL import Image, ImageFont

from sdinpaint.cli import demonstration
from sdinpaint.cli.demonstration import demonstrate, repaint, tasks
from sdinpaint.images import sheets
from sdinpaint.images.files import read_settings
from sdinpaint.images.sheets import CAPTION_SIZE, GAP, MARGIN, PAPER, contact_sheet, tinted
from sdinpaint.pipeline import pipeline
from sdinpaint.pipeline import repaint as run
from sdinpaint.training.scenes import render, silhouette

SIZE = 64


@pytest.fixture(scope="module")
def pipe(tiny, vocabulary):
    return random_pipeline(small(tiny), vocabulary)


@pytest.fixture
def rows(pipe, substitute):
    substitute(demonstration, STEPS=1)
    return repaint(pipe, tasks(SIZE))


def changed_known_pixels(rows):
    """How many known pixels of all results differ from the image that was given."""
    count = 0
    for task, (given, _, *results) in zip(tasks(SIZE), rows, strict=True):
        before = np.asarray(given[0])
        count += sum(int((np.asarray(image)[~task.hole] != before[~task.hole]).sum()) for image, _ in results)
    return count


# the images


def test_every_prompt_is_painted_with_every_sampler(rows):
    assert [len(row) for row in rows] == [6, 6, 6, 6]
    for task, row in zip(tasks(SIZE), rows, strict=True):
        captions = [caption.split("\n")[0] for _, caption in row[2:]]
        assert captions == [prompt for prompt in task.prompts for _ in demonstration.SEEDS]
        assert np.array_equal(np.asarray(row[0][0]), render(task.scene, SIZE))
        for image, _ in row[2:]:
            assert (np.asarray(image)[task.hole] != render(task.scene, SIZE)[task.hole]).any()


def test_known_pixels_stay_bit_for_bit(rows):
    assert changed_known_pixels(rows) == 0


def test_without_pasting_back_they_would_not(pipe, sabotage, substitute):
    substitute(demonstration, STEPS=1)
    sabotage(run, "compose", lambda _, generated, *__, **___: generated)
    assert changed_known_pixels(repaint(pipe, tasks(SIZE))) == 0, "what is joined is pasted too"
    sabotage(pipeline, "paste", lambda _, generated, __: Image.fromarray(generated))
    assert changed_known_pixels(repaint(pipe, tasks(SIZE))) > 0


def test_holes_cover_what_is_to_be_replaced_and_nothing_else():
    replace, recolour, add, extend = tasks(SIZE)
    assert replace.hole[silhouette(replace.scene.things[0], SIZE)].all()
    cube, cone = recolour.scene.things
    assert recolour.hole[silhouette(cube, SIZE)].all()
    assert not recolour.hole[silhouette(cone, SIZE)].any()
    assert add.scene.things == ()
    assert extend.hole.mean() == 0.5
    assert not extend.hole[silhouette(extend.scene.things[0], SIZE)].any()


def test_the_tint_is_seen_in_the_hole_alone():
    image = np.full((20, 30, 3), 128, dtype=np.uint8)
    hole = np.zeros((20, 30), dtype=bool)
    hole[5:9, 7:12] = True
    differs = (np.asarray(tinted(image, hole)) != image).any(axis=2)
    assert np.array_equal(differs, hole)


# the sheet


def paper(sheet):
    return (np.asarray(sheet) == PAPER).all(axis=2)


def test_the_sheet_has_room_for_every_cell():
    rows = [[(Image.new("RGB", (40, 30), (9, 9, 9)), "one")] * 3, [(Image.new("RGB", (20, 30), (9, 9, 9)), "two")]]
    sheet = contact_sheet(rows, scale=2)
    assert sheet.width == 2 * MARGIN + 3 * 80 + 2 * GAP
    dark = (np.asarray(sheet) == 9).all(axis=2)
    assert dark.sum() == 3 * 80 * 60 + 40 * 60
    assert paper(sheet)[:, : MARGIN - 1].all()
    assert paper(sheet)[-(MARGIN - 1) :].all()
    for column in range(3):
        left = MARGIN + column * (80 + GAP)
        assert dark[MARGIN : MARGIN + 60, left : left + 80].all()
        assert not paper(sheet)[MARGIN + 62 :, left : left + 80].all(), "a caption is below it"


def test_a_second_line_makes_rows_higher_and_a_title_the_head():
    image = Image.new("RGB", (50, 50))
    short, long = contact_sheet([[(image, "a")]] * 2), contact_sheet([[(image, "a\nb")]] * 2)
    titled = contact_sheet([[(image, "a")]] * 2, title="A title")
    assert long.width == short.width == titled.width
    line = round(CAPTION_SIZE * sheets.LEADING)
    assert long.height == short.height + 2 * line
    assert titled.height == short.height + 2 * sheets.TITLE_SIZE
    assert not paper(titled)[: MARGIN + sheets.TITLE_SIZE].all()


def test_long_captions_are_wrapped_to_the_image():
    words = "what is asked for here is longer than the image is wide"
    narrow = contact_sheet([[(Image.new("RGB", (70, 30)), words)]])
    assert paper(narrow)[:, -MARGIN + 2 :].all()
    wide = ImageFont.load_default(CAPTION_SIZE).getlength(words)
    lines = sheets._wrapped(words, ImageFont.load_default(CAPTION_SIZE), 140)
    assert len(lines) >= wide / 140
    assert " ".join(text for text, _ in lines) == words


# both


def test_demonstrate_writes_its_files(pipe, tmp_path, substitute):
    substitute(demonstration, STEPS=1)
    done = demonstrate(tmp_path / "new", pipe)
    written = [done.path, done.photo, done.mask]
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    assert done.images == 16
    assert done.seconds > 0
    assert read_settings(done.path)["steps"] == 1
    expected = contact_sheet(repaint(pipe, tasks(SIZE)), title=demonstration.TITLE)
    assert np.array_equal(np.asarray(Image.open(done.path)), np.asarray(expected))
