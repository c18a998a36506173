"""Text from outside is printed without characters that control a terminal, and within bounds."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sdinpaint
from sdinpaint.cli import main
from sdinpaint.errors import SdInpaintError, SdInpaintWarning, SettingError, shown, shown_lines, warn
from sdinpaint.images.input_image import read_image

EVIL = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;title\x07",
    "controls": "bell\x07 backspace\x08 return\r delete\x7f",
    "eight bits": "\x9b31m",
    "direction": "right\u202eto left",
    "isolate": "isolate\u2066 mark\u200f arabic\u061c",
    "separator": "line\u2028separator",
    "surrogate": "lone\udcff surrogate",
    "tag": "tag\U000e0041",
}
UNSEEN = {chr(code) for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000), 0xE0041)} | set(
    "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
)


def is_safe(text, lines=1):
    return not UNSEEN.intersection(text.replace("\n", "")) and len(text.splitlines()) <= lines and len(text) < 6000


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_parts_of_an_error(evil):
    error = SettingError("SETTING_X", evil, evil, expected=evil, hint=evil)
    assert is_safe(str(error), 3)
    assert is_safe(error.args[0])
    assert all(is_safe(part) for part in error.to_json().values())
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_plain_text_of_any_language_stays():
    for text in ("Größe: 10 m, 5", "模型.safetensors", "👩‍🚀 ok", "עברית", "a\nb"):
        assert shown_lines(text) == text
    assert shown("a\nb") == "a b"


def test_a_long_text_keeps_both_ends():
    assert shown("a" * 500 + "z") == "a" * 98 + "..." + "a" * 97 + "z"
    error = SdInpaintError("CODE", "p" * 5000, "f" * 10**6, expected="e" * 10**6, hint="h" * 10**6)
    assert len(error.subject) <= 200
    assert len(str(error)) < 4000


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_warnings(evil):
    with pytest.warns(SdInpaintWarning) as caught:
        warn(f"image {evil} is odd")
    assert is_safe(str(caught[0].message))


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_names_of_files(tmp_path, evil):
    (tmp_path / evil).write_bytes(b"no image")
    with pytest.raises(SdInpaintError) as caught:
        read_image(tmp_path / evil)
    assert is_safe(str(caught.value), 3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / evil).touch()
    for path in (tmp_path / evil, tmp_path / "folder", tmp_path / "folder/nothing.safetensors"):
        done = CliRunner().invoke(main, ["inspect", str(path)])
        assert (done.exit_code, is_safe(done.output, 12)) == (3, True)


def test_metadata_and_settings(tmp_path):
    evil = "".join(EVIL.values()).replace("\udcff", "")
    path = tmp_path / "m.safetensors"
    save_file({"x.weight": torch.ones(1)}, path, {"modelspec.prediction_type": evil, evil: evil})
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert (done.exit_code, is_safe(done.output, 30)) == (3, True)
    info = PngInfo()
    info.add_itxt("sdinpaint", json.dumps({"prompt": evil, "manifest": {"model": evil, "kind": evil}}))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "out.png", pnginfo=info)
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "out.png")])
    assert done.exit_code == 0
    assert is_safe(done.output, 30)


def test_python_is_told_the_same(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SdInpaintError) as caught:
            sdinpaint.load(str(tmp_path / "\x1b[2J.safetensors"))
    assert "\\x1b[2J.safetensors" in str(caught.value)
