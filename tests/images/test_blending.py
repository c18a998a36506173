"""The generated image joined to the original: known pixels exact, colours recovered, edges met."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdinpaint.errors import ImageError, NumericError, SettingError
from sdinpaint.images import blending
from sdinpaint.images.blending import BLENDS, compose, feather, match_color, poisson

SIZE = (45, 61)
JOINS = {"match": match_color, "feather": feather, "poisson": poisson}


def box(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    hole = np.zeros(size, bool)
    hole[top:bottom, left:right] = True
    return hole


HOLES = {
    "inside": box(10, 35, 15, 48),
    "corner": box(0, 20, 0, 25),
    "across": box(0, 45, 20, 40),
    "one pixel": box(7, 8, 9, 10),
    "two": box(3, 12, 3, 15) | box(20, 42, 30, 55),
    "ring": box(10, 35, 15, 48) & ~box(20, 24, 25, 30),
    "scattered": np.random.default_rng(1).random(SIZE) < 0.4,
    "all but one": ~box(7, 8, 9, 10),
    "everything": np.ones(SIZE, bool),
    "nothing": np.zeros(SIZE, bool),
}
each_hole = pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES)
each_edged_hole = pytest.mark.parametrize("name", [name for name in HOLES if name not in ("everything", "nothing")])
each_join = pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)


def random_image(seed: int, low: int = 0, high: int = 256, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (*size, 3), dtype=np.uint8)


def smooth_image(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Levels from about 60 to 190, in waves."""
    rows, columns = np.indices(size)
    phases = np.random.default_rng(seed).uniform(0, 6, 6).reshape(3, 2)
    waves = [np.sin(rows / 7 + one) + np.cos(columns / 9 + other) for one, other in phases]
    return (125 + 32 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def error(image: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    """Root mean square difference."""
    return float(np.sqrt(((image[where].astype(float) - truth[where]) ** 2).mean()))


def mean_step(image: np.ndarray, hole: np.ndarray) -> float:
    """Mean difference of neighbours of which one is in the hole."""
    down = np.abs(np.diff(image.astype(int), axis=0))[hole[1:] != hole[:-1]]
    across = np.abs(np.diff(image.astype(int), axis=1))[hole[:, 1:] != hole[:, :-1]]
    return float(np.concatenate([down, across]).mean())


# known pixels


@each_hole
@pytest.mark.parametrize(("dtype", "match"), [("u1", False), ("u1", True), ("f2", False), ("f4", True), ("f8", False)])
@pytest.mark.parametrize("blend", BLENDS)
def test_known_pixels_stay_bit_for_bit(blend, dtype, match, hole):
    original, generated = random_image(0), random_image(1).astype(dtype)
    composed = compose(original, generated, hole, blend=blend, match=match)
    assert composed.dtype == np.uint8
    assert composed.shape == original.shape
    assert np.array_equal(composed[~hole], original[~hole])
    assert np.array_equal(original, random_image(0))
    assert np.array_equal(generated, random_image(1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 999), st.sampled_from(BLENDS))
def test_any_size_and_any_hole(height, width, share, seed, blend):
    original, generated = (random_image(seed + extra, size=(height, width)) for extra in (0, 1))
    hole = np.random.default_rng(seed).random((height, width)) < share
    composed = compose(original, generated, hole, blend=blend, match=True)
    assert np.array_equal(composed[~hole], original[~hole])


def test_a_changed_known_pixel_would_be_seen(sabotage):
    """The first test fails where the join is returned without the original's pixels."""
    sabotage(blending.np, "where", lambda hole, joined, original: joined)
    with pytest.raises(AssertionError):
        test_known_pixels_stay_bit_for_bit("none", "u1", False, HOLES["inside"])


def test_none_is_the_generated_image():
    original, hole = random_image(0), HOLES["two"]
    levels = random_image(1) + np.float32(0.3)
    levels[30, 40] = (-7, 300, 128.5)
    composed = compose(original, levels, hole)
    assert composed[30, 40].tolist() == [0, 255, 128]
    levels[30, 40] = random_image(1)[30, 40]
    assert np.array_equal(compose(original, levels, hole)[hole], random_image(1)[hole])


@each_hole
@each_join
def test_what_is_removed_has_no_part(join, hole):
    original, generated = random_image(0), random_image(1)
    other = np.where(hole[..., None], 255 - original, original)
    assert np.array_equal(join(generated, original, hole)[hole], join(generated, other, hole)[hole])


@each_hole
@each_join
def test_a_perfect_model_is_left_alone(join, hole):
    """Where the known pixels came out as they are, nothing is corrected inside."""
    generated = smooth_image(1)
    original = np.where(hole[..., None], random_image(0), generated)
    assert np.array_equal(join(generated, original, hole)[hole], generated[hole])


@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("blend", BLENDS)
def test_everything_is_as_generated_and_nothing_as_it_was(blend, match):
    original, generated = random_image(0), random_image(1)
    options = {"blend": blend, "match": match}
    assert np.array_equal(compose(original, generated, HOLES["everything"], **options), generated)
    assert np.array_equal(compose(original, generated, HOLES["nothing"], **options), original)


@each_join
def test_turned_views(join):
    original, generated, hole = (array[::-1, ::-1] for array in (random_image(0), random_image(1), HOLES["two"]))
    assert np.array_equal(join(generated, original, hole), join(generated.copy(), original.copy(), hole.copy()))


# colours


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gain", "offset"), [(1, 0), (1, 12), (0.8, 30), (1.2, -25), (0.9, -10)])
def test_match_recovers_gain_and_offset(gain, offset, seed):
    """Where the ring shows such levels, the model's noise and the rounding are left of it."""
    truth, noise = smooth_image(seed, (96, 96)), np.random.default_rng(seed).normal(0, 2, (96, 96, 3))
    hole = box(24, 72, 20, 76, (96, 96))
    shown = truth[blending._reach(hole, 4) & ~hole]
    within = hole & ((truth >= shown.min(axis=0)) & (truth <= shown.max(axis=0))).all(axis=-1)
    matched = match_color(gain * truth + offset + noise, truth, hole)
    assert within.sum() > hole.sum() / 2
    assert error(matched, truth, within) < 1.05 * np.hypot(2 / gain, np.sqrt(1 / 12))


def test_match_corrects_each_channel_by_itself():
    truth, hole = smooth_image(0), HOLES["inside"]
    shift = np.array([9, 0, -14])
    matched = match_color(truth + shift.astype(float), truth, hole)
    assert np.abs(matched[hole].astype(int) - truth[hole]).max() <= 1


def test_match_ignores_what_something_new_covers():
    """A third of the ring shows the new object, not the old image."""
    truth, hole = smooth_image(0, (96, 96)), box(24, 72, 20, 76, (96, 96))
    generated = truth + 10.0
    generated[60:] = (250, 20, 20)
    seen = hole & ~box(60, 96, 0, 96, (96, 96))
    assert error(match_color(generated, truth, hole), truth, seen) < 1


def test_match_of_a_flat_ring_is_an_offset():
    """Noise alone takes little contrast away: less than 1 level of its 3."""
    rng = np.random.default_rng(0)
    original = np.full((*SIZE, 3), 120, np.uint8)
    generated = 130 + rng.normal(0, 3, (*SIZE, 3))
    matched = match_color(generated, original, HOLES["inside"]).astype(float)
    change = (matched - generated)[HOLES["inside"]]
    assert np.abs(change.mean() + 10) < 0.2
    assert change.std() < 1


def test_match_of_few_pixels_changes_little():
    original, generated = np.full((*SIZE, 3), 100, np.uint8), np.full((*SIZE, 3), 160, np.uint8)
    few = match_color(generated, original, HOLES["all but one"])
    many = match_color(generated, original, HOLES["inside"])
    assert (160 - few[HOLES["all but one"]].astype(int) <= 6).all()
    assert (160 - many[HOLES["inside"]].astype(int) >= 58).all()


def test_match_does_not_extrapolate_to_new_colours():
    """The ring is dark and has too much contrast; a light thing in the hole is shifted as the lightest of the ring."""
    truth = (smooth_image(0) * 0.4).round().astype(np.uint8)
    hole = HOLES["inside"]
    generated = 1.3 * truth + 5
    generated[20:25, 25:30] = 240
    shift = 240 - match_color(generated, truth, hole)[22, 27].astype(int)
    ring = blending._reach(hole, 4) & ~hole
    largest = (generated - truth)[ring].max(axis=0)
    assert (shift <= np.ceil(largest)).all()
    assert (shift > 0).all()


# edges


@pytest.mark.parametrize("name", ["inside", "corner", "across", "one pixel", "two", "ring"])
def test_poisson_is_the_dense_solution(name):
    """Written from the definition: each difference in the hole is the mean of its neighbours in the image."""
    original, generated, hole = random_image(0, 100, 140), random_image(1, 110, 150), HOLES[name]
    place = {pixel: index for index, pixel in enumerate(map(tuple, np.argwhere(hole)))}
    matrix, right = np.zeros((len(place), len(place))), np.zeros((len(place), 3))
    for (row, column), index in place.items():
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if not (0 <= near[0] < SIZE[0] and 0 <= near[1] < SIZE[1]):
                continue
            matrix[index, index] += 1
            if near in place:
                matrix[index, place[near]] -= 1
            else:
                right[index] += original[near].astype(float) - generated[near]
    expected = generated[hole] + np.linalg.solve(matrix, right)
    assert np.abs(poisson(generated, original, hole)[hole] - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("name", ["inside", "one pixel", "two", "ring"])
def test_poisson_continues_a_ramp_of_differences(name):
    """A plane has no Laplacian: it is its own membrane."""
    truth = smooth_image(0)
    rows, columns = np.indices(SIZE)
    ramp = (0.4 * rows - 0.3 * columns + 3)[..., None] * [1, 0.5, -1]
    assert np.abs(poisson(truth + ramp, truth, HOLES[name]).astype(int) - truth)[HOLES[name]].max() <= 0


def test_poisson_leaves_the_border_of_the_image_free():
    """A hole across the whole image: the difference is 10 on one side and 30 on the other, and linear between."""
    original = np.full((*SIZE, 3), 100, np.uint8)
    generated = np.full((*SIZE, 3), 90.0)
    generated[:, 40:] = 70
    generated[:, 20:40] = 50
    expected = 50 + 10 + 20 * np.arange(1, 21) / 21
    blended = poisson(generated, original, HOLES["across"])[:, 20:40]
    assert np.abs(blended - expected[:, None]).max() <= 0.5


def test_a_fixed_border_would_be_seen(sabotage):
    """The tests above fail where the image's border is held at no difference."""

    def fixed(values, hole):
        framed = solve(np.pad(values, ((1, 1), (1, 1), (0, 0))), np.pad(hole, 1))
        return framed[1:-1, 1:-1]

    solve = blending._membrane
    sabotage(blending, "_membrane", fixed)
    with pytest.raises(AssertionError):
        test_poisson_leaves_the_border_of_the_image_free()
    with pytest.raises(AssertionError):
        test_poisson_is_the_dense_solution("corner")


def test_poisson_keeps_gradients():
    """A shift of the whole image by one colour is taken away, with every detail of the hole kept."""
    original = np.full((*SIZE, 3), 100, np.uint8)
    generated = np.where(HOLES["inside"][..., None], random_image(1, 80, 180), np.uint8(117))
    blended = poisson(generated, original, HOLES["inside"])
    assert np.array_equal(blended[HOLES["inside"]], generated[HOLES["inside"]] - 17)


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("name", ["inside", "corner", "two", "ring"])
def test_feather_fades_from_the_edge_to_its_width(name, width):
    """The difference of 40 is taken away beside the known pixels, less and less inwards, and not beyond the width."""
    hole = HOLES[name]
    original, generated = np.full((*SIZE, 3), 100, np.uint8), np.full((*SIZE, 3), 140, np.uint8)
    left = feather(generated, original, hole, width=width)[..., 0].astype(int) - 100
    depth = np.zeros(SIZE, int)
    for row, column in np.argwhere(hole):
        depth[row, column] = np.abs(np.argwhere(~hole) - (row, column)).max(axis=1).min()
    assert (left[depth == 1] == 0).all()
    assert (left[depth > width] == 40).all()
    by_depth = [left[depth == level] for level in range(1, width + 2) if (depth == level).any()]
    assert all(values.min() == values.max() for values in by_depth)
    assert np.all(np.diff([values[0] for values in by_depth]) > 0) or width == 16


def test_feather_follows_the_difference_along_the_edge():
    """Too light on the left, too dark on the right, by 30: beside each edge a tenth of its own side's is left."""
    original = np.full((*SIZE, 3), 120, np.uint8)
    generated = np.full((*SIZE, 3), 150, np.uint8)
    generated[:, 31:] = 90
    blended = feather(generated, original, HOLES["inside"])
    assert np.abs(blended[12:33, 15].astype(int) - 120).max() <= 3
    assert np.abs(blended[12:33, 47].astype(int) - 120).max() <= 3


@pytest.mark.parametrize("join", [feather, poisson])
@each_edged_hole
def test_edges_are_met(join, name):
    """Across each pair of neighbours at the edge, the mean step of a shifted image falls to that of the truth."""
    truth, hole = smooth_image(3), HOLES[name]
    blended = np.where(hole[..., None], join(truth + 25.0, truth, hole), truth)
    assert mean_step(blended, hole) <= mean_step(truth, hole) + 0.5


def test_match_goes_before_the_blend():
    """Deep in the hole a feathered edge changes nothing, so what is corrected there is the match."""
    truth, hole = smooth_image(0, (96, 96)), box(10, 86, 10, 86, (96, 96))
    deep = box(40, 56, 40, 56, (96, 96))
    generated = truth + 20.0
    assert error(compose(truth, generated, hole, blend="feather"), truth, deep) == 20
    assert error(compose(truth, generated, hole, blend="feather", match=True), truth, deep) < 1.5


# what is refused


@pytest.mark.parametrize(("blend", "hint"), [("poison", "poisson"), ("Feather", "feather"), ("xyz", ""), (7, "")])
def test_unknown_blend_lists_the_known(blend, hint):
    with pytest.raises(SettingError) as caught:
        compose(random_image(0), random_image(1), HOLES["inside"], blend=blend)
    assert caught.value.code == "SETTING_BLEND"
    assert repr(blend) in caught.value.found
    assert all(name in caught.value.expected for name in BLENDS)
    assert caught.value.hint == (f"did you mean {hint!r}?" if hint else "")


@pytest.mark.parametrize(("generated", "hole"), [((8, 8, 3), SIZE), ((*SIZE, 3), (8, 8)), ((*SIZE, 4), SIZE)])
def test_other_sizes(generated, hole):
    with pytest.raises(ImageError) as caught:
        compose(random_image(0), np.zeros(generated, np.uint8), np.zeros(hole, bool))
    assert caught.value.code == "IMAGE_BAD_SHAPE"
    assert str(generated) in caught.value.found


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_non_finite_becomes_an_image(bad):
    generated = np.zeros((*SIZE, 3))
    generated[1, 2, 0] = bad
    with pytest.raises(NumericError, match="1 of 8235 values"):
        compose(random_image(0), generated, HOLES["inside"])


def test_only_poisson_needs_the_extra(without):
    without("scipy.sparse")
    for blend in ("none", "feather"):
        compose(random_image(0), random_image(1), HOLES["inside"], blend=blend, match=True)
    with pytest.raises(SettingError, match=r"sdinpaint\[mask\]") as caught:
        compose(random_image(0), random_image(1), HOLES["inside"], blend="poisson")
    assert caught.value.code == "SETTING_EXTRA"
