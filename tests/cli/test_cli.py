"""The command line: what it writes and prints, and with which exit code every kind of failure ends."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import random_pipeline, small
from click.testing import CliRunner
from closeness import same_image
from PIL import Image
from sdinpaint_kernels import backend
from sdinpaint_kernels.cpu_kinds import cpu_kind

import sdinpaint
from sdinpaint import Mask, cli
from sdinpaint.checkpoints import opening
from sdinpaint.cli import demonstration, painting
from sdinpaint.errors import SdInpaintWarning
from sdinpaint.images.files import read_settings, save_png
from sdinpaint.load_options import LoadOptions
from sdinpaint.loading import save_diffusers
from sdinpaint.pipeline import settings as drawing
from sdinpaint.pipeline.settings import BLENDS, COVERS, FILLS, REGIONS, Settings, names_of
from sdinpaint.sampling import SAMPLERS

HEIGHT, WIDTH = 72, 100
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
HOLE = np.zeros((HEIGHT, WIDTH), dtype=bool)
HOLE[20:50, 30:70] = True


@pytest.fixture(scope="module")
def model(tiny, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    return sdinpaint.load(model, device="cpu", progress=False)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with an image and its mask, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    # with one seed of hundreds, random weights make an image that is doubted, and told
    monkeypatch.setattr(drawing, "secrets", SimpleNamespace(randbelow=lambda _: 5))
    Image.fromarray(PIXELS).save("photo.png")
    Image.fromarray(HOLE).save("mask.png")


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


def inpaint(model, *more, **changed):
    given = {"mask": "mask.png", "prompt": "a red fox", "model": model, "out": "out.png", "steps": 2, "device": "cpu"}
    return run("inpaint", "photo.png", *(f"--{name}={value}" for name, value in (given | changed).items()), *more)


def written():
    return set(os.listdir()) - {"photo.png", "mask.png"}


# what it does


def test_an_image_is_written_with_its_settings(model, pipe):
    done = inpaint(model, seed=5, guidance=3, sampler="euler")
    assert done.exit_code == 0, done.output
    result = np.asarray(Image.open("out.png"))
    assert result.shape == PIXELS.shape
    assert np.array_equal(result[~HOLE], PIXELS[~HOLE])
    assert (result[HOLE] != PIXELS[HOLE]).any()
    settings = read_settings("out.png")
    again = pipe.inpaint("photo.png", "mask.png", **settings, progress=False)
    assert same_image(again.image, result)
    other = pipe.inpaint("photo.png", "mask.png", **settings | {"guidance_scale": 4}, progress=False)
    assert not same_image(other.image, result)
    assert again.settings == settings
    assert [settings["manifest"][name]["path"] for name in ("image", "mask")] == ["photo.png", "mask.png"]
    assert done.stdout.startswith("out.png: 100 x 72 pixels, seed 5, ")
    table = re.sub(r'cover="(\w+)"', r"--cover \1", Mask(HOLE).report().table())
    assert done.stderr == f"mask mask.png\n{table}\n"


HOW = {"strength": 0.5, "fill": "blur", "cover": "nearest", "crop": 8, "regions": "each", "blend": "feather"}
TURNED_ON = {"soft": True, "match_color": True}


def test_options_reach_the_run(model, pipe):
    done = inpaint(model, "--soft", "--match-color", seed=5, **HOW)
    assert done.exit_code == 0, done.output
    given = {**HOW, **TURNED_ON, "batch_size": 1, "prompt": "a red fox", "steps": 2, "seed": 5}
    assert given.items() <= read_settings("out.png").items()
    result = pipe.inpaint("photo.png", "mask.png", **given, progress=False)
    assert same_image(result.image, Image.open("out.png"))
    other = pipe.inpaint("photo.png", "mask.png", **given | {"fill": "edge"}, progress=False)
    assert not same_image(other.image, Image.open("out.png"))


@pytest.mark.parametrize(("given", "crop"), [("auto", "auto"), ("none", None), ("0", 0)])
def test_a_crop_is_a_word_or_a_number(given, crop, model):
    assert inpaint(model, crop=given).exit_code == 0
    assert read_settings("out.png").get("crop") == crop


def test_seeds_are_run_in_batches(model, pipe):
    seeds = [3, 4, 5]
    done = inpaint(model, *(f"--seed={seed}" for seed in seeds), **{"batch-size": 2})
    assert done.exit_code == 0, done.output
    options = {"steps": 2, "batch_size": 2, "progress": False}
    together = pipe.inpaint("photo.png", "mask.png", "a red fox", seed=seeds[:2], **options).images
    alone = pipe.inpaint("photo.png", "mask.png", "a red fox", seed=seeds[2], **options).images
    for number, seed, expected in zip((1, 2, 3), seeds, together + alone, strict=True):
        path = f"out-{number}.png"
        assert same_image(Image.open(path), expected)
        settings = read_settings(path)
        assert (settings["seed"], settings["batch_size"], settings["prompt"]) == (seed, 2, "a red fox")
        assert settings["manifest"]["image"]["path"] == "photo.png"


def test_every_seed_gives_an_image_of_its_own(model, pipe):
    done = inpaint(model, "-s", 3, "-s", 4)
    assert done.exit_code == 0
    assert written() == {"out-1.png", "out-2.png"}
    for name, seed in (("out-1.png", 3), ("out-2.png", 4)):
        alone = pipe.inpaint("photo.png", "mask.png", "a red fox", steps=2, seed=seed, progress=False).image
        assert same_image(alone, Image.open(name))
    assert not same_image(Image.open("out-1.png"), Image.open("out-2.png"))


@pytest.mark.parametrize("given", [(), ("--seed", -1)])
def test_a_drawn_seed_is_reported(model, given):
    done = inpaint(model, *given)
    assert f"seed {read_settings('out.png')['seed']}," in done.stdout


def test_quiet_is_silent(model):
    done = inpaint(model, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert written() == {"out.png"}


def test_json_is_one_object(model):
    done = inpaint(model, "--json", out="out.webp")
    (image,) = json.loads(done.stdout)["pictures"]
    assert image["path"] == "out.webp"
    assert read_settings("out.webp").items() <= image.items()


def test_options_are_those_of_the_library():
    assert set(painting.SPACINGS) == {name for sampler in SAMPLERS.values() for name in sampler.spacings}
    chosen = {"cover": painting.COVERS, "fill": painting.FILLS, "regions": painting.REGIONS, "blend": painting.BLENDS}
    assert chosen == {"cover": COVERS, "fill": FILLS, "regions": REGIONS, "blend": BLENDS}
    settings = {field.name for field in fields(Settings)}
    least = ["photo.png", "--mask=mask.png", "--prompt=a red fox", "--model=demo", "--out=out.png"]
    options = cli.main.commands["inpaint"].make_context("inpaint", least).params
    named = inspect.signature(painting._paint).parameters
    loading = set(names_of(LoadOptions))
    assert set(options) - set(named) - loading == settings
    assert loading - {"source"} <= set(options) & set(inspect.signature(sdinpaint.load).parameters)
    defaults = inspect.signature(sdinpaint.Pipeline.inpaint).parameters
    for name in settings - {"batch_size"}:  # one image at a time is written as soon as it is done
        assert options[name] == defaults[name].default


WITHOUT_TORCH = [
    "--help",
    "inpaint --help",
    "--version",
    "samplers",
    "samplers --json",
    "mask --help",
    "mask box photo.png --at 10,10,40,40 --out made.png",
    "mask edit mask.png --grow 4 --feather 2 --on-lattice --out made.png",
    "mask flood photo.png --at 30,30 --out made.png",
    "mask report mask.png",
    "mask preview photo.png mask.png --out made.png",
    "inspect out.png",
    "inspect demo",
]


@pytest.mark.parametrize("line", WITHOUT_TORCH)
def test_what_needs_no_model_does_not_wait_for_torch(line):
    save_png(Image.open("photo.png"), Path("out.png"), {"prompt": "a red fox"})
    arguments = line.split()
    program = f"""
import sys
sys.modules["torch"] = None
from sdinpaint.cli import main
main({arguments!r}, prog_name="sdinpaint")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout or Path("made.png").exists()


# notes


def test_a_warning_is_one_line_and_said_once(model):
    done = inpaint(model, guidance=40)
    assert done.exit_code == 0
    assert done.stderr.count("--guidance 40") == 1
    assert any(line.startswith("note: --guidance 40") for line in done.stderr.splitlines())
    assert "Warning" not in done.stderr


def test_warnings_of_others_stay_what_they_are(loads, pipe):
    def load():
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn("something of ours", SdInpaintWarning, stacklevel=1)
        return pipe

    loads(load)
    with pytest.warns(UserWarning, match="something else") as caught:
        done = inpaint("any")
    assert [str(one.message) for one in caught] == ["something else"]
    assert done.stderr.endswith("kept\nnote: something of ours\n")


# failures


BESIDE_THE_MODEL = {
    "IMAGE_NOT_FOUND": {"mask": "nothing.png"},
    "IMAGE_UNREADABLE": {"mask": "text.png"},
    "MASK_SIZE": {"mask": "square.png"},
    "SETTING_STEPS": {"steps": 0},
    "SETTING_SEED": {"seed": -5},
    "SETTING_GUIDANCE": {"guidance": "nan"},
    "SETTING_PROMPT": {"prompt": "\udc80"},
    "SETTING_ETA": {"eta": -1},
    "SETTING_CROP": {"crop": -1},
    "SETTING_BATCH_SIZE": {"batch-size": 0},
    "SETTING_STRENGTH": {"strength": 1.5},
    "IMAGE_OUTPUT_TYPE": {"out": "out.xyz"},
    "IMAGE_OUTPUT_PATH": {"out": "photo.png/out.png"},
}


@pytest.mark.parametrize("code", BESIDE_THE_MODEL)
def test_bad_input_is_refused_before_the_model_is_loaded(code, loads):
    loads(AssertionError("the model was loaded"))
    Path("text.png").write_text("not an image")
    Image.new("L", (64, 64), 255).save("square.png")
    before = written()
    done = inpaint("any", **BESIDE_THE_MODEL[code])
    assert done.exit_code == 3, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    as_json = inpaint("any", "--json", **BESIDE_THE_MODEL[code])
    error = json.loads(as_json.stdout)["error"]
    assert as_json.exit_code == 3
    assert error["code"] == code
    assert error["found"] in done.stderr
    assert written() == before


@pytest.mark.parametrize("name", ["photo.png", "mask.png", "./photo.png"])
def test_an_input_is_never_overwritten(name, loads):
    loads(AssertionError("the model was loaded"))
    before = Path(name).read_bytes()
    done = inpaint("any", out=name)
    assert done.exit_code == 3
    assert "itself" in done.stderr
    assert Path(name).read_bytes() == before


def test_a_model_that_is_none_is_refused():
    Path("model.ckpt").write_bytes(b"<html>not found</html>")
    for model in ("model.ckpt", "nowhere"):
        done = inpaint(model)
        assert done.exit_code == 3
        assert model in done.stderr
        assert written() == {"model.ckpt"}


def test_samplers_are_listed():
    told = run("samplers").stdout
    for name, one in SAMPLERS.items():
        assert name in told
        assert all(word in told for word in (*one.spacings, *one.aliases))
    rows = json.loads(run("samplers", "--json").stdout)
    assert {name: row["spacings"][0] for name, row in rows.items()} == {n: s.spacing for n, s in SAMPLERS.items()}


def test_a_sampler_may_have_the_name_that_another_program_gives_it(model):
    assert inpaint(model, sampler="DPM++ 2M Karras").exit_code == 0
    made = read_settings("out.png")
    assert (made["sampler"], made["spacing"]) == ("dpmpp_2m", "karras")


def test_the_package_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "sdinpaint", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "sdinpaint,")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inpaint"],
        ["inpaint", "photo.png", "--sampler", "best"],
        ["paint"],
        ["inpaint", "--steps", "many"],
        ["inpaint", "photo.png", "--crop", "some"],
        ["inpaint", "photo.png", "--blend", "well"],
    ],
)
def test_wrong_usage(arguments):
    assert run(*arguments).exit_code == 2


NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
ENVIRONMENT = {
    "OUT_OF_MEMORY": [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("can't start new thread"),
        OSError("libtorch_global_deps.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 75 bytes."),
    ],
    "DISK_FULL": [NO_ROOM],
    "FILE_NOT_USABLE": [PermissionError(errno.EACCES, os.strerror(errno.EACCES), "rows/step.jsonl")],
}


@pytest.mark.parametrize(("code", "error"), [(code, error) for code, errors in ENVIRONMENT.items() for error in errors])
def test_the_machine_is_at_fault(code, error, loads):
    loads(error)
    done = inpaint("any")
    assert done.exit_code == 5
    assert "hint: " in done.stderr
    assert json.loads(inpaint("any", "--json").stdout)["error"]["code"] == code
    assert written() == set()


@pytest.mark.parametrize("device", ["cuda:9", "warp"])
def test_a_device_that_is_not_there(device, model):
    done = inpaint(model, device=device)
    assert done.exit_code == 5
    assert device in done.stderr


def test_a_full_disk_leaves_the_file_of_that_name(model, failing):
    Path("out.png").write_bytes(b"an earlier image")
    failing(os, "fsync", NO_ROOM)
    assert inpaint(model).exit_code == 5
    assert written() == {"out.png"}
    assert Path("out.png").read_bytes() == b"an earlier image"


def test_interrupted_runs_leave_no_file(loads, pipe):
    def interrupt(*_):
        raise KeyboardInterrupt

    loads(pipe)
    hook = pipe.vae.decoder.register_forward_hook(interrupt)
    try:
        done = inpaint("any")
    finally:
        hook.remove()
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert written() == set()


def test_a_bug_is_not_explained_away(loads):
    loads(ZeroDivisionError("a bug"))
    done = inpaint("any")
    assert isinstance(done.exception, ZeroDivisionError)


# the other commands


def test_inspect_says_what_a_checkpoint_is(model):
    done = run("inspect", model)
    assert done.exit_code == 0
    assert done.stdout == f"{sdinpaint.inspect(model)}\n"
    report = json.loads(run("inspect", model, "--json").stdout)
    assert report["in_channels"] == 9
    assert report["problem"] == ""


def test_inspect_shows_the_settings_of_an_image(model):
    inpaint(model, seed=8)
    assert json.loads(run("inspect", "out.png", "--json").stdout) == read_settings("out.png")
    page = run("inspect", "out.png").stdout
    assert page.startswith("out.png: inpaint by sdinpaint ")
    for fact in ("a red fox", "sampler=ddim", "photo.png: ", "% repainted", "unet ", "float32"):
        assert fact in page
    assert "{" not in page
    done = run("inspect", "photo.png", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["error"]["code"] == "IMAGE_NO_SETTINGS"


def test_doctor_tells_what_is_there(model, environment, substitute):
    substitute(opening, DEMO=model)
    substitute(backend, cpu_kind=cpu_kind.__wrapped__)
    environment(SDINPAINT_TOKENIZER="nowhere", SDINPAINT_CPU_KIND="abacus")
    done = run("doctor")
    found = json.loads(run("doctor", "--json").stdout)
    assert done.exit_code == 0
    assert [line[:16].strip() for line in done.stdout.splitlines()] == list(found)
    assert torch.__version__.startswith(found["torch"])  # a build adds "+cpu" to the version of the package
    assert found["demo checkpoint"].startswith("included")
    assert "nowhere" in found["CLIP vocabulary"]
    assert "SDINPAINT_CPU_KIND is 'abacus'" in found["CPU"]


def test_demo_writes_its_sheet(model, substitute):
    substitute(opening, DEMO=model)
    substitute(demonstration, STEPS=1)
    done = run("demo", "--out", "new/folder")
    assert done.exit_code == 0, done.output
    assert "new/folder/sdinpaint-demo.png" in done.stdout
    assert Image.open("new/folder/sdinpaint-demo.png").width > 1000
    Path("file").write_text("in the way")
    assert run("demo", "--out", "file").exit_code == 3
