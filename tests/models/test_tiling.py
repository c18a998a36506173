"""Large images through the autoencoder in bands: the same images, from less memory."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from closeness import close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdinpaint.errors import SdInpaintWarning
from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE, guarded_vae, tiling
from sdinpaint.models.guarded_vae import GuardedVAE

HALVES = "encode", "decode"
SIZES = [  # latent height and width, tile
    (16, 6, 27),  # 8 bands of 16 rows
    (17, 6, 27),  # 8 bands of 16 rows, and one of 8
    (17, 6, 36),  # 5 bands of 27 rows, and one of a single row
    (5, 3, 256),  # one band
]


@pytest.fixture(scope="module")
def vae(tiny):
    torch.manual_seed(0)
    return VAE(tiny.vae).eval().requires_grad_(False)


def draw(half, height, width, *, batch=1, dtype=torch.float32):
    shape = (batch, 4, height, width) if half == "decode" else (batch, 3, 8 * height, 8 * width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def whole(vae, half, given):
    """At once: the image, or the mean and the deviation side by side."""
    return vae.decode(given) if half == "decode" else torch.cat(vae.posterior(given), dim=1)


def tiled(vae, half, given, tile):
    return tiling.decode(vae, given, tile) if half == "decode" else torch.cat(tiling.posterior(vae, given, tile), dim=1)


def excess(vae, half, given, tile):
    """By how much the error of the bands exceeds twice the error of the whole, beside a rounding of the result."""
    reference = whole(copy.deepcopy(vae).double(), half, given.double())
    error, plain = (
        (out.double() - reference).abs().max() for out in (tiled(vae, half, given, tile), whole(vae, half, given))
    )
    return float(error - 2 * plain - torch.finfo(given.dtype).eps * reference.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width", "tile"), SIZES)
@pytest.mark.parametrize("half", HALVES)
def test_bands_make_the_same_as_the_whole(vae, half, height, width, tile, dtype):
    vae = copy.deepcopy(vae).to(dtype)
    given = draw(half, height, width, batch=2, dtype=dtype)
    # float64 against itself: the error of the whole is 0 there, and some hundred roundings are between the two
    assert excess(vae, half, given, tile) <= (1e-12 if dtype == torch.float64 else 0)


def with_statistics_of_their_own(sabotage):
    sabotage(tiling, "shared_norm", lambda norm, source: norm)


def with_a_row_too_few_around(sabotage):
    def local(layer, source, halo, *, right=tiling.local, **scale):
        return right(layer, source, halo if scale else halo - 1, **scale)

    sabotage(tiling, "local", local)


def written_before_the_next_is_made(sabotage):
    def keep(source, into=None):
        bands = list(source.bands())
        if into is None:
            into = torch.cat([source.pull(*band) for band in bands], dim=2)
        for top, bottom in bands:
            into[:, :, top:bottom] = source.pull(top, bottom)
        return tiling.in_memory(into, source.tile)

    sabotage(tiling, "keep", keep)


@pytest.mark.parametrize(
    "broken", [with_statistics_of_their_own, with_a_row_too_few_around, written_before_the_next_is_made]
)
@pytest.mark.parametrize("half", HALVES)
def test_wrong_tiles_are_detected(vae, half, broken, sabotage):
    broken(sabotage)
    assert excess(vae, half, draw(half, 16, 6), 27) > 1e-4


@pytest.mark.parametrize("half", HALVES)
def test_what_is_given_stays(vae, half):
    given = draw(half, 9, 6)
    before = given.clone()
    tiled(vae, half, given, 32)
    assert torch.equal(given, before)


class Allocated(TorchDispatchMode):
    """Counts the bytes that operations put out, until they are freed."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.living:
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.living.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.living.values()))
        return out


def peak(run, *args):
    with Allocated() as allocated:
        run(*args)
    return allocated.peak


@pytest.fixture(scope="module")
def released_size():
    """The released autoencoder without numbers; its attention, which runs at once in any case, left out."""
    with torch.device("meta"):
        vae = VAE(SD15_INPAINT.vae).requires_grad_(False)
    vae.encoder.mid.attn_1 = vae.decoder.mid.attn_1 = nn.Identity()
    return vae


@pytest.mark.parametrize("half", HALVES)
def test_tiles_take_less_than_half_the_memory(released_size, half):
    given = draw(half, 64, 68).to("meta")
    assert peak(tiled, released_size, half, given, guarded_vae.TILE // 2) < 0.5 * peak(
        whole, released_size, half, given
    )


@pytest.mark.parametrize(("half", "maps"), [("encode", 1.25), ("decode", 1.5)])
def test_memory_grows_by_what_is_kept_only(released_size, half, maps):
    """An image of twice the height takes an image more, and so many maps of the finest level's channels."""
    small, large = (draw(half, height, 32).to("meta") for height in (32, 64))
    added, config = small.element_size() * 256 * 256, released_size.config
    grown = peak(tiled, released_size, half, large, 64) - peak(tiled, released_size, half, small, 64)
    assert grown <= (maps * config.channels + config.in_channels) * added
    assert peak(whole, released_size, half, large) > 2 * (maps * config.channels + config.in_channels) * added


@pytest.mark.parametrize("half", HALVES)
def test_only_large_images_are_tiled(vae, half, monkeypatch, substitute):
    in_bands, run_bands = [], tiling.RUNS[half]
    monkeypatch.setitem(tiling.RUNS, half, lambda *given: in_bands.append(given[2]) or run_bands(*given))

    def run(given, **tile):
        in_bands.clear()
        out = getattr(GuardedVAE(vae), half)(given, **tile)
        return out if half == "decode" else torch.cat(out, dim=1)

    substitute(guarded_vae, WHOLE_PIXELS=64 * 16 * 9, TILE=32)
    fits, large = draw(half, 16, 9), draw(half, 17, 9)
    for given, tile, bands in ((fits, {}, []), (large, {}, [32]), (fits, {"tile": 16}, [16]), (large, {"tile": 0}, [])):
        found = run(given, **tile)
        assert in_bands == bands
        assert close(found, tiled(vae, half, given, bands[0]) if bands else whole(vae, half, given))


@pytest.mark.parametrize("half", HALVES)
def test_what_overflows_is_run_in_float32_bands(vae, half):
    loud = copy.deepcopy(vae)
    layer = getattr(loud, f"{half}r").conv_in
    layer.weight.mul_(30_000 / layer.weight.abs().max())
    given = draw(half, 17, 9)
    with pytest.warns(SdInpaintWarning, match=f"the image is {half}d in float32"):
        found = getattr(GuardedVAE(loud.half()), half)(given, tile=32)
    found = found if half == "decode" else torch.cat(found, dim=1)
    expected = tiled(copy.deepcopy(loud).float(), half, given, 32)
    assert close(found, expected)
    assert not close(found, expected.half().float())
