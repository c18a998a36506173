"""The files that a checkpoint is read from are never written over, under whatever name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from builders import random_pipeline, small

import sdinpaint
from sdinpaint.checkpoints import converting
from sdinpaint.errors import CheckpointError, SettingError


@pytest.fixture(scope="module")
def models(tiny, vocabulary, tmp_path_factory):
    """A folder with "model", and a VAE of it alone, "vae"."""
    home = tmp_path_factory.mktemp("writing_over")
    sdinpaint.save_diffusers(home / "model", random_pipeline(small(tiny), vocabulary))
    sdinpaint.convert(home / "model" / "vae", home / "vae", progress=False)
    return home


def snapshot(home):
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", ["model", "model/unet", "model/new", "vae", "vae/new", "link", "hard.safetensors"])
@pytest.mark.parametrize("option", ["vae", "base", "config"])
@pytest.mark.parametrize("write", ["convert", "to_inpainting"])
def test_convert_and_merge_refuse_what_they_read(models, tmp_path, forbid, target, option, write):
    forbid(converting, "open_checkpoint")
    source = models / "model"
    (tmp_path / "link").symlink_to(models / "vae")
    os.link(models / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "hard.safetensors")
    place = tmp_path / target if target in ("link", "hard.safetensors") else models / target
    before = snapshot(models)
    given = {option: models / "vae", "overwrite": True, "progress": False}
    if (write, option) == ("to_inpainting", "base"):
        given["inpaint"] = models / "vae"
    with pytest.raises(SettingError) as caught:
        getattr(sdinpaint, write)(source, place, **given)
    assert caught.value.code == "SETTING_TARGET"
    assert "which is read" in caught.value.found
    assert snapshot(models) == before


def test_the_included_checkpoint_is_not_converted_into_itself(monkeypatch):
    from sdinpaint.checkpoints.opening import DEMO

    with pytest.raises(SettingError) as caught:
        sdinpaint.convert("demo", DEMO / "unet" / "new", progress=False)
    assert caught.value.code == "SETTING_TARGET"
    assert not (DEMO / "unet" / "new").exists()


@pytest.mark.parametrize("target", ["model", "model/unet", ".", "vae"])
def test_a_pipeline_is_not_saved_into_what_it_is_read_from(models, target):
    pipe = sdinpaint.load(models / "model", vae=models / "vae", device="cpu", progress=False)
    before = snapshot(models)
    with pytest.raises(SettingError) as caught:
        sdinpaint.save_diffusers(models / target, pipe)
    assert caught.value.code == "SETTING_TARGET"
    assert snapshot(models) == before


def test_a_saved_pipeline_replaces_another_and_keeps_what_else_is_there(models, tmp_path):
    pipe = sdinpaint.load(models / "model", device="cpu", progress=False)
    target = tmp_path / "new" / "model"
    sdinpaint.save_diffusers(target, pipe)
    (target / "README.md").write_text("mine")
    (target / "unet" / "note").write_text("mine, too")
    sdinpaint.save_diffusers(target, pipe, torch.float16)
    assert {path.relative_to(target) for path in snapshot(target)} == {
        *(path.relative_to(models / "model") for path in snapshot(models / "model")),
        Path("README.md"),
        Path("unet/note"),
    }
    again = sdinpaint.load(target, device="cpu", dtype="float16", progress=False)
    assert next(again.unet.parameters()).dtype == torch.float16
    assert os.listdir(target.parent) == ["model"]


def test_a_pipeline_that_cannot_be_saved_leaves_the_previous_one(models, tmp_path, failing):
    pipe = sdinpaint.load(models / "model", device="cpu", progress=False)
    sdinpaint.save_diffusers(tmp_path / "model", pipe)
    before = snapshot(tmp_path)
    failing(type(pipe.tokenizer), "save", OSError(28, os.strerror(28)))
    with pytest.raises(CheckpointError, match="No space left") as caught:
        sdinpaint.save_diffusers(tmp_path / "model", pipe, torch.float16)
    assert caught.value.code == "CKPT_NOT_WRITTEN"
    assert snapshot(tmp_path) == before
