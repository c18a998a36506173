"""A good model, copies of it to spoil, and a check after every file that no harm was done."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from builders import random_pipeline, small
from refusals import inpaint, load

import sdinpaint


@pytest.fixture(scope="module")
def source(tiny, vocabulary, tmp_path_factory):
    """A good model as a diffusers folder; not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    sdinpaint.save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(scope="module")
def pipe(source):
    return load(source)


@pytest.fixture(scope="module")
def usual(pipe):
    return np.asarray(inpaint(pipe).image)


@pytest.fixture(scope="module", autouse=True)
def no_harm_done(pipe, usual):
    """After all tests of a file, the usual image comes out bit for bit."""
    yield
    assert np.array_equal(inpaint(pipe).image, usual)


@pytest.fixture
def folder(source, tmp_path):
    """A copy of the good model to spoil."""
    return shutil.copytree(source, tmp_path / "model")
