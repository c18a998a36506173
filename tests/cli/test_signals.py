"""Signals end the command line quietly, with the exit code of the signal, and leave no unfinished file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from sdinpaint import cli

RUN = ["inpaint", "scene.png", "--mask=scene-mask.png", "--prompt=a ball", "--model=demo", "--steps=400"]
RUN += ["--out=out.png", "--device=cpu"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("signals")
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "scene.png")
    Image.fromarray(pixels[..., 0] > 127).save(folder / "scene-mask.png")
    return folder


def started(folder, arguments, sigint=signal.SIG_DFL):
    """Start the command line with SIGINT as a shell gives it to a foreground job; ignored, as to a background job."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdinpaint", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),  # noqa: PLW1509 - no other way to set what is inherited
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("after", [0.1, 0.4, 1.2])
def test_ctrl_c_while_libraries_are_imported(scene, after):
    """Before Python has installed its own handler, the signal ends the process by itself: nothing is printed either."""
    process = started(scene, RUN)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("number", "code", "sigint"),
    [
        (signal.SIGINT, 130, signal.SIG_DFL),
        (signal.SIGINT, 130, signal.SIG_IGN),
        (signal.SIGTERM, 143, signal.SIG_DFL),
    ],
    ids=["SIGINT in the foreground", "SIGINT in the background", "SIGTERM"],
)
def test_a_signal_during_a_run(scene, number, code, sigint):
    process = started(scene, RUN, sigint)
    assert "mask" in process.stderr.readline()  # the request was read: what follows is loading and the run
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert sorted(path.name for path in scene.iterdir()) == ["scene-mask.png", "scene.png"]


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (["--strength", "1.5"], ["error: --strength: 1.5", "from 0 to 1"]),
        (
            ["--control-scale", "2"],
            ["error: --control-scale: given without", "hint: load the model with --controlnet PATH"],
        ),
        (
            ["--no-paste-back", "--blend=feather"],
            ["error: --blend: given with --no-paste-back", "hint: leave --paste-back"],
        ),
        (["--ema"], ["no averaged (EMA) weights", "hint: load the plain weights: leave out --ema"]),
        (["--seed", "9" * 30], ["error: --seed: 999"]),
        (["--control-start", "0.7", "--control-end", "0.3"], ["less than --control-end"]),
    ],
)
def test_errors_name_options_of_the_command_line(scene, monkeypatch, options, sentences):
    monkeypatch.chdir(scene)
    done = CliRunner().invoke(cli.main, [*RUN, *options])
    assert done.exit_code == 3, done.output
    for sentence in sentences:
        assert sentence in done.stderr
