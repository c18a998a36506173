"""Helpers of the tests of the reader: reading a whole file, its refusal, and the two formats of torch.save."""

from __future__ import annotations

import pytest
import torch
from sdinpaint_weights.errors import CheckpointError, shown
from sdinpaint_weights.reader import open_weights


def read_all(path):
    weights = open_weights(path)
    return {key: weights.tensor(key) for key in weights}


def refusal(path, read=read_all):
    """The error, after checking what every error must have: the path, what was found, and how to go on."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    error = caught.value
    assert error.code.startswith("CKPT_")
    assert shown(path) in str(error)
    assert error.found
    assert error.hint
    return error


def save_zip(path, value):
    torch.save(value, path)


def save_legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


pickled = pytest.mark.parametrize("save", [save_zip, save_legacy])
