"""Scenes are drawn as described, holes tell nothing, and the judge names what it should and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdinpaint.masks.generator import KINDS
from sdinpaint.training import scenes
from sdinpaint.training.judge import NONE, Verdict, judge
from sdinpaint.training.scenes import COLORS, MASK_KINDS, SHAPES, Background, Scene, Thing

PLAIN = Background(wall=(200, 205, 210), floor=(160, 155, 150), horizon=0.5, light=1.0)


def drawn(count, seed):
    """(scene, thing asked for, hole, image, image without the thing), `count` times."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = scenes.random_scene(rng)
        thing = scene.things[0]
        hole = scenes.object_mask(rng, scene, thing)
        yield scene, thing, hole, scenes.render(scene), scenes.render(scenes.without(scene, thing))


def degraded(image, rng, factor=4, noise=6.0):
    """Blurred by reducing and enlarging, with noise: what a small autoencoder does to an image."""
    side = len(image)
    small = Image.fromarray(image).resize((side // factor, side // factor), Image.Resampling.BOX)
    blurred = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)
    return np.clip(blurred + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def right_share(cases):
    """The shares of right colours and of right shapes over (verdict, thing) pairs."""
    cases = list(cases)
    return (
        np.mean([verdict.color == thing.color for verdict, thing in cases]),
        np.mean([verdict.shape == thing.shape for verdict, thing in cases]),
    )


# --- drawing ---


def test_the_same_seed_gives_the_same_scene_image_and_hole():
    for one, other in zip(drawn(5, seed=3), drawn(5, seed=3), strict=True):
        assert one[:2] == other[:2]
        for first, second in zip(one[2:], other[2:], strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("size", [64, 128, 192])
def test_images_scale(size):
    scene = scenes.random_scene(np.random.default_rng(0))
    image = scenes.render(scene, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    reduced = Image.fromarray(scenes.render(scene, 2 * size)).resize((size, size), Image.Resampling.BOX)
    assert np.abs(np.asarray(reduced, dtype=np.float64) - image).mean() < 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_silhouette_is_what_the_thing_paints_and_not_its_shadow(shape):
    thing = Thing(shape, "red", 0.5, 0.6, 0.2)
    red, blue = (scenes.render(Scene(PLAIN, (replace(thing, color=color),))) for color in ("red", "blue"))
    painted = np.abs(red.astype(int) - blue).max(-1) > 60
    region = scenes.silhouette(thing)
    assert (region & painted).sum() / (region | painted).sum() > 0.96


def test_silhouettes_of_one_size_differ_strongly():
    regions = [scenes.silhouette(Thing(shape, "red", 0.5, 0.5, 0.2)) for shape in SHAPES]
    for i, one in enumerate(regions):
        for other in regions[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.8


def test_things_stand_apart_inside_the_image_on_the_floor():
    for scene, *_ in drawn(200, seed=4):
        for thing in scene.things:
            assert thing.x > thing.radius
            assert thing.x + thing.radius < 1
            assert scene.background.horizon < thing.y + thing.radius < 1
        assert sum(scenes.silhouette(thing).astype(int) for thing in scene.things).max() == 1
        assert len({(thing.shape, thing.color) for thing in scene.things}) == len(scene.things)


def test_light_and_shadow_change_sides():
    thing = Thing("ball", "green", 0.5, 0.6, 0.2)
    flat = replace(PLAIN, wall=PLAIN.floor)
    from_right = scenes.render(Scene(flat, (thing,)))
    from_left = scenes.render(Scene(replace(flat, light=-1.0), (thing,)))
    assert np.abs(from_right[:, ::-1].astype(int) - from_left).max() <= 2
    assert np.abs(from_right.astype(int) - from_left).max() > 30


def test_nothing_else_changes_where_a_thing_is_taken_away():
    for scene, thing, hole, image, empty in drawn(60, seed=5):
        assert thing not in scenes.without(scene, thing).things
        change = np.abs(image.astype(int) - empty).max(-1)
        assert change[~hole].mean() < 0.5
        assert change[hole].mean() > 10


# --- captions ---


def test_captions_name_the_thing_first_in_few_lower_case_words():
    rng = np.random.default_rng(6)
    words = set()
    for scene, thing, *_ in drawn(400, seed=6):
        caption = scenes.captions(rng, scene, thing)
        assert f"{thing.color} {thing.shape}" in caption
        assert caption.split(" next to ")[0].endswith((thing.shape, "floor", "left", "right", "middle"))
        for named in (caption, scenes.scene_caption(rng, scene), scenes.empty_caption(rng)):
            words |= set(named.split())
    assert all(word.isalpha() and word.islower() for word in words)
    assert set(SHAPES) | set(COLORS) <= words
    assert len(words) < 50


def test_places_in_captions_are_true():
    rng = np.random.default_rng(7)
    places = {0.2: "left", 0.5: "middle", 0.8: "right"}
    for x, place in places.items():
        thing = Thing("ring", "orange", x, 0.7, 0.15)
        found = {scenes.captions(rng, Scene(PLAIN, (thing,)), thing) for _ in range(60)}
        named = {word for caption in found for word in places.values() if word in caption}
        assert named == {place}
        assert "an orange ring" in found


def test_captions_of_a_whole_scene_name_all_its_things():
    rng = np.random.default_rng(8)
    both = (Thing("cone", "pink", 0.2, 0.7, 0.15), Thing("cube", "black", 0.8, 0.7, 0.15))
    captions = {scenes.scene_caption(rng, Scene(PLAIN, both)) for _ in range(80)}
    assert all("pink cone" in caption and "black cube" in caption for caption in captions)
    assert len(captions) > 6
    assert scenes.scene_caption(rng, Scene(PLAIN, ())) in scenes.EMPTY_CAPTIONS


# --- holes ---


def test_a_hole_covers_the_thing_well_beyond_and_leaves_the_others():
    ratios = []
    for scene, thing, hole, *_ in drawn(200, seed=9):
        region = scenes.silhouette(thing)
        assert not (region & ~hole).any()
        assert not any((scenes.silhouette(other) & hole).any() for other in scene.things[1:])
        ratios.append(hole.sum() / region.sum())
    assert min(ratios) > 1.2
    assert np.median(ratios) > 2.5


def test_a_hole_tells_neither_shape_nor_colour():
    scene = Scene(PLAIN, (Thing("ball", "red", 0.45, 0.6, 0.2),))
    holes = []
    for shape in SHAPES:
        for color in COLORS:
            thing = replace(scene.things[0], shape=shape, color=color)
            holes.append(scenes.object_mask(np.random.default_rng(10), replace(scene, things=(thing,)), thing))
    assert all((hole == holes[0]).all() for hole in holes)


def test_random_holes_are_never_empty_and_of_every_kind():
    rng = np.random.default_rng(11)
    assert sum(MASK_KINDS.values()) == pytest.approx(1)
    assert set(MASK_KINDS) <= set(KINDS)
    shares = np.array([scenes.random_mask(rng).mean() for _ in range(600)])
    assert shares.min() > 0.005
    assert np.mean(shares == 1) == pytest.approx(MASK_KINDS["full"], abs=0.05)


def test_training_draws_the_holes_it_always_drew():
    """The shipped demo checkpoint was trained on these very holes."""
    rng = np.random.default_rng(21)
    holes = np.stack([scenes.random_mask(rng, 64) for _ in range(40)])
    assert hashlib.sha256(np.packbits(holes).tobytes()).hexdigest()[:16] == "6a4dc32580753691"


# --- the judge ---


def test_the_judge_is_right_about_renders():
    cases = ((judge(image, hole, empty), thing) for _, thing, hole, image, empty in drawn(200, seed=12))
    color, shape = right_share(cases)
    assert color >= 0.97
    assert shape >= 0.97


def test_the_judge_is_right_about_blurred_and_noisy_renders():
    rng = np.random.default_rng(13)
    color, shape = right_share(
        (judge(degraded(image, rng), hole, empty), thing) for _, thing, hole, image, empty in drawn(80, seed=13)
    )
    assert color >= 0.93
    assert shape >= 0.93


def test_the_judge_bears_a_repaint_in_another_tone():
    rng = np.random.default_rng(14)
    color, shape = right_share(
        (judge(np.clip(image + rng.uniform(-12, 12, 3), 0, 255).astype(np.uint8), hole, empty), thing)
        for _, thing, hole, image, empty in drawn(60, seed=14)
    )
    assert color >= 0.95
    assert shape >= 0.95


def test_the_judge_finds_nothing_in_empty_holes():
    rng = np.random.default_rng(15)
    verdicts = {judge(degraded(empty, rng), hole, empty) for _, _, hole, _, empty in drawn(100, seed=15)}
    assert verdicts == {Verdict(NONE, NONE)}


def test_the_judge_falls_to_chance_where_another_thing_was_painted():
    """Breaks what it judges: shapes and colours drawn anew, asked for by the old names."""
    rng = np.random.default_rng(16)
    cases = []
    for scene, thing, hole, _, empty in drawn(120, seed=16):
        swapped = replace(thing, color=str(rng.choice(list(COLORS))), shape=str(rng.choice(SHAPES)))
        image = scenes.render(replace(scene, things=(swapped, *scene.things[1:])))
        cases.append((judge(image, hole, empty), thing))
    color, shape = right_share(cases)
    assert color < 1 / len(COLORS) + 0.1
    assert shape < 1 / len(SHAPES) + 0.12


def test_the_judge_reports_the_colour_that_is_there():
    """An image whose channels are rotated keeps its shapes and loses its colours."""
    cases = []
    for _, thing, hole, image, empty in drawn(100, seed=17):
        if thing.color in {"red", "green", "blue"}:
            cases.append((judge(np.roll(image, 1, axis=-1), hole, np.roll(empty, 1, axis=-1)), thing))
    color, shape = right_share(cases)
    assert color < 0.05
    assert shape > 0.9
