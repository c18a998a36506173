"""Damaged and hostile weights files: each is refused by an error that explains, quickly, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from reading import pickled, refusal, save_legacy, save_zip
from safetensors.torch import save_file
from sdinpaint_weights import pickle_file, pickle_walker
from sdinpaint_weights.reader import open_weights

# Pickles that want to run something


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def evil_files(folder):
    evil = Evil(folder / "sentinel")
    for name, value in {"alone": evil, "beside": {"w": torch.ones(1), "x": evil}}.items():
        for save in (save_zip, save_legacy):
            path = folder / f"{name}-{save.__name__}.ckpt"
            save(path, value)
            yield path
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = folder / f"plain-{protocol}.safetensors"
        path.write_bytes(pickle.dumps({"w": evil}, protocol))
        yield path


def test_evil_pickles_are_refused_and_do_not_run(tmp_path):
    for path in evil_files(tmp_path):
        error = refusal(path)
        assert error.code == "CKPT_UNSAFE_PICKLE", path.name
        assert f"{os.name}.system" in error.found
    assert not (tmp_path / "sentinel").exists()


def test_the_evil_call_would_leave_its_mark(tmp_path):
    function, arguments = Evil(tmp_path / "sentinel").__reduce__()
    function(*arguments)
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("builtins eval", "builtins exec", "builtins getattr", "builtins __import__", "builtins print"),
        *("os popen", "posix system", "nt system", "subprocess Popen", "sys exit", "runpy run_path", "shutil rmtree"),
        *("importlib import_module", "socket socket", "ctypes CDLL", "pip main", "asyncio.subprocess foo"),
        *(
            "torch load",
            "torch.hub load",
            "torch.storage _load_from_bytes",
            "webbrowser open",
            "code InteractiveConsole",
        ),
        *("multiprocessing.util spawnv_passfds", "collections abc.sys.modules", "benign helper.eval"),
    ],
)
def test_dangerous_names_are_refused(tmp_path, name):
    module, _, attribute = name.partition(" ")
    by_name = f"c{module}\n{attribute}\n.".encode()
    by_stack = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, attribute)) + b"\x93."
    for content in (by_name, by_stack, b"\x80\x02" + by_name):
        (tmp_path / "a.ckpt").write_bytes(content + bytes(32))
        error = refusal(tmp_path / "a.ckpt")
        assert error.code == "CKPT_UNSAFE_PICKLE"
        assert f"{module}.{attribute}" in error.found


@pytest.mark.parametrize(
    "name",
    ["argparse Namespace", "omegaconf.dictconfig DictConfig", "lightning.fabric.plugins.io.x Y", "pathlib PosixPath"],
)
def test_harmless_classes_are_ignored_and_listed(tmp_path, name):
    save_zip(tmp_path / "a.ckpt", {"w": torch.ones(2)})
    # An object of the class, with attributes, as another entry of the dictionary.
    entry = b"X\x04\x00\x00\x00argsc" + name.replace(" ", "\n").encode() + b"\n)\x81}X\x01\x00\x00\x00aK\x01sbs."
    content = rewritten(tmp_path / "a.ckpt", lambda data: data[:-1] + entry)
    (tmp_path / "b.ckpt").write_bytes(content)
    weights = open_weights(tmp_path / "b.ckpt")
    assert weights["w"].tolist() == [1, 1]
    assert weights.ignored == (name.replace(" ", "."),)


# Damaged files


@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda path, value: save_file(value, path)])
def test_every_truncation_is_refused(tmp_path, save):
    save(tmp_path / "whole", {"w": torch.randn(7, 5), "half": torch.ones(9).half(), "ids": torch.arange(6)})
    whole = (tmp_path / "whole").read_bytes()
    codes = set()
    for size in [*range(8, len(whole), max(1, len(whole) // 150)), len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:size])
        codes.add(refusal(tmp_path / "cut").code)
    assert codes == {"CKPT_TRUNCATED"}


def test_size_arithmetic_of_a_cut_safetensors_file(tmp_path):
    save_file({"w": torch.zeros(1_000_000)}, tmp_path / "a")
    os.truncate(tmp_path / "a", 2_000_000)
    error = refusal(tmp_path / "a")
    assert error.code == "CKPT_TRUNCATED"
    assert "the header promises 4.00 MB" in error.found
    assert "the file has 2.00 MB (2000000 bytes): incomplete" in error.found


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


EMPTY = one(shape=(0,), offsets=(0, 0))["w"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (safetensors_bytes(one(), bytes(8), length=1 << 63), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(), bytes(8), length=(1 << 64) - 1), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(), bytes(8), length=200_000_000), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(), bytes(8), length=0), "CKPT_BAD_HEADER"),
        (safetensors_bytes(b"{not json}", bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(b"\xff\xfe{}", bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(b'{"a":' + b"[" * 100_000, bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(b"[" * 100_000, bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(b'{"w":' + b"9" * 5000 + b"}", bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes({**one(), **{"v": one()["w"]}}, bytes(8)), "CKPT_BAD_HEADER"),  # overlap
        (safetensors_bytes(one(offsets=(4, 12)), bytes(12)), "CKPT_BAD_HEADER"),  # hole
        (safetensors_bytes(one(), bytes(12)), "CKPT_BAD_HEADER"),  # trailing bytes
        (safetensors_bytes(one(shape=(3,)), bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(shape=(1 << 61, 1 << 61)), bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(shape=(-2,)), bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(shape=(2.0,)), bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(offsets=(8, 0)), bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(dtype="F7"), bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes({"w": 3}), "CKPT_BAD_HEADER"),
        (safetensors_bytes({"a\x1b[2J": one()["w"]}, bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes({"n" * 2000: one()["w"]}, bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes({"__metadata__": {"a": 1}, **one()}, bytes(8)), "CKPT_BAD_HEADER"),
        (safetensors_bytes(one(offsets=(0, 8)), bytes(4)), "CKPT_TRUNCATED"),
        (
            safetensors_bytes(json.dumps(one()).encode()[:-1] + b"," + json.dumps(one()).encode()[1:], bytes(8)),
            "CKPT_DUPLICATE_KEY",
        ),
        (
            safetensors_bytes({f"t{i}": one(shape=(0,), offsets=(0, 0))["w"] for i in range(20_001)}),
            "CKPT_TOO_MANY_TENSORS",
        ),
    ],
)
def test_safetensors_headers(tmp_path, content, code):
    (tmp_path / "a").write_bytes(content)
    begin = time.process_time()
    assert refusal(tmp_path / "a").code == code
    assert time.process_time() - begin < 1


def rewritten(path, edit=lambda data: data, *, members=(), compress=zipfile.ZIP_STORED, drop=()):
    """The bytes of a torch.save archive with its data.pkl edited, and members added or dropped."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compress) as new:
        for name in old.namelist():
            if name.rpartition("/")[2] not in drop:
                new.writestr(name, edit(old.read(name)) if name.endswith("data.pkl") else old.read(name))
        for name, content in members:
            new.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"compress": zipfile.ZIP_DEFLATED}, "CKPT_BAD_ARCHIVE"),
        ({"members": [("b/data.pkl", b"N.")]}, "CKPT_BAD_ARCHIVE"),
        ({"members": [("a/constants.pkl", b"N.")]}, "CKPT_TORCHSCRIPT"),
        ({"drop": ["data.pkl"]}, "CKPT_NOT_TORCH"),
        ({"drop": ["0"]}, "CKPT_TRUNCATED"),
        ({"drop": ["0"], "members": [("a/data/0", bytes(8))]}, "CKPT_BAD_PICKLE"),
        ({"drop": ["byteorder"], "members": [("a/byteorder", b"big")]}, "CKPT_BIG_ENDIAN"),
        ({"edit": lambda data: data[:-20]}, "CKPT_BAD_PICKLE"),
        ({"edit": lambda data: data.replace(b"K\x05\x85", b"K\x06\x85")}, "CKPT_UNSUPPORTED_TENSOR"),
        ({"edit": lambda data: data.replace(b"QK\x00K\x05", b"QK\x01K\x05")}, "CKPT_BAD_PICKLE"),
        ({"edit": lambda data: data.replace(b"FloatStorage", b"QInt8Storage")}, "CKPT_UNSUPPORTED_TENSOR"),
        ({"edit": lambda data: b"\x80\x02\x82\x01."}, "CKPT_BAD_PICKLE"),
        ({"edit": lambda data: b"\x80\x02}."}, "CKPT_NO_TENSORS"),
        ({"edit": lambda data: b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s."}, "CKPT_NO_TENSORS"),
        ({"edit": lambda data: data.replace(b"\x01\x00\x00\x00w", b"\x01\x00\x00\x00\n")}, "CKPT_BAD_PICKLE"),
    ],
)
def test_archives(tmp_path, changes, code):
    save_zip(tmp_path / "a.ckpt", {"w": torch.arange(5.0)})
    assert open_weights(tmp_path / "a.ckpt")["w"].tolist() == [0, 1, 2, 3, 4]
    content = rewritten(tmp_path / "a.ckpt", **changes)
    assert content != rewritten(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(content)
    assert refusal(tmp_path / "b.ckpt").code == code


def test_both_names_of_numpy_scalars_are_known(tmp_path):
    save_zip(tmp_path / "a.ckpt", {"w": torch.ones(2), "loss": np.float64(1.5)})
    for name in (b"numpy._core.", b"numpy.core."):  # of numpy 2 and 1
        content = rewritten(tmp_path / "a.ckpt", lambda data, name=name: re.sub(rb"numpy\.(_core|core)\.", name, data))
        assert name + b"multiarray" in zipfile.ZipFile(io.BytesIO(content)).read("a/data.pkl")
        (tmp_path / "b.ckpt").write_bytes(content)
        assert open_weights(tmp_path / "b.ckpt").ignored == ()


def test_a_member_twice_is_refused(tmp_path):
    save_zip(tmp_path / "a.ckpt", {"w": torch.arange(5.0)})
    with pytest.warns(UserWarning, match="Duplicate"):
        content = rewritten(tmp_path / "a.ckpt", members=[("a/data/0", bytes(20))])
    (tmp_path / "b.ckpt").write_bytes(content)
    assert refusal(tmp_path / "b.ckpt").code == "CKPT_DUPLICATE_KEY"


@pickled
@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda: {"w": torch.ones(1).expand(10**10)}, "CKPT_UNSUPPORTED_TENSOR"),
        (lambda: {"w": torch.eye(3).to_sparse_csr()}, "CKPT_UNSUPPORTED_TENSOR"),
        (lambda: {"w": torch.eye(3).to_sparse()}, "CKPT_UNSUPPORTED_TENSOR"),
        (lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "CKPT_UNSUPPORTED_TENSOR"),
        (lambda: torch.nn.Linear(2, 2), "CKPT_PICKLED_OBJECT"),
        (lambda: {"epoch": 3}, "CKPT_NO_TENSORS"),
        (lambda: [1, 2], "CKPT_NO_TENSORS"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_that_are_no_dense_weights(tmp_path, save, build, code):
    save(tmp_path / "a.ckpt", build())
    assert refusal(tmp_path / "a.ckpt").code == code


def test_every_flipped_byte_of_the_data_is_found(tmp_path):
    save_zip(tmp_path / "a.ckpt", {"w": torch.randn(100), "v": torch.randn(100)})
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        data = archive.read("a/data/1")
    start = content.index(data)
    for position in range(start, start + len(data), 37):
        content[position] ^= 1
        (tmp_path / "b.ckpt").write_bytes(content)
        content[position] ^= 1
        weights = open_weights(tmp_path / "b.ckpt")
        assert weights["w"].shape == (100,)
        for dtype in (None, torch.float16):
            error = refusal(tmp_path / "b.ckpt", lambda _, weights=weights, dtype=dtype: weights.tensor("v", dtype))
            assert error.code == "CKPT_BAD_CRC"
            assert "a/data/1" in error.found


def test_pickles_are_bounded(tmp_path, substitute):
    save_zip(tmp_path / "a.ckpt", {"w": torch.arange(5.0)})
    substitute(pickle_walker, MAX_WORK=20)
    assert refusal(tmp_path / "a.ckpt").code == "CKPT_BAD_PICKLE"
    substitute(pickle_file, MAX_PICKLE=20)
    assert refusal(tmp_path / "a.ckpt").code == "CKPT_BAD_ARCHIVE"


@pytest.mark.parametrize(
    "body",
    [
        b"}" + b")" + b"2\x86" * 100 + b"Ns",  # a key of tuples of tuples, 2 ** 100 leaves to hash
        b"]" + b"2a" * 200_000,  # a list in itself
        b"(" * 300_000,
        b"]" * 100_000 + b"a" * 99_999,  # 100,000 lists, one in the other
        b"\x8b\xff\xff\xff\x7f",  # a number of 2 GB
        b"\x8e" + b"\xff" * 7 + b"\x7f",  # bytes of 9 EB
        b"I" + b"9" * 5000 + b"\n",
        b"N0" * 1_000_000,
        b"(" + b"K\x01" * 100_000 + b"tq\x000" + b"ctorch\nSize\nq\x010" + b"h\x01h\x00R0" * 200_000,
        b"ccollections\nOrderedDict\nq\x010(" + b"U\x01aN\x86" * 99_999 + b"lq\x000" + b"h\x01h\x00\x85R0" * 200_000,
        b"".join(b"ca%d\nb\n0" % number for number in range(200_000)),  # classes
        b"0",
        b"R",
        b"t",
        b"NNR",
        b"h\x07",
    ],
)
def test_hostile_pickles_cost_little(tmp_path, body):
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02" + body + b".")
    begin = time.process_time()
    refusal(tmp_path / "a.ckpt")
    assert time.process_time() - begin < 2


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01tQK\x00)))tR"
LONG_NAME = b"X" + struct.pack("<I", 10_000_000) + b"n" * 10_000_000


@pytest.mark.parametrize(
    "body",
    [
        b"}" + LONG_NAME + b"q\x090" + b"".join(b"U\x06%06d}h\x09h\x05ss" % number for number in range(2000)),
        b"}" + LONG_NAME + b"}" + b"".join(b"U\x06%06dh\x05s" % number for number in range(2000)) + b"s",
    ],
    ids=["inner", "outer"],
)
def test_long_names_are_not_joined_with_many(tmp_path, body):
    save_zip(tmp_path / "a.ckpt", {"w": torch.ones(1)})
    content = rewritten(tmp_path / "a.ckpt", lambda _: b"\x80\x02" + TENSOR + b"q\x050" + body + b".")
    (tmp_path / "b.ckpt").write_bytes(content)
    tracemalloc.start()
    try:
        assert "too long" in refusal(tmp_path / "b.ckpt").found
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_no_member_is_inflated(tmp_path):
    save_zip(tmp_path / "a.ckpt", {"w": torch.ones(1)})
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        content = io.BytesIO(rewritten(tmp_path / "a.ckpt", drop=["byteorder"]))
        with zipfile.ZipFile(content, "a", method) as archive:
            archive.writestr("a/byteorder", bytes(20_000_000))
        (tmp_path / "b.ckpt").write_bytes(content.getvalue())
        begin = time.process_time()
        assert refusal(tmp_path / "b.ckpt").code == "CKPT_BAD_ARCHIVE"
        assert time.process_time() - begin < 0.2


def test_a_long_index_is_not_read(tmp_path):
    member = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, *(0,) * 8, 3, *(0,) * 6) + b"abc"
    head, index = b"PK\x03\x04" + bytes(26), member * 200_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(index), len(head), 0)
    (tmp_path / "a.ckpt").write_bytes(head + index + end)
    begin = time.process_time()
    assert refusal(tmp_path / "a.ckpt").code == "CKPT_TOO_MANY_TENSORS"
    assert time.process_time() - begin < 0.2
