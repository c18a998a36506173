"""Masks in every form people give them, the ones whose meaning is unclear, and what the models make of them."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdinpaint.errors import ImageError, MaskError, SdInpaintWarning
from sdinpaint.masks import Mask, binarize, is_empty, masked_image, read_mask, to_latent
from sdinpaint.masks.reading import looks_inverted

SIZE = (72, 96)


@pytest.fixture
def hole() -> np.ndarray:
    """True in a rectangle away from the borders."""
    hole = np.zeros(SIZE, bool)
    hole[20:50, 30:70] = True
    return hole


def black_and_white(hole: np.ndarray) -> Image.Image:
    return Image.fromarray(hole.astype(np.uint8) * 255)


def brush(hole: np.ndarray, colour: tuple[int, int, int], background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    return np.where(hole[..., None], np.uint8(colour), np.uint8(background))


def refused(source, code: str, size: tuple[int, int] = SIZE) -> MaskError:
    with pytest.raises(MaskError) as caught:
        read_mask(source, size, "the mask")
    assert caught.value.code == code
    assert caught.value.subject == "the mask"
    assert caught.value.hint
    return caught.value


# forms


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_pil_modes(hole, mode):
    mask = read_mask(black_and_white(hole).convert("RGB" if mode == "P" else "L").convert(mode), SIZE)
    assert mask.shape == SIZE
    assert mask.dtype == np.float32
    assert np.array_equal(mask, hole)


@pytest.mark.parametrize("values", [np.uint16(65535), np.int32(65535), np.float32(1)])
def test_deep_pil_modes(hole, values):
    assert np.array_equal(read_mask(Image.fromarray(hole * values), SIZE), hole)


def test_palette_file(hole, tmp_path):
    path = tmp_path / "mask.gif"
    black_and_white(hole).save(path)
    assert np.array_equal(read_mask(path, SIZE), hole)
    assert np.array_equal(read_mask(str(path), SIZE), hole)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 1), (1, *SIZE), (1, 1, *SIZE)])
def test_arrays_and_tensors(hole, dtype, shape):
    white = {"uint8": 255, "uint16": 65535}.get(np.dtype(dtype).name, 1)
    array = (hole * white).astype(dtype).reshape(shape)
    assert np.array_equal(read_mask(array, SIZE), hole)
    assert np.array_equal(read_mask(torch.from_numpy(array), SIZE), hole)


def test_bfloat16_tensor_and_rgb_array(hole):
    assert np.array_equal(read_mask(torch.from_numpy(hole).bfloat16(), SIZE), hole)
    assert np.array_equal(read_mask(brush(hole, (255, 255, 255)), SIZE), hole)


def test_a_mask_is_read_as_its_array_is(hole):
    soft = np.where(hole, np.float32(0.75), np.float32(0.25))
    assert np.array_equal(read_mask(Mask(soft), SIZE), soft)
    with pytest.warns(SdInpaintWarning, match="scaled"):
        assert np.array_equal(read_mask(Mask(soft.repeat(2, axis=0).repeat(2, axis=1)), SIZE) >= 0.5, hole)
    assert "96 rows, 72 columns" in refused(Mask(soft.T), "MASK_SIZE").found


def test_what_was_given_is_not_changed():
    soft = np.full(SIZE, 0.01, np.float32)
    read_mask(soft, SIZE)[:] = 1
    tensor = torch.from_numpy(soft)
    read_mask(tensor, SIZE)[:] = 1
    assert (soft == np.float32(0.01)).all()


def test_exif_orientation(hole, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    black_and_white(hole).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert np.array_equal(read_mask(path, SIZE), hole)


# soft values


@given(st.just(0) | st.integers(2, 255))
@settings(deadline=None)
def test_every_level_of_grey(level):
    mask = read_mask(np.full(SIZE, level, np.uint8), SIZE)
    assert mask[0, 0] == (np.float32(level / 255) if level >= 4 else 0)
    assert bool(binarize(mask)[0, 0]) == (level >= 128)
    assert is_empty(mask) == (level < 128)


def test_half_is_repainted():
    assert binarize(np.float32([[0.5, 0.49999997]])).tolist() == [[True, False]]


def test_jpeg_noise_is_ignored_and_soft_edges_stay(hole):
    stream = io.BytesIO()
    black_and_white(hole).convert("RGB").save(stream, "JPEG", quality=60)
    mask = read_mask(Image.open(stream), SIZE)
    assert np.array_equal(binarize(mask), hole)
    assert not mask[:8].any()
    soft = np.linspace(0, 1, 72 * 96, dtype=np.float32).reshape(SIZE)
    assert np.array_equal(read_mask(soft, SIZE)[2:], soft[2:])


@pytest.mark.parametrize("white", [True, False])
def test_all_white_and_all_black_are_fine(white):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = read_mask(np.full(SIZE, white), SIZE)
    assert (mask == white).all()
    assert is_empty(mask) is not white


# size


def test_same_aspect_is_scaled_with_a_warning(hole):
    twice = hole.repeat(2, axis=0).repeat(2, axis=1)
    with pytest.warns(SdInpaintWarning, match="144 rows, 192 columns; scaled to 72 rows, 96 columns") as caught:
        mask = read_mask(twice, SIZE)
    assert caught[0].filename == __file__
    assert np.array_equal(binarize(mask), hole)
    assert 0 <= mask.min() <= mask.max() <= 1


@pytest.mark.parametrize(
    ("shape", "fits"), [((100, 100), True), ((100, 101), True), ((102, 100), False), ((50, 99), False)]
)
def test_aspect_within_one_percent(shape, fits):
    if fits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SdInpaintWarning)
            assert read_mask(np.zeros(shape, bool), (200, 200)).shape == (200, 200)
    else:
        error = refused(np.zeros(shape, bool), "MASK_SIZE", (200, 200))
        assert f"{shape[0]} rows, {shape[1]} columns" in error.found
        assert "200 rows, 200 columns" in error.expected


def test_transposed_mask_is_refused():
    refused(np.zeros(SIZE[::-1], bool), "MASK_SIZE")


# colour and alpha


@pytest.mark.parametrize(
    ("colour", "background", "remedy"),
    [
        ((255, 0, 0), (0, 0, 0), "getchannel('R')"),
        ((0, 200, 30), (0, 0, 0), "getchannel('G')"),
        ((10, 10, 90), (0, 0, 0), "getchannel('B')"),
        ((255, 0, 0), (255, 255, 255), "inverted"),
    ],
)
def test_coloured_brush_is_refused_with_the_channel_to_take(hole, colour, background, remedy):
    error = refused(Image.fromarray(brush(hole, colour, background)), "MASK_COLOURED")
    assert remedy in error.hint
    assert f"{hole.mean():.1%}" in error.found


def test_the_remedy_works(hole):
    image = Image.fromarray(brush(hole, (255, 0, 0)))
    assert np.array_equal(read_mask(image.getchannel("R"), SIZE), hole)


def test_photograph_is_refused():
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    refused(photo, "MASK_COLOURED")
    refused(np.full((*SIZE, 3), (255, 0, 0), np.uint8), "MASK_COLOURED")


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0)])
@pytest.mark.parametrize("under", [(0, 0, 0), None])
def test_mask_in_the_alpha_channel_is_found(hole, colour, under):
    """`under` is what lies below transparent pixels: the brush's colour, or black as in drawing programs."""
    rgb = brush(hole, colour, colour if under is None else under)
    image = Image.fromarray(np.dstack([rgb, hole.astype(np.uint8) * 255]))
    with pytest.warns(SdInpaintWarning, match="alpha channel: opaque is repainted") as caught:
        mask = read_mask(image, SIZE)
    assert caught[0].filename == __file__
    assert np.array_equal(mask, hole)


def test_soft_alpha(hole):
    alpha = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (72, 1))
    image = Image.fromarray(np.dstack([np.full((*SIZE, 3), 255, np.uint8), alpha]))
    with pytest.warns(SdInpaintWarning, match="alpha"):
        assert read_mask(image, SIZE)[0, 48] == pytest.approx(alpha[0, 48] / 255)


@pytest.mark.parametrize("alpha", [255, 120, 0])
def test_even_alpha_says_nothing(hole, alpha):
    image = black_and_white(hole).convert("RGBA")
    image.putalpha(alpha)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_mask(image, SIZE), hole)


def test_image_with_holes_is_ambiguous(hole):
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(np.dstack([photo, 255 - hole.astype(np.uint8) * 255]))
    assert "getchannel('A')" in refused(image, "MASK_AMBIGUOUS").hint


# inversion


def test_inverted_mask_is_obeyed_and_suspected(hole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_mask(~hole, SIZE), ~hole)
    assert looks_inverted(~hole)


def test_masks_that_are_not_inverted_are_not_suspected(hole):
    outpaint = np.ones(SIZE, bool)
    outpaint[:, :30] = False
    inner = np.zeros(SIZE, bool)
    inner[4:-4, 4:-4] = True
    frame = np.ones(SIZE, bool)
    frame[12:-12, 12:-12] = False
    everything, nothing = np.ones(SIZE, bool), np.zeros(SIZE, bool)
    assert not any(looks_inverted(mask) for mask in (hole, outpaint, inner, frame, everything, nothing))


# what is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.01, 255.0])
def test_float_values_out_of_range(bad):
    array = np.zeros(SIZE)
    array[3, 4] = bad
    assert f"{bad:g}" in refused(array, "MASK_BAD_VALUES").found
    refused(torch.from_numpy(array), "MASK_BAD_VALUES")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_zero_and_one_in_whole_numbers_would_repaint_nothing(hole, dtype):
    error = refused(hole.astype(dtype), "MASK_BAD_VALUES")
    assert "from 0 to 1" in error.found
    assert "mask > 0" in error.hint


@pytest.mark.parametrize("dtype", [np.int64, np.int8, object, complex, "U1"])
def test_other_value_types(hole, dtype):
    refused(hole.astype(dtype), "MASK_TYPE")


@pytest.mark.parametrize("shape", [(2, *SIZE), (3, *SIZE), (72,), (0, 0), (*SIZE, 2)])
def test_other_shapes(shape):
    assert str(shape) in refused(np.zeros(shape, np.float32), "MASK_BAD_SHAPE").found


@pytest.mark.parametrize("source", [None, 3, [[1, 0]]])
def test_other_types(source):
    refused(source, "MASK_TYPE")


def test_broken_file_names_the_mask(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="mask") as caught:
        read_mask(path, SIZE)
    assert caught.value.code == "IMAGE_UNREADABLE"


# for the models


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_latent_mask(seed, rows, columns):
    mask = (torch.rand(2, 1, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(seed)) < 0.02).float()
    cells = mask.reshape(2, 1, rows, 8, columns, 8)
    assert torch.equal(to_latent(mask), cells[:, :, :, 0, :, 0])
    assert torch.equal(to_latent(mask, cover="max"), cells.amax(dim=(3, 5)))


def test_thin_line_slips_through_nearest_but_not_through_max():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 9:16] = 1
    assert not to_latent(mask).any()
    assert to_latent(mask, cover="max").sum() == 8


def test_masked_image_is_mid_grey_where_repainted():
    image = torch.full((2, 3, 8, 8), -0.75)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, :3], mask[:, :, :, 3:5], mask[0, 0, 7, 7] = 1, 0.49, 0.5
    result = masked_image(image, mask)
    assert (result[..., :3] == 0).all()
    assert (result[..., :7, 3:] == -0.75).all()
    assert (result[0, :, 7, 7] == 0).all()
    assert (result[1, :, 7, 7] == -0.75).all()
    assert masked_image(image.bfloat16(), mask).dtype == torch.bfloat16


@pytest.mark.peer
def test_binarisation_and_latent_mask_are_those_of_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    grey = np.random.default_rng(0).integers(2, 256, (64, 96), dtype=np.uint8)
    peer = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected = peer.preprocess(Image.fromarray(grey))
    ours = torch.from_numpy(binarize(read_mask(grey, (64, 96))).astype(np.float32))[None, None]
    assert torch.equal(ours, expected)
    assert torch.equal(to_latent(ours), torch.nn.functional.interpolate(expected, size=(8, 12)))
