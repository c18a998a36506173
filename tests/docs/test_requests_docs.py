"""The code of docs/requests.md runs as it stands, and prints what the text says."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from places import DOCS

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran():
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for text in BLOCK.findall((DOCS / "requests.md").read_text(encoding="utf-8")):
            exec(compile(text, "docs/requests.md", "exec"), names)
    return names, printed.getvalue().splitlines()


def test_it_prints_what_the_text_says(ran):
    _, lines = ran
    assert lines[0] == "SETTING_SAMPLER did you mean 'euler'?"
    assert lines[1] == "euler_ancestral 1.0"
    assert lines[2].startswith("Result(1 image, 128x128, seed ")
    assert lines[2].endswith(", 1 failed) IMAGE_TOO_SMALL")
    assert lines[-3:] == ["40%, 128 pixels", "CANCELLED", "{'source': 'demo', 'dtype': 'bfloat16'}"]


def test_the_batch_holds_what_could_be_made(ran):
    names, _ = ran
    assert [image is None for image in names["batch"]] == [False, True]
    assert names["result"].image.size == (128, 128)
