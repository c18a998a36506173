"""Image files by path, in memory or open: all are read the same, and what is no image file is refused at once."""

from __future__ import annotations

import base64
import io
import os
import socket
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from sdinpaint import Mask
from sdinpaint.errors import ImageError, MaskError, SdInpaintError, SdInpaintWarning
from sdinpaint.images import reading
from sdinpaint.images.exif import ORIENTATION, Exif, short, text
from sdinpaint.images.input_image import read_image
from sdinpaint.images.reading import open_image
from sdinpaint.masks import read_mask
from sdinpaint.pipeline.requests import Request, unbatched

SIZE = 72, 96
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
HOLE = np.zeros(SIZE, np.uint8)
HOLE[20:50, 30:60] = 255


def encoded(array: np.ndarray = RGB, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


class Pipe(io.RawIOBase):
    """A readable file that cannot be rewound, as a network connection."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        return self.stream.readinto(buffer)


def at_its_end(data: bytes) -> io.BytesIO:
    stream = io.BytesIO(data)
    stream.seek(0, os.SEEK_END)
    return stream


class Place:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def in_an_archive(data: bytes) -> io.BufferedIOBase:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image", data)
    return zipfile.ZipFile(stream).open("image")


FORMS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "open file": io.BytesIO,
    "read before": at_its_end,
    "cannot be rewound": lambda data: io.BufferedReader(Pipe(data)),
    "in an archive": in_an_archive,
}


@pytest.mark.parametrize("form", FORMS)
def test_files_in_memory_are_images_masks_and_control_images(form):
    give = FORMS[form]
    request = Request(give(encoded()), give(encoded(HOLE)), "a fox", control_image=give(encoded()))
    (item,) = request.items
    assert np.array_equal(item.image.rgb, RGB)
    assert np.array_equal(item.mask.hole, HOLE > 0)
    assert np.array_equal(item.control_image.rgb, RGB)
    assert item.image.path is item.mask_path is None
    assert np.array_equal(Mask(give(encoded(HOLE))).hole, HOLE > 0)


class Slowly(io.RawIOBase):
    """An open file that gives some bytes at a time, as a socket or a file in the cloud does."""

    def __init__(self, data):
        self.stream = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self.stream.read(min(size, 7) if size > 0 else 7)


class SlowlyFromTheStart(Slowly):
    """One that can be rewound."""

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        return self.stream.seek(offset, whence)


@pytest.mark.parametrize("form", [Slowly, SlowlyFromTheStart])
def test_open_files_that_give_little_at_a_time(form):
    assert np.array_equal(read_image(form(encoded())).rgb, RGB)


def test_a_file_that_cannot_be_read_is_named_with_its_argument_and_left_out():
    closed = io.BytesIO(encoded())
    closed.close()
    with pytest.raises(ImageError, match=r"image 2 of 2: mask: the file object: ValueError"):
        Request([RGB, RGB], [HOLE, closed], "a fox")
    skipped = Request([RGB, closed, RGB], HOLE, "a fox", on_error="skip")
    assert list(skipped.errors) == [1]
    assert list(skipped.replace(steps=3).errors) == [1]


@pytest.mark.parametrize("form", ["open file", "cannot be rewound"])
def test_one_open_file_serves_a_batch(form):
    request = Request(FORMS[form](encoded()), FORMS[form](encoded(HOLE)), ["a fox", "a cube"])
    assert all(np.array_equal(item.image.rgb, RGB) for item in request.items)


def test_paths_of_other_libraries(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded())
    assert read_image(Place(tmp_path / "image.png")).path == str(tmp_path / "image.png")


def test_a_file_is_closed_and_an_open_one_is_not(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read_image(tmp_path / "image.png")
    stream = io.BytesIO(encoded())
    read_image(stream)
    assert not stream.closed


def refused(source: object, code: str, read=read_image) -> SdInpaintError:
    with pytest.raises(ImageError) as caught:
        read(source, "the image")
    assert caught.value.code == code
    assert caught.value.hint
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    return caught.value


READERS = [read_image, open_image, lambda source, argument: read_mask(source, SIZE, argument)]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("place", ["fifo", "/dev/zero", "/proc/self/status", "socket", "loop", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, place, read):
    path = Path(place) if place.startswith("/") else tmp_path / place
    server = socket.socket(socket.AF_UNIX)
    if place == "fifo":
        os.mkfifo(path)
    elif place == "socket":
        server.bind(str(path))
    elif place == "loop":
        path.symlink_to(path)
    elif place == "folder":
        path.mkdir()
    with server:
        refused(path, "IMAGE_NOT_A_FILE", read)


def test_a_link_to_a_device_is_refused(tmp_path):
    (tmp_path / "link.png").symlink_to("/dev/zero")
    refused(tmp_path / "link.png", "IMAGE_NOT_A_FILE")


def test_tables_of_labels_are_read_through_the_same_door(tmp_path):
    os.mkfifo(tmp_path / "labels.txt")
    with pytest.raises(SdInpaintError, match="pipe"):
        Mask.from_labels(tmp_path / "labels.txt", 1)
    assert Mask.from_labels(encoded(HOLE), 255).hole.any()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("prefix", ["", "data:image/any;base64,"])
def test_encoded_images_are_explained(kind, prefix):
    text = prefix + base64.b64encode(encoded(kind=kind)).decode()
    for given in (text, text[:200]):
        error = refused(given, "IMAGE_NOT_FOUND")
        assert "base64.b64decode" in error.hint
    assert "base64.b64decode" in refused(text.encode(), "IMAGE_UNREADABLE").hint


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 2500, "a\0b.png", "a\udc80\u202e.png", "", "photo\n.png"])
def test_paths_that_cannot_be(path):
    refused(path, "IMAGE_NOT_FOUND")


def test_odd_file_objects_are_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded())
    with open(tmp_path / "image.png", encoding="latin-1") as text:
        assert "'rb'" in refused(text, "IMAGE_UNREADABLE").hint
    with open(tmp_path / "image.png", "rb") as closed:
        pass
    refused(closed, "IMAGE_UNREADABLE")
    refused(io.BytesIO(), "IMAGE_UNREADABLE")


def test_files_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_FILE", 1000)
    (tmp_path / "image.png").write_bytes(encoded())
    for source in (tmp_path / "image.png", io.BytesIO(encoded()), io.BufferedReader(Pipe(encoded()))):
        refused(source, "IMAGE_TOO_LARGE")


def test_too_many_pixels_say_what_they_take():
    error = refused(Image.new("1", (10_000, 10_000)), "IMAGE_TOO_LARGE")
    assert "0.3 GiB" in error.found
    refused(np.broadcast_to(np.uint16(7), (10**6, 10**6)), "IMAGE_TOO_LARGE")
    refused(np.broadcast_to(np.float32(1), (10**6, 10**6)), "IMAGE_TOO_LARGE", READERS[2])


def test_memory_that_does_not_suffice_is_told(monkeypatch):
    def load(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", load)
    assert "memory" in refused(Image.new("RGB", (80, 80)), "IMAGE_TOO_LARGE").found


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "AVIF"])
def test_each_frame_of_an_animation_is_itself(kind):
    frames = [Image.new("RGB", (72, 72), colour) for colour in ("red", "blue", "white")]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    with Image.open(stream) as animation, warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        for number, (shown, frame) in enumerate(zip(ImageSequence.Iterator(animation), frames, strict=True)):
            seen = read_image(shown).rgb.astype(int)
            assert np.abs(seen - np.asarray(frame)).max() <= 5
            assert animation.tell() == number
            assert Mask(shown.convert("L").convert("1")).size == (72, 72)
    with pytest.warns(SdInpaintWarning, match="first frame"):
        assert np.abs(read_image(stream).rgb[0, 0].astype(int) - (255, 0, 0)).max() <= 5


def good_exif(*orientation: int | str) -> bytes:
    """Exif data of a camera, with its orientation in numbers or in a word."""
    told = text(orientation[0]) if isinstance(orientation[0], str) else short(">", *orientation)
    return Exif(ifd={0x010F: text("A Camera"), ORIENTATION: told}).to_bytes()


BROKEN = {
    "text": b"Exif\0\0b'Exif\\x00\\x00MM'",
    "short": b"Exif\0\0MM\0*\0\0",
    "noise": b"Exif\0\0" + bytes(range(256)),
    "cut": good_exif(6)[:20],
    "a word": good_exif("upside down"),
    "13": good_exif(13),
    "far": b"Exif\0\0MM\0*\xff\xff\xff\xff",
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:Metadata Warning:UserWarning")
def test_broken_exif_data_do_not_spoil_an_image(kind, broken):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(kind=kind, exif=BROKEN[broken], **lossless)
    plain = np.asarray(Image.open(io.BytesIO(encoded(kind=kind, **lossless))))
    with pytest.warns(SdInpaintWarning, match="Exif data cannot be read") as caught:
        image = read_image(data)
    assert len([one for one in caught if one.category is SdInpaintWarning]) == 1
    assert np.array_equal(image.rgb, plain)
    assert np.array_equal(np.asarray(open_image(data, "labels")), plain)


def test_zero_as_orientation_is_upright_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        assert read_image(encoded(exif=good_exif(0))).size == SIZE


def test_rounding_alone_does_not_spoil_a_mask_or_an_image():
    above, below = np.nextafter(np.float32(1), np.float32(2)), np.float32(-1e-7)
    values = np.array([[below, 0, 0.5], [0.25, 1, above]], np.float32)
    mask = read_mask(values, (2, 3))
    assert (mask.min(), mask.max()) == (0, 1)
    image = np.resize(values, (*SIZE, 3))
    assert read_image(image).samples.max() == 1
    assert read_image(Image.fromarray(image[..., 0])).samples.min() == 0
    assert read_image(2 * torch.from_numpy(image).permute(2, 0, 1) - 1).rgb.max() == 255


@pytest.mark.parametrize("value", [1.00002, -0.00002, 1.5, 255.0])
def test_values_outside_are_shown_with_the_digits_that_tell(value):
    values = np.zeros(SIZE, np.float32)
    values[0, 0] = value
    for read in READERS[::2]:
        with pytest.raises(SdInpaintError) as caught:
            read(values, "image")
        low, high = caught.value.found.rpartition(" from ")[2].split(" to ")
        assert not 0 <= float(low) <= float(high) <= 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, *SIZE, device="meta"),
        torch.zeros(3, *SIZE).to_sparse(),
        torch.zeros(1, 3, *SIZE).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(3, *SIZE), 0.1, 0, torch.quint8),
        torch.zeros(3, *SIZE, dtype=torch.complex64),
        torch.nested.nested_tensor([torch.zeros(3, *SIZE)] * 2, layout=torch.jagged),
    ],
    ids=["meta", "sparse", "sparse batch", "quantized", "complex", "nested"],
)
def test_tensors_without_plain_values_are_refused(tensor):
    assert len(unbatched(tensor, "image")) == 1
    refused(tensor, "IMAGE_TYPE")
    with pytest.raises(MaskError) as caught:
        read_mask(tensor[0] if tensor.layout == torch.strided and not tensor.is_nested else tensor, SIZE)
    assert caught.value.code == "MASK_TYPE"


def test_batches_in_one_array_or_tensor():
    images = np.stack([RGB, 255 - RGB])
    masks = np.stack([HOLE, HOLE[::-1]])
    stacks = [
        masks,
        masks[..., None],
        masks[:, None],
        np.repeat(masks[..., None], 3, axis=3),
        masks.astype(bool),
        torch.from_numpy(masks),
        torch.from_numpy(masks / np.float32(255))[:, None],
        masks.astype(np.uint16) * 257,
    ]
    tensors = torch.from_numpy(images / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    for given in (images, tensors):
        for stack in stacks:
            items = Request(given, stack, "a fox").items
            assert [np.array_equal(item.image.rgb, rgb) for item, rgb in zip(items, images, strict=True)] == [True] * 2
            assert [np.array_equal(item.hole, one > 0) for item, one in zip(items, masks, strict=True)] == [True] * 2
    for one in (HOLE, HOLE[..., None], HOLE[None], np.repeat(HOLE[..., None], 3, 2), torch.from_numpy(HOLE)[None]):
        assert len(Request(RGB, one, "a fox").items) == 1
