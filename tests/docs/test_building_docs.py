"""The code of docs/building.md runs as it stands, and shows what the text says."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from places import DOCS

PAGE = DOCS / "building.md"


@pytest.fixture(scope="module")
def ran():
    """The names that all blocks have defined, and what each printed."""
    names, printed = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            lines = []
            names["print"] = lambda *told, lines=lines: lines.append(told)
            exec(compile(block, str(PAGE), "exec"), names)
            printed.append(lines)
    return names, printed


def test_every_block_runs(ran):
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(ran[1]) == 6


def test_the_hook_saw_both_halves(ran):
    ((shape,),) = ran[1][1]
    assert shape[0] == 2


def test_adapters_are_in_every_self_attention(ran):
    names, _ = ran
    count = sum(type(layer).__name__ == "LoRA" for layer in names["pipe"].unet.modules())
    assert count == sum(name.endswith("attn1") for name, _ in names["pipe"].unet.named_modules()) > 0


def test_the_manifest_is_of_the_edited_weights(ran):
    names, printed = ran
    ((fingerprint,),) = printed[3]
    assert len(fingerprint) == 64
    assert fingerprint == names["result"].settings["manifest"]["weights"]["unet"]


def test_gradients_reach_the_start_and_the_callback(ran):
    _, printed = ran
    assert bool(torch.as_tensor(printed[4][0][0]))
    assert [step for step, _ in printed[5]] == [0, 1]
    assert all(norm > 0 for _, norm in printed[5])
