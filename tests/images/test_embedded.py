"""Data beside the pixels: those of a source survive into every format, and the settings are where programs look."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from sdinpaint.errors import SdInpaintWarning
from sdinpaint.images import embedded
from sdinpaint.images.exif import EXIF, Entry, Exif, parse, text, undefined
from sdinpaint.images.files import read_settings, save_png
from sdinpaint.images.input_image import InputImage, paste, read_image

SIZE = 72, 96
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
SETTINGS = {"prompt": "ein roter Fuchs 🦊", "seed": 7, "steps": 30, "sampler": "ddim", "guidance_scale": 7.5, "x": "y"}
FORMATS = ("png", "jpg", "webp", "tiff", "avif")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PACKET = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="A fox"/></x:xmpmeta>'


def camera(orientation: int = 1, **more: object) -> Image.Exif:
    """Exif data as a camera writes them."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "A Camera", orientation
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExposureTime] = TiffImagePlugin.IFDRational(1, 250)
    details[ExifTags.Base.ExifVersion] = b"0232"
    details[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight] = 96, 72
    position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    position[ExifTags.GPS.GPSLatitudeRef], position[ExifTags.GPS.GPSLatitude] = "N", (50.0, 6.0, 2.5)
    for name, value in more.items():
        exif[ExifTags.Base[name]] = value
    return exif


def photo(kind: str = "JPEG", exif: Image.Exif | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    given = {"exif": exif or camera(), "dpi": (300, 240), "icc_profile": PROFILE, "xmp": PACKET} | options
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", PACKET.decode())
        given["pnginfo"] = given.get("pnginfo", info)
    if kind == "TIFF":
        given["tiffinfo"] = {0x010F: "A Camera", 0x02BC: PACKET, EXIF: dict((exif or camera()).get_ifd(EXIF))}
        given["tiffinfo"][0x8825] = dict((exif or camera()).get_ifd(0x8825))
    Image.fromarray(RGB).save(stream, kind, **given)
    return stream.getvalue()


def saved(source: InputImage, path, stored=SETTINGS) -> Image.Image:
    """The file that a result of this source is written to, as Pillow reads it."""
    save_png(paste(source, source.rgb, np.zeros(source.size, bool)), path, stored, source=source.embedded)
    with Image.open(path) as image:
        image.load()
        return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_photo_keeps_what_its_camera_wrote(tmp_path, kind, suffix):
    image = saved(read_image(photo(kind)), tmp_path / f"out.{suffix}")
    exif = image.getexif()
    details, position = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    assert exif[ExifTags.Base.Make] == "A Camera"
    assert details[ExifTags.Base.ExposureTime] == pytest.approx(1 / 250)
    assert details[ExifTags.Base.DateTimeOriginal] == "2024:05:06 07:08:09"
    assert details[ExifTags.Base.ExifVersion] == b"0232"
    assert position[ExifTags.GPS.GPSLatitude] == (50, 6, 2.5)
    assert image.info["icc_profile"] == PROFILE
    assert b'dc:title="A fox"' in image.info["xmp"]
    assert b"Orientation" not in image.info["xmp"]
    if kind in ("JPEG", "PNG", "TIFF"):
        resolution = image.info.get("dpi") or (exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution])
        assert tuple(map(round, resolution)) == (300, 240)
    assert read_settings(tmp_path / f"out.{suffix}") == SETTINGS


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_is_applied_once_and_sizes_follow(tmp_path, suffix, orientation):
    source = read_image(photo(exif=camera(orientation)))
    image = saved(source, tmp_path / f"out.{suffix}")
    assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    again = read_image(tmp_path / f"out.{suffix}")
    assert again.size == source.size == (SIZE[::-1] if orientation == 6 else SIZE)
    details = image.getexif().get_ifd(ExifTags.IFD.Exif)
    assert (details[ExifTags.Base.ExifImageHeight], details[ExifTags.Base.ExifImageWidth]) == source.size


def piexif_load(data: bytes) -> str:
    """A UserComment as piexif reads it. Source: piexif/helper.py UserComment.load."""
    encodings = {b"UNICODE\0": "utf_16_be", b"ASCII\0\0\0": "ascii"}
    return data[8:].decode(encodings[data[:8]])


def user_comment_type(exif: bytes) -> int:
    """The type of the UserComment, found by hand."""
    block = exif.removeprefix(b"Exif\0\0")
    order = "<" if block[:2] == b"II" else ">"

    def entries(offset: int) -> dict[int, tuple[int, int, int]]:
        (count,) = struct.unpack(order + "H", block[offset : offset + 2])
        table = block[offset + 2 : offset + 2 + 12 * count]
        return {tag: (kind, number, at) for tag, kind, number, at in struct.iter_unpack(order + "HHII", table)}

    first = entries(struct.unpack(order + "I", block[4:8])[0])
    return entries(first[0x8769][2])[0x9286][0]


@pytest.mark.parametrize("suffix", FORMATS[1:])
@pytest.mark.parametrize("source", [None, photo()], ids=["alone", "a photo"])
def test_other_programs_find_the_settings(tmp_path, suffix, source):
    made = InputImage(rgb=RGB) if source is None else read_image(source)
    png = saved(made, tmp_path / "out.png").text["parameters"]
    image = saved(made, tmp_path / f"out.{suffix}")
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert piexif_load(comment) == png
    assert png.startswith("ein roter Fuchs 🦊\nSteps: 30, Sampler: DDIM")
    if "exif" in image.info:
        assert user_comment_type(image.info["exif"]) == 7  # UNDEFINED, as Exif says
    assert json.loads(image.getexif()[ExifTags.Base.ImageDescription]) == SETTINGS


@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_a_caption_and_a_comment_move_to_where_others_show_them(tmp_path, suffix):
    exif = camera(ImageDescription="My dog at the lake")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0a good one"
    image = saved(read_image(photo(exif=exif)), tmp_path / f"out.{suffix}")
    moved = [image.getexif()[tag] for tag in (ExifTags.Base.XPTitle, ExifTags.Base.XPComment)]
    assert [bytes(one).decode("utf-16-le").rstrip("\0") for one in moved] == ["My dog at the lake", "a good one"]
    again = read_image(tmp_path / f"out.{suffix}")
    second = saved(again, tmp_path / f"again.{suffix}", SETTINGS | {"seed": 8})
    assert read_settings(tmp_path / f"again.{suffix}")["seed"] == 8
    assert bytes(second.getexif()[ExifTags.Base.XPTitle]).decode("utf-16-le").rstrip("\0") == "My dog at the lake"
    assert bytes(second.getexif()[ExifTags.Base.XPComment]).decode("utf-16-le").rstrip("\0") == "a good one"


def test_a_png_keeps_its_texts_and_ours_win(tmp_path):
    info = PngInfo()
    for key, value in {"Author": "Ann", "parameters": "theirs", "sdinpaint": "{}", "workflow": "ü" * 50_000}.items():
        info.add_itxt(key, value)
    info.add_text("Copyright", "© Ann", zip=True)
    source = read_image(photo("PNG", pnginfo=info))
    texts = saved(source, tmp_path / "out.png").text
    assert {key: texts[key] for key in ("Author", "workflow", "Copyright")} == {
        "Author": "Ann",
        "workflow": "ü" * 50_000,
        "Copyright": "© Ann",
    }
    assert texts["parameters"].startswith("ein roter")
    assert json.loads(texts["sdinpaint"]) == SETTINGS


def test_what_is_kept_of_texts_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "MAX_KEPT", 1000)
    info = PngInfo()
    info.add_text("long", "x" * 2000)
    info.add_text("short", "y")
    texts = saved(read_image(photo("PNG", pnginfo=info)), tmp_path / "out.png").text
    assert "long" not in texts
    assert texts["short"] == "y"


@pytest.mark.parametrize("suffix", FORMATS)
def test_large_data_of_a_source_never_prevent_a_save(tmp_path, suffix):
    exif = camera()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = bytes(range(256)) * 235
    stored = SETTINGS | {"prompt": "fox " * 9000}
    source = read_image(photo(exif=exif))
    limited = suffix == "jpg"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = saved(source, tmp_path / f"out.{suffix}", stored)
    told = [str(one.message) for one in caught]
    assert any("of the source did not fit" in one for one in told) == limited
    assert read_settings(tmp_path / f"out.{suffix}") == stored
    assert limited or image.getexif()[ExifTags.Base.Make] == "A Camera"


def test_a_maker_note_gives_way_before_the_rest(tmp_path):
    exif = camera()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = bytes(64_600)
    with pytest.warns(SdInpaintWarning, match="maker note"):
        image = saved(read_image(photo(exif=exif)), tmp_path / "out.jpg", SETTINGS | {"prompt": "fox " * 300})
    assert image.getexif()[ExifTags.Base.Make] == "A Camera"
    assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo)


def test_xmp_data_that_a_jpeg_file_cannot_hold_are_told(tmp_path):
    source = embedded.Embedded(xmp=b"<x/>" * 20_000)
    with pytest.warns(SdInpaintWarning, match="XMP data of the source, 80000 bytes, do not fit into JPEG"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "out.jpg", SETTINGS, source=source)
    for suffix in ("png", "webp", "tiff", "avif"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / f"out.{suffix}", SETTINGS, source=source)
        with Image.open(tmp_path / f"out.{suffix}") as image:
            assert embedded.read_embedded(image).xmp == source.xmp


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning", "ignore:Metadata Warning:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Exif data:sdinpaint.errors.SdInpaintWarning")
@given(cuts=st.lists(st.tuples(st.integers(6, 400), st.integers(0, 255)), max_size=6), end=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_broken_data_never_prevent_a_save(tmp_path_factory, suffix, cuts, end):
    data = bytearray(camera().tobytes())
    for at, value in cuts:
        data[at % len(data)] = value
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "PNG", exif=bytes(data[: max(end, 7)]))
    source = read_image(stream)
    path = tmp_path_factory.getbasetemp() / f"broken.{suffix}"
    save_png(Image.new("RGB", (8, 8)), path, SETTINGS, source=source.embedded)
    assert read_settings(path) == SETTINGS


ENTRIES = st.dictionaries(
    st.integers(1, 0xFFFF).filter(lambda tag: tag not in embedded.STORAGE and tag not in (0x8769, 0x8825)),
    st.binary(min_size=1, max_size=30).map(undefined),
    max_size=6,
)


@given(ENTRIES, ENTRIES, st.sampled_from("<>"))
@settings(max_examples=100, deadline=None)
def test_a_block_comes_back_as_it_was(first, second, order):
    second.pop(0xA005, None)
    block = Exif(order, {**first, **({EXIF: second} if second else {})})
    if block.ifd:
        read = parse(block.to_bytes())
        assert (read.ifd, read.order, read.whole) == (block.ifd, order, True)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_block_or_refused(data):
    for start in (b"", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0"):
        try:
            block = parse(start + data)
        except ValueError:
            continue
        assert parse(block.to_bytes()).ifd == block.ifd if block.ifd else True


def test_an_entry_that_is_not_there_is_left_out_and_told():
    block = Exif(ifd={0x010F: text("A Camera that is long"), 0x0131: text("abc")})
    read = parse(block.to_bytes()[:-4])
    assert read.ifd == {0x0131: Entry(2, 4, b"abc\0")}
    assert not read.whole


def test_thumbnails_and_storage_do_not_survive():
    image = read_image(photo("TIFF"))
    assert not set(image.embedded.exif.ifd) & embedded.STORAGE
    assert image.embedded.exif.text(0x010F) == "A Camera"


def test_a_result_image_alone_has_none_of_it(tmp_path):
    image = paste(read_image(photo()), RGB, np.zeros(SIZE, bool))
    for suffix in FORMATS:
        image.save(tmp_path / f"alone.{suffix}")
        with Image.open(tmp_path / f"alone.{suffix}") as read:
            assert not {ExifTags.Base.Make, ExifTags.IFD.GPSInfo} & set(read.getexif())
            assert "xmp" not in read.info


OLDER = {"prompt": "an older image", "seed": 1}


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_settings_of_older_versions_are_read(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(OLDER)
    Image.fromarray(RGB).save(tmp_path / f"old.{suffix}", exif=exif)
    assert read_settings(tmp_path / f"old.{suffix}") == OLDER


def test_texts_after_the_pixels_are_kept_too(tmp_path):
    data = photo("PNG")
    body = b"tEXtAuthor\0Ann"
    late = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    assert saved(read_image(data[:-12] + late + data[-12:]), tmp_path / "out.png").text["Author"] == "Ann"
