"""`inspect --verify`: every value is read, and what cannot be right or is unusual is told, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from builders import TEXT_FILE, UNET_FILE, VAE_FILE, rewrite, single_file
from click.testing import CliRunner
from refusals import INF, NAN
from safetensors.torch import save_file

import sdinpaint
from sdinpaint.cli import main

KEY = "conv_in.weight"


@pytest.fixture
def folder(pipe, tmp_path):
    sdinpaint.save_diffusers(tmp_path / "model", pipe)
    return tmp_path / "model"


def verify(path):
    return sdinpaint.inspect(path, verify=True, progress=False)


def changed(value, at=slice(3, 4)):
    def change(tensors):
        tensors[KEY].view(-1)[at] = value
        return tensors

    return change


def test_a_good_model_has_no_findings(folder):
    report = verify(folder)
    assert report.findings == ()
    assert report.usable
    assert report.verified == sum(sum(counts.values()) for counts in report.dtypes.values())
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        assert report.sha256[file] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
    assert "cannot be right" in str(report)
    unread = sdinpaint.inspect(folder)
    assert (unread.verified, unread.sha256) == (0, {})
    assert "verified" not in str(unread)


WRONG = {
    "NaN": (changed(NAN, slice(3, 5)), "2 of 972 values are NaN or infinite"),
    "infinity": (changed(-INF), "1 of 972 values are NaN or infinite"),
    "blank": (changed(0, slice(None)), "all 972 values are zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_right(folder, name):
    change, says = WRONG[name]
    rewrite(folder / UNET_FILE, change)
    report = verify(folder)
    assert [(one.tensor, one.what, one.wrong) for one in report.findings] == [(KEY, says, True)]
    assert not report.usable
    done = CliRunner().invoke(main, ["inspect", str(folder), "--verify"])
    assert done.exit_code == 3
    assert f"wrong: {KEY} in {UNET_FILE.rpartition('/')[2]}: {says}" in done.stdout
    table = json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--verify", "--json"]).stdout)
    assert table["findings"][0]["what"] == says


def test_what_is_unusual_is_told(folder):
    def change(tensors):
        names = sorted(tensors, key=lambda name: tensors[name].numel())
        tensors[names[-1]].view(-1)[100:3300] = 0
        tensors[names[-2]].view(-1)[7] = 1e6
        return tensors

    rewrite(folder / UNET_FILE, change)
    report = verify(folder)
    assert report.usable
    assert sorted(one.what.split()[-1] for one in report.findings) == ["one", "zero"]
    assert all(not one.wrong for one in report.findings)


def test_damaged_members_are_named(pipe, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(single_file(pipe), path)
    content = bytearray(path.read_bytes())
    weight = single_file(pipe)["first_stage_model.decoder.conv_out.weight"].numpy().tobytes()
    content[content.index(weight) + 9] ^= 1
    path.write_bytes(content)
    report = verify(path)
    assert [(one.tensor, one.wrong) for one in report.findings] == [("first_stage_model.decoder.conv_out.weight", True)]
    assert "CRC" in report.findings[0].what


def test_tensors_of_no_model_cannot_be_wrong(pipe, tmp_path):
    save_file(single_file(pipe) | {"junk": torch.full((3,), NAN)}, tmp_path / "a.safetensors")
    report = verify(tmp_path / "a.safetensors")
    assert [(one.tensor, one.wrong) for one in report.findings] == [("junk", False)]


def test_a_part_of_a_model_is_verified_too(folder, tmp_path):
    last = "decoder.conv_out.weight"
    rewrite(folder / VAE_FILE, lambda tensors: tensors | {last: tensors[last] / 0})
    shutil.move(folder / "vae", tmp_path / "vae")
    report = verify(tmp_path / "vae")
    assert [(one.tensor, one.wrong) for one in report.findings] == [(last, True)]
    assert not report.usable
