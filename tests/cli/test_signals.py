"""Signals end the command line quietly, with the exit code of the signal, and leave no unfinished file."""

from __future__ import annotations

import signal
import time

import pytest
from click.testing import CliRunner
from killing import INPUTS, RUN, await_handlers, interrupt, make_scene, start

from sdinpaint import cli

LONG = [*RUN, "--steps=400"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    make_scene(folder)
    return folder


def ended(process):
    """Wait for a process; give its exit code and what it said."""
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_random_moments(tmp_path, number):
    make_scene(tmp_path)
    command = ["mask", "box", "scene.png", "--at=1,1,9,9", "--grow=3", "--out=new/out.png", "--quiet"]
    found = interrupt(number, tmp_path, 8, arguments=command, wait=await_handlers)
    assert set(found) <= {f"exit code {128 + number}", "exit code 0", "stray"}
    assert found[f"exit code {128 + number}"] >= 3
    assert found["stray"] == 0


@pytest.mark.parametrize("after", [0, 0.3, 1.2])
def test_ctrl_c_while_libraries_are_imported(scene, after):
    process = start(scene, LONG)
    await_handlers(process)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130
    assert said.endswith("interrupted: no unfinished file is left\n")


@pytest.mark.parametrize(
    ("number", "code", "sigint", "word"),
    [
        (signal.SIGINT, 130, signal.SIG_DFL, "interrupted"),
        (signal.SIGINT, 130, signal.SIG_IGN, "interrupted"),
        (signal.SIGTERM, 143, signal.SIG_DFL, "terminated"),
    ],
    ids=["SIGINT in the foreground", "SIGINT in the background", "SIGTERM"],
)
def test_a_signal_during_a_run(scene, number, code, sigint, word):
    process = start(scene, LONG, sigint)
    assert "mask" in process.stderr.readline()  # the request was read: what follows is loading and the run
    time.sleep(0.5)
    process.send_signal(number)
    ending, said = ended(process)
    assert ending == code
    assert said.endswith(f"{word}: no unfinished file is left\n")
    assert {path.name for path in scene.iterdir()} == INPUTS


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
