"""Outputs of the command line: missing folders, files that are replaced, inputs, and standard streams that are lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import random_pipeline, small
from click.testing import CliRunner
from PIL import Image

from sdinpaint import Mask, cli
from sdinpaint.images.input_image import read_image
from sdinpaint.loading import save_diffusers


@pytest.fixture(scope="module")
def model(tiny, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "model"
    save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save("photo.png")
    Image.linear_gradient("L").resize((64, 64)).point(lambda level: 255 * (level > 127)).save("mask.png")


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


def inpaint(model, *more):
    given = ["photo.png", "--mask=mask.png", "--prompt=a", "--steps=1", "--device=cpu", "--seed=1"]
    return run("inpaint", *given, f"--model={model}", *more)


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_folders_are_made_when_a_file_is_written(model):
    done = inpaint(model, "--out=new/dir/out.png", "--sheet=sheets/sheet.jpg")
    assert done.exit_code == 0, done.output
    assert run("mask", "box", "photo.png", "--at=1,1,9,9", "--out=masks/out.png", "--preview=seen/out.webp").output
    assert run("replay", "new/dir/out.png", "--out=again/out.png").exit_code == 0
    assert run("convert", model, "models/sd/file.safetensors", "--quiet").exit_code == 0
    assert run("convert", model, "models/folder/model", "--quiet").exit_code == 0
    made = {"new/dir/out.png", "sheets/sheet.jpg", "masks/out.png", "seen/out.webp", "again/out.png"}
    assert made | {"models/sd/file.safetensors", "models/folder/model/model_index.json"} <= {*files()}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Also where a shell leaves it, behind "=" or in quotes, and in Python."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    Path("photo.png").rename(home / "photo.png")
    done = run("mask", "box", "~/photo.png", "--at=1,1,9,9", "--out=~/masks/out.png", "--json")
    assert done.exit_code == 0, done.output
    for mask in (Mask.open("~/masks/out.png"), Mask("~/masks/out.png")):
        mask.save("~/masks/again.png")
    assert read_image("~/photo.png").path == str(home / "photo.png")
    assert run("mask", "box", "~/photo.png", "--at=1,1,9,9", "--out=~/photo.png").exit_code != 0
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == {
        "mask.png", "home/photo.png", "home/masks/out.png", "home/masks/again.png",
    }  # fmt: skip


def test_folders_of_a_run_that_fails_are_not_made(model, failing):
    failing(os, "fsync", OSError(28, os.strerror(28)))
    assert inpaint(model, "--out=new/out.png").exit_code == 5
    assert inpaint("missing", "--out=new/out.png").exit_code == 3
    assert run("convert", model, "models/file.safetensors").exit_code == 5
    assert run("convert", model, "models/folder").exit_code == 5
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]


def test_what_is_replaced_is_said(model):
    for times in range(2):
        for more, quiet in (([], False), (["--json"], False), (["--quiet"], True)):
            done = inpaint(model, "--out=out.png", "--sheet=sheet.png", *more)
            said = [line for line in done.stderr.splitlines() if line.startswith("replaced")]
            first = times == 0 and not more
            assert said == ([] if quiet or first else ["replaced out.png", "replaced sheet.png"])


INPUTS = {
    "inpaint --out": ["inpaint", "photo.png", "--mask=mask.png", "--prompt=a", "--model=demo", "--out=NAME"],
    "inpaint --sheet": [
        *("inpaint", "photo.png", "--mask=mask.png", "--prompt=a", "--model=demo", "--out=out.png", "--sheet=NAME"),
    ],
    "vary": ["vary", "photo.png", "--prompt=a", "--model=demo", "--out=NAME"],
    "outpaint": ["outpaint", "photo.png", "--left=8", "--prompt=a", "--model=demo", "--out=NAME"],
    "model": ["vary", "mask.png", "--prompt=a", "--model=photo.png", "--out=NAME"],
    "vae": ["vary", "mask.png", "--prompt=a", "--model=demo", "--vae=photo.png", "--out=NAME"],
    "mask --out": ["mask", "box", "photo.png", "--at=1,1,9,9", "--out=NAME"],
    "mask --preview": ["mask", "box", "photo.png", "--at=1,1,9,9", "--out=out.png", "--preview=NAME"],
    "mask edit": ["mask", "edit", "mask.png", "--add=photo.png", "--out=NAME"],
    "mask preview": ["mask", "preview", "photo.png", "mask.png", "--out=NAME"],
}


@pytest.mark.parametrize("command", INPUTS)
@pytest.mark.parametrize("link", [os.link, os.symlink, None])
def test_an_input_is_never_replaced_under_whatever_name(command, link):
    name = "./photo.png"
    if link is not None:
        link("photo.png", name := "another.png")
    before = {path: Path(path).read_bytes() for path in files()}
    done = run(*(one.replace("NAME", name) for one in INPUTS[command]))
    assert done.exit_code == 3
    assert "itself" in done.stderr
    assert {path: Path(path).read_bytes() for path in files()} == before


def test_a_replay_never_replaces_what_it_reads(model):
    assert inpaint(model, "--out=out.png").exit_code == 0
    os.link("photo.png", "another.png")
    for name in ("out.png", "another.png", "mask.png"):
        done = run("replay", "out.png", f"--out={name}")
        assert done.exit_code == 3
        assert "itself" in done.stderr


def test_a_file_that_is_read_only_is_told_before_anything_is_computed(forbid):
    from sdinpaint import loading

    forbid(loading, "load")
    Path("out.png").write_bytes(b"the old image")
    Path("out.png").chmod(0o444)
    done = inpaint("demo", "--out=out.png")
    assert done.exit_code == 5
    assert "read-only" in done.stderr
    assert Path("out.png").read_bytes() == b"the old image"


def test_a_format_that_does_not_hold_the_image_is_told_before_anything_is_computed(forbid):
    from sdinpaint import loading

    forbid(loading, "load")
    done = run("outpaint", "photo.png", "--right=16400", "--prompt=a", "--model=demo", "--out=out.webp")
    assert done.exit_code == 3
    assert "at most 16383 a side" in done.stderr


# names


@pytest.mark.parametrize("name", ["control_image.png", "seed=42.png", "batch_size.png", "dir/mask_threshold.png"])
def test_errors_leave_names_of_files_as_they_are(model, name):
    for more in ([f"--mask={name}"], [f"--out=photo.png/{name}"], [f"--control-image={name}", f"--controlnet={model}"]):
        done = inpaint("demo", "--out=out.png", *more)
        assert done.exit_code == 3
        assert f"{name}'" in done.stderr
    assert f"error: --control-image '{name}'" in done.stderr
    done = inpaint(f"{name}.ckpt", "--out=out.png")
    assert f"error: {name}.ckpt: no such file" in done.stderr


@pytest.mark.parametrize(
    "name", ["\x1b[31mred\x07", "line\nbreak", "right\u202eto left", "eight\x9b31m bits", "lone\udcff"]
)
def test_names_of_files_do_not_control_the_terminal(model, name):
    unsafe = {*"\x1b\x07\u202e\x9b\udcff"}
    os.symlink(model, f"{name} model")
    commands = [
        ["mask", "box", "photo.png", "--at=1,1,40,40", f"--out={name}.png"],
        ["mask", "edit", f"{name}.png", f"--out={name} 2.png", "--grow=2"],
        ["mask", "report", f"{name}.png"],
        ["inpaint", "photo.png", f"--mask={name}.png", "--prompt=a", "--steps=1", "--device=cpu", "--seed=1"],
        ["replay", f"{name} out.png"],
        ["inspect", f"{name} out.png"],
        ["inspect", f"{name} model"],
        ["convert", f"{name} model", f"{name}.safetensors"],
        ["mask", "preview", "photo.png", f"{name}.png", f"--out={name}.png"],
    ]
    commands[3] += [f"--model={name} model", f"--out={name} out.png"]
    for command in commands:
        for _ in range(2):  # the second replaces, or refuses to
            done = run(*command)
            assert done.exception is None or isinstance(done.exception, SystemExit)
            assert not unsafe.intersection(done.output)
            assert "line\nbreak" not in done.output


# standard streams


def process(*arguments, **streams):
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([sys.executable, "-m", "sdinpaint", *arguments], text=True, **given)


@pytest.mark.parametrize("command", [["--help"], ["samplers", "--json"]])
def test_a_full_disk_under_the_output_is_told(command):
    with open("/dev/full", "w") as full:
        one = process(*command, stdout=full)
        _, said = one.communicate()
    assert one.returncode == 5
    assert said == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8"])
def test_an_output_without_the_letters_of_a_name_has_escapes(encoding):
    one = process(
        "mask", "box", "photo.png", "--at=1,1,9,9", "--out=模型.png", env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    told, said = one.communicate()
    assert (one.returncode, said) == (0, "")
    assert told.startswith("模型.png" if encoding == "utf-8" else "\\u6a21\\u578b.png")


def test_a_current_folder_that_was_removed_is_told(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    one = process("inspect", "demo", preexec_fn=lambda: (os.chdir(gone), os.rmdir(gone)))
    _, said = one.communicate()
    assert one.returncode == 5
    assert said.splitlines() == [
        "error: current folder: No such file or directory",
        "  hint: change to a folder that exists",
    ]


def test_a_closed_pipe_ends_the_command_quietly():
    one = process("samplers")
    one.stdout.close()
    assert one.stderr.read() == ""
    assert one.wait() == 141


@pytest.mark.parametrize(
    ("closed", "command", "code"),
    [
        ([1], ["samplers"], 5),
        ([2], ["samplers"], 0),
        ([2], ["mask", "report", "missing.png"], 3),
        ([0, 1, 2], ["samplers"], 5),
        ([1], ["mask", "box", "photo.png", "--at=1,1,9,9", "--out=out.png", "--quiet"], 0),
    ],
)
def test_closed_streams(closed, command, code):
    one = process(*command, preexec_fn=lambda: [os.close(number) for number in closed])
    _, said = one.communicate()
    assert one.returncode == code
    assert "Traceback" not in said
    if "--out=out.png" in command:
        Image.open("out.png").load()


def test_a_full_disk_under_the_errors_does_not_end_a_command():
    with open("/dev/full", "w") as full:
        one = process("mask", "report", "missing.png", stderr=full)
        one.communicate()
        assert one.returncode == 3
        one = process("mask", "edit", "mask.png", "--grow=2", "--out=mask-2.png", stderr=full)
        one.communicate()
        assert one.returncode == 0
