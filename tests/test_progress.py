"""Progress bars: seen in a terminal and in a notebook, silent elsewhere, and gone where a run fails."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from builders import random_pipeline, small
from painting import IMAGE, inpaint
from torch import nn

import sdinpaint
from sdinpaint import progress
from sdinpaint.progress import bar_class, is_notebook, progress_bar
from sdinpaint.training.loop import Trainer

SECONDS = 60


class Shell:
    """IPython as it describes itself; the application is that of a terminal or of a kernel."""

    def __init__(self, application):
        self.config = {application: {}}


@pytest.fixture
def ipython(installed):
    """Give ipython(shell): what IPython says that it runs in."""

    def run_in(shell):
        module = types.ModuleType("IPython")
        module.get_ipython = lambda: shell
        installed("IPython", module)

    return run_in


@pytest.fixture
def stderr_of(ipython, stderr):
    """Give stderr_of(place): that of a "terminal", a "file", or a "notebook", whose kernel has no terminal."""

    def change(place):
        if place == "notebook":
            ipython(Shell("IPKernelApp"))
        return stderr(terminal=place == "terminal")

    return change


@pytest.fixture(scope="module")
def checkpoint(tiny, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    sdinpaint.save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


def train(folder, progress):
    layer = nn.Linear(2, 1)
    trainer = Trainer(layer, folder / "stage", steps=3, peak_lr=0.1)
    trainer.fit(lambda step: (layer(torch.ones(1, 2)).square().sum(), {"loss": 1.0}), progress=progress)


TASKS = {
    "inpaint": ("inpaint", lambda pipe, model, folder, progress: inpaint(pipe, progress=progress)),
    "vary": ("vary", lambda pipe, model, folder, progress: pipe.vary(IMAGE, "a fox", steps=3, progress=progress)),
    "load": ("load model", lambda pipe, model, folder, progress: sdinpaint.load(model, progress=progress)),
    "convert": (
        "write out.safetensors",
        lambda pipe, model, folder, progress: sdinpaint.convert(model, folder / "out.safetensors", progress=progress),
    ),
    "train": ("stage", lambda pipe, model, folder, progress: train(folder, progress)),
}
every_task = pytest.mark.parametrize(("title", "task"), TASKS.values(), ids=list(TASKS))


@every_task
@pytest.mark.parametrize("place", ["notebook", "terminal"])
def test_bars_are_shown_in_terminals_and_notebooks(place, title, task, pipe, checkpoint, tmp_path, stderr_of):
    stream = stderr_of(place)
    task(pipe, checkpoint, tmp_path, True)
    assert f"{title}: 100%" in stream.getvalue()


@every_task
@pytest.mark.parametrize("place", ["notebook", "terminal", "file"])
def test_bars_are_not_shown_where_they_are_not_wanted(place, title, task, pipe, checkpoint, tmp_path, stderr_of):
    stream = stderr_of(place)
    task(pipe, checkpoint, tmp_path, place == "file")
    assert stream.getvalue() == ""


def test_ipython_in_a_terminal_is_no_notebook(ipython, stderr):
    ipython(Shell("TerminalIPythonApp"))
    assert not is_notebook()
    stream = stderr(terminal=False)
    with progress_bar(2, "work") as bar:
        bar.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("broken", ["no IPython shell", "no stderr", "closed stderr"])
def test_a_missing_output_is_no_failure(broken, ipython, monkeypatch, stderr):
    stream = stderr(terminal=True)
    if broken == "no IPython shell":
        ipython(None)
        stream.terminal = False
    elif broken == "no stderr":
        monkeypatch.setattr(sys, "stderr", None)
    else:
        stream.close()
        stream.isatty = io.StringIO.isatty.__get__(stream)  # which a closed one refuses
    with progress_bar(2, "work") as bar:
        bar.update()
        bar.set_postfix_str("half")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["notebook", "terminal"])
def test_an_error_leaves_no_half_bar(place, error, pipe, stderr_of):
    stream = stderr_of(place)

    def stop(step, x, x0):
        if step == 1:
            raise error("enough")

    with pytest.raises(error):
        inpaint(pipe, progress=True, on_step=stop)
    assert "inpaint" in stream.getvalue()
    assert stream.getvalue().split("\r")[-1].strip() == ""
    assert "\n" not in stream.getvalue()
    inpaint(pipe, progress=True)
    assert stream.getvalue().rstrip("\n").split("\r")[-1].startswith("inpaint: 100%")  # and in the first line


def test_bars_within_bars(stderr_of):
    stream = stderr_of("terminal")
    with progress_bar(2, "outer") as outer:
        for _ in range(2):
            with progress_bar(1, "inner", leave=False) as inner:
                inner.update()
            outer.update()
    text = stream.getvalue()
    assert "inner" in text
    assert text.count("outer: 100%") >= 1
    assert "outer: 100%" in text.rstrip("\n").split("\r")[-1]


def test_a_silent_bar_starts_no_thread_of_tqdm(stderr_of, forbid):
    stderr_of("file")
    forbid(progress, "_Bar")
    with progress_bar(2, "work") as bar:
        bar.update()


@pytest.mark.parametrize("show", [True, False])
def test_bars_of_other_libraries(show, stderr_of):
    stream = stderr_of("notebook")
    with bar_class(show=show)(total=2, desc="Fetching") as bar:
        bar.update(2)
    assert ("Fetching: 100%" in stream.getvalue()) == show


KERNEL = """
import io, sys, types

class Stream(io.StringIO):
    def isatty(self):
        return False

class Shell:
    config = {"IPKernelApp": {}}

for name in ("IPython", "IPython.display", "ipykernel", "ipykernel.zmqshell"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["IPython"].get_ipython = lambda: Shell
shown = []
sys.modules["IPython.display"].display = shown.append
"""
WIDGETS = """
class Widget:
    bar_style = ""
    def __init__(self, **given):
        self.__dict__.update(given)
        self.layout, self.style, self.closed = types.SimpleNamespace(), types.SimpleNamespace(), False
    def close(self):
        self.closed = True

widgets = sys.modules["ipywidgets"] = types.ModuleType("ipywidgets")
widgets.HTML = widgets.FloatProgress = widgets.HBox = Widget
"""
USE = """
sys.stderr = Stream()
from sdinpaint.progress import progress_bar
import huggingface_hub.utils
with progress_bar(3, "work") as bar:
    bar.update(3)
try:
    with progress_bar(3, "broken") as bar:
        bar.update(1)
        raise ValueError
except ValueError:
    pass
print(repr((sys.stderr.getvalue(), [(one.children[1].value, one.closed) for one in shown])))
"""


@pytest.mark.parametrize("widgets", ["", WIDGETS], ids=["without ipywidgets", "with ipywidgets"])
def test_a_kernel_with_and_without_widgets(widgets):
    """Without a warning of what is not installed, also where huggingface_hub asks tqdm next."""
    made = subprocess.run(
        [sys.executable, "-c", KERNEL + widgets + USE],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(sdinpaint.__file__).parents[1],
    )
    assert made.returncode == 0, made.stderr
    text, shown = eval(made.stdout)
    if widgets:
        assert text == ""
        assert shown == [(3, False), (1, True)]
    else:
        assert "work: 100%" in text
        assert "Warning" not in text
        assert text.split("\r")[-1].strip() == ""
