"""Weights files: what is readable reads bit by bit, and whatever else is refused by a CheckpointError that explains."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from builders import lightning_callback
from reading import pickled, read_all, refusal, save_legacy, save_zip
from safetensors.torch import save_file
from sdinpaint_weights.folder import open_folder_component
from sdinpaint_weights.reader import open_weights
from torch import nn

CLASS = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def example():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(7, 5, generator=generator)
    return OrderedDict(
        single=draw,
        half=draw.half(),
        brain=draw.bfloat16(),
        double=draw.double(),
        eight=draw.to(torch.float8_e4m3fn),
        eight_wide=draw.to(torch.float8_e5m2),
        ids=torch.arange(6).reshape(1, 6),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 3),
        odd=torch.arange(3, dtype=torch.uint8),
    )


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.to(torch.float64), b.to(torch.float64))


# What is readable


def test_safetensors_reads_every_dtype_bit_by_bit(tmp_path):
    tensors = example()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"who": "test"})
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.kind == "safetensors"
    assert weights.metadata == {"who": "test"}
    assert set(weights) == set(tensors)
    for key, tensor in tensors.items():
        assert weights.shape(key) == tuple(tensor.shape)
        assert weights.dtype(key) == tensor.dtype
        assert same(weights[key], tensor)
        assert same(weights.tensor(key, torch.float64), tensor.to(torch.float64))


@pickled
def test_pickles_read_every_dtype_and_view(tmp_path, save):
    tensors = example()
    base = torch.arange(12.0)
    tensors["part"] = base[3:7]
    tensors["stepped"] = base[::3]
    tensors["transposed"] = base.reshape(3, 4).t()
    tensors["parameter"] = torch.nn.Parameter(base)
    tensors["annotated"] = torch.nn.Parameter(base.clone())
    tensors["annotated"].note = "makes torch pickle it by _rebuild_from_type_v2 or _rebuild_parameter_with_state"
    save(tmp_path / "a.ckpt", tensors)
    weights = open_weights(tmp_path / "a.ckpt")
    assert set(weights) == set(tensors)
    assert weights.kind == {"save_zip": "zip pickle", "save_legacy": "legacy pickle"}[save.__name__]
    assert weights.ignored == ()
    for key, tensor in tensors.items():
        assert same(weights[key], tensor.detach()), key
        assert same(weights.tensor(key, torch.float32), tensor.detach().float()), key


@pickled
def test_lightning_checkpoint_reads_without_lightning(tmp_path, save):
    tensors = {"w": torch.randn(3, 2)}
    with lightning_callback() as callback:
        checkpoint = {
            "epoch": np.int64(3),
            "callbacks": {callback: {"best_model_score": np.float32(0.5), "scores": np.arange(3)}},
            "state_dict": {"state_dict": OrderedDict(tensors)},
            "optimizer_states": [{"state": {0: torch.zeros(4)}}],
        }
        save(tmp_path / "a.ckpt", checkpoint)
    weights = open_weights(tmp_path / "a.ckpt")
    assert list(weights) == ["w"]
    assert same(weights["w"], tensors["w"])
    assert weights.ignored == (CLASS,)


class Marker:
    """Pickled as a persistent id."""

    def __init__(self, identity):
        self.identity = identity


class Rebuilt:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.arguments


class MarkerPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Marker) else None


def test_a_view_as_pytorch_0_wrote_it(tmp_path):
    # Before PyTorch 0.4 a tensor that saw a part of a storage said so in the storage's id.
    identity = ("storage", torch.FloatStorage, "11", "cpu", 6, ("22", 2, 3))
    out = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, out, protocol=2)
    MarkerPickler(out, protocol=2).dump({"w": Rebuilt(Marker(identity), 1, (2,), (1,))})
    pickle.dump(["11"], out, protocol=2)
    out.write(struct.pack("<q6f", 6, 0, 10, 20, 30, 40, 50))
    (tmp_path / "a.pth").write_bytes(out.getvalue())
    assert read_all(tmp_path / "a.pth")["w"].tolist() == [30, 40]


def test_a_textual_inversion_embedding_shows_its_names(tmp_path):
    save_zip(tmp_path / "a.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 4)}, "step": 3})
    assert list(open_weights(tmp_path / "a.pt")) == ["string_to_param.*"]


@pickled
def test_tables_of_parameters_and_tensors_alone(tmp_path, save):
    """Also as PyTorch wrote them before 1.12, and beside a tensor of numbers."""
    rows = torch.randn(2, 4)
    table = nn.ParameterDict({"*": nn.Parameter(rows)})
    old = nn.ParameterDict({"*": nn.Parameter(rows)})
    old.__dict__["_parameters"] = OrderedDict(old._parameters)
    del old._keys
    for value in (table, old):
        save(tmp_path / "a.pt", {"string_to_token": torch.tensor(265), "string_to_param": value})
        assert same(read_all(tmp_path / "a.pt")["string_to_param.*"], rows)
        save(tmp_path / "b.pt", value)
        assert same(read_all(tmp_path / "b.pt")["*"], rows)
    for value in (rows, nn.Parameter(rows)):
        save(tmp_path / "c.pt", value)
        assert list(open_weights(tmp_path / "c.pt")) == ["tensor"]
        assert same(read_all(tmp_path / "c.pt")["tensor"], rows)


def test_content_decides_and_not_the_name(tmp_path):
    tensors = {"w": torch.randn(2, 3)}
    save_file(tensors, tmp_path / "a.ckpt")
    save_zip(tmp_path / "b.safetensors", tensors)
    save_legacy(tmp_path / "c.safetensors", tensors)
    for name in ("a.ckpt", "b.safetensors", "c.safetensors"):
        assert same(open_weights(tmp_path / name)["w"], tensors["w"])


@pytest.mark.parametrize("length", [0x4B50, 0x80, 0x8B1F, 0x7B, 0x3C])
def test_header_lengths_that_look_like_the_beginning_of_another_kind(tmp_path, length):
    # "PK" of a zip file, a pickle's first byte, gzip's magic number, "{" and "<".
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + text + bytes(8))
    assert read_all(tmp_path / "a")["w"].tolist() == [0, 0]


@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda path, value: save_file(value, path)])
def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path, save):
    save(tmp_path / "a", {"w": torch.zeros(16)})
    before = (tmp_path / "a").read_bytes()
    open_weights(tmp_path / "a")["w"].fill_(7)
    assert (tmp_path / "a").read_bytes() == before


def test_a_dtype_as_stored_copies_nothing(tmp_path):
    save_file({"w": torch.zeros(1024)}, tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    assert weights["w"].data_ptr() == weights.tensor("w", torch.float32).data_ptr()


def test_tensors_beyond_four_gigabytes(tmp_path):
    huge, path = 5 * 10**9, tmp_path / "huge.safetensors"
    header = {
        "huge": {"dtype": "F16", "shape": [huge // 2], "data_offsets": [0, huge]},
        "tail": {"dtype": "F32", "shape": [2], "data_offsets": [huge, huge + 8]},
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(huge, os.SEEK_CUR)
        file.write(struct.pack("<2f", 1.5, -2.0))
    weights = open_weights(path)
    assert weights["tail"].tolist() == [1.5, -2.0]
    assert weights.tensor("tail", torch.float64).tolist() == [1.5, -2.0]
    assert weights["huge"][-3:].tolist() == [0, 0, 0]


# Files that are something else, or damaged


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "CKPT_EMPTY", "empty"),
        (b"abc", "CKPT_UNKNOWN_FORMAT", "3 bytes"),
        (b"\x01\x02\x03", "CKPT_TRUNCATED", "3 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n",
            "CKPT_LFS_POINTER",
            "4.27 GB",
        ),
        (b"<!DOCTYPE html><title>401 Unauthorized</title>", "CKPT_HTML", "401 Unauthorized"),
        (b'\n  {"error": "Invalid username or password."}', "CKPT_HTML", "Invalid username"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "CKPT_GGUF", "GGUF"),
        (b"\x1f\x8b\x08\x00" + bytes(64), "CKPT_UNKNOWN_FORMAT", "gzip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "CKPT_UNKNOWN_FORMAT", "image"),
        (bytes(range(200, 250)), "CKPT_UNKNOWN_FORMAT", "c8 c9"),
        (b"just some words\n", "CKPT_UNKNOWN_FORMAT", "just some words"),
        (pickle.dumps({"w": [1.0]}), "CKPT_NOT_TORCH", "torch.save"),
        (b"PK\x03\x04" + bytes(64), "CKPT_TRUNCATED", "index"),
    ],
)
def test_other_files_are_named(tmp_path, content, code, says):
    (tmp_path / "a.safetensors").write_bytes(content)
    error = refusal(tmp_path / "a.safetensors")
    assert error.code == code
    assert says in str(error)


def test_paths_that_are_no_file_are_named(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    expected = {
        tmp_path: "CKPT_IS_DIRECTORY",
        tmp_path / "missing.safetensors": "CKPT_NOT_FOUND",
        tmp_path / "no folder" / "a": "CKPT_NOT_FOUND",
        tmp_path / "dangling": "CKPT_NOT_REGULAR",
        tmp_path / "loop": "CKPT_NOT_REGULAR",
        tmp_path / "pipe": "CKPT_NOT_REGULAR",
        os.devnull: "CKPT_NOT_REGULAR",
        f"{tmp_path}/a\0b": "CKPT_NOT_FOUND",
        f"{tmp_path}/{'x' * 300}": "CKPT_NOT_FOUND",
    }
    assert {path: refusal(path).code for path in expected} == expected


def test_a_file_that_changes_under_the_reader_is_refused(tmp_path):
    save_file({"w": torch.zeros(64)}, tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.truncate(100)
    assert refusal(tmp_path / "a", lambda _: weights["w"]).code == "CKPT_CHANGED"


# Folders


def test_folder_takes_safetensors_before_pickles_and_plain_before_variants(tmp_path):
    for name, value in {
        "pytorch_model.bin": 1.0,
        "diffusion_pytorch_model.bin": 2.0,
        "diffusion_pytorch_model.fp16.safetensors": 3.0,
        "diffusion_pytorch_model.safetensors": 4.0,
    }.items():
        save = save_zip if name.endswith("bin") else lambda path, value: save_file(value, path)
        save(tmp_path / name, {"w": torch.tensor([value])})
        weights = open_folder_component(tmp_path)
        assert weights["w"].item() == (2.0 if value == 3.0 else value)
        assert weights.notes == ()
    assert open_folder_component(tmp_path, "fp16")["w"].item() == 3.0
    other = open_folder_component(tmp_path, "bf16")
    assert (other["w"].item(), other.variant) == (4.0, None)
    assert "no weights of the variant 'bf16', so the weights without one are used" in other.notes[0]


def test_folder_falls_back_to_the_only_variant_and_says_so(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    save_zip(tmp_path / "pytorch_model.fp16.bin", {"w": torch.ones(1)})
    weights = open_folder_component(tmp_path)
    assert weights.path.name == "model.fp16.safetensors"
    assert "no weights without a variant, so the variant 'fp16' is used" in weights.notes[0]
    save_file({"w": torch.ones(1)}, tmp_path / "model.non_ema.safetensors")
    error = refusal(tmp_path, open_folder_component)
    assert error.code == "CKPT_VARIANT"
    assert "fp16, non_ema" in error.found


def write_index(folder, table, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_merged(tmp_path, variant):
    middle = f".{variant}" if variant else ""
    shards = [f"model{middle}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / shards[0])
    save_file({"c": torch.ones(3)}, tmp_path / shards[1])
    table = {"a": shards[0], "b": shards[0], "c": shards[1]}
    write_index(tmp_path, table, f"model.safetensors.index{middle}.json")
    for weights in (open_folder_component(tmp_path), open_folder_component(tmp_path, variant)):
        assert weights.shapes() == {"a": (1,), "b": (2,), "c": (3,)}
        assert weights["c"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ({"a": "../outside.safetensors"}, "CKPT_BAD_INDEX"),
        ({"a": "/etc/passwd"}, "CKPT_BAD_INDEX"),
        ({"a": ".."}, "CKPT_BAD_INDEX"),
        ({"a": 3}, "CKPT_BAD_INDEX"),
        ({}, "CKPT_BAD_INDEX"),
        (["a"], "CKPT_BAD_INDEX"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "CKPT_BAD_INDEX"),
        ({"a": "two.safetensors"}, "CKPT_BAD_INDEX"),
        ({"a": "missing.safetensors"}, "CKPT_NOT_FOUND"),
    ],
)
def test_bad_indices(tmp_path, table, code):
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    save_file({"a": torch.ones(1), "z": torch.ones(1)}, folder / "two.safetensors")
    write_index(folder, table)
    assert refusal(folder, open_folder_component).code == code


def test_folders_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    error = refusal(tmp_path, open_folder_component)
    assert error.code == "CKPT_NOT_FOUND"
    assert "config.json" in error.found
    assert refusal(tmp_path / "no", open_folder_component).code == "CKPT_NOT_FOUND"
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    assert refusal(tmp_path, open_folder_component).code == "CKPT_BAD_INDEX"


# Memory

MEASURE = """
import re, sys, torch
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import load_tensors, native_state
from sdinpaint_weights.reader import open_weights

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.zeros(1).half().float()
base = memory("VmRSS")
for path in sys.argv[2:]:
    weights = open_weights(path)
    state = load_tensors(native_state(weights, "unet", identify(weights.shapes())), getattr(torch, sys.argv[1]))
    del weights, state
print(memory("VmHWM") - base)
"""


def test_peak_memory(tmp_path):
    tensors = {f"input_blocks.{i}.0.weight": torch.full((2_500_000,), i + 0.5) for i in range(12)}
    save_zip(tmp_path / "zip", tensors)
    save_file(tensors, tmp_path / "safetensors")
    total, largest, slack = 120_000_000, 10_000_000, 16_000_000
    for dtype, limit in {"float32": total + slack, "float16": total / 2 + largest + slack}.items():
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, dtype, tmp_path / "zip", tmp_path / "safetensors"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert int(result.stdout) <= limit, dtype


def test_an_index_of_many_megabytes_is_named_with_its_bound(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(" " * 17_000_000)
    error = refusal(tmp_path / "model.safetensors.index.json", lambda path: open_folder_component(path.parent))
    assert (error.code, "16.00 MB" in error.expected) == ("CKPT_BAD_INDEX", True)
