"""Images in every form people give them, the ones that are refused, and the pixels that models see."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from sdinpaint.errors import ImageError, NumericError, SdInpaintError, SdInpaintWarning
from sdinpaint.images.input_image import InputImage, pad_to_multiple, paste, read_image, to_tensor, to_uint8

SIZE = (72, 96)


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def grey(rgb) -> np.ndarray:
    return rgb[..., 0].copy()


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def refused(source, code: str, argument: str = "image") -> SdInpaintError:
    """The error that reading raises: of this code, naming the argument and a way to go on."""
    with pytest.raises(ImageError) as caught:
        read_image(source, argument)
    assert caught.value.code == code
    assert argument in caught.value.subject
    assert caught.value.found
    assert caught.value.hint
    if isinstance(source, Path):
        assert str(source) in caught.value.subject
    return caught.value


# forms


def test_every_form_of_one_image_is_the_same(rgb, tmp_path):
    image = Image.fromarray(rgb)
    path = saved(image, tmp_path / "image.png")
    tensor = to_tensor(rgb)
    for source in (path, str(path), image, rgb, tensor, tensor[0], tensor.double(), InputImage(rgb=rgb)):
        read = read_image(source)
        assert np.array_equal(read.rgb, rgb)
        assert read.alpha is None
        assert read.icc_profile is None
        assert read.size == SIZE


def test_array_is_copied(rgb):
    image = read_image(rgb)
    rgb[:] = 0
    assert image.rgb.any()


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "bmp", "gif", "jpg"])
def test_formats(tmp_path, suffix):
    colour = np.full((*SIZE, 3), (200, 40, 90), np.uint8)
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    image = read_image(saved(Image.fromarray(colour), tmp_path / f"image.{suffix}", **options))
    assert np.abs(image.rgb.astype(int) - colour).max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_modes(grey, mode):
    image = Image.fromarray(grey).convert(mode)
    read = read_image(image)
    expected = np.asarray(image.convert("L"))
    assert (read.rgb == expected[..., None]).all()


def test_palette(rgb):
    image = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(read_image(image).rgb, np.asarray(image.convert("RGB")))


def test_palette_with_transparency(rgb, tmp_path):
    image = Image.fromarray(rgb).quantize(16)
    path = saved(image, tmp_path / "palette.png", transparency=3)
    read = read_image(path)
    assert np.array_equal(read.alpha == 0, np.asarray(image) == 3)


def test_grey_with_alpha(grey):
    alpha = grey[::-1].copy()
    image = read_image(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]))
    assert (image.rgb == grey[..., None]).all()
    assert np.array_equal(image.alpha, alpha)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_colour(tmp_path, mode):
    image = Image.new(mode, (72, 72), 0)
    image.paste(255 if mode == "L" else (255, 255, 255), (0, 0, 10, 72))
    path = saved(image, tmp_path / "colour.png", transparency=0 if mode == "L" else (0, 0, 0))
    assert (read_image(path).alpha == 0).mean() == pytest.approx(62 / 72)


def test_alpha_is_kept_and_shown_over_white(rgb):
    alpha = np.zeros(SIZE, np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    image = read_image(Image.fromarray(np.dstack([rgb, alpha])))
    assert np.array_equal(image.rgb, rgb)
    assert np.array_equal(image.alpha, alpha)
    seen = image.opaque()
    assert seen.dtype == np.uint8
    assert (seen[:, :10] == 255).all()
    assert np.array_equal(seen[:, 20:], rgb[:, 20:])
    blend = rgb[:, 10:20] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(seen[:, 10:20] - blend).max() <= 0.5 + 1e-9


def test_opaque_image_is_itself(rgb):
    assert InputImage(rgb=rgb).opaque() is rgb


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32"])
def test_sixteen_bits_are_scaled_not_clipped(grey, dtype):
    image = read_image(Image.fromarray((grey.astype(np.int64) * 257).astype(dtype)))
    assert (image.rgb == grey[..., None]).all()


def test_sixteen_bit_file(grey, tmp_path):
    path = saved(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "deep.png")
    assert (read_image(path).rgb == grey[..., None]).all()


def test_values_of_a_smaller_range_are_pointed_out(grey):
    mistaken = [
        Image.fromarray(grey.astype(np.int32)),
        Image.fromarray(grey.astype(np.uint16)),
        grey.astype(np.uint16),
        (grey > 127).astype(np.uint8),
        grey / 255 / 255,
    ]
    for image in mistaken:
        with pytest.warns(SdInpaintWarning, match="almost black"):
            read_image(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for usual in (np.zeros_like(grey), grey, grey * np.uint16(257), grey / 255):
            read_image(usual)


def test_a_tensor_with_gradients_and_a_matrix_are_read_without_a_word(grey):
    values = torch.from_numpy(np.stack([grey] * 3) / 127.5 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for tensor in (values.requires_grad_(), values.detach().half()):
            assert np.abs(read_image(tensor).rgb.astype(int) - grey[..., None]).max() <= 1
        assert (read_image(np.array(grey).view(np.matrix)).rgb == grey[..., None]).all()
        assert read_image(values.detach().to(torch.float8_e4m3fn)).size == grey.shape


def test_float_mode(grey):
    image = read_image(Image.fromarray(grey.astype(np.float32) / 255))
    assert (image.rgb == grey[..., None]).all()


@pytest.mark.parametrize(
    ("array", "limits"),
    [
        (np.full(SIZE, 70000, np.int32), "70000"),
        (np.full(SIZE, -1, np.int32), "-1"),
        (np.full(SIZE, 1.5, np.float32), "1.5"),
        (np.full(SIZE, np.nan, np.float32), "nan"),
    ],
)
def test_deep_values_out_of_range(array, limits):
    assert limits in refused(Image.fromarray(array), "IMAGE_BAD_VALUES").found


def test_cmyk():
    cmyk = Image.new("CMYK", (72, 72), (0, 255, 255, 0))
    image = read_image(cmyk)
    assert image.rgb.shape == (72, 72, 3)
    assert (image.rgb[0, 0] == (255, 0, 0)).all()


def test_cmyk_jpeg_reads_as_it_was_drawn(tmp_path):
    path = saved(Image.new("CMYK", (72, 72), (0, 255, 255, 0)), tmp_path / "print.jpg", quality=95)
    assert np.abs(read_image(path).rgb[30, 30].astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB"])
def test_other_colour_spaces_are_converted_and_told(mode):
    with pytest.warns(SdInpaintWarning, match=r"converted to s?RGB"):
        image = read_image(Image.new("RGB", (72, 72), (120, 60, 30)).convert(mode))
    assert np.abs(image.rgb.astype(int) - (120, 60, 30)).max() <= 3


def test_unknown_modes_are_refused():
    refused(Image.new("La", (72, 72)), "IMAGE_TYPE")


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The stored image whose Exif tag makes it show as `image`."""
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    return image if back is None else image.transpose(Image.Transpose(back))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["path", "pil"])
def test_exif_orientation_is_always_obeyed(rgb, tmp_path, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(turned(Image.fromarray(rgb), orientation), tmp_path / "turned.png", exif=exif)
    with Image.open(path) as image:
        assert np.array_equal(read_image(path if form == "path" else image).rgb, rgb)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    first, second = Image.new("RGB", (72, 72), "red"), Image.new("RGB", (72, 72), "blue")
    path = saved(first, tmp_path / f"moving.{suffix}", save_all=True, append_images=[second])
    with pytest.warns(SdInpaintWarning, match="first frame") as caught:
        image = read_image(path)
    assert caught[0].filename == __file__
    assert image.rgb[0, 0, 0] > 250
    assert image.rgb[0, 0, 2] < 5


def rgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_rgb_profile_is_carried_to_the_output(rgb, tmp_path):
    profile = rgb_profile()
    image = read_image(saved(Image.fromarray(rgb), tmp_path / "wide.png", icc_profile=profile))
    assert image.icc_profile == profile
    assert np.array_equal(image.rgb, rgb)
    pasted = paste(image, rgb, np.zeros(SIZE, bool))
    assert pasted.info["icc_profile"] == profile


def test_profile_that_does_not_fit_is_dropped(grey, tmp_path):
    grey_profile = bytearray(rgb_profile())
    grey_profile[16:20] = b"GRAY"
    path = saved(Image.fromarray(grey), tmp_path / "grey.png", icc_profile=bytes(grey_profile))
    with pytest.warns(SdInpaintWarning, match="profile"):
        image = read_image(path)
    assert image.icc_profile is None
    assert (image.rgb == grey[..., None]).all()


def test_grey_profile_is_applied(grey, monkeypatch):
    """The colour engine is asked with the image's own profile, and its answer is used."""
    asked = []

    def convert(image, given, to, **options):
        asked.append((image.mode, given, options))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda stream: stream.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    for mode, space in (("L", b"GRAY"), ("CMYK", b"CMYK")):
        image = Image.fromarray(grey).convert("RGB").convert(mode)
        image.info["icc_profile"] = b"." * 16 + space + b"." * 100
        assert (read_image(image).rgb == (1, 2, 3)).all()
    assert [mode for mode, _, _ in asked] == ["L", "CMYK"]
    assert asked[1][1][16:20] == b"CMYK"


# files that are refused


def test_missing_file(tmp_path):
    refused(tmp_path / "absent.png", "IMAGE_NOT_FOUND", "control image")


def test_address_is_not_fetched():
    assert "not fetched" in refused("https://example.com/cat.png", "IMAGE_NOT_FOUND").hint


def test_folder(tmp_path):
    refused(tmp_path, "IMAGE_NOT_A_FILE")


def test_path_with_a_null_byte():
    refused("a\0b.png", "IMAGE_NOT_FOUND")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"hello, this is text", "hello"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "PS-Adobe"),
    ],
)
def test_what_is_not_an_image(tmp_path, content, word):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    error = refused(path, "IMAGE_UNREADABLE")
    assert word in error.found
    assert "PNG JPEG WEBP TIFF BMP GIF" in error.expected


def test_heic_names_the_way_to_go_on(tmp_path):
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert "pillow-heif" in refused(path, "IMAGE_UNREADABLE").hint


def test_rare_formats_are_not_decoded(rgb, tmp_path):
    path = saved(Image.fromarray(rgb), tmp_path / "image.ppm")
    refused(path, "IMAGE_UNREADABLE")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("form", ["path", "pil"])
def test_truncated_file(rgb, tmp_path, suffix, form):
    path = saved(Image.fromarray(rgb), tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    if form == "path":
        refused(path, "IMAGE_TRUNCATED")
    else:
        with Image.open(path) as image:
            refused(image, "IMAGE_TRUNCATED")


def png_with(*chunks: tuple[bytes, bytes], width: int = 72, height: int = 72) -> bytes:
    """A grey PNG of zeros with extra chunks before its data; only the header knows its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes((72 + 1) * 72)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def test_huge_text_chunk_is_explained(tmp_path):
    path = tmp_path / "text.png"
    path.write_bytes(png_with((b"zTXt", b"comment\0\0" + zlib.compress(bytes(2**22)))))
    assert "text" in refused(path, "IMAGE_UNREADABLE").found


@pytest.mark.parametrize("side", [8200, 13_000, 20_000, 2**31 - 1])
def test_pixel_budget_is_checked_on_the_header(tmp_path, side):
    """Nothing is decoded: the data of this file is far too short for its size."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_with(width=side, height=side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        refused(path, "IMAGE_TOO_LARGE")


def test_pixel_budget_holds_with_warnings_as_errors(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_with(width=13_000, height=13_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, "IMAGE_TOO_LARGE")


def test_pixel_budget_holds_for_pil_and_arrays():
    refused(Image.new("1", (8200, 8200)), "IMAGE_TOO_LARGE")
    refused(np.broadcast_to(np.zeros(3, np.uint8), (2**14, 2**13, 3)), "IMAGE_TOO_LARGE")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 100), (100, 7)])
def test_too_small(width, height):
    assert str(height) in refused(Image.new("RGB", (width, height)), "IMAGE_TOO_SMALL").found


def test_small_is_warned_about():
    with pytest.warns(SdInpaintWarning, match="very small") as caught:
        read_image(Image.new("RGB", (8, 63)))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(Image.new("RGB", (64, 64)))


# arrays and tensors that are refused


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"image": 1}])
def test_other_types_name_the_argument(source):
    refused(source, "IMAGE_TYPE", "style image")


@pytest.mark.parametrize("dtype", [np.int64, bool, np.complex64, object])
def test_arrays_of_other_types(dtype):
    error = refused(np.ones((*SIZE, 3), dtype), "IMAGE_TYPE")
    assert np.dtype(dtype).name in error.found


@pytest.mark.parametrize(("low", "high"), [(0.25, 255.0), (-1.0, 1.0), (0.0, 1.0001), (float("nan"), 1.0)])
def test_float_array_says_its_range(low, high):
    error = refused(np.linspace(low, high, 72 * 72 * 3).reshape(72, 72, 3), "IMAGE_BAD_VALUES")
    assert f"from {low:g} to {high:.7g}" in error.found or np.isnan(low)


@pytest.mark.parametrize("shape", [(*SIZE, 2), (3, *SIZE), (1, *SIZE, 3), (72,)])
def test_arrays_of_other_shapes(shape):
    assert str(shape) in refused(np.zeros(shape, np.uint8), "IMAGE_BAD_SHAPE").found


@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 3), (2, 3, *SIZE), (1, 4, *SIZE), (1, 3, 0, 72)])
def test_tensors_of_other_shapes(shape):
    assert str(shape) in refused(torch.zeros(shape), "IMAGE_BAD_SHAPE").found


def test_integer_tensor():
    refused(torch.zeros((3, *SIZE), dtype=torch.uint8), "IMAGE_TYPE")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.01, 255.0])
def test_tensor_values(bad):
    tensor = torch.zeros(3, *SIZE)
    tensor[1, 2, 3] = bad
    assert f"{bad:g}" in refused(tensor, "IMAGE_BAD_VALUES").found


def test_tensor_that_looks_like_zero_to_one_is_pointed_out():
    with pytest.warns(SdInpaintWarning, match="below 0") as caught:
        read_image(torch.rand(3, *SIZE))
    assert caught[0].filename == __file__


# what the models see


def test_all_bytes_survive_the_round_trip():
    rgb = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(rgb)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert np.array_equal(to_uint8(tensor)[0], rgb)


def test_conversion_keeps_rows_columns_and_channels_apart(rgb):
    tensor = to_tensor(rgb)
    assert tensor[0, 2, 5, 7] == pytest.approx(2 * rgb[5, 7, 2] / 255 - 1)


def test_uint8_rounds_and_clamps():
    values = torch.tensor([-3.0, -1.0, -0.998, 0.0, 0.999, 1.0, 7.0]).reshape(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_non_finite_becomes_an_image(bad):
    tensor = torch.zeros(2, 3, 8, 8)
    tensor[1, 2, 3, 4] = bad
    with pytest.raises(NumericError, match="1 of 384 values"):
        to_uint8(tensor)


@pytest.mark.peer
def test_conversion_is_that_of_diffusers(rgb):
    from diffusers.image_processor import VaeImageProcessor

    peer = VaeImageProcessor()
    assert torch.equal(to_tensor(rgb), peer.preprocess(Image.fromarray(rgb)))
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = [np.asarray(image) for image in peer.postprocess(noise, output_type="pil")]
    assert np.array_equal(to_uint8(noise), np.stack(expected))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8, 64]))
@settings(max_examples=60, deadline=None)
def test_padding_and_crop_are_inverse(height, width, multiple):
    image = torch.rand(1, 2, height, width)
    padded, crop = pad_to_multiple(image, multiple)
    rows, columns = padded.shape[-2:]
    assert rows % multiple == columns % multiple == 0
    assert rows - height < multiple
    assert columns - width < multiple
    assert torch.equal(padded[(..., *crop)], image)


def test_reflection_is_torchs_where_torch_can():
    image = torch.rand(1, 3, 9, 13)
    padded, _ = pad_to_multiple(image, 8)
    assert torch.equal(padded, torch.nn.functional.pad(image, (0, 3, 0, 7), mode="reflect"))


def test_reflection_of_a_single_pixel():
    padded, _ = pad_to_multiple(torch.full((1, 1, 1, 1), 0.5), 8)
    assert (padded == 0.5).all()


# pasting


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_paste_changes_the_mask_alone(seed, transparent):
    generator = np.random.default_rng(seed)
    original = InputImage(
        rgb=generator.integers(0, 256, (20, 30, 3), dtype=np.uint8),
        alpha=generator.integers(0, 256, (20, 30), dtype=np.uint8) if transparent else None,
    )
    generated = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = generator.random((20, 30)) < 0.3
    image = paste(original, generated, mask)
    pixels = np.asarray(image)
    assert image.mode == ("RGBA" if transparent else "RGB")
    assert np.array_equal(pixels[~mask][:, :3], original.rgb[~mask])
    assert np.array_equal(pixels[mask][:, :3], generated[mask])
    if original.alpha is not None:
        assert np.array_equal(pixels[~mask][:, 3], original.alpha[~mask])
        assert (pixels[mask][:, 3] == 255).all()


@pytest.mark.parametrize(("generated", "mask"), [((8, 8, 3), SIZE), ((*SIZE, 3), (8, 8)), ((*SIZE, 4), SIZE)])
def test_paste_refuses_other_sizes(rgb, generated, mask):
    with pytest.raises(ImageError) as caught:
        paste(InputImage(rgb=rgb), np.zeros(generated, np.uint8), np.zeros(mask, bool))
    assert caught.value.code == "IMAGE_BAD_SHAPE"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "image.png"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_read_or_refused(damaged, seed):
    """Whatever is in the bytes, the answer is an image or an ImageError."""
    generator = np.random.default_rng(seed)
    stream = io.BytesIO()
    image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.save(stream, ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"][seed % 6])
    data = bytearray(stream.getvalue())
    for place in generator.integers(0, min(len(data), 400), 4):
        data[place] = generator.integers(256)
    damaged.write_bytes(data[: generator.integers(1, len(data) + 1)])
    with warnings.catch_warnings(), contextlib.suppress(ImageError):
        warnings.simplefilter("ignore")
        assert read_image(damaged).rgb.dtype == np.uint8


def test_upright_file_needs_no_turning(rgb, tmp_path):
    """The helper of the orientation test stores what Pillow's own transposition undoes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(turned(Image.fromarray(rgb), 6), tmp_path / "turned.png", exif=exif)
    with Image.open(path) as image:
        assert image.size == (SIZE[0], SIZE[1])
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), rgb)
