"""A file that weights are mapped from: a change of it is noticed before the next use, and it need not be mapped."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import UNET_FILE
from refusals import inpaint, load, refused
from safetensors.torch import save_file
from sdinpaint_weights.files import Watched
from sdinpaint_weights.reader import open_weights

import sdinpaint
from sdinpaint.errors import CheckpointError


@pytest.fixture
def folder(pipe, tmp_path):
    sdinpaint.save_diffusers(tmp_path / "model", pipe)
    return tmp_path / "model"


def painted(pipe):
    return np.asarray(inpaint(pipe).image)


def written_in_place(path):
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def copied_over(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("change", [written_in_place, truncated, copied_over])
def test_a_change_of_a_mapped_file_is_refused_before_the_run(folder, change, offload):
    pipe = load(folder, offload=offload)
    inpaint(pipe)
    change(folder / UNET_FILE)
    refused(CheckpointError, "CKPT_CHANGED", lambda: inpaint(pipe), UNET_FILE)
    for other in (copy.copy(pipe), pipe):
        refused(CheckpointError, "CKPT_CHANGED", lambda other=other: other.encode_prompts(["a"]))


def test_another_file_under_the_same_name_is_no_change(folder):
    pipe = load(folder)
    before = painted(pipe)
    copied = folder / "new"
    shutil.copy(folder / UNET_FILE, copied)
    copied_over(copied)
    os.replace(copied, folder / UNET_FILE)
    assert np.array_equal(painted(pipe), before)
    (folder / UNET_FILE).unlink()
    assert np.array_equal(painted(pipe), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_what_has_its_own_memory_is_not_watched(folder, copied):
    pipe = load(folder)
    before = painted(pipe)
    other, cast, read = copied(pipe), load(folder, dtype="bfloat16"), load(folder, mmap=False)
    expected = painted(cast)
    truncated(folder / UNET_FILE)
    assert np.array_equal(painted(other), before)
    assert np.array_equal(painted(read), before)
    assert np.array_equal(painted(cast), expected)


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"dtype": "float16", "offload": True}])
def test_files_that_are_not_mapped_make_the_same_image(folder, options):
    pipe = load(folder, mmap=False, **options)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert np.array_equal(painted(pipe), painted(load(folder, **options)))


def test_watching_costs_microseconds(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    held = weights["w"]
    watched = Watched(weights.files)
    del weights
    begin = time.perf_counter()
    for _ in range(1000):
        watched.require_unchanged()
    assert time.perf_counter() - begin < 0.05
    written_at = os.stat(tmp_path / "a").st_mtime_ns
    os.utime(tmp_path / "a", ns=(written_at, written_at + 1))
    with pytest.raises(CheckpointError, match="changed"):
        watched.require_unchanged()
    del held
    watched.require_unchanged()  # nothing is mapped any more
