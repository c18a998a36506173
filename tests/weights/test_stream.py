"""Files written tensor by tensor are those that the safetensors library writes, and are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.stream import CODES, Item, write_stream

FLOATS = tuple(dtype for dtype in CODES if dtype.is_floating_point)
HAVE_INFINITY = tuple(dtype for dtype in FLOATS if dtype != torch.float8_e4m3fn)


def item(name, tensor, dtype=None):
    return Item(name, dtype or tensor.dtype, tuple(tensor.shape), lambda: tensor)


def one_of_each_dtype():
    """Odd sizes, so that any padding would show; scalars, empty tensors and names outside of ASCII too."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"block.{place}.{kind}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for place, dtype in enumerate(CODES)
        for kind, shape in {"weight": (3, 5), "bias": (7,), "scale": (), "none": (0, 3)}.items()
    }
    return tensors | {"größe": torch.tensor([1.5]), 'a "name"': torch.tensor([2.5])}


def test_the_bytes_are_those_of_the_library(tmp_path):
    tensors = one_of_each_dtype()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_stream(tmp_path / "ours", [item(*pair) for pair in tensors.items()], {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_library_and_our_reader_read_what_was_given(tmp_path):
    tensors = one_of_each_dtype()
    metadata = {"format": "pt", "source": 'größe "1"\n', "z": "", "a": "2"}
    write_stream(tmp_path / "a", [item(*pair) for pair in reversed(tensors.items())], metadata)
    weights = open_weights(tmp_path / "a")
    read = load_file(tmp_path / "a")
    assert set(read) == set(weights) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == weights[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float()), name
        assert torch.equal(weights[name].float(), tensor.float()), name
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == weights.metadata == metadata


def test_without_metadata_and_without_tensors(tmp_path):
    write_stream(tmp_path / "ours", [], {})
    save_file({}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_are_aligned(tmp_path):
    """Torch reads an unaligned tensor only through a copy."""
    write_stream(tmp_path / "a", [item(*pair) for pair in one_of_each_dtype().items()], {"format": "p" * 3})
    for name, entry in open_weights(tmp_path / "a").entries.items():
        assert (entry.storage.offset + entry.start) % entry.dtype.itemsize == 0, name


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_are_cast_and_made_dense(tmp_path, dtype):
    tensor = torch.arange(24, dtype=torch.float64).reshape(4, 6).T
    write_stream(tmp_path / "a", [item("x", tensor, dtype)], {})
    assert torch.equal(load_file(tmp_path / "a")["x"].double(), tensor.to(dtype).double())


def test_one_tensor_is_alive_at_a_time(tmp_path):
    alive, most = set(), []

    class Watched(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def produce():
        tensor = torch.zeros(5).as_subclass(Watched)
        alive.add(id(tensor))
        most.append(len(alive))
        return tensor

    write_stream(tmp_path / "a", [Item(f"x{i}", torch.float32, (5,), produce) for i in range(20)], {})
    assert len(most) == 20
    assert max(most) <= 2  # one on its way to the file, one that is being made


def test_progress_counts_every_byte_of_the_tensors(tmp_path):
    tensors = one_of_each_dtype()
    told = []
    write_stream(tmp_path / "a", [item(*pair) for pair in tensors.items()], {}, told.append)
    assert len(told) == len(tensors)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())


def fail(error):
    def produce():
        raise error

    return produce


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ZeroDivisionError()])
def test_an_interrupted_file_leaves_nothing_and_the_old_one_as_it_was(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    items = [item("a", torch.zeros(1000)), Item("b", torch.float32, (1,), fail(error))]
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_stream(path, items, {})
    if isinstance(error, OSError):
        assert caught.value.code == "CKPT_NOT_WRITTEN"
        assert "No space left" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", HAVE_INFINITY)
def test_what_is_not_finite_is_refused_by_the_name_of_its_source(tmp_path, bad, dtype):
    tensor = torch.tensor([1.0, bad])
    with pytest.raises(CheckpointError) as caught:
        write_stream(tmp_path / "a", [Item("x.weight", dtype, (2,), lambda: tensor, "model.ckpt")], {})
    assert caught.value.code == "CKPT_NONFINITE"
    assert caught.value.subject == "model.ckpt"
    assert "x.weight" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_what_a_dtype_cannot_hold_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        write_stream(tmp_path / "a", [item("x", torch.tensor([70000.0]), torch.float16)], {})
    assert caught.value.code == "CKPT_OVERFLOW"
    assert "70000" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_tensor_of_another_shape_than_was_said_is_refused(tmp_path):
    """Its bytes would shift those of every tensor after it."""
    with pytest.raises(CheckpointError) as caught:
        write_stream(tmp_path / "a", [Item("x", torch.float32, (2, 3), lambda: torch.zeros(3, 2))], {})
    assert caught.value.code == "CKPT_SHAPE"
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, free_space):
    free_space(3_999_999)
    items = [Item("x", torch.float32, (1_000_000,), fail(AssertionError("nothing is to be read")))]
    with pytest.raises(CheckpointError) as caught:
        write_stream(tmp_path / "a", items, {})
    assert caught.value.code == "CKPT_NO_SPACE"
    assert "4.00 MB" in caught.value.expected
    assert "free" in caught.value.found
    assert os.listdir(tmp_path) == []


def test_the_header_is_checked_by_the_library(tmp_path):
    """Broken on purpose: one offset that is wrong by a byte, and the library refuses the file."""
    write_stream(tmp_path / "a", [item("x", torch.zeros(10)), item("y", torch.zeros(10))], {})
    held = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(held.replace(b"[40,80]", b"[41,80]"))
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / "b")
