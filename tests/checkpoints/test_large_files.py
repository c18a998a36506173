"""Files of full size, which take no room on the disk: what they are is told at once, from their headers alone."""

from __future__ import annotations

import json
import math
import time

import pytest
from released import read
from sdinpaint_weights.files import SourceFile

from sdinpaint.checkpoints.building import build
from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.checkpoints.inspecting import inspect
from sdinpaint.checkpoints.known_shapes import has_known_shapes
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.families import SDXL_INPAINT
from sdinpaint.load_options import LoadOptions

BYTES = {"F32": 4, "F16": 2}
FILES = {
    "sd15_inpainting.ldm": ("F32", 4.27, "sd15-inpainting", 1_066_249_707),
    "sd15_inpainting.ldm_with_ema": ("F32", 7.70, "sd15-inpainting", 1_066_249_707),
    "sd2_inpainting.ldm": ("F32", 5.21, "sd2-inpainting", 1_289_966_827),
    "sdxl_base.sgm": ("F16", 6.94, "sdxl", 3_468_837_867),
    "sdxl_inpainting.sgm": ("F32", 13.88, "sdxl-inpainting", 3_468_852_267),
}
"""Inventory -> dtype of its floats, GB, family, and parameters that are loaded."""
XL_FOLDER = {
    "unet/diffusion_pytorch_model": "unet",
    "vae/diffusion_pytorch_model": "vae",
    "text_encoder/model": "text_encoder",
    "text_encoder_2/model": "text_encoder_2",
}


def sparse(path, inventory, dtype):
    """A safetensors file with a released file's names and shapes, whose data is one hole."""
    header, end = {}, 0
    for name, (shape, kind) in read(inventory).items():
        code, size = ("I64", 8) if kind == "int64" else ("I32", 4) if kind == "int32" else (dtype, BYTES[dtype])
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path


@pytest.fixture
def reads(forbid, spy):
    """Let no tensor be read, and list every read of a header: its file, its offset and its bytes."""
    forbid(SourceFile, "map", "loaded", "crc32", "sha256")
    return spy(SourceFile, "read")


def inspected(source):
    """The report, and the CPU seconds that it took: those of a waiting machine do not count."""
    started = time.process_time()
    report = inspect(source)
    return report, time.process_time() - started


@pytest.mark.parametrize("inventory", FILES)
def test_a_single_file_is_told_from_its_header(tmp_path, reads, inventory):
    dtype, size, family, parameters = FILES[inventory]
    path = sparse(tmp_path / "model.safetensors", inventory, dtype)
    on_disk = path.stat()
    assert on_disk.st_size / 1e9 == pytest.approx(size, abs=0.005)
    assert on_disk.st_blocks * 512 < 2e6
    inspect(path)  # what is imported on the way does not count
    reads.clear()
    report, seconds = inspected(path)
    assert report.problem == ""
    assert report.family == family
    assert sum(report.parameters.values()) == parameters
    assert sum(count for _, _, count in reads) < 2e6
    assert seconds < 2
    assert path.stat().st_blocks == on_disk.st_blocks
    assert has_known_shapes(open_checkpoint(LoadOptions(source=path)))
    for model in build(open_checkpoint(LoadOptions(source=path))).values():
        assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_folder_is_told_from_its_headers(tmp_path, reads):
    for file, component in XL_FOLDER.items():
        sparse(tmp_path / f"{file}.safetensors", f"sdxl_inpainting.diffusers.{component}", "F32")
    for name, table in diffusers_configs(SDXL_INPAINT).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(table))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size / 1e9 == pytest.approx(13.88, abs=0.005)
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors").stat().st_size > 10e9
    inspect(tmp_path)
    reads.clear()
    report, seconds = inspected(tmp_path)
    assert report.problem == ""
    assert report.family == "sdxl-inpainting"
    assert has_known_shapes(open_checkpoint(LoadOptions(source=tmp_path)))
    assert sum(count for _, _, count in reads) < 2e6
    assert seconds < 2


def test_reading_a_tensor_is_seen(tmp_path, reads):
    """Broken on purpose: one tensor is read."""
    path = sparse(tmp_path / "model.safetensors", "sd15_inpainting.ldm", "F16")
    checkpoint = open_checkpoint(LoadOptions(source=path))
    with pytest.raises(pytest.fail.Exception, match="was called"):
        checkpoint.states["vae"].weights.tensor("first_stage_model.quant_conv.bias")
