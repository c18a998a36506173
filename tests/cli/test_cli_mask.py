"""`sdinpaint mask ...`: each command makes what `Mask` makes of the same arguments, or names what is wrong."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw
from places import ROOT

from sdinpaint.cli import main
from sdinpaint.cli.edits import EDITS
from sdinpaint.cli.masking import KINDS
from sdinpaint.images.boxes import Box
from sdinpaint.images.input_image import read_image
from sdinpaint.masks import Mask

HEIGHT, WIDTH = SIZE = 72, 100
BOX = Box(30, 20, 70, 50)


def draw_photo():
    photo = Image.new("RGB", (WIDTH, HEIGHT), (200, 180, 160))
    draw = ImageDraw.Draw(photo)
    draw.ellipse((30, 20, 69, 49), fill=(20, 60, 200))
    draw.rectangle((5, 5, 14, 14), fill=(255, 255, 255))
    return photo


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with an image, one with transparency, a map of classes, and three masks, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    photo = draw_photo()
    photo.save("photo.png")
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(51, (10, 12, 40, 44))
    photo.putalpha(alpha)
    photo.save("cutout.png")
    Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(SIZE) % 5).save("classes.png")
    Mask.box(SIZE, BOX).save("mask.png")
    Mask.box(SIZE, (60, 40, 90, 70)).save("other.png")
    Mask.strokes(SIZE, [[(2, 68), (97, 68)]], 3).save("scribble.png")


def run(*arguments):
    return CliRunner().invoke(main, ["mask", *(str(one) for one in arguments)])


def typed(report):
    """The report as the command line tells it."""
    return re.sub(r'cover="(\w+)"', r"--cover \1", str(report))


def made(*arguments, out="out.png"):
    """The mask that a command writes: uint8 (H, W)."""
    done = run(*arguments, "-o", out)
    assert done.exit_code == 0, done.output
    image = Image.open(out)
    assert image.mode == "L"
    return np.asarray(image)


def levels(mask):
    return np.asarray(mask.to_pil())


def photo():
    return read_image("photo.png")


# making

MADE = {
    "box": ("photo.png --at 30,20,70,50", lambda: Mask.box(SIZE, BOX)),
    "ellipse": ("photo.png --at 30,20,70,50", lambda: Mask.ellipse(SIZE, BOX)),
    "polygon": (
        "photo.png --point 10,10 --point 80,30 --point 40,60",
        lambda: Mask.polygon(SIZE, [(10, 10), (80, 30), (40, 60)]),
    ),
    "strokes": (
        ["photo.png", "--stroke", "10,10 40,30  60,30", "--stroke", "80,60", "--width", "7"],
        lambda: Mask.strokes(SIZE, [[(10, 10), (40, 30), (60, 30)], [(80, 60)]], 7),
    ),
    "alpha": ("cutout.png", lambda: Mask.from_alpha("cutout.png")),
    "color": ("photo.png --color 20,70,190 --tolerance 11", lambda: Mask.from_color(photo(), (20, 70, 190), 11)),
    "luminance": ("photo.png --low 0.9", lambda: Mask.from_luminance(photo(), 0.9, 1)),
    "labels": ("classes.png --id 3 --id 1", lambda: Mask.from_labels("classes.png", [1, 3])),
    "grabcut": (
        "photo.png --box 25,15,75,55 --keep scribble.png --iterations 2",
        lambda: Mask.grabcut(photo(), (25, 15, 75, 55), keep="scribble.png", iterations=2),
    ),
    "flood": ("photo.png --at 50,35 --tolerance 0.05", lambda: Mask.flood(photo(), (50, 35), 0.05)),
    "region": ("photo.png --at 50,35 --scale 100", lambda: Mask.region(photo(), (50, 35), 100)),
}
BY_MODELS = {"points", "text"}


@pytest.mark.parametrize("name", MADE)
def test_a_command_makes_what_the_library_makes(name):
    given, expected = MADE[name]
    mask = expected()
    assert 0 < mask.share < 1
    assert np.array_equal(made(name, *(given.split() if isinstance(given, str) else given)), levels(mask))


def test_all_commands_that_make_masks_are_tested():
    assert set(MADE) | BY_MODELS == set(KINDS)


LEAST = {
    "box": "--at 1,2,30,40",
    "ellipse": "--at 1,2,30,40",
    "polygon": "--point 1,2",
    "strokes": "--stroke 1,2 --width 3",
    "alpha": "",
    "color": "--color red",
    "luminance": "",
    "labels": "--id 1",
    "grabcut": "",
    "flood": "--at 1,2",
    "region": "--at 1,2",
    "points": "--model folder",
    "text": "dog --model folder",
}


@pytest.mark.parametrize("name", KINDS)
def test_defaults_are_those_of_the_library(name, monkeypatch):
    method = KINDS[name].method
    parameters = inspect.signature(getattr(Mask, method)).parameters
    asked = {}
    monkeypatch.setattr(Mask, method, lambda _, **given: asked.update(given) or Mask.full(SIZE))
    made(name, "photo.png", *LEAST[name].split())
    for argument, value in asked.items():
        default = parameters[argument].default
        assert default is inspect.Parameter.empty or value == default, argument
    needed = [argument for argument, one in parameters.items() if one.default is inspect.Parameter.empty][1:]
    assert set(needed) <= set(asked)


def test_alpha_of_what_is_opaque():
    assert np.array_equal(made("alpha", "cutout.png", "--opaque"), 255 - made("alpha", "cutout.png"))


@pytest.mark.parametrize("color", ["20,60,200", "#143cc8"])
def test_a_colour_has_several_names(color):
    assert np.array_equal(made("color", "photo.png", "--color", color), levels(Mask.flood(photo(), (50, 35), 0)))


def test_labels_at_another_size():
    assert np.array_equal(
        made("labels", "classes.png", "--id", 3, "--size", "50x36"),
        levels(Mask.from_labels("classes.png", 3, (36, 50))),
    )


@pytest.fixture
def models(substitute):
    """Give the list of what `Mask.sam` and `Mask.clipseg` were asked for; both answer with a box."""
    asked = []

    def answer(image, **given):
        asked.append((image.size, given))
        return Mask.box(image.size, BOX)

    substitute(Mask, sam=answer, clipseg=answer)
    return asked


def test_points_reach_the_model(models):
    given = ["--at", "50,35", "--at", "60,30", "--not", "3,4", "--box", "30,20,70,50", "--model", "some/sam"]
    assert np.array_equal(made("points", "photo.png", *given), levels(Mask.box(SIZE, BOX)))
    points, keep_points = ((50, 35), (60, 30)), ((3, 4),)
    told = {"points": points, "keep_points": keep_points, "box": BOX, "model": "some/sam", "device": None}
    assert models == [(SIZE, told)]


def test_text_reaches_the_model(models):
    mask = made("text", "photo.png", "the dog", "--model", "folder", "--threshold", 0.3, "--grow", 4)
    assert np.array_equal(mask, levels(Mask.box(SIZE, BOX).grow(4)))
    assert models == [(SIZE, {"text": "the dog", "model": "folder", "threshold": 0.3, "device": None})]


# changing

EDITED = {
    "--grow 5": lambda mask, other: mask.grow(5),
    "--shrink 5": lambda mask, other: mask.shrink(5),
    "--feather 6": lambda mask, other: mask.feather(6),
    "--smooth 9": lambda mask, other: mask.smooth(9),
    "--invert --fill-holes": lambda mask, other: (~mask).fill_holes(),
    "--subtract other.png --drop-specks": lambda mask, other: (mask - other).drop_specks(),
    "--on-lattice": lambda mask, other: mask.on_lattice(),
    "--resize 50x36": lambda mask, other: mask.resize((36, 50)),
    "--add other.png": lambda mask, other: mask | other,
    "--subtract other.png": lambda mask, other: mask - other,
    "--intersect other.png": lambda mask, other: mask & other,
    "--grow 4 --invert": lambda mask, other: ~mask.grow(4),
    "--invert --grow 4": lambda mask, other: (~mask).grow(4),
    "--grow 4 --shrink 12 --grow 8": lambda mask, other: mask.grow(4).shrink(12).grow(8),
    "--invert --add other.png --invert": lambda mask, other: ~(~mask | other),
    "--add other.png --feather 3 --subtract scribble.png": lambda mask, other: (
        (mask | other).feather(3) - Mask.open("scribble.png")
    ),
}


@pytest.mark.parametrize("edits", EDITED)
def test_edits_are_done_in_the_order_in_which_they_are_typed(edits):
    expected = levels(EDITED[edits](Mask.open("mask.png"), Mask.open("other.png")))
    assert np.array_equal(made("edit", "mask.png", *edits.split()), expected)
    first, *rest = edits.split()
    assert np.array_equal(made("edit", first, *rest, "mask.png", out="again.png"), expected)


def test_the_order_matters_here():
    assert not np.array_equal(
        made("edit", "mask.png", "--grow", 4, "--invert"), made("edit", "mask.png", "--invert", "--grow", 4)
    )


def test_every_edit_is_tested():
    tested = {word for edits in EDITED for word in edits.split() if word.startswith("--")}
    assert tested == {f"--{name.replace('_', '-')}" for name in EDITS}


@pytest.mark.parametrize("name", MADE)
def test_commands_that_make_a_mask_also_change_it(name):
    given, expected = MADE[name]
    words = given.split() if isinstance(given, str) else given
    mask = made(name, *words, "--feather", 2, "--add", "other.png")
    assert np.array_equal(mask, levels(expected().feather(2) | Mask.open("other.png")))


# telling


@pytest.mark.parametrize("cover", ["nearest", "max"])
def test_report_is_that_of_the_library(cover):
    told = Mask.open("mask.png").report(cover)
    assert run("report", "mask.png", "--cover", cover).stdout == f"mask.png\n{typed(told)}\n"
    assert json.loads(run("report", "mask.png", "--cover", cover, "--json").stdout) == {
        "path": "mask.png",
        **told.to_json(),
    }


@pytest.mark.parametrize("command", [["box", "photo.png", "--at", "30,20,70,50"], ["edit", "mask.png"]])
def test_what_was_made_is_reported(command):
    told = Mask.box(SIZE, BOX).report()
    assert run(*command, "-o", "out.png").stdout == f"out.png\n{typed(told)}\n"
    assert json.loads(run(*command, "-o", "out.png", "--json").stdout) == {"path": "out.png", **told.to_json()}
    assert run(*command, "-o", "out.png").stderr == "replaced out.png\n"
    assert run(*command, "-o", "out.png", "--quiet").output == ""


def test_a_mistake_is_a_line_with_its_remedy():
    done = run("edit", "mask.png", "--subtract", "mask.png", "-o", "out.png")
    assert done.exit_code == 0
    assert "warning: nothing is repainted" in done.stdout


def test_a_remedy_is_a_command():
    done = run("box", "photo.png", "--at", "30,20,32,50", "-o", "out.png")
    assert "warning: 100% of the mask is thinner than 8 pixels; widen it: sdinpaint mask edit --grow 4" in done.stdout


# looking


def test_a_preview_shows_the_mask_over_the_image():
    given = ["photo.png", "--at", "30,20,70,50", "--grow", 3, "--preview", "seen.png"]
    mask = Mask.box(SIZE, BOX).grow(3)
    assert np.array_equal(made("box", *given), levels(mask))
    seen = np.asarray(Image.open("seen.png"))
    assert np.array_equal(seen, np.asarray(mask.over("photo.png")))
    pixels = photo().rgb
    assert np.array_equal(seen[~mask.hole], pixels[~mask.hole])
    assert (seen[mask.hole] != pixels[mask.hole]).any(axis=-1).all()


def test_any_mask_can_be_looked_at():
    assert run("preview", "photo.png", "mask.png", "-o", "seen.png").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("seen.png")), np.asarray(Mask.open("mask.png").over("photo.png")))


# what is wrong

REFUSED = {
    "box photo.png --at 300,20,400,50": "--at",
    "box photo.png --at 70,20,30,50": "--at",
    "box nowhere.png --at 30,20,70,50": "image 'nowhere.png'",
    "ellipse photo.png --at 30,20,30,50": "Mask.ellipse",
    "polygon photo.png --point 1,1 --point 20,20": "Mask.polygon",
    "polygon photo.png --point 101,1 --point 120,20 --point 130,9": "Mask.polygon",
    "strokes photo.png --stroke 1,1 --width 0": "width",
    "strokes photo.png --stroke 1,1 --width nan": "width",
    "alpha photo.png": "from_alpha",
    "color photo.png --color 300,0,0": "color",
    "color photo.png --color red --tolerance 300": "--tolerance",
    "luminance photo.png --low 0.9 --high 0.1": "low",
    "labels classes.png --id 99": "from_labels",
    "labels photo.png --id 1": "from_labels",
    "labels nowhere.png --id 1": "labels 'nowhere.png'",
    "grabcut photo.png": "grabcut",
    "grabcut photo.png --box 0,0,300,9": "box",
    "grabcut photo.png --repaint nowhere.png": "repaint 'nowhere.png'",
    "flood photo.png --at 100,5": "--at",
    "flood photo.png --at 50,5 --tolerance 2": "--tolerance",
    "region photo.png --at -1,5": "--at",
    "region photo.png --at 1,5 --scale -1": "--scale",
    "points photo.png --model nowhere": "sam",
    "points photo.png --at 50,72 --model nowhere": "--at",
    "text photo.png dog --model nowhere --threshold 2": "--threshold",
    "edit nowhere.png": "mask 'nowhere.png'",
    "edit photo.png": "mask",
    "edit mask.png --grow -1": "--grow",
    "edit mask.png --feather inf": "--feather",
    "edit mask.png --feather 1e9": "--feather",
    "edit mask.png --smooth 1e9": "--smooth",
    "edit mask.png --resize 0x5": "--resize",
    "edit mask.png --resize 50x36 --add other.png": "mask",
    "edit mask.png --subtract nowhere.png": "nowhere.png",
}


@pytest.mark.parametrize("given", REFUSED)
def test_bad_input_is_named_and_nothing_is_written(given):
    subject = REFUSED[given]
    before = set(os.listdir())
    done = run(*given.split(), "-o", "out.png", "--quiet")
    assert done.exit_code == 3, done.output
    assert done.stdout == ""
    assert subject in done.stderr
    as_json = run(*given.split(), "-o", "out.png", "--json")
    assert as_json.exit_code == 3
    error = json.loads(as_json.stdout)["error"]
    assert subject in error["subject"]
    assert error["expected"]
    assert set(os.listdir()) == before


def test_a_report_and_a_preview_of_no_mask_are_refused():
    assert run("report", "nowhere.png").exit_code == 3
    assert json.loads(run("report", "photo.png", "--json").stdout)["error"]["code"] == "MASK_COLOURED"
    Mask.box((64, 64), BOX).save("square.png")
    done = run("preview", "photo.png", "square.png", "-o", "seen.png")
    assert (done.exit_code, Path("seen.png").exists()) == (3, False)
    assert "64 rows" in done.stderr


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("box photo.png --at 1,2,3", "LEFT,TOP,RIGHT,BOTTOM, such as 100,50,300,400"),
        ("flood photo.png --at 1.5,2", "X,Y, such as 220,140"),
        ("polygon photo.png --point 1;2", "X,Y"),
        ("strokes photo.png --stroke 1,2,3 --width 4", "'X,Y X,Y ...'"),
        ("strokes photo.png --stroke= --width 4", "'X,Y X,Y ...'"),
        ("color photo.png --color grellow", "COLOR"),
        ("edit mask.png --resize 5", "WIDTHxHEIGHT, such as 640x480"),
        ("edit mask.png --cover most", "nearest"),
        ("text photo.png --model folder", "TEXT"),
    ],
)
def test_what_cannot_be_read_is_wrong_usage(given, form):
    done = run(*given.split(), "-o", "out.png")
    assert done.exit_code == 2
    assert form in done.stderr
    assert not Path("out.png").exists()


@pytest.fixture
def nothing_is_computed(forbid):
    forbid(Mask, "box", "grabcut", "grow")


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    "given",
    [
        "box photo.png --at 30,20,70,50 -o photo.png",
        "box photo.png --at 30,20,70,50 -o ./photo.png",
        "box photo.png --at 30,20,70,50 -o out.png --preview photo.png",
        "box photo.png --at 30,20,70,50 -o out.png --preview out.png",
        "box photo.png --at 30,20,70,50 -o other.png --add other.png",
        "grabcut photo.png --box 30,20,70,50 --keep scribble.png -o scribble.png",
        "edit mask.png --grow 3 -o mask.png",
        "edit mask.png --grow 3 --add other.png -o other.png",
        "preview photo.png mask.png -o mask.png",
    ],
)
def test_an_input_is_never_overwritten(given):
    before = {path: Path(path).read_bytes() for path in os.listdir()}
    done = run(*given.split())
    assert done.exit_code == 3, done.output
    assert "itself" in done.stderr
    assert {path: Path(path).read_bytes() for path in os.listdir()} == before


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("name", ["out.jpg", "out.webp", "out", "photo.png/out.png"])
def test_a_mask_is_written_as_png_alone(name):
    for command in (["box", "photo.png", "--at", "30,20,70,50"], ["edit", "mask.png", "--grow", "3"]):
        done = run(*command, "-o", name)
        assert done.exit_code == 3
        assert name in done.stderr
        assert not Path(name).exists()


def test_a_full_disk_leaves_the_mask_of_that_name(failing):
    before = Path("other.png").read_bytes()

    failing(os, "fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    files = set(os.listdir())
    assert run("edit", "mask.png", "--grow", 3, "-o", "other.png").exit_code == 5
    assert Path("other.png").read_bytes() == before
    assert set(os.listdir()) == files


# help


def test_help_does_not_wait_for_torch():
    program = """
import sys
sys.modules["torch"] = None
from sdinpaint.cli import main
main(sys.argv[1:], prog_name="sdinpaint")
"""
    command = [sys.executable, "-c", program, "mask", "text", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sdinpaint mask text" in done.stdout


@pytest.mark.parametrize("name", main.commands["mask"].commands)
def test_every_command_explains_itself_by_an_example(name):
    assert f"sdinpaint mask {name} " in run(name, "--help").stdout
