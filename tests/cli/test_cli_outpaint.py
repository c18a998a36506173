"""`sdinpaint outpaint` and `sdinpaint replay`, and what the commands that paint print and write beside images."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from builders import random_pipeline, small
from click.testing import CliRunner
from closeness import LEVEL, SHARE, same_image
from PIL import Image

import sdinpaint
from sdinpaint import cli
from sdinpaint.cli import painting
from sdinpaint.images.canvas import ANCHORS, EXTENDING_FILLS, OVERLAP, canvas_for
from sdinpaint.images.files import read_settings
from sdinpaint.loading import save_diffusers
from sdinpaint.pipeline.settings import CanvasSettings, names_of

SIZE = 72, 100
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
HOLE = np.zeros(SIZE, dtype=bool)
HOLE[20:50, 30:70] = True


@pytest.fixture(scope="module")
def model(tiny, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("photo.png")
    Image.fromarray(HOLE).save("mask.png")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


def paint(command, model, *more):
    options = ("--prompt=a fox", f"--model={model}", "--out=out.png", "--steps=2", "--device=cpu", "--seed=3")
    return run(command, "photo.png", *options, *more)


def pixels(path):
    return np.asarray(Image.open(path))


# outpaint


def test_defaults_and_choices_are_the_librarys(model):
    assert set(painting.ANCHORS) == set(ANCHORS)
    assert set(painting.EDGES) == set(EXTENDING_FILLS)
    assert tuple(inspect.signature(canvas_for).parameters)[1:-1] == ("size", "anchor", "overlap", "fill")
    options = {option.name: option.default for option in cli.main.commands["outpaint"].params}
    assert options["overlap"] == OVERLAP
    for name, parameter in inspect.signature(sdinpaint.Pipeline.outpaint).parameters.items():
        if name in names_of(CanvasSettings) and name != "size":
            assert options[name] == parameter.default, name


def test_it_writes_what_the_library_makes(model):
    done = paint("outpaint", model, "--right=24", "--top=16", "--overlap=8")
    assert done.exit_code == 0, done.output
    pipe = sdinpaint.load(model, device="cpu", progress=False)
    expected = pipe.outpaint(PIXELS, "a fox", right=24, top=16, overlap=8, steps=2, seed=3, progress=False)
    assert same_image(pixels("out.png"), expected.image)
    other = pipe.outpaint(PIXELS, "a cube", right=24, top=16, overlap=8, steps=2, seed=3, progress=False)
    assert not same_image(pixels("out.png"), other.image)
    assert (pixels("out.png")[24:, :92] == PIXELS[8:, :92]).all()
    assert "124 x 88 pixels" in done.output
    assert read_settings("out.png")["manifest"]["kind"] == "outpaint"


def test_to_a_size(model):
    assert paint("outpaint", model, "--size=120x80", "--anchor=left", "--crop=auto").exit_code == 0
    assert Image.open("out.png").size == (120, 80)


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ([], "left"),
        (["--right=-8"], "right"),
        (["--right=8", "--size=200x200"], "size"),
        (["--size=50x50"], "size"),
        (["--right=8", "--overlap=100"], "overlap"),
        (["--right=60000000"], "right"),
    ],
)
def test_bad_sides_are_refused_before_a_model_is_loaded(arguments, subject):
    done = paint("outpaint", "no such model", "--json", *arguments)
    assert done.exit_code == 3
    assert subject in json.loads(done.output)["error"]["subject"]


# replay


COMMANDS = {"inpaint": ["--mask=mask.png", "--crop=8"], "vary": [], "outpaint": ["--left=8"]}


@pytest.fixture
def kept(model, loads):
    """One pipeline for all commands: with the same weights in the same place, every bit is the same."""
    loads(sdinpaint.load(model, device="cpu", progress=False))


@pytest.mark.usefixtures("kept")
def test_a_replay_says_that_it_is_the_same(model):
    for command, more in COMMANDS.items():
        assert paint(command, model, *more).exit_code == 0
        again = run("replay", "out.png", "--device=cpu")
        assert (again.exit_code, again.output) == (0, "out.png: identical\n"), (command, again.exception)
    assert run("replay", "out.png", "--out=again.png", "--quiet").output == ""
    assert (pixels("again.png") == pixels("out.png")).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_replay_loads_the_model_by_itself(model, command):
    """Its weights may lie otherwise than those that made the image, so that a few pixels may differ by a level."""
    assert paint(command, model, *COMMANDS[command]).exit_code == 0
    again = run("replay", "out.png", "--device=cpu", "--json", "--out=again.png")
    found = json.loads(again.output)
    assert found["largest"] <= LEVEL
    assert found["changed"] < SHARE * pixels("out.png")[..., 0].size
    assert found["differences"] == []
    assert (again.exit_code == 0) is found["identical"] is (found["changed"] == 0)
    assert same_image(pixels("again.png"), pixels("out.png"))


@pytest.mark.usefixtures("kept")
def test_and_that_it_is_not(model):
    from sdinpaint.images.files import save_png

    assert paint("inpaint", model, "--mask=mask.png").exit_code == 0
    changed = np.array(pixels("out.png"))
    changed[0, 0, 0] ^= 7
    save_png(Image.fromarray(changed), "out.png", read_settings("out.png"))
    again = run("replay", "out.png", "--json")
    assert again.exit_code == 1
    found = json.loads(again.output)
    assert (found["identical"], found["changed"]) == (False, 1)


def test_another_model_is_refused_by_its_components(model, tiny, vocabulary):
    assert paint("inpaint", model, "--mask=mask.png").exit_code == 0
    save_diffusers("other", random_pipeline(small(tiny), vocabulary, seed=5))
    again = run("replay", "out.png", "--model=other", "--json")
    assert again.exit_code == 3
    error = json.loads(again.output)["error"]
    assert error["code"] == "MANIFEST_WEIGHTS"
    assert "unet" in error["found"]


@pytest.mark.parametrize("given", ["photo.png", "mask.png", "missing.png"])
def test_what_holds_no_settings(given):
    assert run("replay", given).exit_code == 3


def test_it_does_not_write_over_what_it_reads(model):
    assert paint("inpaint", model, "--mask=mask.png").exit_code == 0
    assert run("replay", "out.png", "--out=out.png").exit_code == 3


# beside the image


def test_the_mask_report_is_printed_before_the_run_and_the_scores_after(model):
    done = paint("inpaint", model, "--mask=mask.png")
    lines = done.stderr.splitlines()
    assert lines[0] == "mask mask.png"
    assert any("repainted" in line and "16.67%" in line for line in lines)
    assert "known error 0" in done.stdout
    assert paint("inpaint", model, "--mask=mask.png", "--quiet").output == ""


def test_a_sheet(model):
    done = paint("inpaint", model, "--mask=mask.png", "--sheet=sheet.png", "--seed=4")
    assert done.exit_code == 0, done.output
    assert Image.open("sheet-1.png").width == Image.open("sheet-2.png").width > 400
    both = paint("inpaint", model, "--mask=mask.png", "--sheet=both.png", "--seed=4", "--batch-size=2")
    assert both.exit_code == 0
    assert Image.open("both.png").height > 1.5 * Image.open("sheet-1.png").height - 100
    assert paint("inpaint", model, "--mask=mask.png", "--sheet=out.png").exit_code == 3
