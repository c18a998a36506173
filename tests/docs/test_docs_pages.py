"""README.md and the pages of docs/: links lead somewhere, commands have the options shown, the README's code runs."""

from __future__ import annotations

import contextlib
import re
import shlex
import tomllib
import warnings

import click
import pytest
from click.testing import CliRunner
from PIL import Image
from places import DOCS, ROOT

from sdinpaint.cli import main as command_line
from sdinpaint.masks import Mask
from sdinpaint.training.scenes import MOODS, Background, Scene, Thing, render

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def named(page):
    return page.relative_to(ROOT).as_posix()


def anchors(page):
    """Return the names that the headings of a page have in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """Every line of a page's code that calls the command line, without its comment."""
    for _, text in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in text.replace("\\\n", "").splitlines():
            if line.startswith("sdinpaint "):
                yield line.partition(" # ")[0]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target:
            path = (page.parent / target) if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_and_option_exists(page):
    for line in commands(page):
        name, *words = shlex.split(line)[1:]
        command = command_line.get_command(None, name)
        while isinstance(command, click.Group):
            assert words, line
            command = command.get_command(None, words.pop(0))
        assert command is not None, line
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_compile(page):
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(text, str(page), "exec")


def test_the_readme_is_short_and_shows_one_image():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    assert re.findall(r"!\[.+?\]\((.+?)\)", text) == ["docs/demo.png"]


def test_the_code_and_the_commands_of_the_readme_run(tmp_path):
    room = Background(*MOODS[4], horizon=0.55, light=-1.0)
    photo = render(Scene(room, (Thing("ball", "red", x=0.34, y=0.66, radius=0.19),)))
    blocks = FENCE.findall(README.read_text(encoding="utf-8"))
    (python,), (shell,) = ([text for language, text in blocks if language == one] for one in ("python", "sh"))
    names = {"print": lambda *_: None}
    with contextlib.chdir(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.fromarray(photo).save("photo.png")
        Mask.box((128, 128), (20, 100, 60, 124)).save("mask.png")
        exec(compile(python.replace("steps=20", "steps=2"), str(README), "exec"), names)
        assert names["wider"].image.size == (192, 128)
        assert len(python.strip().splitlines()) <= 12
        for line in shell.splitlines():
            _, *words = shlex.split(line.partition(" # ")[0])
            words += ["--steps", "2"] if words[0] == "inpaint" else []
            done = CliRunner().invoke(command_line, words, catch_exceptions=False)
            assert done.exit_code == 0, (line, done.output)


def test_the_lowest_versions_on_the_page_are_those_that_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in project["dependencies"])
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (PyTorch|Triton|tokenizers)[^|]*\| ([\d.]+) \|$", page, re.MULTILINE)
    names = {"PyTorch": "torch", "Triton": "triton", "tokenizers": "tokenizers"}
    assert len(shown) == 3
    for title, version in shown:
        assert version.removesuffix(".0") == bounds[names[title]].removesuffix(".0")
