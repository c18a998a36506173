"""Converted weights in a nameless temporary file: they behave as weights that are mapped from a checkpoint."""

from __future__ import annotations

import copy
import errno
import gc
import mmap
import os
import pickle
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from refusals import inpaint, load
from sdinpaint_kernels import contents, release, unchanged
from sdinpaint_kernels.pages import is_unwritten, lies_in, private_maps
from sdinpaint_weights import spool as module
from sdinpaint_weights.spool import spool

import sdinpaint

PAGE = mmap.PAGESIZE
LARGE = (700, 31)
RSS = Path("/proc/self/statm")


@pytest.fixture(autouse=True)
def folder(tmp_path, substitute):
    """The folder of temporary files, on a disk with room."""
    substitute(tempfile, tempdir=str(tmp_path))
    substitute(module, MARGIN=0)
    return tmp_path


def drawn(stored=torch.float16):
    """Tensors of every layout, which a dtype stores."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"conv": (64, 50, 3, 3), "bias": (64,), "k": (64, 128), "q": (64, 128), "turned": LARGE, "v": (64, 128)}
    tensors = {name: torch.randn(shape, generator=generator).to(stored) for name, shape in shapes.items()}
    return tensors | {"turned": tensors["turned"].mT, "conv": tensors["conv"].to(memory_format=torch.channels_last)}


def converted(tensors, dtype=torch.float32):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with spool(shapes, dtype) as convert:
        return {name: convert(name, tensor, dtype) for name, tensor in tensors.items()}


def mapped(tensors):
    """The names of the tensors in a private mapping."""
    maps = private_maps()
    return {name for name, tensor in tensors.items() if lies_in(tensor, maps)}


def same(tensors, expected, dtype):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        right = expected[name].to(dtype).contiguous()
        assert tensor.is_contiguous()
        assert tensor.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), right.view(torch.uint8)), name


@pytest.mark.parametrize("piece", [1000, 1 << 15, module.PIECE])
@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_a_conversion_in_memory(stored, dtype, piece, substitute):
    substitute(module, PIECE=piece, SMALL=1 << 13)
    tensors = drawn(stored)
    found = converted(tensors, dtype)
    same(found, tensors, dtype)
    assert mapped(found) == tensors.keys() - {"bias"}
    assert all(found[name].data_ptr() % PAGE == 0 for name in mapped(found))


def test_copies_of_one_tensor_hold_no_others():
    found = converted(drawn())
    for copied in (copy.deepcopy(found["conv"]), pickle.loads(pickle.dumps(found["conv"]))):
        assert copied.untyped_storage().nbytes() == found["conv"].nbytes
        assert torch.equal(copied, found["conv"])


def resident():
    return int(RSS.read_text().split()[1]) * PAGE


def test_pages_are_given_back_and_come_back():
    tensors = {"a": torch.arange(6 << 20, dtype=torch.int32).to(torch.float64)}
    (weight,) = converted(tensors, torch.float32).values()
    expected = weight.sum(dtype=torch.float64)
    full = resident()
    assert release(weight)
    assert full - resident() > 0.9 * weight.nbytes
    assert weight.sum(dtype=torch.float64) == expected
    assert full - resident() < 0.1 * weight.nbytes


def test_contents_are_known_without_reading_and_edits_are_noticed(spy):
    found = converted(drawn())
    weights = [found[name] for name in ("conv", "q", "turned")]
    before = contents(weights)
    digests = spy(contents.__globals__["hashlib"], "sha256")
    assert unchanged(before, weights) == [True] * 3
    assert not digests
    weights[0].numpy()[0, 0, 0, 0] += 1
    assert unchanged(before, weights) == [False, True, True]
    assert not is_unwritten(weights[0])
    assert not release(weights[0])


def memory(folder, substitute):
    mounts = folder / "mounts"
    device = os.stat(folder).st_dev
    lines = [
        f"36 35 {os.major(device) + 1}:0 / /other rw - ext4 /dev/sda rw",
        f"37 35 {os.major(device)}:{os.minor(device)} / {folder} rw,nosuid shared:5 master:1 - tmpfs tmpfs rw",
    ]
    mounts.write_text("\n".join(lines))
    substitute(module, MOUNTS=mounts)


def no_folder(folder, substitute):
    substitute(tempfile, tempdir=str(folder / "none"))


def no_room(folder, substitute):
    substitute(module, MARGIN=1 << 60)


def raising(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def not_reserved(folder, substitute):
    substitute(os, posix_fallocate=raising(errno.ENOSPC))


def not_mapped(folder, substitute):
    substitute(mmap, mmap=raising(errno.ENOMEM))


def full_in_the_middle(folder, substitute):
    write = os.pwrite

    def some(file, data, offset):
        if offset > 150_000:  # behind the first tensor
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: len(data) // 2 + 1], offset)

    substitute(os, pwrite=some)


def another_system(folder, substitute):
    substitute(module.sys, platform="darwin")


NO_DISK = [memory, no_folder, no_room, not_reserved, not_mapped, full_in_the_middle, another_system]


def nameless(folder):
    """The open or mapped files of this process in a folder that have no name."""
    links = [os.readlink(link) for link in map(str, Path("/proc/self/fd").iterdir()) if os.path.islink(link)]
    return [line for line in (*links, *Path("/proc/self/maps").read_text().splitlines()) if str(folder) in line]


@pytest.mark.parametrize("obstacle", NO_DISK)
def test_without_a_disk_everything_is_in_memory(folder, substitute, obstacle, monkeypatch):
    tensors = drawn()
    found = converted(tensors)
    assert nameless(folder)
    del found
    assert not nameless(folder)
    obstacle(folder, substitute)
    found = converted(tensors)
    monkeypatch.undo()
    same(found, tensors, torch.float32)
    assert not mapped(found)
    assert not nameless(folder)


def test_an_interrupt_leaves_nothing(folder):
    def interrupted(tensor):
        with spool({"conv": tuple(tensor.shape)}, torch.float32) as convert:
            convert("conv", tensor, torch.float32)
            assert nameless(folder)
            assert not list(folder.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(drawn()["conv"])
    gc.collect()  # what pytest holds of the frames
    assert not nameless(folder)
    assert not list(folder.iterdir())


def test_the_file_never_has_a_name_and_goes_with_a_killed_process(folder):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = converted(drawn())
        os.write(writing, b"%d" % len(mapped(found)))
        signal.pause()
    assert int(os.read(reading, 10)) > 3
    assert str(folder) in Path(f"/proc/{child}/maps").read_text()
    assert not list(folder.iterdir())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def halves(pipe, tmp_path_factory):
    """A model in float16."""
    place = tmp_path_factory.mktemp("halves")
    sdinpaint.save_diffusers(place / "model", pipe, "float16")
    return place / "model"


def large(pipe):
    models = (pipe.unet, pipe.vae, *pipe.condition.encoders)
    return {
        f"{number}.{name}": weight
        for number, model in enumerate(models)
        for name, weight in model.named_parameters()
        if weight.nbytes >= module.SMALL
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_another_dtype_is_mapped(halves, dtype, substitute):
    substitute(module, SMALL=1 << 11)
    found = load(halves, dtype=dtype)
    weights = large(found)
    assert mapped(weights) == weights.keys()
    in_memory = load(halves, dtype=dtype, mmap=False)
    assert not mapped(large(in_memory))
    for name, weight in large(in_memory).items():
        assert torch.equal(weight, weights[name]), name


def test_only_what_is_converted_on_a_cpu_is_written(halves, folder):
    for options in ({"dtype": "float16"}, {"dtype": "float32", "mmap": False}, {"dtype": "float32", "offload": True}):
        kept = load(halves, **options)
        assert not nameless(folder)
        del kept


def test_an_edit_of_a_converted_model_counts(halves, substitute):
    substitute(module, SMALL=1 << 11)
    found = load(halves, dtype="float32")
    weights = list(large(found).values())
    before = inpaint(found).settings["manifest"]["weights"]
    with torch.no_grad():
        weights[0].mul_(1.5)
    after = inpaint(found).settings["manifest"]["weights"]
    assert before["unet"] != after["unet"]
    assert before["vae"] == after["vae"]
